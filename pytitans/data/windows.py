"""Token arrays and the windows cut from them, for training (drawn) and for scoring (in order).

A file with at least a window's tokens is a *stream* of its own; shorter files are joined into one
stream. Every file begins with eos, so the first token of a text has something to follow, and the
end of one text is what a model learns to end with. A window never leaves its stream.
"""

from collections.abc import Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from pytitans.data.text import Document
from pytitans.data.tokenizer import encode

IGNORED = -100  # a label that is not scored
LONGEST = 64  # steps through which a memory is carried


class TokenText(NamedTuple):
    """A text as ids: its streams, and the UTF-8 bytes and tokens (without eos) it is made of."""

    streams: list[np.ndarray]
    eos: int
    bytes: int
    tokens: int


def tokenize(
    tokenizer: PreTrainedTokenizerFast, documents: Sequence[Document], length: int
) -> TokenText:
    """The documents' ids, in streams for windows of `length` tokens."""
    eos = cast(int, tokenizer.eos_token_id)
    long, short, size, count = [], [], 0, 0
    for document in documents:
        ids = encode(tokenizer, document.text)
        size, count = size + len(document.text.encode()), count + len(ids)
        (long if len(ids) >= length else short).append(np.insert(ids, 0, eos))
    streams = [*long, np.concatenate(short)] if short else long
    return TokenText(streams, eos, size, count)


class DrawnWindows(Dataset):
    """`count` windows of `length` tokens, the i-th drawn by (seed, i) alone among all places.

    A run that stops and resumes, or that reads with other workers, sees the same windows.
    Raises ValueError if the text does not fill one.
    """

    def __init__(self, text: TokenText, length: int, count: int, seed: int):
        self.streams = [stream for stream in text.streams if len(stream) >= length]
        if not self.streams:
            raise ValueError(
                f"the training text has {text.tokens} tokens, too few for a sequence of {length}: "
                "give more text by --data, or a smaller --data.sequence_length"
            )
        self.places = np.cumsum([len(stream) - length + 1 for stream in self.streams])
        self.length, self.count, self.seed = length, count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self.count:
            raise IndexError(f"window {index} of {self.count}")
        draw = np.random.Generator(np.random.Philox(key=[self.seed, index]))
        place = int(draw.integers(self.places[-1]))
        stream = int(np.searchsorted(self.places, place, side="right"))
        start = place - (int(self.places[stream - 1]) if stream else 0)
        ids = to_tensor(self.streams[stream][start : start + self.length])
        return {"input_ids": ids, "labels": ids}


class CarriedWindows(Dataset):
    """The same windows, and of each whether the memory before it is to be forgotten ("fresh").

    The memory is carried for stretches of 1 to `LONGEST` steps of `rows` windows, short and long
    ones alike often. A stretch's windows are of different places: read on in one place, they taught
    less (docs/log.md).
    """

    def __init__(self, windows: DrawnWindows, rows: int):
        self.windows, self.rows = windows, rows
        steps = max(1, len(windows) // rows)
        draw = np.random.default_rng(windows.seed)
        stretches = np.exp(draw.uniform(0, np.log(LONGEST + 1), steps)).astype(int)
        self.first_steps = {0, *np.cumsum(stretches).tolist()}

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        fresh = index // self.rows in self.first_steps
        return self.windows[index] | {"fresh": torch.tensor(fresh)}


class ScoredWindows(Dataset):
    """Windows in order, in which every token of the text is a scored label exactly once.

    A window begins `stride` tokens after the one before and scores the tokens that it adds; the
    default, `length - 1`, is the longest: one token of a window is context alone. The eos between
    files is context and not scored. The last window of a stream is filled up with eos.
    """

    def __init__(self, text: TokenText, length: int, stride: int | None = None):
        self.stride = length - 1 if stride is None else stride
        if not 1 <= self.stride < length:
            raise ValueError(f"stride={stride} does not fit windows of {length}: 1 to {length - 1}")
        self.text, self.length = text, length
        self.starts = [
            (stream, start)
            for stream, ids in enumerate(text.streams)
            for start in range(0, max(len(ids) - length, 0) + self.stride, self.stride)
        ]

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        stream, start = self.starts[index]
        ids = to_tensor(self.text.streams[stream][start : start + self.length])
        labels = ids.masked_fill(ids == self.text.eos, IGNORED)
        labels[: 1 if start == 0 else self.length - self.stride] = IGNORED
        missing = (0, self.length - len(ids))
        return {
            "input_ids": torch.nn.functional.pad(ids, missing, value=self.text.eos),
            "labels": torch.nn.functional.pad(labels, missing, value=IGNORED),
        }


def to_tensor(ids: np.ndarray) -> Tensor:
    return torch.from_numpy(ids.astype(np.int64))
