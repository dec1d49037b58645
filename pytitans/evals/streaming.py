"""Reading with a model piece by piece through its cache: a length costs time and no memory.

Whatever keeps a cache can be read with: Titans, Hugging Face's Transformers with whole, windowed or
hybrid caches, Mamba. Feeding pieces equals feeding the whole text. Memory is flat where the cache
is (Titans, sliding windows, state spaces); the cache of full attention grows with the text, so that
such a model is given a `window`: it then reads the last `window` tokens alone.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pytitans.evals.task import Example, collate

PIECE = 4096  # tokens that are read at once, of all rows together
LOGITS = 2**22  # that are held at once


class Stream:
    """A model and what it has read so far.

    >>> stream = Stream(model)
    >>> for piece in ids.split(4096, dim=1):
    >>>     logits = stream.read(piece)
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        names = inspect.signature(model.forward).parameters
        self.cache_name = "past_key_values" if "past_key_values" in names else "cache_params"
        self.can_choose = "logits_to_keep" in names
        if self.cache_name not in names:
            raise ValueError(f"{type(model).__name__} has no cache to stream with")
        self.cache = None

    def read(self, ids: Tensor, keep: Tensor | None = None) -> Tensor:
        """ids [B, T], read after all before; the logits [B, N, V] at the places `keep` [N] of them
        (None: at all)."""
        options = {} if self.cache is None else {self.cache_name: self.cache}
        if keep is not None and self.can_choose:
            options["logits_to_keep"] = keep
        out = self.model(input_ids=ids, use_cache=True, **options)
        self.cache = out[self.cache_name]
        if keep is not None and not self.can_choose:
            return out.logits[:, keep]
        return out.logits

    def skip(self, ids: Tensor) -> None:
        """Reads without looking at what the model says."""
        self.read(ids, torch.tensor([ids.shape[1] - 1], device=ids.device))


class Score(NamedTuple):
    """accuracy: share of answers with all tokens right; exact: whether all are; nll: nats per asked
    token; last: whether the last answer is right."""

    accuracy: float
    exact: float
    last: float
    nll: float


def context_limit(model: PreTrainedModel) -> int | None:
    """Tokens that the model can look back on; None where its cache has constant size, whatever the
    length: Titans, state spaces, sliding windows, and hybrids of these."""
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if config.model_type == "titans" or limit is None:
        return None
    kinds = set(getattr(config, "layer_types", None) or [])
    constant = {"sliding_attention", "chunked_attention", "linear_attention", "mamba"}
    if kinds:
        return None if kinds <= constant else limit
    return None if getattr(config, "sliding_window", None) else limit


def position_limit(model: PreTrainedModel) -> int | None:
    """The length at which a model with learned positions (GPT-2) has none left."""
    relative = getattr(model.config.get_text_config(), "rope_parameters", None)
    return None if relative else context_limit(model)


def score_examples(
    model: PreTrainedModel,
    examples: list[Example],
    *,
    window: int | None = None,
    piece: int = PIECE,
    advance: Callable[[int], Any] = lambda tokens: None,
) -> list[Score]:
    """Reads the examples as one batch, and scores each.

    window: only the last so many tokens are read (None: all). advance: is told how many tokens have
    been dealt with, now and then. For a model in eval mode, under inference_mode.
    """
    ids, targets = collate(examples)
    asked = torch.zeros_like(targets, dtype=torch.bool)
    for row, example in enumerate(examples):
        asked[row, example.at] = True
    columns = asked.any(0).nonzero()[:, 0]
    dropped = max(0, ids.shape[1] - window) if window else 0
    if dropped > int(columns[0]):
        raise ValueError(
            f"a window of {window} tokens leaves out questions: the first is token {columns[0]} of "
            f"{ids.shape[1]}"
        )
    right = torch.zeros_like(asked)
    nll = torch.zeros(ids.shape, dtype=torch.float32)
    size = max(1, piece // len(examples))
    most = max(1, LOGITS // (model.config.get_text_config().vocab_size * len(examples)))
    if len(columns) > most:
        size = min(size, most)
    stream, end = Stream(model), int(columns[-1]) + 1
    advance(dropped * len(examples))
    for start in range(dropped, end, size):
        part = ids[:, start : min(start + size, end)].to(model.device)
        keep = asked[:, start : start + part.shape[1]].any(0).nonzero()[:, 0]
        if not len(keep):
            stream.skip(part)
        else:
            logits = stream.read(part, keep.to(model.device)).float()
            wanted = targets[:, start + keep]
            right[:, start + keep] = logits.argmax(-1).cpu() == wanted
            chosen = wanted.clamp(min=0).to(logits.device)[..., None]
            log_p = logits.gather(2, chosen) - logits.logsumexp(-1, keepdim=True)
            nll[:, start + keep] = -log_p[..., 0].cpu()
        advance(part.numel())
    advance((ids.shape[1] - end) * len(examples))
    return [score(example, right[i], nll[i]) for i, example in enumerate(examples)]


def score(example: Example, right: Tensor, nll: Tensor) -> Score:
    """right, nll [T]: whether the likeliest token is the expected one, and its nats."""
    at = torch.from_numpy(example.at)
    answers = torch.ones(example.answers, dtype=torch.bool)
    number = torch.from_numpy(example.answer)
    wrong = number[~right[at]]
    answers[wrong] = False
    return Score(
        accuracy=float(answers.float().mean()),
        exact=float(answers.all()),
        last=float(answers[-1]),
        nll=float(nll[at].mean(dtype=torch.float64)),
    )
