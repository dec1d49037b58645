"""Needles in a haystack: one sentence, or several, to be found again in a long text.

Hsieh et al., "RULER: What's the Real Context Size of Your Long-Context Language Models?",
arXiv 2404.06654, tables 1 and 5: S-NIAH-1 to 3, and several needles (MK-, MV-, MQ-NIAH).

    niah_single_1     a word's 7-digit number in noise, five sentences that repeat (passkey)
    niah_single_2     the same in prose
    niah_single_3     a word's UUID in prose
    niah_multikey_1   four words' numbers in prose, one of them asked
    niah_multikey_2   a text of nothing but such sentences, one of them asked
    niah_multikey_3   the same with UUIDs for words and numbers
    niah_multivalue   one word's four numbers in prose, all asked
    niah_multiquery   four words' numbers in prose, all asked
    passkey           five digits in noise, briefly asked: Mohtashami and Jaggi, arXiv 2305.16300

Prompt: RULER's, word for word, its answer prefix included. Metric: an answer is right if greedy
decoding writes it; `accuracy` is the share of right answers (RULER's string_match_all), `exact` the
share of examples with all of them right.

Where this differs from RULER:
- An example has exactly the tokens asked for, answer included: the haystack ends in mid-sentence.
  RULER leaves 128 tokens for the answer and rounds down.
- Prose is whatever files are given (RULER: Paul Graham's essays), by default Python's
  documentation; each example begins at another sentence of it, RULER's all at the first. It goes
  round if short.
- Sentences end where a full stop, question or exclamation mark is followed by a space and no small
  letter; RULER asks NLTK.
- Words are an adjective and a noun of our own lists (192,699, RULER: wonderwords). All keys of an
  example differ; RULER's may not.
- Depth is any percentage, of tokens; RULER draws among 40, of sentences. With a depth given, the
  needle asked first stands there and the others anywhere.
- The answer is read, not written: several values come in the order in which the text tells (of
  queries: asks for) them, as "a, b, c, and d", each judged given the ones before it and the comma.
  RULER takes any order.
- passkey has neither the original's introduction nor the repetition of the key, and its noise
  begins, and its needle stands, anywhere, in mid-sentence too: it fits in 100 bytes, to begin
  training with.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from transformers import PreTrainedTokenizerFast

from pytitans.evals.haystack import (
    PYTHON,
    Hay,
    Haystack,
    continuation,
    encode_with_places,
    start_of,
)
from pytitans.evals.task import Example, Task, check_depth
from pytitans.evals.words import WORDS, draw_words, word

NOISE = (
    "The grass is green.", " The sky is blue.", " The sun is yellow.", " Here we go.",
    " There and back again.",
)  # fmt: skip
INTRO = (
    "{Some} special magic {values} {are} hidden within the following text. Make sure to memorize "
    "it. I will quiz you about the {values} afterwards.\n"
)
NEEDLE = "One of the special magic {values} for {key} is: {value}."
QUESTION = (
    "\nWhat {are_all} the special magic {values} for {query} mentioned in the provided text?"
    " The special magic {values} for {query} mentioned in the provided text {are}"
)
SHORT_NEEDLE = " The pass key is {value}. Remember it."
SHORT_QUESTION = " What is the pass key? The pass key is"


@dataclass(frozen=True, kw_only=True)
class Kind:
    """keys: how many there are; values: of each; queries: how many of them are asked for."""

    haystack: Literal["noise", "prose", "needles"]
    key: Literal["words", "uuids"] = "words"
    value: Literal["numbers", "uuids"] = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1


KINDS = {
    "niah_single_1": Kind(haystack="noise"),
    "niah_single_2": Kind(haystack="prose"),
    "niah_single_3": Kind(haystack="prose", value="uuids"),
    "niah_multikey_1": Kind(haystack="prose", keys=4),
    "niah_multikey_2": Kind(haystack="needles"),
    "niah_multikey_3": Kind(haystack="needles", key="uuids", value="uuids"),
    "niah_multivalue": Kind(haystack="prose", values=4),
    "niah_multiquery": Kind(haystack="prose", keys=4, queries=4),
}
DRAW: dict[str, Callable[[np.random.Generator, int], list[str]]] = {
    "words": draw_words,
    "numbers": lambda rng, count: [str(x) for x in rng.integers(10**6, 10**7, count)],
    "uuids": lambda rng, count: draw_uuids(rng, count),
}


class Niah(Task):
    """One of RULER's needle tasks.

    Args:
        name: see above.
        files: the prose, as `titans train --data` takes it.
    """

    depths = (0, 25, 50, 75, 100)

    def __init__(
        self, name: str, tokenizer: PreTrainedTokenizerFast, files: Sequence[str] = (PYTHON,)
    ):
        self.name, self.kind, self.tokenizer = name, KINDS[name], tokenizer
        self.prose = Haystack(tokenizer, files)
        if self.kind.values * self.kind.queries > 1:  # all are asked for: there is no one place
            self.depths = (None,)

    @cached_property
    def noise(self) -> np.ndarray:
        return continuation(self.tokenizer, "".join(NOISE) + "\n")

    def draw(self, rng, index, length, depth) -> Example:
        check_depth(self, depth)
        kind, encode = self.kind, lambda text: continuation(self.tokenizer, text)
        several = kind.queries * kind.values > 1
        kinds = kind.value if several else kind.value[:-1]
        keys = DRAW[kind.key](rng, kind.keys)
        values = [DRAW[kind.value](rng, kind.values) for _ in keys]
        separator = " {}" if kind.haystack == "prose" else "{}\n"
        needles = [
            encode(separator.format(NEEDLE.format(values=kind.value, key=key, value=value)))
            for key, several_values in zip(keys, values, strict=True)
            for value in several_values
        ]
        asked = range(kind.queries)  # keys and places are in random order: the first ones will do
        verb = {"are_all": "are all", "are": "are"} if several else {"are_all": "is", "are": "is"}
        query = listed([keys[i] for i in asked])
        question = QUESTION.format(values=kinds, query=query, **verb)
        told = [f" {value}" for i in asked for value in values[i]]
        joints = ["", *[","] * (len(told) - 2), ", and"][: len(told)]
        answers = [encode(x) for pair in zip(joints, told, strict=True) for x in pair]
        intro = INTRO.format(Some="Some" if several else "A", values=kinds, are=verb["are"])
        before = [start_of(self.tokenizer), encode(intro)]
        after = [encode(question), *answers]
        room = length - sum(len(piece) for piece in (*before, *after, *needles))
        check_room(self.name, length, room)
        hay = self.hay(rng, room, keys)
        places = rng.uniform(0, 100, len(needles))
        if depth is not None:
            places[0] = depth
        if kind.values > 1:
            places.sort()  # a word's values are asked for in the text's order
        context = insert(hay, needles, places)
        pieces = [*before, *context, *after]
        return Example.of_pieces(pieces, range(len(pieces) - len(answers) + 1, len(pieces), 2))

    def hay(self, rng: np.random.Generator, length: int, keys: Sequence[str]) -> Hay:
        if self.kind.haystack == "prose":
            return self.prose.cut(rng, length)
        if self.kind.haystack == "noise":
            return repeated(self.noise, np.zeros(1, dtype=np.int64), length)
        return self.other_needles(rng, length, keys)

    def other_needles(self, rng: np.random.Generator, length: int, keys: Sequence[str]) -> Hay:
        """Lines that look like the needle, of other keys."""
        lines: list[str] = []
        ids, places = np.zeros(0), np.zeros(0)
        each = len(continuation(self.tokenizer, self.line(["key-word"], ["1234567"])[0]))
        while len(ids) < length:
            count = 1 + (length - len(ids)) // each
            found = (
                DRAW["uuids"](rng, count) if self.kind.key == "uuids" else other_words(rng, count)
            )
            found = [key for key in found if key not in keys]
            lines += self.line(found, DRAW[self.kind.value](rng, len(found)))
            starts = np.cumsum([0, *[len(line) for line in lines]])
            ids, places = encode_with_places(self.tokenizer, "".join(lines), starts)
        return Hay(ids[:length], places[places < length])

    def line(self, keys: list[str], values: list[str]) -> list[str]:
        template = NEEDLE.replace("{values}", self.kind.value) + "\n"
        return [template.format(key=k, value=v) for k, v in zip(keys, values, strict=True)]


class Passkey(Task):
    """Digits in noise. Names no key and has no introduction, so that training can begin short."""

    name = "passkey"
    depths = (0, 25, 50, 75, 100)

    def __init__(self, tokenizer: PreTrainedTokenizerFast, digits: int = 5):
        self.tokenizer, self.digits = tokenizer, digits
        self.noise = continuation(tokenizer, " " + "".join(NOISE))

    def draw(self, rng, index, length, depth) -> Example:
        check_depth(self, depth)
        key = f"{int(rng.integers(10**self.digits)):0{self.digits}d}"
        needle = continuation(self.tokenizer, SHORT_NEEDLE.format(value=key))
        question = continuation(self.tokenizer, SHORT_QUESTION)
        answer = continuation(self.tokenizer, f" {key}")
        start = start_of(self.tokenizer)
        room = length - sum(len(piece) for piece in (start, needle, question, answer))
        check_room(self.name, length, room)
        shift = int(rng.integers(len(self.noise)))
        noise = turning(self.noise, shift, room)
        place = int(rng.integers(room + 1)) if depth is None else round(depth / 100 * room)
        pieces = [start, noise[:place], needle, noise[place:], question, answer]
        return Example.of_pieces(pieces, [len(pieces) - 1])


def draw_uuids(rng: np.random.Generator, count: int) -> list[str]:
    """Of version 4, as uuid.uuid4 writes them."""
    raw = np.frombuffer(rng.bytes(16 * count), dtype=np.uint8).reshape(count, 16).copy()
    raw[:, 6] = raw[:, 6] & 0x0F | 0x40
    raw[:, 8] = raw[:, 8] & 0x3F | 0x80
    digits = raw.tobytes().hex()
    rows = (digits[i : i + 32] for i in range(0, len(digits), 32))
    return [f"{x[:8]}-{x[8:12]}-{x[12:16]}-{x[16:20]}-{x[20:]}" for x in rows]


def other_words(rng: np.random.Generator, count: int) -> list[str]:
    return [word(number) for number in rng.integers(WORDS, size=count)]


def repeated(unit: np.ndarray, places: np.ndarray, length: int) -> Hay:
    """`length` tokens of the unit again and again, and its places in each."""
    turns = -(-length // len(unit))
    every = (np.arange(turns)[:, None] * len(unit) + places).ravel()
    return Hay(np.tile(unit, turns)[:length], every[every < length])


def turning(unit: np.ndarray, start: int, length: int) -> np.ndarray:
    """`length` tokens of the unit again and again, from its token `start` on."""
    return np.resize(np.roll(unit, -start), length)


def insert(hay: Hay, needles: Sequence[np.ndarray], depths: Sequence[float] | np.ndarray):
    """The hay in pieces, with each needle at the place nearest to its depth, or at the end."""
    length = len(hay.ids)
    places = np.append(hay.places, length)
    wanted = np.asarray(depths) / 100 * length
    after = np.searchsorted(places, wanted).clip(max=len(places) - 1)
    before = (after - 1).clip(min=0)
    nearer = np.where(wanted - places[before] < places[after] - wanted, before, after)
    pieces, done = [], 0
    for number in np.argsort(places[nearer], kind="stable"):
        place = int(places[nearer[number]])
        pieces += [hay.ids[done:place], needles[number]]
        done = place
    return [*pieces, hay.ids[done:]]


def listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + ", and " + words[-1]


def check_room(name: str, length: int, room: int) -> None:
    if room < 0:
        raise ValueError(
            f"length={length} is too short for {name}: it takes {length - room} or more"
        )
