"""Needles: examples are what RULER says, of exactly the length asked for, the same for a seed."""

import re

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pytitans.data.tokenizer import byte_tokenizer
from pytitans.data.windows import IGNORED
from pytitans.evals import load_task, niah
from pytitans.evals.niah import KINDS
from pytitans.evals.words import ADJECTIVES, NOUNS

BYTES = byte_tokenizer()
PROSE = " ".join(
    f"The {noun} was {adjective}, and it was seen. Did anybody care? No!"
    for noun, adjective in zip(NOUNS, ADJECTIVES, strict=False)
)
NEEDLE = re.compile(r"One of the special magic (numbers|uuids) for ([\w-]+) is: ([\w-]+)\.")
UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"


@pytest.fixture(scope="module")
def prose(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text(PROSE)
    return str(path)


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    """A small byte-level BPE, whose tokens are of several bytes."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([PROSE], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="<s>")


def text_of(ids, tokenizer=BYTES) -> str:
    return tokenizer.decode(np.asarray(ids).tolist(), skip_special_tokens=True)


def answers_of(example, tokenizer=BYTES) -> list[str]:
    numbers = range(example.answers)
    return [text_of(example.expected[example.answer == i], tokenizer).strip() for i in numbers]


@pytest.mark.parametrize("name", [*KINDS, "passkey"])
@pytest.mark.parametrize("which", ["bytes", "words"])
def test_examples_are_well_formed(name, which, prose, words):
    tokenizer = BYTES if which == "bytes" else words
    task = load_task(name, tokenizer, files=[prose])
    for index in range(3):
        example = task.example(index, length=1500, seed=5)
        text = text_of(example.ids, tokenizer)
        assert len(example.ids) == 1500
        assert (example.ids[example.at + 1] == example.expected).all()
        assert text.endswith(answers_of(example, tokenizer)[-1])
        for answer in answers_of(example, tokenizer):
            assert text.count(answer) == 2  # told once, asked once


@pytest.mark.parametrize("name", KINDS)
def test_the_answer_is_the_asked_keys_value(name, prose):
    kind, task = KINDS[name], load_task(name, BYTES, files=[prose])
    example = task.example(0, length=3000)
    text, question = text_of(example.ids).rsplit("\nWhat ", 1)
    told: dict[str, list[str]] = {}
    for _, key, value in NEEDLE.findall(text):
        told.setdefault(key, []).append(value)
    asked = re.search(r"numbers?|uuids?", question)
    assert asked is not None
    query = question.split(f"{asked[0]} for ")[1].split(" mentioned")[0]
    keys = query.replace("and ", "").split(", ")
    assert answers_of(example) == [value for key in keys for value in told[key]]
    assert len(keys) == kind.queries
    if kind.haystack != "needles":
        assert len(told) == kind.keys
    value = {"numbers": r"[1-9]\d{6}", "uuids": UUID}[kind.value]
    assert all(re.fullmatch(value, x) for x in answers_of(example))
    if kind.key == "uuids":
        assert all(re.fullmatch(UUID, key) for key in keys)


def test_the_prompt_is_rulers():
    task = load_task("niah_single_1", BYTES)
    text = text_of(task.example(0, length=600, depth=0).ids)
    key, value = NEEDLE.findall(text)[0][1:]
    assert text.startswith(
        "A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards.\n"
        f"One of the special magic numbers for {key} is: {value}.\n"
        "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
    )
    assert text.endswith(
        f"\nWhat is the special magic number for {key} mentioned in the provided text? "
        f"The special magic number for {key} mentioned in the provided text is {value}"
    )


@pytest.mark.parametrize("name", ["passkey", "niah_single_1", "niah_single_2", "niah_multikey_2"])
def test_depth_is_where_the_needle_is(name, prose):
    task, places = load_task(name, BYTES, files=[prose]), []
    for depth in (0, 20, 50, 90, 100):
        text = text_of(task.example(1, length=20_000, depth=depth).ids)
        value = text.rsplit(" ", 1)[1]
        places.append(100 * text.index(value) / 20_000)
    assert places == pytest.approx([0, 20, 50, 90, 100], abs=2.5)


def test_needles_stand_between_sentences(prose):
    task = load_task("niah_single_2", BYTES, files=[prose])
    for index in range(20):
        text = text_of(task.example(index, length=2000, depth=50).ids)
        before, after = NEEDLE.sub("#", text).split("#")
        assert before.endswith((". ", "? ", "! ")) and re.match(r" [A-Z]", after)


def test_prose_goes_round(prose):
    task = load_task("niah_single_2", BYTES, files=[prose])
    text = text_of(task.example(0, length=4 * len(PROSE)).ids)
    assert text.count("The acorn was able, and it was seen.") >= 3


def test_seed_index_length_and_depth_decide():
    task = load_task("niah_single_1", BYTES)
    first = task.example(3, length=512, depth=25, seed=1)
    again = load_task("niah_single_1", BYTES).example(3, length=512, depth=25, seed=1)
    assert (first.ids == again.ids).all()
    others = [{"seed": 2}, {"depth": 50}, {"length": 513}]
    for change in others:
        other = task.example(3, **{"length": 512, "depth": 25, "seed": 1, **change})
        assert answers_of(other) != answers_of(first)
    assert answers_of(task.example(4, length=512, depth=25, seed=1)) != answers_of(first)


def test_batch_is_its_examples():
    task = load_task("passkey", BYTES)
    ids, targets = task.batch(4, length=300, seed=1, first=2)
    for row, example in enumerate(task.examples(4, length=300, seed=1, first=2)):
        assert (ids[row].numpy() == example.ids).all()
        assert (targets[row, example.at].numpy() == example.expected).all()
        assert int((targets[row] != IGNORED).sum()) == len(example.at)
    assert (ids[:, 1:][targets[:, :-1] != IGNORED] == targets[targets != IGNORED]).all()


def test_keys_of_an_example_differ(prose):
    for name in ("niah_multikey_1", "niah_multikey_2"):
        task = load_task(name, BYTES, files=[prose])
        for index in range(20):
            example = task.example(index, length=5000)
            asked = text_of(example.ids).rsplit(" for ", 1)[1].split()[0]
            keys = [key for _, key, _ in NEEDLE.findall(text_of(example.ids))]
            assert keys.count(asked) == 1


def test_lines_around_the_needle_never_have_its_key(monkeypatch):
    monkeypatch.setitem(niah.DRAW, "words", lambda rng, count: ["able-acorn"])
    monkeypatch.setattr(niah, "other_words", lambda rng, n: (["big-tree", "able-acorn"] * n)[:n])
    text = text_of(load_task("niah_multikey_2", BYTES).example(0, length=3000).ids)
    assert [key for _, key, _ in NEEDLE.findall(text)].count("able-acorn") == 1


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"takes 3\d\d or more"):
        load_task("niah_single_1", BYTES).example(0, length=200)
    with pytest.raises(ValueError, match="no depth"):
        load_task("niah_multivalue", BYTES).example(0, length=2000, depth=50)
    with pytest.raises(ValueError, match="depth=101"):
        load_task("passkey", BYTES).example(0, length=500, depth=101)
    with pytest.raises(ValueError, match="no task"):
        load_task("niah", BYTES)
