"""Neural memory a chunk at a time: the matmul form of `pytitans.ops.naive`, for any depth.

Inside a chunk every gradient is taken at the chunk's first memory. There, token j writes to each
layer W the outer product of that layer's input h_j and its error d_j, so the memory at token t is
W_t = beta_t W + phi_t S - sum_{j<=t} G_tj h_j d_j^T, and applying it needs no W_t:

    x_t W_t = beta_t x_t W + phi_t x_t S - sum_{j<=t} G_tj <x_t, h_j> d_j

with weights that depend on the gates alone:

    E_ij = prod_{j<l<=i} momentum_l,   A_ij = prod_{j<l<=i} decay_l   (j <= i, else 0)
    G = A E diag(lr),   mu and beta the running products of momentum and decay,   phi = A mu

A token that does not exist (`mask`) has lr 0, decay and momentum 1, and its row of E and mu left
out of the sums that make G and phi: S is not added to M there. Axes: see `pytitans.shapes`.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from pytitans.ops.naive import (
    ACTIVATIONS,
    NORM_EPS,
    Activation,
    Gate,
    MemoryState,
    Norm,
    Objective,
    pick,
)

LOG_ZERO = -30.0  # a gate below e^-30 is 0: sums of larger logarithms would drown their neighbours
SQRT_HALF, INV_SQRT_2PI = 0.5**0.5, 0.3989422804014327


class ChunkGates(NamedTuple):
    """How much of the chunk's start, and of each write in it, is left at each token."""

    beta: Float[Tensor, "B H C 1"]  # of M, in M
    phi: Float[Tensor, "B H C 1"] | None  # of S, in M
    mu: Float[Tensor, "B H C 1"] | None  # of S, in S
    writes_in_M: Float[Tensor, "B H C C"]  # G
    writes_in_S: Float[Tensor, "B H C C"] | None  # E diag(lr)


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
        return ChunkGates(beta, None, None, A * lr[..., None, :], None)
    E, mu = decay_matrix(log_momentum), running_product(log_momentum)
    writes_in_S = E * lr[..., None, :]
    adds_S = A if mask is None else A * mask[..., None, :]
    return ChunkGates(beta, adds_S @ mu, mu, adds_S @ writes_in_S, writes_in_S)


def slope(x: Tensor, activation: Activation) -> Tensor:
    """The derivative of the memory's activation."""
    if activation == "silu":
        s = x.sigmoid()
        return s * (1 + x * (1 - s))
    return 0.5 * (1 + torch.erf(x * SQRT_HALF)) + x * torch.exp(-0.5 * x * x) * INV_SQRT_2PI


def output_error(k, z, v, norm, objective: Objective) -> Tensor:
    """The loss's gradient in z, the MLP's output: through the residual and LayerNorm if any."""
    if norm is None:
        return -v if objective == "dot" else z - v
    weight, bias = norm
    variance, mean = torch.var_mean(z, dim=-1, keepdim=True, correction=0)
    scale = (variance + NORM_EPS).rsqrt()
    unit = (z - mean) * scale
    error = -v if objective == "dot" else k + unit * weight + bias - v
    g = error * weight
    return scale * (g - g.mean(-1, keepdim=True) - unit * (g * unit).mean(-1, keepdim=True))


def inputs_and_errors(M, k, v, norm, objective, activation) -> list[tuple[Tensor, Tensor]]:
    """Each layer's input and error for `naive.associative_loss`: backpropagation by hand."""
    first, *rest = M
    inputs, slopes = [k], []
    z = k @ first
    for W in rest:
        inputs.append(ACTIVATIONS[activation](z))
        slopes.append(slope(z, activation))
        z = inputs[-1] @ W
    errors = [output_error(k, z, v, norm, objective)]
    for W, dphi in zip(reversed(rest), reversed(slopes), strict=True):
        errors.append((errors[-1] @ W.mT) * dphi)
    return list(zip(inputs, reversed(errors), strict=True))


def read_chunk(q, layers, gates, activation, norm) -> Tensor:
    """What every token's query retrieves from the memory just after that token's write."""
    x = q
    for depth, ((W, s, h, d), g) in enumerate(zip(layers, gates, strict=True)):
        x = ACTIVATIONS[activation](x) if depth else x
        scores = (x @ h.mT) * g.writes_in_M.to(x.dtype)
        y = g.beta.to(x.dtype) * (x @ W) - scores @ d
        x = y if g.phi is None else y + g.phi.to(x.dtype) * (x @ s)
    if norm is None:
        return x
    weight, bias = norm
    return q + F.layer_norm(x, x.shape[-1:], eps=NORM_EPS) * weight + bias


def chunk_end(M, S, layers, gates):
    """The memory and its surprise after the chunk's last token, in the state's dtype."""
    new_M, new_S = [], []
    for W, s, (_, _, h, d), g in zip(M, S, layers, gates, strict=True):
        beta, phi, mu, in_M, in_S = (None if x is None else x[..., -1, :, None] for x in g)
        new = beta * W - ((in_M.to(h.dtype) * h).mT @ d).to(W.dtype)
        new_M.append(new if phi is None else new + phi * s)
        if mu is None:
            new_S.append(s)
        else:
            new_S.append(mu * s - ((in_S.to(h.dtype) * h).mT @ d).to(s.dtype))
    return tuple(new_M), tuple(new_S)


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
    options = (objective, activation, norm)
    if mask is None and isinstance(state.position, int):
        out, end = read_pieces(tokens, None, state, state.position, chunk_size, *options)
        position = (state.position + q.shape[1]) % chunk_size
        anchor = end.M if position == 0 else end.anchor
        return out, end._replace(anchor=anchor, position=position)
    slot, real, position = slots(state.position, mask, q, chunk_size)
    width = -(-(int(slot.max()) + 1) // chunk_size) * chunk_size
    spread = [None if x is None else on_grid(x, slot, real, width) for x in tokens]
    exists = on_grid(real, slot, real, width)
    out, end = read_pieces(spread, exists, state, 0, chunk_size, *options)
    rows = torch.arange(q.shape[0], device=q.device)[:, None]
    out = out[rows, slot].masked_fill(~real[..., None, None], 0.0)
    anchor = pick(position == 0, end.M, end.anchor)
    return out, end._replace(anchor=anchor, position=position)


def read_pieces(tokens, mask, state, offset, chunk_size, objective, activation, norm):
    """Cuts at the chunk grid, of which `offset` tokens have gone by, and reads piece by piece."""
    M, S, anchor, _ = state
    T, wide, narrow = tokens[0].shape[1], M[0].dtype, tokens[0].dtype
    retrieved, begin = [], 0
    while begin < T:
        end = min(begin + chunk_size - (offset if begin == 0 else 0), T)
        q, k, v = (x[:, begin:end].transpose(1, 2) for x in tokens[:3])
        lr, *logs = (gate_layers(x, begin, end, wide, len(M)) for x in tokens[3:])
        exists = None if mask is None else mask[:, begin:end]
        if begin:
            anchor = M if exists is None else pick(exists.any(1), M, anchor)
        if lr[0] is None:
            lr = [q.new_zeros(q.shape[:3], dtype=wide)] * len(M)
        heads = None if exists is None else exists[:, None]
        gates = [chunk_gates(*g, mask=heads) for g in zip(lr, *logs, strict=True)]
        affine = None if norm is None else tuple(x[:, None].to(narrow) for x in norm)
        low = tuple(W.to(narrow) for W in anchor)
        writes = inputs_and_errors(low, k, v, affine, objective, activation)
        base = low if M is anchor else tuple(W.to(narrow) for W in M)
        layers = [(W, s.to(narrow), h, d) for W, s, (h, d) in zip(base, S, writes, strict=True)]
        retrieved.append(read_chunk(q, layers, gates, activation, affine))
        M, S = chunk_end(M, S, layers, gates)
        begin = end
    return torch.cat(retrieved, dim=2).transpose(1, 2), MemoryState(M, S, anchor, 0)


def gate_layers(gate: Tensor | None, begin: int, end: int, dtype, layers: int) -> list:
    """One [B, H, C] gate for each layer of the memory, or None for each."""
    if gate is None:
        return [None] * layers
    piece = gate[:, begin:end].to(dtype)
    if piece.ndim == 3:
        return [piece.transpose(1, 2)] * layers
    return [x.transpose(1, 2) for x in piece.unbind(-1)]


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
