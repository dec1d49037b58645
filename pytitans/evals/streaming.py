"""Reading with a model piece by piece through its cache: a length costs time and no memory.

Whatever keeps a cache can be read with: Titans, Hugging Face's Transformers with whole, windowed or
hybrid caches, Mamba. Feeding pieces equals feeding the whole text. Memory is flat where the cache
is (Titans, sliding windows, state spaces); the cache of full attention grows with the text, so that
such a model is given a `window`: it then reads the last `window` tokens alone.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from pytitans.evals.task import Example

PIECE = 4096  # tokens that are read at once, of all rows together
LOGITS = 2**22  # that are held at once
CACHE_NAMES = "cache", "past_key_values", "cache_params"  # the last two before transformers 5.24


class Stream:
    """A model and what it has read so far.

    >>> stream = Stream(model)
    >>> for piece in ids.split(4096, dim=1):
    >>>     logits = stream.read(piece)
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        names = inspect.signature(model.forward).parameters
        self.can_choose = "logits_to_keep" in names
        found = [name for name in CACHE_NAMES if name in names]
        if not found:
            raise ValueError(f"{type(model).__name__} has no cache to stream with")
        self.cache_name = found[0]
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
    length = max(len(example.ids) for example in examples)
    columns = np.unique(np.concatenate([example.at for example in examples]))
    dropped = max(0, length - window) if window else 0
    if dropped > columns[0]:
        raise ValueError(
            f"a window of {window} tokens leaves out questions: the first is token {columns[0]} of "
            f"{length}"
        )
    size = max(1, piece // len(examples))
    most = max(1, LOGITS // (model.config.get_text_config().vocab_size * len(examples)))
    if len(columns) > most:
        size = min(size, most)
    right = [np.zeros(len(example.at), dtype=bool) for example in examples]
    nll = [np.zeros(len(example.at), dtype=np.float32) for example in examples]
    stream, end = Stream(model), int(columns[-1]) + 1
    advance(dropped * len(examples))
    for start in range(dropped, end, size):
        stop = min(start + size, end)
        part = cut(examples, start, stop).to(model.device)
        keep = columns[slice(*np.searchsorted(columns, (start, stop)))]
        if not len(keep):
            stream.skip(part)
        else:
            logits = stream.read(part, torch.from_numpy(keep - start).to(model.device)).float()
            for row, example in enumerate(examples):
                asked = slice(*np.searchsorted(example.at, (start, stop)))
                place = torch.from_numpy(np.searchsorted(keep, example.at[asked]))
                said = logits[row, place.to(logits.device)]
                wanted = torch.from_numpy(example.expected[asked].astype(np.int64)).to(said.device)
                right[row][asked] = (said.argmax(-1) == wanted).cpu().numpy()
                nll[row][asked] = cross_entropy(said, wanted, reduction="none").cpu().numpy()
        advance(part.numel())
    advance((length - end) * len(examples))
    return [score(*row) for row in zip(examples, right, nll, strict=True)]


def cut(examples: list[Example], start: int, stop: int) -> Tensor:
    """Tokens start to stop of each, 0 after an end: [B, stop - start]. No more of a text is ever a
    tensor, so that millions of tokens cost as many bytes as their ids."""
    ids = np.zeros((len(examples), stop - start), dtype=np.int64)
    for row, example in enumerate(examples):
        part = example.ids[start:stop]
        ids[row, : len(part)] = part
    return torch.from_numpy(ids)


def score(example: Example, right: np.ndarray, nll: np.ndarray) -> Score:
    """right, nll [N]: of each question, whether the likeliest token is expected, and its nats."""
    answers = np.ones(example.answers, dtype=bool)
    answers[example.answer[~right]] = False
    return Score(
        accuracy=float(answers.mean()),
        exact=float(answers.all()),
        last=float(answers[-1]),
        nll=float(nll.mean(dtype=np.float64)),
    )
