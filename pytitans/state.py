"""States: nested tuples of tensors whose first axis is the batch, and what is done to them."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


def map_state(change: Callable[[Tensor], Tensor], state: Any) -> Any:
    """The same nesting with every tensor changed; integers and None stay."""
    if isinstance(state, Tensor):
        return change(state)
    if isinstance(state, tuple):
        parts = [map_state(change, x) for x in state]
        return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)
    return state


def tensors_of(state: Any) -> Iterator[Tensor]:
    """All tensors of a nesting of tuples and lists, from left to right."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, (tuple, list)):
        for part in state:
            yield from tensors_of(part)


def compact(state: Any) -> Any:
    """The same tensors, but for views into storage of more than twice their size: these are
    copied, so that a state does not keep alive the call that it comes from."""
    copies: dict[int, Tensor] = {}

    def own(x: Tensor) -> Tensor:
        if x.untyped_storage().nbytes() <= 2 * x.numel() * x.itemsize:
            return x
        return copies.setdefault(id(x), x.clone())

    return map_state(own, state)


def batch_of(state: Any, batch_size: int) -> Any:
    """A state of one row, seen by each of `batch_size` rows. Others stay as they are."""
    return map_state(lambda x: x.expand(batch_size, *x.shape[1:]) if x.shape[0] == 1 else x, state)


def pick_rows(rows: bool | Tensor, new: Any, old: Any) -> Any:
    """`new` in the rows marked, `old` in the others; rows: a bool for all, or [B]."""
    if isinstance(rows, bool):
        return new if rows else old
    if isinstance(new, Tensor) or isinstance(old, Tensor):
        a, b = (torch.as_tensor(x, device=rows.device) for x in (new, old))
        return torch.where(rows.reshape(-1, *[1] * (max(a.ndim, b.ndim) - 1)), a, b)
    if isinstance(new, tuple):
        parts = [pick_rows(rows, a, b) for a, b in zip(new, old, strict=True)]
        return type(new)(*parts) if hasattr(new, "_fields") else tuple(parts)
    if new == old:
        return new
    return torch.where(rows, torch.as_tensor(new), torch.as_tensor(old))


def advance(position: int | Tensor, tokens: int, real: Tensor | None, period: int) -> int | Tensor:
    """Where each row stands in its chunk or segment after `tokens`, of which `real` [B] exist."""
    return (position + (tokens if real is None else real)) % period


def put(past: Any, new: Any, position: int | Tensor, size: int) -> Any:
    """Appends [B, H, t, d] tensors behind each row's first `position` entries of the past.

    Where rows differ, the result is `size` long and what stands behind a row's own is meaningless.
    """
    if isinstance(position, int):
        return map_pairs(lambda a, b: torch.cat([a[:, :, :position].to(b.dtype), b], 2), past, new)
    index = position[:, None] + torch.arange(next(iter(new)).shape[2], device=position.device)

    def scatter(a: Tensor, b: Tensor) -> Tensor:
        wide = b.new_zeros(b.shape[0], b.shape[1], size, b.shape[3])
        wide = torch.cat([a.to(b.dtype), wide[:, :, a.shape[2] :]], 2)
        return wide.scatter(2, index[:, None, :, None].expand(-1, b.shape[1], -1, b.shape[3]), b)

    return map_pairs(scatter, past, new)


def map_pairs(join: Callable[[Tensor, Tensor], Tensor], a: Any, b: Any) -> Any:
    return type(a)(*(join(x, y) for x, y in zip(a, b, strict=True)))
