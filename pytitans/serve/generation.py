"""A prompt read and continued in small steps, so that many requests can take turns.

Each function is an iterator that does a step's work each time it is asked; what it yields is
something to tell the client, or None. Run them under `torch.inference_mode`. Caches that come in
are forked, never written.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from pytitans.cache import TitansCache
from pytitans.serve.text import Writer, document_ids

STEP = 512  # tokens of a prompt that are read at a time
SEEDS = 2**63


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How an answer is drawn; temperature 0 always takes the likeliest token."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    stop: Sequence[str] = field(default=())


@dataclass(frozen=True)
class Read:
    """Tokens of the prompt or the document that were read."""

    tokens: int


@dataclass(frozen=True)
class Written:
    """More of answer `index`; the text may be empty while a character is incomplete."""

    index: int
    text: str


@dataclass(frozen=True)
class Finished:
    """Answer `index` is complete, for OpenAI's reason `stop` or `length`."""

    index: int
    reason: str
    tokens: int


Event = Read | Written | Finished


class Reader:
    """A model and a cache of its own that reads on."""

    def __init__(self, model: PreTrainedModel, cache: TitansCache | None):
        self.model = model
        self.cache = TitansCache(model.config.num_hidden_layers) if cache is None else cache.fork()
        self.logits: Tensor | None = None  # [vocabulary], of the token to come

    @property
    def seen(self) -> int:
        return self.cache.get_seq_length()

    def read(self, ids: Sequence[int]) -> None:
        ids_BT = torch.tensor([ids], device=self.model.device)
        out = self.model(input_ids=ids_BT, cache=self.cache, logits_to_keep=1)
        self.logits = out.logits[0, -1]

    def read_in_steps(self, ids: Sequence[int]) -> Iterator[Read]:
        for start in range(0, len(ids), STEP):
            self.read(ids[start : start + STEP])
            yield Read(len(ids[start : start + STEP]))

    def fork(self) -> "Reader":
        fork = Reader(self.model, self.cache)
        fork.logits = self.logits
        return fork


def read_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    cache: TitansCache | None,
    text: str,
) -> Generator[Read, None, TitansCache]:
    """Reads on; returns the cache after the text."""
    first = cache is None or cache.get_seq_length() == 0
    return (yield from read_ids(model, cache, document_ids(tokenizer, text, first)))


def read_ids(
    model: PreTrainedModel, cache: TitansCache | None, ids: Sequence[int]
) -> Generator[Read, None, TitansCache]:
    """Reads on; returns the cache after the ids."""
    reader = Reader(model, cache)
    yield from reader.read_in_steps(ids)
    return reader.cache


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    cache: TitansCache | None,
    encode: Callable[[bool], list[int]],
    sampling: Sampling,
    *,
    n: int = 1,
    first_index: int = 0,
    advance: bool = False,
) -> Generator[Event | None, None, TitansCache | None]:
    """Reads the prompt, then writes n answers, numbered from first_index.

    encode: called with whether nothing was read before, gives the prompt's ids; may raise.
    Returns, if advance (n = 1), the cache after prompt and answer, else None. An answer that was
    cut at a stop string is read up to there.
    """
    prompt = Reader(model, cache)
    yield from prompt.read_in_steps(encode(prompt.seen == 0))
    after = None
    for index in range(n):
        rereads = advance and sampling.stop
        reader = prompt.fork() if rereads or index < n - 1 else prompt
        text = Writer(tokenizer, sampling.stop)
        yield from write(reader, text, sampling, index, first_index)
        if advance and not text.stopped:
            reader.read(text.ids[-1:])
            after = reader.cache
        elif advance:
            for _ in prompt.read_in_steps(text.ids[: text.kept]):
                yield None
            after = prompt.cache
    return after


def write(
    reader: Reader, text: Writer, sampling: Sampling, index: int, first_index: int
) -> Iterator[Event | None]:
    """One answer. The reader has then read all of it but the last token."""
    generator = torch.Generator().manual_seed((sampling.seed + index) % SEEDS)
    end = end_tokens(reader.model)
    reason = "length"
    for written in range(sampling.max_tokens):
        if written:
            reader.read(text.ids[-1:])
        assert reader.logits is not None  # a prompt has a token or more
        token = choose(reader.logits, sampling, generator)
        yield Written(first_index + index, text.add(token))
        if text.stopped or token in end:
            reason = "stop"
            break
    rest = text.finish()
    if rest:
        yield Written(first_index + index, rest)
    reason = "stop" if text.stopped else reason
    yield Finished(first_index + index, reason, len(text.ids))


def end_tokens(model: PreTrainedModel) -> set[int]:
    """What ends an answer, as for the model's `generate`."""
    settings = getattr(model, "generation_config", None) or model.config
    end = settings.eos_token_id
    if end is None:
        return set()
    return set(end) if isinstance(end, (list, tuple)) else {int(end)}


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """A token, logits [vocabulary]. In float64: a temperature near 0 must not divide 0 by 0."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    logits = logits.cpu().double()
    p = ((logits - logits.max()) / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:
        p, order = p.sort(descending=True, stable=True)
        beyond = p.cumsum(-1) - p >= sampling.top_p
        beyond[0] = False  # the likeliest stays
        drawn = torch.multinomial(p.masked_fill(beyond, 0), 1, generator=generator)
        return int(order[drawn])
    return int(torch.multinomial(p, 1, generator=generator))
