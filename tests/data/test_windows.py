"""Windows for training and for scoring."""

import numpy as np
import pytest
import torch

from pytitans.data.text import Document
from pytitans.data.tokenizer import byte_tokenizer
from pytitans.data.windows import IGNORED, DrawnWindows, ScoredWindows, tokenize

EOS = 256


def token_text(*texts: str, length: int = 8):
    return tokenize(byte_tokenizer(), [Document(str(i), t) for i, t in enumerate(texts)], length)


def test_long_files_are_streams_and_short_ones_are_joined():
    text = token_text("a" * 20, "bcd", "ef", length=8)
    assert [stream.tolist() for stream in text.streams] == [
        [EOS, *b"a" * 20],
        [EOS, *b"bcd", EOS, *b"ef"],
    ]
    assert (text.bytes, text.tokens) == (25, 25)


def test_drawn_windows_lie_in_one_file():
    windows = DrawnWindows(token_text("a" * 30, "b" * 30), 8, 200, seed=0)
    seen = {tuple(set(window["input_ids"].tolist()) - {EOS}) for window in windows}
    assert seen == {(ord("a"),), (ord("b"),)}


def test_every_place_is_drawn():
    text = token_text("".join(map(chr, range(40))), "".join(map(chr, range(40, 60))))
    windows = DrawnWindows(text, 8, 2000, seed=0)
    starts = {tuple(windows[i]["input_ids"].tolist()) for i in range(2000)}
    assert len(starts) == (41 - 7) + (21 - 7)


def test_a_window_depends_on_seed_and_index_alone():
    text = token_text("".join(map(chr, range(100))))
    first, longer, other = (DrawnWindows(text, 8, n, seed=s) for n, s in ((5, 1), (9, 1), (5, 2)))
    same = [torch.equal(first[i]["input_ids"], longer[i]["input_ids"]) for i in (4, 0, 2)]
    assert all(same)
    assert any(not torch.equal(first[i]["input_ids"], other[i]["input_ids"]) for i in range(5))


def test_text_shorter_than_a_window_is_refused():
    with pytest.raises(ValueError, match="has 3 tokens, too few for a sequence of 8"):
        DrawnWindows(token_text("abc"), 8, 1, seed=0)


@pytest.mark.parametrize("stride", [None, 1, 3, 7])
@pytest.mark.parametrize("sizes", [(1,), (6,), (7,), (8,), (9,), (14, 15), (40, 2, 3, 1)])
def test_every_token_is_scored_once_after_its_true_past(sizes, stride):
    texts = [bytes(np.random.default_rng(n).integers(97, 123, n)).decode() for n in sizes]
    text = token_text(*texts)
    scored = []
    for window in ScoredWindows(text, 8, stride):
        ids, labels = window["input_ids"], window["labels"]
        assert labels[0] == IGNORED
        assert torch.equal(ids[labels != IGNORED], labels[labels != IGNORED])
        scored += labels[labels != IGNORED].tolist()
    assert bytes(scored).decode() == "".join(t for t in texts if len(t) >= 8) + "".join(
        t for t in texts if len(t) < 8
    )


def test_stride_must_fit_the_window():
    with pytest.raises(ValueError, match="stride=8 does not fit windows of 8"):
        ScoredWindows(token_text("abc"), 8, 8)
