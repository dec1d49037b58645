"""Neural memory a chunk at a time: the matmul form of `pytitans.ops.naive`, for any depth.

Inside a chunk every gradient is taken at the chunk's first memory. There, token j writes to each
layer W the outer product of that layer's input h_j and its error d_j, so the memory at token t is
W_t = beta_t W + phi_t S - sum_{j<=t} G_tj h_j d_j^T, and applying it needs no W_t:

    x_t W_t = beta_t x_t W + phi_t x_t S - sum_{j<=t} G_tj <x_t, h_j> d_j

with weights G, beta, phi that depend on the gates alone (`pytitans.ops.gates`). `ops.chunk_plain`
computes a run of chunks and its gradients; here the text is put on the chunks' grid and the state
together. Axes: see `pytitans.shapes`.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from pytitans.ops import chunk_plain
from pytitans.ops.chunk_plain import Inputs, Run
from pytitans.ops.naive import Activation, Gate, MemoryState, Norm, Objective, pick


class Chunked(torch.autograd.Function):
    """A run of chunks: retrieved, then the layers of M, S and the last chunk's first M.

    `parts` says how many of the weights that follow `Inputs` are M, S (0 without momentum) and the
    first chunk's M (0 where it is M itself).
    """

    @staticmethod
    def forward(ctx, run: Run, parts: tuple[int, int, int], *tensors):
        inputs, weights = Inputs(*tensors[: len(Inputs._fields)]), tensors[len(Inputs._fields) :]
        flat = [w.reshape(-1, *w.shape[-2:]) for w in weights]
        out, state, kept = chunk_plain.forward(run, inputs, *split(flat, parts))
        ctx.run, ctx.parts, ctx.inputs = run, parts, len(tensors)
        ctx.save_for_backward(*tensors, *kept)
        ctx.set_materialize_grads(False)
        heads = weights[0].shape[:2]
        return out, *(w.unflatten(0, heads) for w in state)

    @staticmethod
    @once_differentiable
    def backward(ctx, g_out, *g_state):
        """Analytic; a second derivative is refused by `once_differentiable`."""
        tensors, kept = ctx.saved_tensors[: ctx.inputs], ctx.saved_tensors[ctx.inputs :]
        inputs, weights = Inputs(*tensors[: len(Inputs._fields)]), tensors[len(Inputs._fields) :]
        like = [*weights[: ctx.parts[0] + ctx.parts[1]], *weights[: ctx.parts[0]]]
        g_state = [
            (torch.zeros_like(w) if g is None else g).reshape(-1, *w.shape[-2:])
            for g, w in zip(g_state, like, strict=True)
        ]
        g_out = torch.zeros_like(inputs.v) if g_out is None else g_out
        A = [w.reshape(-1, *w.shape[-2:]) for w in weights[ctx.parts[0] + ctx.parts[1] :]]
        found = chunk_plain.backward(ctx.run, inputs, ctx.parts[0], kept, A, g_out, g_state)
        g_inputs, g_weights = found
        g_weights = (g.view_as(w) for g, w in zip(g_weights, weights, strict=True))
        return None, None, *g_inputs, None, *g_weights


def split(weights: list, parts) -> tuple[list, list, list]:
    M, S, _ = parts
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
    online: bool = False,
    mask: Bool[Tensor, "B T"] | None = None,
) -> tuple[Float[Tensor, "B T H V"], MemoryState]:
    """Same contract as `pytitans.ops.naive.naive_memory`, but for `online` (see `ops.online`)."""
    if online:
        raise ValueError("chunk_memory takes gradients once per chunk; online=True is ops.online's")
    tokens = (q, k, v, lr, log_momentum, log_decay)
    norm = norm or (None, None)
    if mask is None and isinstance(state.position, int):
        run = Run(chunk_size, state.position, objective, activation, None)
        out, end = read(run, Inputs(*tokens, *norm, None), state, state.position > 0)
        position = (state.position + q.shape[1]) % chunk_size
        return out, end._replace(anchor=end.anchor if position else end.M, position=position)
    slot, real, position = slots(state.position, mask, q, chunk_size)
    filled = slot.amax(1) + 1
    width = -(-int(filled.max()) // chunk_size) * chunk_size
    spread = [None if x is None else on_grid(x, slot, real, width) for x in tokens]
    exists = on_grid(real, slot, real, width)
    begun = torch.as_tensor(state.position, device=q.device).expand(q.shape[0]) > 0
    state = state._replace(anchor=pick(begun, state.anchor, state.M))
    run = Run(chunk_size, 0, objective, activation, (filled - 1) // chunk_size)
    out, end = read(run, Inputs(*spread, *norm, exists), state, True)
    rows = torch.arange(q.shape[0], device=q.device)[:, None]
    out = out[rows, slot].masked_fill(~real[..., None, None], 0.0)
    anchor = pick(position == 0, end.M, end.anchor)
    return out, end._replace(anchor=anchor, position=position)


def read(run: Run, inputs: Inputs, state: MemoryState, opened: bool):
    """What the run of chunks retrieves and the state after it, but for the position."""
    M, S, anchor, _ = state
    S_in, A_in = S if inputs.log_momentum is not None else (), anchor if opened else ()
    out, *new = Chunked.apply(run, (len(M), len(S_in), len(A_in)), *inputs, *M, *S_in, *A_in)
    new_M, new_S, new_anchor = split(new, (len(M), len(S_in), len(M)))
    return out, MemoryState(tuple(new_M), tuple(new_S) or S, tuple(new_anchor), 0)


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
