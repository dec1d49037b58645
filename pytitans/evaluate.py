"""Bits per byte and perplexity of any Hugging Face causal model on a text, beside `xz -9`.

    bits per byte = total negative log-likelihood of the text's tokens / ln 2 / its UTF-8 bytes

which does not depend on the tokenizer; perplexity is per token and does.
"""

import lzma
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from pytitans.data.text import Document
from pytitans.data.tokenizer import check_vocabulary
from pytitans.data.windows import IGNORED, ScoredWindows, tokenize


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    documents: Sequence[Document],
    *,
    length: int,
    stride: int | None = None,
    batch_size: int = 8,
    bf16: bool = False,
    progress: bool = True,
) -> dict[str, float | int]:
    """Scores every token of the documents once, in windows of `length` tokens.

    A window begins `stride` tokens after the one before and scores what it adds (default: windows
    that share one token). Deterministic. Returns bits_per_byte, perplexity, xz_bits_per_byte,
    tokens, bytes, length and stride.
    """
    check_vocabulary(tokenizer, model.config.get_text_config().vocab_size)
    text = tokenize(tokenizer, documents, length)
    windows = ScoredWindows(text, length, stride)
    nats = 0.0
    batches = DataLoader(windows, batch_size=batch_size)
    with scoring(model, bf16), tqdm(total=text.tokens, unit="token", disable=not progress) as bar:
        for batch in batches:
            labels = batch["labels"].to(model.device)
            logits = model(input_ids=batch["input_ids"].to(model.device), use_cache=False).logits
            nats += window_nll(logits, labels).sum(dtype=torch.float64).item()
            bar.update(int((labels[:, 1:] != IGNORED).sum()))
    return {
        "bits_per_byte": nats / math.log(2) / text.bytes,
        "perplexity": math.exp(min(nats / text.tokens, 700)),
        "xz_bits_per_byte": xz_bits_per_byte(documents),
        "tokens": text.tokens,
        "bytes": text.bytes,
        "length": length,
        "stride": windows.stride,
    }


def window_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """The negative log-likelihood, in nats, that each window [B] gives to its scored labels."""
    nll = nn.functional.cross_entropy(
        logits[:, :-1].mT.float(), labels[:, 1:], ignore_index=IGNORED, reduction="none"
    )
    return nll.sum(dim=1)


def xz_bits_per_byte(documents: Sequence[Document]) -> float:
    """What `xz -9` makes of the documents, one after another in one file."""
    data = "".join(document.text for document in documents).encode()
    return 8 * len(lzma.compress(data, preset=9)) / len(data)


@contextmanager
def scoring(model: PreTrainedModel, bf16: bool) -> Iterator[None]:
    """The model in eval mode, without gradients, in bf16 autocast if asked; then as it was."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(), torch.autocast(model.device.type, torch.bfloat16, bf16):
            yield
    finally:
        model.train(was_training)
