"""Where text comes from and how it is split: names -> sources -> documents.

A *source* is a piece of text with a name, not read yet: a file, a member of a zip archive, a split
of a Hugging Face dataset. `find_sources` lists them, `split_sources` shares them out, `read` turns
one into a *document*. The split needs names only, so what a run does not use is never read.
"""

import glob
import gzip
import hashlib
import lzma
import os
import sysconfig
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple, get_args

STDLIB = "stdlib"
HUB = "hub:"
COMPRESSED = {".xz": lzma.open, ".gz": gzip.open}
PLAIN = {".txt", ".md", ".rst", ".py", ".tex", ".html", ".c", ".h", ".js", ".ts", ".java", ".rs"}
HELD_OUT = 0.05  # share of the validation text, and of the test text, where no names are given

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass(frozen=True, kw_only=True)
class TextData:
    """Which text to read and how to split it.

    Args:
        files: files, folders, globs (plain, .xz, .gz, .zip), hub:NAME[:CONFIG] for a Hugging Face
            dataset, or `stdlib`, the source text of Python's own library; short: --data
        validation: names or globs of files to validate on, among `files` or not; without any, 5 %
            of the files (of each file if they are few)
        test: likewise for `titans eval --split test`
        text_column: the column that holds the text of a Hugging Face dataset
        tokenizer: `bytes`, or a Hugging Face tokenizer by folder or hub name
        sequence_length: tokens of a training example, and of a window of validation
    """

    files: Sequence[str] = (STDLIB,)
    validation: Sequence[str] = ()
    test: Sequence[str] = ()
    text_column: str = "text"
    tokenizer: str = "bytes"
    sequence_length: int = 512

    def __post_init__(self):
        if self.sequence_length < 2:
            raise ValueError(
                f"sequence_length={self.sequence_length}: a sequence has 2 tokens or more"
            )


class Document(NamedTuple):
    """A text that belongs together."""

    name: str
    text: str


class Source(NamedTuple):
    """A text to be read: what it is called, where it is (for messages), how to read it."""

    name: str
    place: str
    load: Callable[[], str]
    split: Split | None = None  # what its publisher says it is for
    span: tuple[float, float] = (0.0, 1.0)  # the part that is used
    optional: bool = False  # whether to go on without it where it cannot be read


def load_text(data: TextData, splits: Iterable[str] = SPLITS) -> dict[str, list[Document]]:
    """The documents of each split asked for ("all": every one), ordered by a hash of their names.

    Raises ValueError, naming the value and the remedy, if something is missing or unreadable.
    """
    shared = split_sources(data)
    shared["all"] = find_sources(data.files, data.text_column) if "all" in splits else []
    return {split: read_all(shared[split], split) for split in splits}


def split_sources(data: TextData) -> dict[str, list[Source]]:
    """Which source serves which split.

    With names given, the sources that match them; all others train. Otherwise as the dataset's
    publisher says; otherwise a hash of the name holds out 5 % for validation and 5 % for test.
    Where that leaves a split empty, every file gives its last tenth: 5 % and 5 %.
    """
    sources = find_sources(data.files, data.text_column)
    if data.validation or data.test:
        return split_by_name(sources, data)
    if any(source.split for source in sources):
        return {split: [s for s in sources if (s.split or "train") == split] for split in SPLITS}
    shared: dict[str, list[Source]] = {split: [] for split in SPLITS}
    for source in sources:
        share = hashed(source.name)
        held_out = "validation" if share < HELD_OUT else "test" if share < 2 * HELD_OUT else "train"
        shared[held_out].append(source)
    return shared if all(shared.values()) else split_by_position(sources)


def split_by_name(sources: list[Source], data: TextData) -> dict[str, list[Source]]:
    shared = {"validation": [], "test": []}
    for split, chosen in shared.items():
        for pattern in getattr(data, split):
            among = [source for source in sources if matches(source, pattern)]
            chosen += among or find_sources([pattern], data.text_column)
    held_out = {source.place for chosen in shared.values() for source in chosen}
    return {"train": [s for s in sources if s.place not in held_out], **shared}


def split_by_position(sources: list[Source]) -> dict[str, list[Source]]:
    cuts = (0.0, 1 - 2 * HELD_OUT, 1 - HELD_OUT, 1.0)
    spans = zip(SPLITS, cuts[:-1], cuts[1:], strict=True)
    return {split: [s._replace(span=(a, b)) for s in sources] for split, a, b in spans}


def matches(source: Source, pattern: str) -> bool:
    """Whether the pattern is, or globs, the source's path, its name, or its name less suffixes."""
    name = PurePosixPath(source.name).name
    plain = name.removesuffix(".xz").removesuffix(".gz")
    known = {source.place, source.name, name, plain, PurePosixPath(plain).stem}
    return any(fnmatch(candidate, pattern) for candidate in known)


def find_sources(names: Sequence[str], text_column: str = "text") -> list[Source]:
    """All sources under the given names, each once, in the order of a hash of their names."""
    found: dict[str, Source] = {}
    for name in names:
        for source in find(name, text_column):
            found.setdefault(source.place, source)
    return sorted(found.values(), key=lambda source: (hashed(source.name), source.place))


def find(name: str, text_column: str) -> list[Source]:
    if name == STDLIB:
        return stdlib_sources()
    if name.startswith(HUB):
        return hub_sources(name, text_column)
    path = Path(name).expanduser()
    if path.is_dir():
        files = [p for p in path.rglob("*") if p.is_file() and is_text(p)]
        if not files:
            raise ValueError(f"{name!r} holds no text files: give files by a glob, as '{name}/*'")
    else:
        files = [Path(p) for p in glob.glob(str(path), recursive=True) if os.path.isfile(p)]
        if path.is_file():
            files = [path]
        if not files:
            raise ValueError(
                f"{name!r} is no file, directory or glob that matches one: check the path, or "
                f"write {HUB}{name} for a Hugging Face dataset"
            )
    return [source for file in sorted(files) for source in file_sources(file, root_of(files))]


def root_of(files: list[Path]) -> Path:
    """The folder that names are relative to, so that moving it does not change the split."""
    return Path(os.path.commonpath([file.absolute().parent for file in files]))


def is_text(path: Path) -> bool:
    suffix = Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix
    return suffix in PLAIN or path.suffix == ".zip"


def file_sources(path: Path, root: Path) -> list[Source]:
    name = path.absolute().relative_to(root).as_posix()
    if path.suffix != ".zip":
        return [Source(name, str(path), lambda: read_file(path))]
    try:
        with zipfile.ZipFile(path) as archive:
            members = sorted(item.filename for item in archive.infolist() if not item.is_dir())
    except (OSError, zipfile.BadZipFile) as error:
        raise unreadable(str(path), error) from error
    return [
        Source(f"{name}/{member}", f"{path}/{member}", lambda member=member: read_zip(path, member))
        for member in members
    ]


def stdlib_sources() -> list[Source]:
    """The *.py files of the running Python's standard library, its tests included (about 30 MB)."""
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages"}
    files = sorted(p for p in root.rglob("*.py") if not skipped & set(p.relative_to(root).parts))
    if not files:
        raise ValueError(f"no *.py files under {root}: give text by --data FILES")
    found = [source for file in files for source in file_sources(file, root)]
    return [source._replace(optional=True) for source in found]


def hub_sources(name: str, text_column: str) -> list[Source]:
    """One source for each split of a Hugging Face dataset (a hub name, or a folder of data)."""
    import datasets

    path, _, config = name.removeprefix(HUB).partition(":")
    try:
        found = datasets.load_dataset(path, config or None)
    except Exception as error:  # datasets, fsspec, pyarrow and huggingface_hub have their own
        raise ValueError(f"{name!r} cannot be loaded as a dataset: {one_line(error)}") from error
    sources = []
    for key, rows in found.items():
        if text_column not in rows.column_names:
            columns = ", ".join(rows.column_names)
            raise ValueError(
                f"{name!r} has no column {text_column!r}: choose --data.text_column among {columns}"
            )
        split: Split | None = next((s for s in SPLITS if str(key).startswith(s[:5])), None)
        label = f"{path}/{key}"
        sources.append(
            Source(label, f"{name}/{key}", lambda rows=rows: "\n".join(rows[text_column]), split)
        )
    return sources if {s.split for s in sources} >= {"train", "validation"} else unsplit(sources)


def unsplit(sources: list[Source]) -> list[Source]:
    return [source._replace(split=None) for source in sources]


def read_all(sources: list[Source], split: str) -> list[Document]:
    documents = [document for source in sources if (document := read(source)) is not None]
    if not any(document.text for document in documents):
        places = ", ".join(source.place for source in sources[:3]) or "no file is left for it"
        raise ValueError(f"the {split} text is empty ({places}): add files, or use --data.{split}")
    return documents


def read(source: Source) -> Document | None:
    """The source's document; one that cannot be read is an error, or None if it is optional."""
    try:
        text = source.load()
    except (OSError, EOFError, lzma.LZMAError, zlib.error, zipfile.BadZipFile) as error:
        problem = unreadable(source.place, error)
    except UnicodeDecodeError as error:
        problem = ValueError(
            f"{source.place} is not UTF-8 text (byte {error.start}): leave it out, or convert it, "
            "for example by `iconv -f latin1 -t utf-8`"
        )
    else:
        start, end = (round(part * len(text)) for part in source.span)
        return Document(source.name, text[start:end])
    if source.optional:
        return None
    raise problem


def read_file(path: Path) -> str:
    with COMPRESSED.get(path.suffix, open)(path, "rb") as file:
        return file.read().decode("utf-8")


def read_zip(path: Path, member: str) -> str:
    with zipfile.ZipFile(path) as archive:
        return archive.read(member).decode("utf-8")


def hashed(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64


def unreadable(place: str, error: Exception) -> ValueError:
    return ValueError(f"{place} cannot be read ({one_line(error)}): check that the file is whole")


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def head(documents: list[Document], limit: int | None) -> list[Document]:
    """Whole documents until `limit` UTF-8 bytes are reached; the last one is cut. None: all."""
    if limit is None:
        return documents
    kept = []
    for name, text in documents:
        if limit <= 0:
            break
        data = text.encode()[:limit]
        kept.append(Document(name, data.decode("utf-8", errors="ignore")))
        limit -= len(data)
    return kept


def size_in_bytes(documents: list[Document]) -> int:
    return sum(len(document.text.encode()) for document in documents)
