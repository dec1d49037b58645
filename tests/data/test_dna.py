"""DNA as ids: letters, strands, FASTA in blocks, and errors that say where."""

import gzip

import numpy as np
import pytest
from transformers import AutoTokenizer

from pytitans.data import dna
from pytitans.data.dna import (
    EOS_ID,
    encode_bases,
    fasta_lengths,
    is_fasta,
    nucleotide_tokenizer,
    read_fasta,
    reverse_complement,
    stored_bases,
)

RECORDS = {"one": "ACGTNacgtn" * 13, "two": "GATTACA", "three": "R" * 70 + "y"}


def write_fasta(path, records=RECORDS, width=9, end="\n"):
    lines = []
    for name, bases in records.items():
        lines.append(f">{name} of several words")
        lines += [bases[i : i + width] for i in range(0, len(bases), width)]
    data = (end.join(lines) + end).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def joined(path, size):
    found = {}
    for block in read_fasta(path, size):
        before = found.setdefault(block.record, np.zeros(0, np.uint8))
        assert block.start == len(before) and 0 < len(block.ids) <= size
        found[block.record] = np.concatenate([before, block.ids])
    return found


def test_tokenizer_and_encoding_give_the_same_ids(tmp_path):
    tokenizer = nucleotide_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "ACGTNacgtnRYSWKMBDHVryswkmbdhv"
    ids = [0, 1, 2, 3, 4] * 2 + [4] * 20
    assert encode_bases(text).tolist() == ids
    for each in (tokenizer, loaded):
        assert each(text).input_ids == ids
        assert each.decode(ids[:5]) == "ACGTN"
        assert len(each) == 7 and each.eos_token_id == EOS_ID
        padded = each(["ACG", "A"], padding=True)
        assert padded.input_ids == [[0, 1, 2], [0, 6, 6]]
        assert padded.attention_mask == [[1, 1, 1], [1, 0, 0]]


def test_a_bad_letter_is_named_with_its_place():
    with pytest.raises(ValueError, match="base 4 is 'J'"):
        encode_bases("ACGJACGX")
    with pytest.raises(ValueError, match="base 2 is 'é'"):
        encode_bases("Aé")


def test_reverse_complement_by_hand_and_back():
    ids = encode_bases("AACGTN")
    assert reverse_complement(ids).tolist() == encode_bases("NACGTT").tolist()
    assert reverse_complement(reverse_complement(ids)).tolist() == ids.tolist()


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("width", [1, 9, 10**6])
@pytest.mark.parametrize("name, end", [("a.fa", "\n"), ("a.fa.gz", "\r\n")])
def test_fasta_comes_whole_in_blocks_of_any_size(tmp_path, monkeypatch, size, width, name, end):
    monkeypatch.setattr(dna, "LINE", 11)  # headers and lines are longer than what is read at once
    found = joined(write_fasta(tmp_path / name, width=width, end=end), size)
    assert list(found) == list(RECORDS)
    for record, bases in RECORDS.items():
        assert found[record].tolist() == encode_bases(bases).tolist()


def test_lengths_and_stored_bases(tmp_path):
    path = write_fasta(tmp_path / "a.fna")
    assert fasta_lengths(path) == {name: len(bases) for name, bases in RECORDS.items()}
    for stored, bases in zip(stored_bases(path), RECORDS.values(), strict=True):
        assert stored.tolist() == [EOS_ID, *encode_bases(bases)]


@pytest.mark.parametrize(
    "text, message",
    [
        (">a\nACGT\nAC!T\n", "line 3: base 7 of record 'a' is '!'"),
        ("ACGT\n", "does not begin with '>'"),
        ("", "is empty"),
        (">a\n>b\nACGT\n", "record 'a' has no bases"),
        (">a\nAC\n>a\nG\n", "two records called 'a'"),
    ],
)
def test_what_is_no_fasta_is_said_with_its_place(tmp_path, text, message):
    path = tmp_path / "a.fa"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        fasta_lengths(path)


def test_a_broken_archive_is_an_error_of_its_file(tmp_path):
    path = write_fasta(tmp_path / "a.fa.gz")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="cannot be read"):
        fasta_lengths(path)


def test_names_of_fasta_files():
    assert all(map(is_fasta, ("a.fa", "a.fasta.gz", "x/a.fna.xz")))
    assert not any(map(is_fasta, ("a.csv", "a.gz", "fa")))
