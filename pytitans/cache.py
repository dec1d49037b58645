"""TitansCache: everything that outlives a call, of a size that does not grow with what was read."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from pytitans.snapshot import (
    Snapshot,
    describe_snapshot,
    model_fingerprint,
    read_snapshot,
    write_snapshot,
)
from pytitans.state import compact, map_state, tensors_of


class TitansCacheLayer(CacheLayerMixin):
    """One block's state, see `pytitans.blocks`; None before the first token."""

    is_compileable = False
    is_sliding = False

    def __init__(self):
        super().__init__()
        self.state: Any = None
        self.seen = 0

    def update(self, *args, **kwargs):
        raise NotImplementedError("a Titans block hands over its whole state: set `layer.state`")

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to prepare: blocks make their own first state."""

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1  # as transformers says "no limit"

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def change(self, function) -> None:
        self.state = map_state(function, self.state)

    def reset(self) -> None:
        self.state, self.seen = None, 0

    def offload(self) -> None:
        self.change(lambda x: x.to("cpu"))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.change(lambda x: x.index_select(0, indices.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.change(lambda x: x.repeat_interleave(repeats, 0))

    def crop(self, *args, **kwargs) -> None:
        raise ValueError("what a memory has read cannot be unread: fork the cache beforehand")


class TitansCache(Cache):
    """The states of a model's blocks after the tokens read so far.

    >>> out = model(ids, use_cache=True)
    >>> model(more_ids, cache=out.cache)  # reads on

    Feeding a text in pieces through one cache equals feeding it whole. As a file it outlives the
    process:

    >>> cache.save("book.safetensors", model, metadata={"title": "Middlemarch"})
    >>> cache = TitansCache.load("book.safetensors", model)
    """

    def __init__(self, num_layers: int):
        self.block_layers = [TitansCacheLayer() for _ in range(num_layers)]
        self.before = 0  # tokens read before the sequence that `generate` is told of
        super().__init__(layers=list(self.block_layers))

    @property
    def states(self) -> list[Any]:
        return [layer.state for layer in self.block_layers]

    @property
    def tokens(self) -> int:
        """Tokens read, padding included, whatever `generate` has been told of."""
        return self.before + self.get_seq_length()

    def advance(self, states: list[Any], tokens: int) -> None:
        """Takes the blocks' new states, `tokens` further on."""
        for layer, state in zip(self.block_layers, states, strict=True):
            layer.state = state if torch.compiler.is_compiling() else compact(state)
            layer.seen += tokens

    def fork(self) -> "TitansCache":
        """A second cache that shares nothing: reading on with one leaves the other as it is."""
        return self.mapped(torch.clone)

    def as_start(self) -> "TitansCache":
        """A fork from which a new sequence starts: `generate` takes all its input_ids to be new,
        where otherwise it takes them to begin with what the cache has read.

        >>> model.generate(question_ids, cache=cache.as_start())
        """
        start = self.fork()
        start.before = self.tokens
        for layer in start.block_layers:
            layer.seen = 0
        return start

    def detach(self) -> "TitansCache":
        """The same states without their history: where back-propagation through time is cut."""
        return self.mapped(torch.detach)

    def reset(self) -> None:
        super().reset()
        self.before = 0

    def to(self, device: torch.device | str) -> "TitansCache":
        """The same states on another device."""
        return self.mapped(lambda x: x.to(device))

    def save(
        self,
        path: str | Path,
        model: PreTrainedModel,
        *,
        metadata: Mapping[str, Any] | None = None,
        fingerprint: str | None = None,
    ) -> None:
        """Writes the states to a safetensors file, which a crash leaves old or new, never broken.

        metadata: what JSON can hold, for the caller alone; `describe` returns it. fingerprint: the
        model's, from `model_fingerprint`, for a caller who saves often and knows it already.
        """
        snapshot = Snapshot(self.states, self.tokens)
        write_snapshot(snapshot, path, fingerprint or model_fingerprint(model), metadata or {})

    @classmethod
    def load(
        cls, path: str | Path, model: PreTrainedModel, *, fingerprint: str | None = None
    ) -> "TitansCache":
        """The states that `save` wrote, on the model's device: reading on equals never having
        stopped. ValueError, naming the file, if it is damaged or another model's."""
        states, tokens = read_snapshot(path, fingerprint or model_fingerprint(model))
        cache = cls(len(states))
        cache.advance(states, tokens)
        return cache if model.device.type == "cpu" else cache.to(model.device)

    @staticmethod
    def describe(path: str | Path) -> dict[str, Any]:
        """What a file says of itself, without a model: version, model (its fingerprint), tokens,
        metadata, bytes. Only the header is read; whether the rest is whole `load` finds out."""
        return describe_snapshot(path)

    @property
    def nbytes(self) -> int:
        """Bytes held by the states; what several of them share counts once."""
        storages = [x.untyped_storage() for x in tensors_of(self.states)]
        return sum({x.data_ptr(): x.nbytes() for x in storages}.values())

    @property
    def batch_size(self) -> int:
        """Rows of the batch; 0 before the first token."""
        return next((x.shape[0] for x in tensors_of(self.states)), 0)

    def for_rows(self, rows: int) -> "TitansCache":
        """A cache whose every row serves as many rows of a batch: itself if there are as many."""
        own = self.batch_size
        if own in (0, rows):
            return self
        if rows % own:
            raise ValueError(
                f"a cache of {own} rows does not serve a batch of {rows}: choose rows by "
                "`cache.batch_select_indices`"
            )
        return self.mapped(lambda x: x.repeat_interleave(rows // own, 0))

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "TitansCache":
        """A second cache, of these states with every tensor changed."""
        copy = TitansCache(len(self.block_layers))
        copy.advance([map_state(change, s) for s in self.states], self.get_seq_length())
        copy.before = self.before
        return copy

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.block_layers[layer_idx].seen
