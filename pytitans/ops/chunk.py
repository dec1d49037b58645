"""Neural memory a chunk at a time: the matmul form of `pytitans.ops.naive`, for any depth.

Inside a chunk every gradient is taken at the chunk's first memory. There, token j writes to each
layer W the outer product of that layer's input h_j and its error d_j, so the memory at token t is
W_t = beta_t W + phi_t S - sum_{j<=t} G_tj h_j d_j^T, and applying it needs no W_t:

    x_t W_t = beta_t x_t W + phi_t x_t S - sum_{j<=t} G_tj <x_t, h_j> d_j

with weights G, beta, phi that depend on the gates alone (`pytitans.ops.gates`). `ops.chunk_fused`
(C++) or `ops.chunk_plain` computes a run of chunks and its gradients; here the text is put on the
chunks' grid and the state together. Axes: see `pytitans.shapes`.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.compiler import is_compiling

from pytitans.ops import chunk_fused, chunk_plain
from pytitans.ops.chunk_plain import Inputs, Run
from pytitans.ops.naive import NORM_EPS, Activation, Gate, MemoryState, Norm, Objective, pick

ARITY = len(Inputs._fields)


class Plan(NamedTuple):
    """What a call is, but for its tensors."""

    run: Run
    layers: tuple[int, int, int]  # of M, of S (0 without momentum), of the first chunk's own M
    keep: bool  # states, for a backward
    anchor: bool  # whether to return the last chunk's first M


class Chunked(torch.autograd.Function):
    """A run of chunks: `Inputs` and weights -> retrieved, then layers of M, S and the anchor."""

    @staticmethod
    def forward(ctx, plan: Plan, *tensors):
        inputs, weights = Inputs(*tensors[:ARITY]), tensors[ARITY:]
        flat = split([w.flatten(0, 1) for w in weights], plan.layers)
        fused = chunk_fused.available(inputs, list(weights), plan.layers[0])
        form = chunk_fused if fused else chunk_plain
        out, state, kept = form.forward(plan.run, inputs, *flat, keep=plan.keep, anchor=plan.anchor)
        ctx.plan, ctx.form, ctx.inputs = plan, form, len(tensors)
        ctx.save_for_backward(*tensors, *kept)
        ctx.set_materialize_grads(False)
        return out, *(w.unflatten(0, weights[0].shape[:2]) for w in state)

    @staticmethod
    def backward(ctx, *g_results):
        if torch.is_grad_enabled():  # only create_graph=True does that
            raise RuntimeError(
                "the memory's gradient has no derivative: create_graph=True is for backend='naive'"
            )
        plan, saved, (g_out, *g_state) = ctx.plan, ctx.saved_tensors, g_results
        inputs, weights, kept = (
            Inputs(*saved[:ARITY]), saved[ARITY : ctx.inputs], saved[ctx.inputs :]
        )  # fmt: skip
        flat = split([w.flatten(0, 1) for w in weights], plan.layers)
        like = [*flat[0], *flat[1], *(flat[0] if plan.anchor else [])]
        g_flat = [
            torch.zeros_like(w) if g is None else g.flatten(0, 1)
            for g, w in zip(g_state, like, strict=True)
        ]
        g_out = torch.zeros_like(inputs.v) if g_out is None else g_out
        g_inputs, g_weights = ctx.form.backward(
            plan.run, inputs, *flat, kept, g_out, *split(g_flat, plan.layers)
        )
        g_weights = (g.view_as(w) for g, w in zip(g_weights, weights, strict=True))
        return None, *g_inputs, None, *g_weights


def split(weights: list, layers: tuple[int, int, int]) -> tuple[list, list, list]:
    M, S, _ = layers
    return weights[:M], weights[M : M + S], weights[M + S :]


def chunk_memory(
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
    """Same contract as `pytitans.ops.naive.naive_memory`, but for `online` (see `ops.online`)."""
    if online:
        raise ValueError("chunk_memory takes gradients once per chunk; online=True is ops.online's")
    tokens = (q, k, v, lr, log_momentum, log_decay)
    weight, bias = norm or (None, None)
    if mask is None and isinstance(state.position, int):
        run = Run(chunk_size, state.position, objective, activation, None, norm_eps)
        position = (state.position + q.shape[1]) % chunk_size
        within = state.position + q.shape[1] <= chunk_size
        inputs, opened = Inputs(*tokens, weight, bias, None), state.position > 0
        out, end = read(run, inputs, state, opened, anchor=position > 0 and not within)
        if position and within:  # the chunk that is open is the one it began with
            end = end._replace(anchor=state.anchor if opened else state.M)
        return out, end._replace(position=position)
    slot, real, position = slots(state.position, mask, q, chunk_size)
    filled = slot.amax(1) + 1
    width = -(-int(filled.max()) // chunk_size) * chunk_size
    spread = [None if x is None else on_grid(x, slot, real, width) for x in tokens]
    inputs = Inputs._make((*spread, weight, bias, on_grid(real, slot, real, width)))
    begun = torch.as_tensor(state.position, device=q.device).expand(q.shape[0]) > 0
    state = state._replace(anchor=pick(begun, state.anchor, state.M))
    run = Run(chunk_size, 0, objective, activation, (filled - 1) // chunk_size, norm_eps)
    out, end = read(run, inputs, state, True, anchor=True)
    rows = torch.arange(q.shape[0], device=q.device)[:, None]
    out = out[rows, slot].masked_fill(~real[..., None, None], 0.0)
    anchor = pick(position == 0, end.M, end.anchor)
    return out, end._replace(anchor=anchor, position=position)


def read(run: Run, inputs: Inputs, state: MemoryState, opened: bool, *, anchor: bool):
    """What the run of chunks retrieves, and the state after it but for the position. The anchor is
    M unless asked for."""
    M, S, A, _ = state
    S_in, A_in = S if inputs.log_momentum is not None else (), A if opened else ()
    weights = [*M, *S_in, *A_in]
    layers = (len(M), len(S_in), len(A_in))
    tensors = [x for x in (*inputs, *weights) if x is not None]
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    plan = Plan(run, layers, keep, anchor)
    # The kernel is called through ctypes, which torch.compile cannot look into.
    apply: Any = Chunked.apply
    if is_compiling():
        apply = torch.compiler.disable(apply)
    out, *new = apply(plan, *inputs, *weights)
    new_M, new_S, new_A = (tuple(part) for part in split(new, layers))
    return out, MemoryState(new_M, new_S or S, new_A or new_M, 0)


def slots(position: int | Tensor, mask: Tensor | None, q: Tensor, chunk_size: int):
    """Where each token stands when every row's chunks begin at multiples of `chunk_size`, which
    tokens are real, and each row's position after the call. Others stand at slot 0."""
    real = torch.ones(q.shape[:2], dtype=torch.bool, device=q.device) if mask is None else mask
    first = torch.as_tensor(position, device=q.device).expand(q.shape[0])
    slot = (first[:, None] + real.cumsum(1) - 1).masked_fill(~real, 0)
    return slot, real, (first + real.sum(1)) % chunk_size


def on_grid(x: Tensor, slot: Tensor, real: Tensor, width: int) -> Tensor:
    """[B, T, ...] -> [B, width, ...] with real tokens at their slots and zeros elsewhere."""
    grid = x.new_zeros(x.shape[0], width, *x.shape[2:])
    row, token = real.nonzero(as_tuple=True)
    return grid.index_put((row, slot[row, token]), x[row, token])
