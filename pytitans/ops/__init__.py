"""The memory operator: functions of tensors. The one place where a backend is chosen.

    retrieved, state = neural_memory(q, k, v, lr, log_momentum, log_decay, state, chunk_size=64)

`naive` is the definition; `chunk` the matmul form; `online` the exact per-token form of a linear
memory. All share one signature and are tested against the definition.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pytitans.ops.chunk import chunk_memory
from pytitans.ops.naive import (
    ACTIVATIONS,
    NORM_EPS,
    Activation,
    Gate,
    MemoryState,
    Norm,
    Objective,
    apply_memory,
    initial_state,
    naive_memory,
)
from pytitans.ops.online import online_memory

__all__ = ["MemoryState", "initial_state", "neural_memory", "retrieve"]

Backend = Literal["auto", "naive", "chunk"]


def neural_memory(
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
    backend: Backend = "auto",
) -> tuple[Float[Tensor, "B T H V"], MemoryState]:
    """Writes every token into the memory and reads it back with every query (Titans, eqs. 12-18).

    u_t = grad of the loss at the memory as it stood when t's chunk began;
    S_t = momentum_t S_{t-1} - lr_t u_t;  M_t = decay_t M_{t-1} + S_t;  retrieved_t = M_t(q_t).

    Args:
        q, k: queries and keys [B, T, H, K]; a step of lr is stable on keys of norm 1.
        v: values [B, T, H, V].
        lr: step size >= 0, [B, T, H], or one for each memory layer, [B, T, H, L]; None: no step.
        log_momentum: log of the factor on S, <= 0, likewise; None: no momentum.
        log_decay: log of the factor on M, <= 0, likewise; None: nothing is forgotten.
        state: where to go on from; `initial_state(M)` for a sequence's start.
        chunk_size: tokens that share one gradient point. It changes the result, so a trained model
            is to be used with the one it was trained with.
        objective: "l2", 0.5 |M(k) - v|^2, or "dot", -<M(k), v>.
        activation: between the memory's layers, "silu" or "gelu" (erf).
        norm: (weight, bias), each [H, V]: M(x) = x + LayerNorm(MLP(x)); needs K = V.
        norm_eps: what LayerNorm adds to the variance. The gradient in the MLP is at most
            weight / sqrt(norm_eps) times the error: the smaller, the less a step is bounded.
        online: gradients at M_{t-1}: depth 1, no norm. chunk_size is then only a tile.
        mask: False where a token does not exist: state and position stay as they are there and the
            answer is 0. Rows may have gaps anywhere.
        backend: "naive" (the definition, slow), "chunk" (matmuls), or "auto".

    Returns:
        What was retrieved, [B, T, H, V] in v's dtype, and the state after the last token.
        Cutting a sequence at any token and feeding the pieces one after another changes nothing.

    Raises:
        ValueError: shapes that disagree, an unknown option, chunk_size < 1, NaN in the inputs.
    """
    check_inputs(q, k, v, (lr, log_momentum, log_decay), state, norm, mask)
    check_options(chunk_size, objective, activation, online, len(state.M), norm, norm_eps)
    if q.shape[1] == 0:
        return v.new_zeros(v.shape), state
    op = choose(backend, online)
    with torch.autocast(q.device.type, enabled=False):  # it would round the gates' products
        return op(
            q, k, v, lr, log_momentum, log_decay, state,
            chunk_size=chunk_size, objective=objective, activation=activation,
            norm=norm, norm_eps=norm_eps, online=online, mask=mask,
        )  # fmt: skip


def choose(backend: str, online: bool) -> Callable:
    """The definition if asked for by name; else the matmul form, exact per token if online."""
    if backend == "naive":
        return naive_memory
    if backend in ("auto", "chunk"):
        return online_memory if online else chunk_memory
    raise ValueError(f"backend={backend!r} is unknown: choose 'auto', 'naive' or 'chunk'")


def retrieve(
    q: Float[Tensor, "B T H K"],
    state: MemoryState,
    *,
    activation: Activation = "silu",
    norm: Norm | None = None,
    norm_eps: float = NORM_EPS,
) -> Float[Tensor, "B T H V"]:
    """M(q) at the state's memory, without writing (eq. 15). Result in q's dtype."""
    if q.ndim != 4 or q.shape[-1] != state.M[0].shape[-2]:
        raise ValueError(
            f"q has shape {tuple(q.shape)}; the memory reads [B, T, H, {state.M[0].shape[-2]}]"
        )
    affine = None if norm is None else tuple(x[:, None].to(q.dtype) for x in norm)
    M = tuple(W.to(q.dtype) for W in state.M)
    return apply_memory(M, q.transpose(1, 2), activation, affine, norm_eps).transpose(1, 2)


def check_inputs(q, k, v, gates, state, norm, mask) -> None:
    if q.ndim != 4 or k.shape != q.shape or v.shape[:3] != q.shape[:3] or v.ndim != 4:
        raise ValueError(
            "q, k and v are [B, T, H, K], [B, T, H, K] and [B, T, H, V]; "
            f"got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    B, T, H, K = q.shape
    V, L = v.shape[-1], len(state.M)
    widths = [tuple(W.shape) for W in state.M]
    chained = all(a[-1] == b[-2] for a, b in pairwise(widths))
    if not L or any(w[:2] != (B, H) for w in widths) or not chained:
        raise ValueError(f"the memory's weights are [{B}, {H}, in, out] in a chain; got {widths}")
    if widths[0][-2] != K or widths[-1][-1] != V:
        raise ValueError(
            f"the memory maps {widths[0][-2]} to {widths[-1][-1]}, the tokens {K} to {V}"
        )
    for name, gate in zip(("lr", "log_momentum", "log_decay"), gates, strict=True):
        if gate is not None and gate.shape not in ((B, T, H), (B, T, H, L)):
            raise ValueError(
                f"{name} has shape {tuple(gate.shape)}; expected {(B, T, H)} or {(B, T, H, L)}"
            )
    if norm is not None:
        if K != V:
            raise ValueError(f"norm adds the query to the answer and needs K = V; got {K} and {V}")
        if any(x.shape != (H, V) for x in norm):
            raise ValueError(
                f"norm is (weight, bias), each {(H, V)}; got {[x.shape for x in norm]}"
            )
    if mask is not None and (mask.shape != (B, T) or mask.dtype != torch.bool):
        raise ValueError(f"mask is a boolean {(B, T)}; got {mask.dtype} {tuple(mask.shape)}")
    if q.device.type == "cpu" and not torch.compiler.is_compiling():  # elsewhere it would wait
        for name, x in (("q", q), ("k", k), ("v", v)):
            if x.detach().sum().isnan():
                raise ValueError(
                    f"{name} holds NaN (or opposite infinities); the memory would keep it"
                )


def check_options(chunk_size, objective, activation, online, layers, norm, norm_eps) -> None:
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} is not a number of tokens: use 1 or more")
    if objective not in ("l2", "dot"):
        raise ValueError(f"objective={objective!r} is unknown: choose 'l2' or 'dot'")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is unknown: choose from {sorted(ACTIVATIONS)}")
    if norm is not None and not norm_eps > 0:
        raise ValueError(f"norm_eps={norm_eps} must be above 0")
    if online and (layers > 1 or norm is not None):
        raise ValueError("online=True is exact for a linear memory only: one layer, no norm")
