"""Labelled DNA: GUE's csv, tables of sequences, GenomicBenchmarks' folders -> train, dev and test.

    GUE/tf/0                          train.csv, dev.csv, test.csv: columns sequence, label
    promoters.tsv.gz                  one table (seq, label): split 7:1:2 by a seeded draw
    human_nontata_promoters           train/CLASS.csv.gz, test/CLASS.csv.gz: intervals of --genome
    ~/.genomic_benchmarks/...         train/CLASS/ID.txt, as the package makes of these

A publisher's split is kept as it is. What is missing is drawn from the training table, or from the
only one there is, and `Sets.split` says so. A draw never parts a sequence from its copies, on
either strand.
"""

import csv
import lzma
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import numpy as np

from pytitans.data.dna import encode_bases, read_fasta, reverse_complement
from pytitans.data.text import COMPRESSED, unreadable

SPLITS = ("train", "dev", "test")
NAMES = {"train": ("train",), "dev": ("dev", "valid", "validation"), "test": ("test",)}
TABLES = {".csv", ".tsv"}
SEQUENCE, LABEL = ("sequence", "seq"), ("label", "labels", "class")
INTERVAL = ("region", "start", "end", "strand")
DRAWN = {"test": 0.2, "dev": 0.1}  # shares of the training sequences, where a set is not given
Row = tuple[str, str, str]  # place for messages, sequence, label


@dataclass(frozen=True, kw_only=True)
class DnaData:
    """Which sequences to read, and how.

    Args:
        files: a folder with train, dev and test tables (GUE) or train and test folders
            (GenomicBenchmarks), or tables (csv, tsv; plain, .gz, .xz) with columns sequence and
            label, or a FASTA file for a next-base model; short: --data
        dev: tables of the dev set, by which runs are compared
        test: tables of the test set
        genome: FASTA file that GenomicBenchmarks' intervals are places of
        reverse_complement: how the other strand is used: "none"; "augment": training draws one of
            the two strands each time; "average": an evaluation averages over both; "both": both
        split_seed: of the draw of a dev or test set that is not given
        sequence_length: bases of a training example of a next-base model
    """

    files: Sequence[str] = ()
    dev: Sequence[str] = ()
    test: Sequence[str] = ()
    genome: str | None = None
    reverse_complement: Literal["none", "augment", "average", "both"] = "none"
    split_seed: int = 0
    sequence_length: int = 1024

    def __post_init__(self):
        if self.sequence_length < 2:
            raise ValueError(f"sequence_length={self.sequence_length} must be 2 or more")

    @property
    def augments(self) -> bool:
        return self.reverse_complement in ("augment", "both")

    @property
    def averages(self) -> bool:
        return self.reverse_complement in ("average", "both")


class Labelled(NamedTuple):
    """Sequences, each [T] uint8, and the numbers of their classes [N]."""

    sequences: list[np.ndarray]
    labels: np.ndarray

    def pick(self, rows: np.ndarray) -> "Labelled":
        return Labelled([self.sequences[i] for i in rows], self.labels[rows])


class Sets(NamedTuple):
    """The three sets, the names of the classes, and how the sets came about."""

    train: Labelled
    dev: Labelled
    test: Labelled
    classes: list[str]
    split: str


def load_sets(data: DnaData) -> Sets:
    """The sets of `data`. Raises ValueError, naming the file and the line, for what is wrong."""
    rows = {split: rows_of(files, data.genome) for split, files in found_files(data).items()}
    if not rows.get("train"):
        raise ValueError("no sequences to train on: give a table or a folder by --data")
    classes = class_names(row[2] for row in rows["train"])
    sets = {split: labelled(part, classes) for split, part in rows.items()}
    missing, whole = [split for split in DRAWN if split not in sets], len(sets["train"].labels)
    how = ["as published: " + ", ".join(split for split in SPLITS if split in sets)]
    for split in missing:
        count = round(DRAWN[split] * whole)
        sets["train"], sets[split] = draw(sets["train"], count, data.split_seed)
    if missing:
        origin = f"drawn from the training sequences with seed {data.split_seed}"
        how = how if len(missing) < 2 else []
        how.append(f"{' and '.join(missing)} {origin}, copies on either strand together")
    return Sets(sets["train"], sets["dev"], sets["test"], classes, "; ".join(how))


def found_files(data: DnaData) -> dict[str, list[Path]]:
    """The files or folders of each split; "train" has those that are not said to be another's."""
    paths = [Path(name).expanduser() for name in data.files]
    for path in paths:
        if not path.exists():
            raise ValueError(f"{str(path)!r} does not exist: give a table or a folder by --data")
    found: dict[str, list[Path]] = {}
    if len(paths) == 1 and paths[0].is_dir():
        for split in SPLITS:
            inside = [x for x in sorted(paths[0].iterdir()) if stem(x) in NAMES[split]]
            if inside:
                found[split] = inside
        if "train" not in found:
            raise ValueError(
                f"{str(paths[0])!r} has neither train.csv nor a folder train: give tables by --data"
            )
    elif paths:
        found["train"] = paths
    named = {"dev": data.dev, "test": data.test}
    return found | {split: [Path(x) for x in files] for split, files in named.items() if files}


def stem(path: Path) -> str:
    """train.csv.xz -> train; folders keep their names; other kinds of files have none."""
    if path.is_dir():
        return path.name
    return (
        Path(path.stem).stem if path.suffix in COMPRESSED else path.stem if is_table(path) else ""
    )


def is_table(path: Path) -> bool:
    return (Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix) in TABLES


def rows_of(files: Sequence[Path], genome: str | None) -> list[Row]:
    rows: list[Row] = []
    for path in files:
        if not path.is_dir():
            rows += table_rows(path)
        elif tables := [x for x in sorted(path.iterdir()) if is_table(x)]:
            rows += interval_rows(tables, genome)
        else:
            rows += [
                (str(x), x.read_text().strip(), folder.name)
                for folder in sorted(x for x in path.iterdir() if x.is_dir())
                for x in sorted(folder.glob("*.txt"))
            ]
    return rows


def lines_of(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """The table's lines, each with its place and by its columns' names."""
    tabs = ".tsv" in path.suffixes[-2:]
    try:
        with opened_text(path) as file:
            reader = csv.DictReader(file, delimiter="\t" if tabs else ",")
            for line in reader:
                yield f"{path}, line {reader.line_num}", line
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not text: give a csv or tsv file, plain, .gz or .xz"
        ) from error
    except (OSError, EOFError, lzma.LZMAError, zlib.error, csv.Error) as error:
        raise unreadable(str(path), error) from error


def opened_text(path: Path) -> IO[str]:
    opened: Any = COMPRESSED.get(path.suffix, open)
    return opened(path, "rt", encoding="utf-8", newline="")


def table_rows(path: Path) -> Iterator[Row]:
    for place, line in lines_of(path):
        sequence, label = (
            next((line[name] for name in names if line.get(name)), None)
            for names in (SEQUENCE, LABEL)
        )
        if sequence is None or label is None:
            what = f"its columns are {', '.join(str(key) for key in line)}"
            raise ValueError(f"{place}: no sequence or no label ({what}): name them so")
        yield place, sequence, label


def table_sequences(path: Path) -> list[np.ndarray]:
    """The sequences of a table, which needs no labels."""
    found = []
    for place, line in lines_of(path):
        sequence = next((line[name] for name in SEQUENCE if line.get(name)), None)
        if sequence is None:
            raise ValueError(f"{place}: no sequence: call its column {' or '.join(SEQUENCE)}")
        found.append(checked(place, sequence))
    if not found:
        raise ValueError(f"{path} holds no sequences")
    return found


def checked(place: str, sequence: str) -> np.ndarray:
    try:
        return encode_bases(sequence)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def interval_rows(tables: Sequence[Path], genome: str | None) -> Iterator[Row]:
    """The sequences at GenomicBenchmarks' intervals; a table's name is its class."""
    if genome is None:
        raise ValueError(
            f"{tables[0]} holds intervals: give the genome's FASTA file by --data.genome"
        )
    wanted: dict[str, list] = {}
    for path in tables:
        for place, line in lines_of(path):
            try:
                region, start, end, strand = (line[name] for name in INTERVAL)
                interval = (place, int(start), int(end), strand, stem(path))
            except (KeyError, TypeError, ValueError) as error:
                columns = ", ".join(INTERVAL)
                raise ValueError(f"{place} is no interval: its columns are {columns}") from error
            wanted.setdefault(region, []).append(interval)
    yield from cut_intervals(wanted, genome)


def cut_intervals(wanted: dict[str, list], genome: str) -> Iterator[Row]:
    """One record of the genome is held at a time, and only if something is to be cut from it."""
    left, record, parts = dict(wanted), None, []

    def cut() -> Iterator[Row]:
        key = next((x for x in region_names(record) if x in left), None) if record else None
        if key is None:
            return
        ids = np.concatenate(parts)
        for place, start, end, strand, label in left.pop(key):
            if not 0 <= start < end <= len(ids):
                raise ValueError(f"{place}: {start} to {end} is outside {record!r} of {len(ids):,}")
            piece = ids[start:end] if strand != "-" else reverse_complement(ids[start:end])
            yield place, "".join("ACGTN"[i] for i in piece), label

    for block in read_fasta(genome, 2**20):
        if block.start == 0:
            yield from cut()
            record, parts = block.record, []
        if any(name in left for name in region_names(block.record)):
            parts.append(block.ids)
    yield from cut()
    if left:
        region, [(place, *_), *_] = next(iter(left.items()))
        raise ValueError(f"{place}: {genome} has no record {region!r}: is it the right genome?")


def region_names(record: str) -> tuple[str, ...]:
    """How tables call a record: Ensembl's 1 is chr1 in them, and ENST00000123.4 ENST00000123."""
    return record, f"chr{record}", record.split(".")[0]


def class_names(labels) -> list[str]:
    """In the order of their numbers: numerically where all are numbers."""
    names = set(labels)
    if len(names) < 2:
        raise ValueError(f"all sequences have the label {next(iter(names))!r}: two at least")
    numbers = all(name.isdigit() for name in names)
    return sorted(names, key=(lambda name: (int(name), name)) if numbers else str)


def labelled(rows: Sequence[Row], classes: Sequence[str]) -> Labelled:
    number = {name: i for i, name in enumerate(classes)}
    sequences, labels = [], []
    for place, sequence, label in rows:
        if label not in number:
            known = ", ".join(classes[:8])
            raise ValueError(f"{place}: label {label!r} is none of the training set's: {known}")
        if not sequence:
            raise ValueError(f"{place}: an empty sequence")
        sequences.append(checked(place, sequence))
        labels.append(number[label])
    return Labelled(sequences, np.array(labels, dtype=np.int64))


def draw(rows: Labelled, count: int, seed: int) -> tuple[Labelled, Labelled]:
    """What stays, and about `count` rows: sequences in a seeded order, each with all its copies."""
    names = [min(x.tobytes(), reverse_complement(x).tobytes()) for x in rows.sequences]
    copies = Counter(names)
    order = sorted(copies)  # whatever the order in the file
    np.random.default_rng(seed).shuffle(order)
    drawn, taken = set(), 0
    for name in order:
        if taken >= count:
            break
        drawn.add(name)
        taken += copies[name]
    chosen = np.array([name in drawn for name in names])
    if chosen.all() or not chosen.any():
        raise ValueError(f"{len(names)} sequences are too few to draw {count} of them: give more")
    return rows.pick((~chosen).nonzero()[0]), rows.pick(chosen.nonzero()[0])
