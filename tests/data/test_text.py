"""Sources, splits and what happens to text that cannot be read."""

import gzip
import lzma
import zipfile

import pytest

from pytitans.data.text import Document, TextData, head, load_text, size_in_bytes, split_sources


def write_files(folder, count: int) -> None:
    for i in range(count):
        (folder / f"{i}.txt").write_text(f"text {i} " * 10)


def names(data: TextData) -> dict[str, list[str]]:
    return {split: [s.name for s in sources] for split, sources in split_sources(data).items()}


def test_compressed_files_read_as_plain_ones(tmp_path):
    (tmp_path / "a.txt").write_text("plän")
    (tmp_path / "b.txt.xz").write_bytes(lzma.compress("plän".encode()))
    (tmp_path / "c.md.gz").write_bytes(gzip.compress("plän".encode()))
    with zipfile.ZipFile(tmp_path / "d.zip", "w") as archive:
        archive.writestr("inside/e.txt", "plän")
    documents = load_text(TextData(files=[str(tmp_path)]), ["all"])["all"]
    assert sorted(d.name for d in documents) == [
        "a.txt",
        "b.txt.xz",
        "c.md.gz",
        "d.zip/inside/e.txt",
    ]
    assert {d.text for d in documents} == {"plän"}


def test_named_files_are_held_out_and_all_others_train(tmp_path):
    for name in ("moby-dick", "emma", "dracula", "ulysses"):
        (tmp_path / f"{name}.txt.xz").write_bytes(lzma.compress(name.encode()))
    data = TextData(files=[f"{tmp_path}/*.xz"], validation=["moby-dick"], test=["dra*"])
    assert names(data)["validation"] == ["moby-dick.txt.xz"]
    assert names(data)["test"] == ["dracula.txt.xz"]
    assert sorted(names(data)["train"]) == ["emma.txt.xz", "ulysses.txt.xz"]


def test_held_out_files_may_lie_elsewhere(tmp_path):
    (tmp_path / "train.txt").write_text("a")
    (tmp_path / "other.txt").write_text("b")
    data = TextData(files=[f"{tmp_path}/train.txt"], validation=[f"{tmp_path}/other.txt"])
    assert load_text(data, ["validation"])["validation"][0].text == "b"


def test_hashed_split_holds_out_a_twentieth_each_and_ignores_the_folder(tmp_path):
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        write_files(tmp_path / folder, 400)
    here, there = (names(TextData(files=[str(tmp_path / f)])) for f in ("here", "there"))
    assert here == there
    assert sum(map(len, here.values())) == 400
    assert all(8 <= len(here[split]) <= 32 for split in ("validation", "test"))


def test_few_files_are_cut_by_position(tmp_path):
    (tmp_path / "book.txt").write_text("".join(chr(0x4E00 + i) for i in range(1000)))
    splits = load_text(TextData(files=[f"{tmp_path}/book.txt"]))
    assert [len(splits[s][0].text) for s in ("train", "validation", "test")] == [900, 50, 50]
    assert "".join(splits[s][0].text for s in splits) == (tmp_path / "book.txt").read_text()


def test_only_the_splits_asked_for_are_read(tmp_path):
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "bad.txt.xz").write_bytes(b"not xz")
    data = TextData(files=[str(tmp_path)], validation=["bad"])
    assert load_text(data, ["train"])["train"][0].text == "good"


def test_standard_library_is_there_without_any_download():
    shared = split_sources(TextData())
    assert len(shared["train"]) > 100
    assert not any("site-packages" in source.place for source in shared["train"])
    text = load_text(TextData(), ["validation"])["validation"]
    assert size_in_bytes(text) > 50_000


def test_dataset_of_the_hub_by_its_own_splits(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "validation.jsonl").write_text('{"text": "three"}\n')
    splits = load_text(TextData(files=[f"hub:{tmp_path}"]), ["train", "validation"])
    assert splits["train"][0].text == "one\ntwo"
    assert splits["validation"][0].text == "three"
    with pytest.raises(
        ValueError, match=r"no column 'body': choose --data\.text_column among text"
    ):
        load_text(TextData(files=[f"hub:{tmp_path}"], text_column="body"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "missing.txt' is no file"),
        ("cut.xz", lzma.compress(b"text" * 99)[:-20], "cut.xz cannot be read"),
        ("broken.xz", b"not xz at all", "broken.xz cannot be read"),
        ("broken.gz", b"not gz at all", "broken.gz cannot be read"),
        ("broken.zip", b"not zip at all", "broken.zip cannot be read"),
        ("latin.txt", "é".encode("latin1"), "latin.txt is not UTF-8 text"),
        ("empty.txt", b"", "text is empty .*empty.txt"),
    ],
)
def test_bad_file_is_one_error_that_names_it(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_text(TextData(files=[str(tmp_path / name)]))


def test_folder_without_text_and_pattern_without_match(tmp_path):
    with pytest.raises(ValueError, match="holds no text files"):
        load_text(TextData(files=[str(tmp_path)]))
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match="'moby' is no file"):
        load_text(TextData(files=[str(tmp_path)], validation=["moby"]))


def test_sequence_length_of_one_is_refused():
    with pytest.raises(ValueError, match="sequence_length=1"):
        TextData(sequence_length=1)


def test_head_cuts_at_a_letter():
    documents = [Document("a", "aé"), Document("b", "bb")]
    assert head(documents, None) == documents
    assert head(documents, 2) == [Document("a", "a")]
    assert head(documents, 4) == [Document("a", "aé"), Document("b", "b")]
