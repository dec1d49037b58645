"""DNA as ids: the nucleotide tokenizer, the other strand, FASTA files of any length.

    A 0   C 1   G 2   T 3   N 4   <|eos|> 5   <|pad|> 6

Lower case, by which genomes mark repeats, is read as upper case. IUPAC's letters for bases that are
not known for sure (R, Y, S, ...) are read as N. Any other letter is an error that says where.
"""

import lzma
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple, cast

import numpy as np
from transformers import PreTrainedTokenizerFast

from pytitans.data.text import COMPRESSED, unreadable

LETTERS = "ACGTN"
AMBIGUOUS = "RYSWKMBDHV"
EOS, PAD = "<|eos|>", "<|pad|>"
UNKNOWN_ID, EOS_ID, PAD_ID = 4, 5, 6
BLOCK = 2**16  # bases that are read at once
LINE = 2**16  # bytes of a line that are; a record may be one line
FASTA = {".fa", ".fasta", ".fna", ".ffn"}


def id_table() -> bytes:
    """Byte -> id, for `bytes.translate`."""
    table = bytearray([UNKNOWN_ID]) * 256
    for letters in (LETTERS, LETTERS.lower()):
        for number, letter in enumerate(letters):
            table[ord(letter)] = number
    return bytes(table)


IDS = id_table()
VALID = (LETTERS + AMBIGUOUS + (LETTERS + AMBIGUOUS).lower()).encode()
COMPLEMENT = np.array([3, 2, 1, 0, UNKNOWN_ID, EOS_ID, PAD_ID], dtype=np.uint8)


def nucleotide_tokenizer() -> PreTrainedTokenizerFast:
    """One token per base: 7 ids. Pads on the right, which is exact for every causal model."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
    from tokenizers import pre_tokenizers as splits

    core = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(LETTERS)}))
    core.normalizer = normalizers.Sequence(  # type: ignore - as its documentation has it
        [
            *[normalizers.Replace(x.lower(), x) for x in LETTERS],
            normalizers.Replace(Regex(f"[{AMBIGUOUS}{AMBIGUOUS.lower()}]"), "N"),
        ]
    )
    core.pre_tokenizer = splits.Split(Regex(r"[\s\S]"), "isolated")  # type: ignore - likewise
    core.decoder = decoders.Fuse()  # type: ignore - likewise
    core.add_special_tokens([AddedToken(token, special=True) for token in (EOS, PAD)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=EOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
        model_max_length=int(1e30),
    )


def encode_bases(sequence: str) -> np.ndarray:
    """A sequence's ids as of the tokenizer, uint8. ValueError names a bad letter and its place."""
    raw = sequence.encode()
    if wrong := raw.translate(None, delete=VALID):
        letter = wrong.decode()[0]
        raise ValueError(f"base {sequence.index(letter) + 1} is {letter!r}, which is no nucleotide")
    return np.frombuffer(raw.translate(IDS), dtype=np.uint8)


def reverse_complement(ids: np.ndarray) -> np.ndarray:
    """The other strand, read in its own direction: ACG -> CGT."""
    return COMPLEMENT[ids[::-1]]


class Bases(NamedTuple):
    """Bases of a FASTA record, in order: their ids, and the place of the first of them, from 0."""

    record: str  # first word of its header
    start: int
    ids: np.ndarray


def is_fasta(path: str | Path) -> bool:
    name = Path(path)
    return (Path(name.stem).suffix if name.suffix in COMPRESSED else name.suffix) in FASTA


def read_fasta(path: str | Path, size: int = BLOCK) -> Iterator[Bases]:
    """The records of a FASTA file (plain, .gz, .xz), in blocks of `size` bases; the last of a
    record is shorter. No more than a block is held, however long a record or a line is.

    Raises ValueError, naming record, base and line, for what is no FASTA.
    """
    try:
        with COMPRESSED.get(Path(path).suffix, open)(path, "rb") as file:
            yield from fasta_blocks(cast(IO[bytes], file), str(path), size)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise unreadable(str(path), error) from error


def fasta_blocks(file: IO[bytes], name: str, size: int) -> Iterator[Bases]:
    record, start, held = None, 0, bytearray()
    number, at_line_start = 0, True

    def cut(count: int) -> Bases:
        nonlocal start
        ids = np.frombuffer(bytes(held[:count]).translate(IDS), dtype=np.uint8)
        del held[:count]
        start += len(ids)
        return Bases(cast(str, record), start - len(ids), ids)

    def last() -> Iterator[Bases]:
        if held:
            yield cut(len(held))
        elif record is not None and not start:
            raise ValueError(f"{name}, line {number}: record {record!r} has no bases")

    while line := file.readline(LINE):
        begins, at_line_start = at_line_start, line.endswith(b"\n")
        number += begins
        line = line.strip()
        if begins and line.startswith(b">"):
            yield from last()
            while not at_line_start and (rest := file.readline(LINE)):
                at_line_start = rest.endswith(b"\n")
            record, start = (line[1:].split() or [b""])[0].decode(errors="replace"), 0
            continue
        if not line:
            continue
        if record is None:
            raise ValueError(f"{name} is no FASTA file: its first line does not begin with '>'")
        if wrong := line.translate(None, delete=VALID):
            place = start + len(held) + line.index(wrong[:1]) + 1
            raise ValueError(
                f"{name}, line {number}: base {place:,} of record {record!r} is "
                f"{wrong[:1].decode(errors='replace')!r}, which is no nucleotide"
            )
        held += line
        while len(held) >= size:
            yield cut(size)
    yield from last()
    if record is None:
        raise ValueError(f"{name} is empty: a FASTA file begins with '>'")


def fasta_lengths(path: str | Path) -> dict[str, int]:
    """Bases of each record, in order. ValueError for two records of one name."""
    lengths: dict[str, int] = {}
    for block in read_fasta(path):
        if block.start != lengths.get(block.record, 0):
            raise ValueError(f"{path} has two records called {block.record!r}: rename one")
        lengths[block.record] = block.start + len(block.ids)
    return lengths


def stored_bases(path: str | Path) -> list[np.ndarray]:
    """Each record's ids, eos before them, as views of a temporary file: what is not used takes no
    memory. The file has no name, and is gone with the last view."""
    ends, size = [], 0
    with tempfile.TemporaryFile() as file:
        for block in read_fasta(path):
            if block.start == 0:
                ends.append(size)
                size += file.write(bytes([EOS_ID]))
            size += file.write(block.ids.tobytes())
        file.flush()
        ids = np.memmap(file, dtype=np.uint8, mode="r")
    return [ids[a:b] for a, b in zip(ends, [*ends[1:], size], strict=True)]
