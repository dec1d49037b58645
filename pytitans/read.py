"""Reading a text of any length into a memory: a stream of pieces, one state, nothing else kept.

Files are read block by block, so neither a text's size nor its number of files matters. Each token
but the very last is read, and scored on the way: `next_token` is known but not yet read, so that
whoever goes on, reading or writing, begins with it and has a prediction to begin from.
"""

import codecs
import lzma
import math
import os
import re
import signal
import sys
import threading
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from pytitans.cache import TitansCache, model_fingerprint
from pytitans.data.text import COMPRESSED, unreadable
from pytitans.data.tokenizer import encode, is_bytes

BLOCK = (
    4096  # tokens that are read at once; bytes of a block for each token of another tokenizer: 4
)
LOGITS = 2**22  # that are held at once
STDIN = "-"


class Block(NamedTuple):
    """A piece of the text: its ids, the UTF-8 bytes they stand for, and how much of the files on
    the disk has gone by."""

    ids: np.ndarray
    bytes: int
    place: int


@dataclass
class Reading:
    """A memory, and how far it has come in a text."""

    cache: TitansCache
    eos: int
    next_token: int | None = None  # known, not read yet
    files: list[str] = field(default_factory=list)
    tokens: int = 0  # of these files, the eos before each included
    bytes: int = 0
    nats: float = 0.0  # negative log-likelihood of all tokens but eos
    finished: bool = False

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan

    @torch.no_grad()
    def feed(self, model: PreTrainedModel, block: Block) -> None:
        """Reads the block, one token late."""
        known = [] if self.next_token is None else [self.next_token]
        ids = torch.from_numpy(np.concatenate([known, block.ids]).astype(np.int64))
        hidden = None
        if len(ids) > 1:
            now = ids[None, :-1].to(model.device)
            out = model.base_model(input_ids=now, cache=self.cache, use_cache=True)
            hidden = out.last_hidden_state[0]
        self.next_token = int(ids[-1])
        self.tokens += len(block.ids)
        self.bytes += block.bytes
        if hidden is not None:
            self.nats += self.score(model, hidden, ids[1:].to(model.device))

    def score(self, model: PreTrainedModel, hidden: Tensor, targets: Tensor) -> float:
        """Nats of the targets, but for eos; not all logits at once."""
        head = cast(nn.Module, model.get_output_embeddings())
        rows, nats = max(1, LOGITS // model.config.vocab_size), 0.0
        for h, y in zip(hidden.split(rows), targets.split(rows), strict=True):
            loss = nn.functional.cross_entropy(
                head(h).float(), y, ignore_index=self.eos, reduction="sum"
            )
            nats += loss.item()
        return nats

    def save(self, path: Path, model: PreTrainedModel, fingerprint: str) -> None:
        kept = ("next_token", "files", "tokens", "bytes", "nats", "finished")
        metadata = {"reading": {name: getattr(self, name) for name in kept}}
        self.cache.save(path, model, metadata=metadata, fingerprint=fingerprint)


def next_token_of(path: str | Path) -> int | None:
    """The token that a saved reading goes on with; None if the file is not of a reading."""
    return TitansCache.describe(path)["metadata"].get("reading", {}).get("next_token")


def resumed_memory(
    path: str | Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompt: str
) -> tuple[TitansCache, list[int]]:
    """What `generate` goes on from: the saved memory, and the ids of what follows its text."""
    ids = encode(tokenizer, prompt).tolist()
    known = next_token_of(path)
    ids = ids if known is None else [known, *ids]
    if not ids:
        raise ValueError(f"{path} does not say what comes next: give a --prompt")
    return TitansCache.load(path, model).as_start(), ids


def read(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    files: Sequence[str],
    memory: str | Path,
    *,
    memory_from: str | Path | None = None,
    resume: bool = False,
    save_minutes: float = 5.0,
    progress: bool = True,
) -> Reading:
    """Reads the files (`-`: standard input; .gz and .xz as they are) and saves the `memory`.

    memory_from: a memory to read on with. resume: go on where a reading of these files into
    `memory` was stopped, if it was. The memory is saved every save_minutes, at the end, before an
    error in a file is raised, and on Ctrl-C or SIGTERM, which end the reading: the rest is for
    `resume`.
    """
    memory = Path(memory)
    check(model, files, memory, memory_from, resume, save_minutes)
    fingerprint = model_fingerprint(model)
    start = memory if resume and memory.exists() else memory_from
    eos = cast(int, tokenizer.eos_token_id)
    reading = Reading(TitansCache(model.config.num_hidden_layers), eos, files=list(files))
    if start is not None:
        reading.cache = TitansCache.load(start, model, fingerprint=fingerprint)
        reading.next_token = next_token_of(start)
    if start == memory and resume:
        take_up(reading, memory)
    blocks = after(reading.tokens, text_blocks(files, tokenizer))
    begun, saved, before = time.monotonic(), time.monotonic(), reading.tokens
    size = sum(os.path.getsize(name) for name in files if name != STDIN)
    shown = "{l_bar}{bar}| {elapsed}<{remaining}{postfix}" if size else "{elapsed}{postfix}"
    bar = tqdm(total=size or None, bar_format=shown, disable=None if progress else True)
    try:
        with bar, interruptible(blocks) as blocks:
            for block in blocks:
                reading.feed(model, block)
                bar.update(block.place - bar.n)
                rate = (reading.tokens - before) / (time.monotonic() - begun)
                bar.set_postfix_str(
                    f"{reading.tokens:,} tokens, {rate:,.0f} tokens/s, "
                    f"{resident_mb():,.0f} MB, {reading.bits_per_byte:.3f} bits/byte",
                    refresh=False,
                )
                if time.monotonic() - saved > 60 * save_minutes:
                    reading.save(memory, model, fingerprint)
                    saved = time.monotonic()
            reading.finished = not blocks.interrupted
    except Exception:  # what was read is not lost; a second Ctrl-C leaves what was saved last
        reading.save(memory, model, fingerprint)
        raise
    reading.save(memory, model, fingerprint)
    return reading


def check(model, files, memory: Path, memory_from, resume: bool, save_minutes: float) -> None:
    """All that can be known to fail, before any work."""
    if model.config.model_type != "titans":
        raise ValueError(
            f"a {model.config.model_type} model has no memory to read into: train one with "
            "--variant mac, mag, mal or lmm"
        )
    if not files:
        raise ValueError(f"no text: give files, or {STDIN} for standard input")
    for name in files:
        if name != STDIN and (not Path(name).exists() or Path(name).is_dir()):
            raise ValueError(f"{name!r} is no file: give text files, plain, .gz or .xz")
    if not memory.absolute().parent.is_dir():
        raise ValueError(f"there is no folder {str(memory.parent)!r} to save {memory.name} in")
    goes_on = resume or (
        memory_from is not None and memory.absolute() == Path(memory_from).absolute()
    )
    if memory.exists() and not goes_on:
        raise ValueError(
            f"{str(memory)!r} exists: --resume goes on with a reading that was stopped, "
            f"--memory-from {memory} reads more into it, another name leaves it as it is"
        )
    if not save_minutes > 0:
        raise ValueError(f"save_minutes={save_minutes} must be above 0")


def take_up(reading: Reading, memory: Path) -> None:
    """Where the stopped reading of the same files was."""
    past = TitansCache.describe(memory)["metadata"].get("reading", {})
    if past.get("files") != reading.files:
        raise ValueError(
            f"{str(memory)!r} was made from {' '.join(past.get('files', ['no file']))}: resume "
            f"with the same files, or read more into it with --memory-from {memory}"
        )
    for name in ("tokens", "bytes", "nats"):
        setattr(reading, name, past[name])


def after(tokens: int, blocks: Iterable[Block]) -> Iterator[Block]:
    """The blocks less their first `tokens` tokens."""
    for block in blocks:
        if tokens >= len(block.ids):
            tokens -= len(block.ids)
        else:
            left = round(block.bytes * (1 - tokens / len(block.ids)))
            yield block._replace(ids=block.ids[tokens:], bytes=left)
            tokens = 0


def text_blocks(files: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> Iterator[Block]:
    """The files' ids, an eos before each, as in training. Small files share a block."""
    eos = cast(int, tokenizer.eos_token_id)
    ids: list[np.ndarray] = []
    count = size = place = done = 0
    for name in files:
        ids.append(np.array([eos]))
        for found in file_blocks(name, tokenizer):
            ids.append(found.ids)
            place, size, count = done + found.place, size + found.bytes, count + len(found.ids)
            if count >= BLOCK:
                yield Block(np.concatenate(ids), size, place)
                ids, size, count = [], 0, 0
        done = place
    if ids:
        yield Block(np.concatenate(ids), size, place)


def file_blocks(name: str, tokenizer: PreTrainedTokenizerFast) -> Iterator[Block]:
    """One file's ids. A byte tokenizer takes any bytes; for others text is cut before a word."""
    cut = byte_blocks if is_bytes(tokenizer) else word_blocks
    try:
        with opened(name) as (file, raw):
            read = 0
            for ids, size in cut(file, tokenizer):
                read += size
                yield Block(ids, size, read if raw is None else raw.tell())
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name} is not UTF-8 text ({error.reason}): convert it, or use a byte model"
        ) from error
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise unreadable(name, error) from error


@contextmanager
def opened(name: str) -> Iterator[tuple[IO[bytes], IO[bytes] | None]]:
    """The text's bytes, and the file on the disk they come from, if any."""
    if name == STDIN:
        yield sys.stdin.buffer, None
        return
    with open(name, "rb") as raw:
        disk = raw if raw.seekable() else None  # a pipe has no place
        unpack = COMPRESSED.get(Path(name).suffix)
        if unpack is None:
            yield raw, disk
        else:
            with unpack(raw) as file:
                yield cast(IO[bytes], file), disk


def byte_blocks(file: IO[bytes], tokenizer) -> Iterator[tuple[np.ndarray, int]]:
    while data := file.read(BLOCK):
        yield np.frombuffer(data, dtype=np.uint8), len(data)


def word_blocks(file: IO[bytes], tokenizer) -> Iterator[tuple[np.ndarray, int]]:
    """Cut after a line, else before a word's space: tokenizers do not join the two sides."""
    decode = codecs.getincrementaldecoder("utf-8")().decode
    left = ""
    while data := file.read(4 * BLOCK):
        text = left + decode(data)
        lines = [x.end() for x in re.finditer(r"\n(?=\S)", text)]
        at = (lines or [x.start() for x in re.finditer(r" (?=\S)", text)] or [0])[-1]
        if at:
            yield encode(tokenizer, text[:at]), len(text[:at].encode())
        left = text[at:]
    left += decode(b"", final=True)
    if left:
        yield encode(tokenizer, left), len(left.encode())


class Interruptible:
    """An iterator that a signal ends: at once while it waits for more, else after the block at
    hand. A second signal is an ordinary Ctrl-C."""

    def __init__(self, blocks: Iterator[Block]):
        self.blocks, self.interrupted, self.waiting = blocks, False, False

    def __iter__(self) -> Iterator[Block]:
        while not self.interrupted:
            self.waiting = True
            try:
                block = next(self.blocks, None)
            except KeyboardInterrupt:
                return
            finally:
                self.waiting = False
            if block is None:
                return
            yield block

    def asked(self, *_: Any) -> None:
        again, self.interrupted = self.interrupted, True
        if self.waiting or again:
            raise KeyboardInterrupt


@contextmanager
def interruptible(blocks: Iterator[Block]) -> Iterator[Interruptible]:
    """Ends them on Ctrl-C and SIGTERM; not in another thread than the main one, which alone gets
    signals."""
    ended = Interruptible(blocks)
    main = threading.current_thread() is threading.main_thread()
    kinds = (signal.SIGINT, signal.SIGTERM) if main else ()
    before = {kind: signal.signal(kind, ended.asked) for kind in kinds}
    try:
        yield ended
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def resident_mb() -> float:
    """Memory of this process now; where the system does not say, at its peak."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    except OSError:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**20 if sys.platform == "darwin" else 2**10)
