"""What the gates alone decide: how much of the chunk's start, and of each write, is left later.

    E_ij = prod_{j<l<=i} momentum_l,   A_ij = prod_{j<l<=i} decay_l   (j <= i, else 0)
    G = A E diag(lr),   mu and beta the running products of momentum and decay,   phi = A mu

A token that does not exist (`mask`) has lr 0, decay and momentum 1, and its row of E and mu left
out of the sums that make G and phi: S is not added to M there. Nothing is divided by a product of
gates, which may be 0. Axes: see `pytitans.shapes`.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

LOG_ZERO = -30.0  # a gate below e^-30 is 0: sums of larger logarithms would drown their neighbours


class SurpriseGates(NamedTuple):
    """What is left of S in M at each token, and after the last one what is left in S."""

    phi: Float[Tensor, "*b C 1"]  # of S, in M
    end: Float[Tensor, "*b 1 1"]  # of S, in S
    end_writes: Float[Tensor, "*b C 1"]  # of each write, in S


class ChunkGates(NamedTuple):
    """How much of the chunk's start, and of each write in it, is left at each token."""

    beta: Float[Tensor, "*b C 1"]  # of M, in M
    writes: Float[Tensor, "*b C C"]  # G: of each write, in M
    surprise: SurpriseGates | None  # None: momentum is switched off

    def map(self, f: Callable[[Tensor], Tensor]) -> "ChunkGates":
        s = self.surprise
        return ChunkGates(
            f(self.beta), f(self.writes), None if s is None else SurpriseGates(*map(f, s))
        )

    def tensors(self) -> list[Tensor]:
        return [self.beta, self.writes, *(self.surprise or ())]


def decay_matrix(log_gate: Float[Tensor, "*b C"]) -> Float[Tensor, "*b C C"]:
    """`out[i, j]` is the product of the gates in (j, i] for j <= i, and 0 above the diagonal."""
    closed = log_gate < LOG_ZERO
    total = log_gate.masked_fill(closed, 0.0).double().cumsum(-1)
    closures = closed.cumsum(-1)
    span = (total[..., :, None] - total[..., None, :]).to(log_gate.dtype)
    lower = torch.ones(span.shape[-2:], dtype=torch.bool, device=span.device).tril()
    keep = lower & (closures[..., :, None] == closures[..., None, :])
    return span.masked_fill(~keep, -torch.inf).exp()  # mask before exp: the upper half overflows


def running_product(log_gate: Float[Tensor, "*b C"]) -> Float[Tensor, "*b C 1"]:
    closed = (log_gate < LOG_ZERO).cumsum(-1) > 0
    return log_gate.cumsum(-1).masked_fill(closed, -torch.inf).exp()[..., None]


def chunk_gates(lr, log_momentum, log_decay, mask=None) -> ChunkGates:
    """From gates [..., C]; `mask` broadcasts against them."""
    if mask is not None:
        lr = lr.masked_fill(~mask, 0.0)
        log_decay = None if log_decay is None else log_decay.masked_fill(~mask, 0.0)
        log_momentum = None if log_momentum is None else log_momentum.masked_fill(~mask, 0.0)
    A = decay_matrix(torch.zeros_like(lr) if log_decay is None else log_decay)
    beta = torch.ones_like(lr)[..., None] if log_decay is None else running_product(log_decay)
    if log_momentum is None:
        return ChunkGates(beta, A * lr[..., None, :], None)
    mu, in_S = running_product(log_momentum), decay_matrix(log_momentum) * lr[..., None, :]
    adds_S = A if mask is None else A * mask[..., None, :]
    surprise = SurpriseGates(adds_S @ mu, mu[..., -1:, :], in_S[..., -1, :, None])
    return ChunkGates(beta, adds_S @ in_S, surprise)
