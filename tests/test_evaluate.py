"""Bits per byte are exact, whatever the windows and the tokenizer."""

import lzma
import math
import subprocess

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pytitans.data.text import Document
from pytitans.data.tokenizer import byte_tokenizer
from pytitans.evaluate import evaluate, xz_bits_per_byte

TEXT = "It was the best of times, it was the wörst of times, ☃. " * 4


def tiny_llama(vocab_size: int = 258) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            initializer_range=0.5,
            bos_token_id=256,
            eos_token_id=256,
        )
    )


def score(model, texts, **options):
    documents = [Document(str(i), text) for i, text in enumerate(texts)]
    return evaluate(model, byte_tokenizer(), documents, progress=False, **options)


def test_one_window_is_the_definition():
    model = tiny_llama()
    ids = torch.tensor([[256, *TEXT.encode()]])
    nats = model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
    result = score(model, [TEXT], length=1000)
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(TEXT.encode()))
    # By its logarithm: exp makes float32's last digit of the nats a larger error of the perplexity.
    assert math.log(result["perplexity"]) == pytest.approx(nats / len(TEXT.encode()))
    assert result["bytes"] == result["tokens"] == len(TEXT.encode())


def test_windows_see_their_past_and_no_more():
    model, length, stride = tiny_llama(), 16, 5
    ids, nats = torch.tensor([256, *TEXT.encode()]), 0.0
    for start in range(0, len(ids) - length + stride, stride):
        window = ids[start : start + length]
        logits = model(input_ids=window[None]).logits[0, :-1].detach().log_softmax(-1)
        new = 1 if start == 0 else length - stride
        nats -= sum(float(logits[i - 1, window[i]]) for i in range(new, len(window)))
    result = score(model, [TEXT], length=length, stride=stride, batch_size=3)
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(TEXT.encode()))


def test_batch_size_does_not_matter():
    model = tiny_llama()
    results = [score(model, [TEXT, "short"], length=16, batch_size=n) for n in (1, 4)]
    assert results[0]["bits_per_byte"] == pytest.approx(results[1]["bits_per_byte"])


def test_uniform_model_needs_log_v_bits():
    model = tiny_llama(vocab_size=512)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert score(model, [TEXT], length=32)["bits_per_byte"] == pytest.approx(9)


def test_training_mode_is_left_as_it_was():
    model = tiny_llama().train()
    score(model, ["text"], length=8)
    assert model.training


def test_xz_is_the_program_xz(tmp_path):
    documents = [Document("a", TEXT), Document("b", TEXT)]
    path = tmp_path / "text"
    path.write_text(TEXT + TEXT)
    try:
        packed = subprocess.run(["xz", "-9", "-c", path], capture_output=True, check=True).stdout
    except FileNotFoundError:
        packed = lzma.compress(path.read_bytes(), preset=9)
    size = len((TEXT + TEXT).encode())
    assert xz_bits_per_byte(documents) == pytest.approx(8 * len(packed) / size)


def test_tokenizer_beyond_the_vocabulary_is_refused():
    with pytest.raises(ValueError, match="vocab_size is 100"):
        score(tiny_llama(vocab_size=100), ["text"], length=8)
