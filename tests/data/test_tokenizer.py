"""The byte tokenizer, and any other."""

import numpy as np
import pytest
from transformers import AutoTokenizer

from pytitans.data.tokenizer import byte_tokenizer, check_vocabulary, encode, load_tokenizer

TEXTS = ["", "plain", "  two  spaces\t\n\r\n", "plän ☃ 🐍", "\x00\x7f\u2028", "a <|eos|> b <|pad|>"]


@pytest.fixture(params=["fresh", "saved"])
def tokenizer(request, tmp_path):
    tokenizer = byte_tokenizer()
    if request.param == "fresh":
        return tokenizer
    tokenizer.save_pretrained(tmp_path)
    return AutoTokenizer.from_pretrained(tmp_path)


@pytest.fixture
def bpe_folder(tmp_path):
    """A byte-level BPE that has merged something."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=["<end>"], show_progress=False
    )
    core.train_from_iterator(["the cat sat on the mat " * 20], trainer)
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>").save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize("text", TEXTS)
def test_numpy_path_gives_the_tokenizers_ids(tokenizer, text):
    ids = encode(tokenizer, text)
    assert ids.tolist() == tokenizer(text).input_ids == list(text.encode())
    assert ids.dtype == np.uint16


def test_special_ids(tokenizer):
    special = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    assert (*special, len(tokenizer)) == (256, 256, 257, 258)


def test_tokenizer_from_a_folder(bpe_folder):
    tokenizer = load_tokenizer(str(bpe_folder))
    ids = encode(tokenizer, "the cat <end>")
    assert len(ids) < len("the cat <end>")
    assert tokenizer.decode(ids) == "the cat <end>"
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.pad_token == tokenizer.eos_token


def test_folder_with_vocabulary_and_merges_alone(bpe_folder, tmp_path):
    whole = load_tokenizer(str(bpe_folder))
    files = tmp_path / "files"
    files.mkdir()
    whole.backend_tokenizer.model.save(str(files))
    text = "the cat sat"
    assert encode(load_tokenizer(str(files)), text).tolist() == encode(whole, text).tolist()


def test_no_tokenizer_there(tmp_path):
    with pytest.raises(ValueError, match="no tokenizer at"):
        load_tokenizer(str(tmp_path))


def test_vocabulary_that_does_not_fit():
    check_vocabulary(byte_tokenizer(), 258)
    with pytest.raises(ValueError, match=r"ids up to 257.*vocab_size is 257.*vocab_size 258"):
        check_vocabulary(byte_tokenizer(), 257)
