"""Neural memory, one token at a time: the definition every faster path is tested against.

    u_t = grad_M loss(M; k_t, v_t)         at the memory as it stood when t's chunk began
    S_t = momentum_t S_{t-1} - lr_t u_t    surprise
    M_t = decay_t M_{t-1} + S_t            memory
    o_t = M_t(q_t)                         write, then read

with loss = 0.5 |M(k) - v|^2 ("l2") or -<M(k), v> ("dot"). Titans, eqs. 12-15
(https://arxiv.org/abs/2501.00663): momentum is the paper's eta; decay is its 1 - alpha, the factor
the memory is multiplied by; lr is 2 theta, because the 1/2 in the loss makes lr the delta rule's
beta. Momentum and decay arrive as logarithms: products become sums, and the log of a sigmoid
neither overflows nor reaches log(0).

M is an MLP without biases: a tuple of weights, one entry being the linear memory; with `norm` it is
M(x) = x + LayerNorm(MLP(x)). Axes: see `pytitans.shapes`.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from torch.func import grad, vmap

Weights = tuple[Float[Tensor, "B H _ _"], ...]
Norm = tuple[Float[Tensor, "H V"], Float[Tensor, "H V"]]
Gate = Float[Tensor, "B T H"] | Float[Tensor, "B T H L"] | None
Objective = Literal["l2", "dot"]
Activation = Literal["silu", "gelu"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu}
NORM_EPS = 1e-5  # of the LayerNorm inside the memory, unless told


class MemoryState(NamedTuple):
    """All that a cut at any token needs.

    M: the memory after the last token, one [B, H, in, out] weight per layer.
    S: its surprise, shaped like M. Untouched while momentum is switched off.
    anchor: M as it stood when the open chunk began: where the chunk's gradients are taken.
    position: tokens already read of the open chunk, in [0, chunk_size): an int where all rows
        agree, else one per row, [B].
    """

    M: Weights
    S: Weights
    anchor: Weights
    position: int | Tensor = 0


def initial_state(M: Weights) -> MemoryState:
    """The state before the first token: the memory as given, no surprise."""
    M = tuple(M)
    return MemoryState(M, tuple(torch.zeros_like(W) for W in M), M, 0)


def apply_memory(
    M: tuple[Tensor, ...], x: Tensor, activation: Activation, norm, norm_eps: float
) -> Tensor:
    """M(x). `norm`: None, or (weight, bias) that broadcast against the result."""
    first, *rest = M
    y = x @ first
    for W in rest:
        y = ACTIVATIONS[activation](y) @ W
    if norm is None:
        return y
    weight, bias = norm
    return x + F.layer_norm(y, y.shape[-1:], eps=norm_eps) * weight + bias


def associative_loss(
    M, k, v, norm, objective: Objective, activation: Activation, norm_eps: float
) -> Tensor:
    prediction = apply_memory(M, k, activation, norm, norm_eps)
    if objective == "dot":
        return -(prediction * v).sum()
    return 0.5 * (prediction - v).square().sum()


def momentary_surprise(M, k_BHK, v_BHV, norm, *options):
    """The gradient of one token's loss in M, for each row and head by itself."""

    def loss(M, k, v, norm):
        return associative_loss(M, k, v, norm, *options)

    over_heads = vmap(grad(loss), in_dims=(0, 0, 0, None if norm is None else 0))
    return vmap(over_heads, in_dims=(0, 0, 0, None))(M, k_BHK, v_BHV, norm)


def gate_per_layer(gate: Tensor | None, off: float, like: Tensor, layers: int) -> Tensor:
    """[B, T, H] or [B, T, H, L] or None -> [L, B, T, H, 1, 1], in the state's dtype."""
    if gate is None:
        gate = like.new_full(like.shape[:3], off)
    if gate.ndim == 3:
        gate = gate[..., None].expand(*gate.shape, layers)
    return gate.movedim(-1, 0)[..., None, None]


def naive_memory(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    lr: Gate,
    log_momentum: Gate,
    log_decay: Gate,
    state: MemoryState,
    *,
    chunk_size: int,
    objective: Objective = "l2",
    activation: Activation = "silu",
    norm: Norm | None = None,
    norm_eps: float = NORM_EPS,
    online: bool = False,
    mask: Bool[Tensor, "B T"] | None = None,
) -> tuple[Float[Tensor, "B T H V"], MemoryState]:
    """The memory's answer to every query, and its state after the last token.

    A gate of None is switched off: no step, no momentum, nothing forgotten. `online` takes every
    gradient at the memory before its token. A token whose `mask` is False does not exist: it leaves
    state and position exactly as they were, and its answer is 0.
    """
    M, S, anchor, position = state
    L, B, wide = len(M), q.shape[0], M[0].dtype
    q_, k_, v_ = (x.to(wide) for x in (q, k, v))
    lr_ = gate_per_layer(lr, 0.0, q_, L)
    momentum = gate_per_layer(log_momentum, -torch.inf, q_, L).exp()
    decay = gate_per_layer(log_decay, 0.0, q_, L).exp()
    row_position = torch.as_tensor(position, device=q.device).expand(B)
    retrieved = []
    for t in range(q.shape[1]):
        real = torch.ones_like(row_position, dtype=torch.bool) if mask is None else mask[:, t]
        starts = (row_position == 0) | online
        anchor = pick(starts & real, M, anchor)
        u = momentary_surprise(anchor, k_[:, t], v_[:, t], norm, objective, activation, norm_eps)
        S_t = tuple(momentum[i, :, t] * S[i] - lr_[i, :, t] * u[i] for i in range(L))
        M_t = tuple(decay[i, :, t] * M[i] + S_t[i] for i in range(L))
        M = pick(real, M_t, M)
        S = S if log_momentum is None else pick(real, S_t, S)
        row_position = torch.where(real, (row_position + 1) % chunk_size, row_position)
        affine = None if norm is None else tuple(x[:, None] for x in norm)
        answer = apply_memory(M, q_[:, t, :, None], activation, affine, norm_eps)[:, :, 0]
        retrieved.append(answer.masked_fill(~real[:, None, None], 0.0))
    if online:  # every token is a chunk of its own
        row_position = torch.zeros_like(row_position)
    anchor = pick(row_position == 0, M, anchor)  # the open chunk is empty: it begins at M
    if mask is None and isinstance(position, int):
        position = 0 if online else (position + q.shape[1]) % chunk_size
    else:
        position = row_position
    return torch.stack(retrieved, dim=1).to(v.dtype), MemoryState(M, S, anchor, position)


def pick(rows: Bool[Tensor, "B"], new: Weights, old: Weights) -> Weights:
    return tuple(
        torch.where(rows[:, None, None, None], a, b) for a, b in zip(new, old, strict=True)
    )
