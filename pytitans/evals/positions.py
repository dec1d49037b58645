"""Loss by position: what has a model gained, a million tokens on, from all it has read before?

Bits per byte and perplexity of whole documents, one after another, in bins of positions. The
measure is an old one (e.g. Kaplan et al., arXiv 2001.08361, figure 20); Titans' claim is that it
keeps falling. The state is carried from a document's first token to its last.

A model whose cache grows cannot do that: it reads in windows of `window` tokens, each begun half a
window after the one before and scored in its new half, so that every token beyond the first window
has at least half a window before it.

Bins grow by factors of 2: tokens 0 to 1,023, 1,024 to 2,047, 2,048 to 4,095 and so on. In each,
over all documents that reach it: nats, tokens, and the UTF-8 bytes they stand for. Later bins hold
fewer documents, so compare models in a bin, not bins of a model, unless the documents are the same.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from pytitans.data.tokenizer import encode, is_bytes
from pytitans.evals.haystack import start_of
from pytitans.evals.streaming import LOGITS, PIECE, Stream

FIRST_BIN = 1024


def score_document(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    text: str,
    *,
    window: int | None = None,
    piece: int = PIECE,
    advance: Callable[[int], Any] = lambda tokens: None,
) -> list[dict[str, float | int]]:
    """The document's bins: first, last (tokens, inclusive), tokens, bytes, nats.

    window: read in windows of so many tokens (None: as one stream). For a model in eval mode, under
    inference_mode. advance: is told of bytes that have been read, now and then.
    """
    ids = encode(tokenizer, text)
    sizes = token_bytes(tokenizer, text, ids)
    start = start_of(tokenizer)
    if not len(start):  # nothing comes before the first token: it is not scored
        sizes = sizes[1:]
    stream = torch.from_numpy(np.concatenate([start, ids]).astype(np.int64))
    parts, done = stream_nll(model, stream, piece), 0
    if window is not None:
        parts = window_nll(model, stream, window)
    found = [torch.zeros(0)]
    for part in parts:
        found.append(part)
        advance(int(sizes[done : done + len(part)].sum()))
        done += len(part)
    return binned(torch.cat(found).numpy(), sizes)


def stream_nll(model: PreTrainedModel, ids: Tensor, piece: int) -> Iterator[Tensor]:
    """Nats of each of the ids [T] but the first, given all before it, in pieces."""
    stream = Stream(model)
    size = max(1, min(piece, LOGITS // model.config.get_text_config().vocab_size))
    for start in range(0, len(ids) - 1, size):
        part = ids[start : start + size + 1]
        logits = stream.read(part[None, :-1].to(model.device))[0]
        yield nll_of(logits, part[1:])


def window_nll(model: PreTrainedModel, ids: Tensor, window: int) -> Iterator[Tensor]:
    """The same, given half a window of tokens before it or more (or all there are)."""
    if window < 2:
        raise ValueError(f"window={window} must be 2 or more")
    done = 1  # the next token to score
    while done < len(ids):
        stop = min(len(ids), done + window // 2 if done > 1 else window)
        first = max(0, stop - window)
        part = ids[first:stop]
        logits = model(input_ids=part[None, :-1].to(model.device), use_cache=False).logits[0]
        yield nll_of(logits[done - 1 - first :], ids[done:stop])
        done = stop


def nll_of(logits: Tensor, ids: Tensor) -> Tensor:
    wanted = ids.to(logits.device)
    return torch.nn.functional.cross_entropy(logits.float(), wanted, reduction="none").cpu()


def token_bytes(tokenizer: PreTrainedTokenizerFast, text: str, ids: np.ndarray) -> np.ndarray:
    """[T]: bytes of the text that each token adds; those of a character count where it ends."""
    if is_bytes(tokenizer):
        return np.ones(len(ids), dtype=np.int64)
    found = tokenizer(
        text,
        add_special_tokens=False,
        split_special_tokens=True,
        return_offsets_mapping=True,
        verbose=False,
    )
    ends = np.asarray([end for _, end in found["offset_mapping"]], dtype=np.int64)
    before = np.cumsum([0, *[len(character.encode()) for character in text]])
    reached = np.maximum.accumulate(before[ends])
    if len(reached):
        reached[-1] = before[-1]
    return np.diff(reached, prepend=0)


def binned(nats: np.ndarray, sizes: np.ndarray) -> list[dict[str, float | int]]:
    bins, first, width = [], 0, FIRST_BIN
    while first < len(nats):
        part = slice(first, first + width)
        bins.append(
            {
                "first": first,
                "last": first + width - 1,
                "tokens": len(nats[part]),
                "bytes": int(sizes[part].sum()),
                "nats": float(nats[part].sum(dtype=np.float64)),
            }
        )
        first += width
        width = first
    return bins
