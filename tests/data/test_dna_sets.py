"""Labelled DNA: published splits as they are, drawn ones without copies across, intervals."""

import gzip
import lzma

import numpy as np
import pytest

from pytitans.data.dna import encode_bases, reverse_complement
from pytitans.data.dna_sets import DnaData, draw, labelled, load_sets

RNG = np.random.default_rng(0)
SEQUENCES = ["".join("ACGT"[i] for i in RNG.integers(4, size=12)) for _ in range(60)]


def table(path, sequences, header="sequence,label", labels=("0", "1")):
    comma = "\t" if "tsv" in path.name else ","
    lines = [header.replace(",", comma)]
    lines += [f"{s}{comma}{labels[i % len(labels)]}" for i, s in enumerate(sequences)]
    text = ("\n".join(lines) + "\n").encode()
    pack = {".xz": lzma.compress, ".gz": gzip.compress}.get(path.suffix, bytes)
    path.write_bytes(pack(text))
    return str(path)


def canonical(sequences):
    return {min(x.tobytes(), reverse_complement(x).tobytes()) for x in sequences}


def test_published_sets_stay_as_they_are(tmp_path):
    for split, part in (
        ("train", SEQUENCES[:40]),
        ("dev", SEQUENCES[40:50]),
        ("test", SEQUENCES[50:]),
    ):
        table(tmp_path / f"{split}.csv.xz", part)
    sets = load_sets(DnaData(files=[str(tmp_path)]))
    assert [x.tolist() for x in sets.train.sequences] == [
        encode_bases(x).tolist() for x in SEQUENCES[:40]
    ]
    assert sets.train.labels.tolist() == [0, 1] * 20
    assert (len(sets.dev.labels), len(sets.test.labels)) == (10, 10)
    assert sets.split == "as published: train, dev, test" and sets.classes == ["0", "1"]


def test_sets_by_name(tmp_path):
    train = table(tmp_path / "a.csv.gz", SEQUENCES[:40])
    test = table(tmp_path / "b.tsv", SEQUENCES[40:], "seq,label")
    sets = load_sets(DnaData(files=[train], test=[test]))
    assert [len(x.labels) for x in sets[:3]] == [36, 4, 20]
    assert sets.split.startswith("as published: train, test; dev drawn")


def test_a_single_table_is_split_7_1_2_the_same_each_time(tmp_path):
    path = table(tmp_path / "a.tsv.gz", SEQUENCES, "seq,label")
    one, again = (load_sets(DnaData(files=[path])) for _ in range(2))
    other = load_sets(DnaData(files=[path], split_seed=1))
    assert [len(x.labels) for x in one[:3]] == [42, 6, 12]
    assert canonical(one.test.sequences) == canonical(again.test.sequences)
    assert canonical(one.test.sequences) != canonical(other.test.sequences)
    assert "seed 0" in one.split and "published" not in one.split


def test_copies_on_either_strand_stay_together():
    sequences = [encode_bases(x) for x in SEQUENCES[:20]]
    sequences += [reverse_complement(x) for x in sequences] + sequences
    rows = labelled([("", "A", "0")], ["0"])._replace(
        sequences=sequences, labels=np.arange(len(sequences))
    )
    left, drawn = draw(rows, 12, seed=0)
    assert not canonical(left.sequences) & canonical(drawn.sequences)
    assert sorted([*left.labels, *drawn.labels]) == list(range(60)) and len(drawn.labels) == 12


def test_genomic_benchmarks_intervals(tmp_path):
    genome = "".join(SEQUENCES)
    (tmp_path / "genome.fa").write_text(f">1 a chromosome\n{genome}\n>ENST01.7\n{genome[::-1]}\n")
    for split in ("train", "test"):
        (tmp_path / "set" / split).mkdir(parents=True)
        for name, strand in (("negative", "+"), ("positive", "-")):
            lines = [",id,region,start,end,strand"]
            lines += [f"{i},{i},chr1,{12 * i},{12 * i + 5},{strand}" for i in range(10)]
            lines += [f"9,9,ENST01,3,9,{strand}"]
            table_ = tmp_path / "set" / split / f"{name}.csv.gz"
            table_.write_bytes(gzip.compress("\n".join(lines).encode()))
    data = DnaData(files=[str(tmp_path / "set")], genome=str(tmp_path / "genome.fa"))
    sets = load_sets(data)
    assert sets.classes == ["negative", "positive"]
    assert [len(x.labels) for x in sets[:3]] == [20, 2, 22]
    forward = [encode_bases(x[:5]).tolist() for x in SEQUENCES[:10]]
    pairs = list(zip(sets.test.sequences, sets.test.labels, strict=True))
    found = [x.tolist() for x, label in pairs if not label]
    assert found == [*forward, encode_bases(genome[::-1][3:9]).tolist()]
    other = [x for x, label in pairs if label]
    assert [reverse_complement(x).tolist() for x in other] == found
    with pytest.raises(ValueError, match=r"--data\.genome"):
        load_sets(DnaData(files=data.files))
    (tmp_path / "genome.fa").write_text(f">2\n{genome}\n")
    with pytest.raises(ValueError, match="no record 'chr1'"):
        load_sets(data)
    (tmp_path / "genome.fa").write_text(">chr1\nACGT\n>ENST01\nACGTACGTACGT\n")
    with pytest.raises(ValueError, match="line 2: 0 to 5 is outside"):
        load_sets(data)


def test_genomic_benchmarks_sequences(tmp_path):
    for split in ("train", "test"):
        for number, name in enumerate(("negative", "positive")):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for i in range(10):
                (folder / f"{i}.txt").write_text(SEQUENCES[20 * number + i])
    sets = load_sets(DnaData(files=[str(tmp_path)]))
    assert sets.test.labels.tolist() == [0] * 10 + [1] * 10
    assert sets.test.sequences[0].tolist() == encode_bases(SEQUENCES[0]).tolist()


def test_classes_are_in_numerical_order(tmp_path):
    path = table(tmp_path / "a.csv", SEQUENCES, labels=[str(i) for i in range(12)])
    assert load_sets(DnaData(files=[path])).classes == [str(i) for i in range(12)]


@pytest.mark.parametrize(
    "text, message",
    [
        ("sequence,label\nACGT,0\nACXT,1\n", "line 3: base 3 is 'X'"),
        ("dna,label\nACGT,0\n", "line 2: no sequence or no label .*dna, label"),
        ("sequence,label\nACGT,0\nACGG,0\n", "label '0': two at least"),
        ("sequence,label\nACGT,0\nACGG,1\n", "too few"),
        ("", "no sequences"),
    ],
)
def test_a_wrong_table_is_told_with_its_line(tmp_path, text, message):
    path = tmp_path / "a.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load_sets(DnaData(files=[str(path)]))


def test_wrong_files_are_told(tmp_path):
    train = table(tmp_path / "a.csv", SEQUENCES)
    other = table(tmp_path / "b.csv", SEQUENCES, labels=["0", "7"])
    with pytest.raises(ValueError, match="label '7' is none of the training set's"):
        load_sets(DnaData(files=[train], dev=[other]))
    with pytest.raises(ValueError, match="does not exist"):
        load_sets(DnaData(files=["nowhere.csv"]))
    with pytest.raises(ValueError, match=r"neither train\.csv"):
        load_sets(DnaData(files=[str(tmp_path)]))
    (tmp_path / "c.csv.gz").write_bytes(b"no archive")
    with pytest.raises(ValueError, match="cannot be read"):
        load_sets(DnaData(files=[str(tmp_path / "c.csv.gz")]))
