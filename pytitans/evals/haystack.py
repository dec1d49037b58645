"""Text to hide things in: ids of any number of tokens, and where its sentences begin."""

import re
from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from pytitans.data.text import TextData, load_text
from pytitans.data.tokenizer import encode, is_bytes

PYTHON = "python"  # the documentation that every Python brings along
# A sentence ends with . ! or ?, maybe quotes or brackets, one space, and no small letter after it.
SENTENCE = re.compile(r"[.!?]['\"\u201d\u2019)\]]*(?= [^a-z ])")


class Hay(NamedTuple):
    """ids [n], and the places in it, ascending, before which something can be put."""

    ids: np.ndarray
    places: np.ndarray


class Haystack:
    """Prose, its white space made single spaces, encoded once.

    Args:
        files: as `titans train --data` takes them; `python` is the language reference that Python's
            own `help()` shows, 0.7 MB of English.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, files: Sequence[str] = (PYTHON,)):
        self.tokenizer, self.files = tokenizer, tuple(files)

    @cached_property
    def texts(self) -> list[str]:
        if self.files == (PYTHON,):
            return [" ".join(python_documentation().split())]
        found = load_text(TextData(files=self.files), ("all",))["all"]
        return [text for document in found if (text := " ".join(document.text.split()))]

    @cached_property
    def hay(self) -> Hay:
        """All of it."""
        parts, places, size = [], [], 0
        for text in self.texts:
            ends = [match.end() for match in SENTENCE.finditer(text)]
            ids, found = encode_with_places(self.tokenizer, text + " ", [*ends, len(text)])
            parts.append(ids)
            places.append(found + size)
            size += len(ids)
        ids = np.concatenate(parts)
        if not size:
            raise ValueError(f"the text is empty ({', '.join(self.files)}): give other --data")
        places = np.unique(np.concatenate(places))
        return Hay(ids, places[places < size])

    def cut(self, rng: np.random.Generator, length: int) -> Hay:
        """`length` tokens from the start of a sentence on, going round as often as it takes."""
        ids, places = self.hay
        start = int(rng.choice(places)) if len(places) else 0
        rounds = -(-(start + length) // len(ids))
        if rounds == 1:
            first, last = np.searchsorted(places, (start, start + length))
            return Hay(ids[start : start + length], places[first:last] - start)
        parts = [
            ids[start:],
            *[ids] * (rounds - 2),
            ids[: start + length - (rounds - 1) * len(ids)],
        ]
        around = np.concatenate([places + turn * len(ids) - start for turn in range(rounds)])
        return Hay(np.concatenate(parts), around[(around >= 0) & (around < length)])

    def sentences(self, rng: np.random.Generator, length: int) -> list[np.ndarray]:
        """`length` tokens as the sentences they are made of, the last one cut."""
        hay = self.cut(rng, length)
        inner = hay.places[hay.places > 0]
        return np.split(hay.ids, inner)


def python_documentation() -> str:
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def encode_with_places(
    tokenizer: PreTrainedTokenizerFast, text: str, places: Sequence[int] | np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The text's ids, and the number of the token that each of the places (characters) begins."""
    if is_bytes(tokenizer):
        data = text.encode()
        ids = np.frombuffer(data, dtype=np.uint8)
        if len(data) == len(text):
            return ids, np.asarray(places, dtype=np.int64)
        starts = np.flatnonzero((ids & 0xC0) != 0x80)  # first byte of each character
        return ids, np.append(starts, len(ids))[np.asarray(places, dtype=np.int64)]
    found = tokenizer(
        text,
        add_special_tokens=False,
        split_special_tokens=True,
        return_offsets_mapping=True,
        verbose=False,
    )
    starts = np.asarray([start for start, _ in found["offset_mapping"]], dtype=np.int64)
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    return np.asarray(found["input_ids"], dtype=dtype), np.searchsorted(starts, places)


def continuation(tokenizer: PreTrainedTokenizerFast, text: str) -> np.ndarray:
    """The ids of a text that goes on after another: without the space that some tokenizers put
    before the first word."""
    if is_bytes(tokenizer):
        return np.frombuffer(text.encode(), dtype=np.uint8)
    anchor, both = encode(tokenizer, "."), encode(tokenizer, "." + text)
    if len(both) > len(anchor) and (both[: len(anchor)] == anchor).all():
        return both[len(anchor) :]
    return encode(tokenizer, text)


def start_of(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """The token that begins every text, if there is one."""
    bos = tokenizer.bos_token_id
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    return np.array([] if bos is None else [bos], dtype=dtype)
