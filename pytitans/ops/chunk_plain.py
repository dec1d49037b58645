"""A run of chunks in plain torch: the matmul form of `pytitans.ops.naive` and its backward by hand.

For one head, layers l = 1..L of the memory W_l, S_l, and the chunk's first memory A_l (which is W_l
unless the run begins inside a chunk); G, beta, phi, mu as in `pytitans.ops.gates`.

    write   h_1 = k,  z_l = h_l A_l,  h_{l+1} = act(z_l),  d_L = dloss/dz_L,
            t_l = d_{l+1} A_{l+1}^T,  d_l = t_l * act'(z_l)
    read    x_1 = q,  y_l = beta (x_l W_l) + phi (x_l S_l) - P_l d_l,  x_{l+1} = act(y_l)
            with P_l = G * R_l and R_l = x_l h_l^T
    end     W_l' = beta_C W_l + phi_C S_l - (g h_l)^T d_l,  S_l' = mu_C S_l - (n h_l)^T d_l
            with g and n the last rows of G and of E diag(lr), as columns

The backward walks this in reverse; `g_x` is the loss's gradient in x. Only states at the start of
every `GROUP`-th chunk are kept; the rest is computed again. Matmuls run in the tokens' dtype, gates
and state in the state's. Here every head of every row stands on one axis X.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pytitans.ops.gates import ChunkGates, chunk_gates
from pytitans.ops.inner_loss import (
    curvature,
    output_error,
    output_error_back,
    slope,
    standardise,
    standardise_back,
)
from pytitans.ops.naive import ACTIVATIONS, Activation, Objective

GROUP = 8  # chunks between two states that are kept
TINY = 1e-30  # smaller entries of a state are 0: denormals slow matmuls down five times


class Inputs(NamedTuple):
    """The tensors of a call but for the state's weights, as `ops.neural_memory` takes them."""

    q: Tensor
    k: Tensor
    v: Tensor
    lr: Tensor | None
    log_momentum: Tensor | None
    log_decay: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    mask: Tensor | None


class Run(NamedTuple):
    """What is the same for all chunks of a call."""

    chunk_size: int
    offset: int  # tokens of the first chunk that went by before the call
    objective: Objective
    activation: Activation
    last: Tensor | None  # each row's last chunk with a token that exists; None: the call's last
    norm_eps: float

    def groups(self, T: int) -> list[tuple[int, int, int]]:
        """(first token, width, number) of runs of equal chunks, at most GROUP at a time."""
        head = min(T, (self.chunk_size - self.offset) % self.chunk_size)
        whole, tail = divmod(T - head, self.chunk_size)
        found = [(0, head, 1)] if head else []
        for i in range(0, whole, GROUP):
            begin = head + i * self.chunk_size
            found.append((begin, self.chunk_size, min(GROUP, whole - i)))
        return [*found, (T - tail, tail, 1)] if tail else found


class Writes(NamedTuple):
    """A chunk's write pass, one entry per layer (`t` and `slope`: but for the last)."""

    h: list[Tensor]
    z: list[Tensor]
    d: list[Tensor]
    t: list[Tensor]
    slope: list[Tensor]


def write_pass(A, k, v, norm, run: Run) -> Writes:
    act, L = ACTIVATIONS[run.activation], len(A)
    h, z = [k], []
    for i, W in enumerate(A):
        z.append(h[i] @ W)
        if i + 1 < L:
            h.append(act(z[i]))
    slopes = [slope(x, run.activation) for x in z[:-1]]
    d, t = [output_error(k, z[-1], v, norm, run.objective, run.norm_eps)], []
    for i in reversed(range(L - 1)):
        t.insert(0, d[0] @ A[i + 1].mT)
        d.insert(0, t[0] * slopes[i])
    return Writes(h, z, d, t, slopes)


def read_layer(x, W, S, h, d, g: ChunkGates):
    """y, and R, of one layer."""
    R = x @ h.mT
    y = g.beta.to(x.dtype) * (x @ W)
    if g.surprise is not None:
        y = y.addcmul_(g.surprise.phi.to(x.dtype), x @ S)
    return y.baddbmm_(R * g.writes.to(x.dtype), d, alpha=-1), R


def residual_norm(q, y, norm, eps: float) -> Tensor:
    if norm is None:
        return y
    weight, bias = norm
    return q + F.layer_norm(y, y.shape[-1:], eps=eps) * weight + bias


def add_product(base: Tensor, a: Tensor, b: Tensor, alpha: int = 1) -> Tensor:
    """base += alpha a @ b, in place, where base may be wider than a and b."""
    if base.dtype == a.dtype:
        return base.baddbmm_(a, b, alpha=alpha)
    return base.add_(a @ b, alpha=alpha)


def layer_end(W, s, h, d, g: ChunkGates):
    """One layer's state after the chunk's last token."""
    left = g.beta[:, -1:] * W
    if g.surprise is not None:
        left = left.addcmul_(g.surprise.phi[:, -1:], s)
    W = add_product(left, (g.writes[:, -1, :, None].to(h.dtype) * h).mT, d, alpha=-1)
    if g.surprise is None:
        return W, s
    _, end, end_writes = g.surprise
    return W, add_product(end * s, (end_writes.to(h.dtype) * h).mT, d, alpha=-1)


def end_pass(M, S, w: Writes, gates) -> tuple[list, list]:
    ends = [layer_end(*x) for x in zip(M, S, w.h, w.d, gates, strict=True)]
    return [W for W, _ in ends], [s for _, s in ends]


class Chunks:
    """The inputs of a call, cut into chunks: heads on one axis, operands in the tokens' dtype."""

    def __init__(self, run: Run, inputs: Inputs, wide: torch.dtype):
        self.run, self.mask = run, inputs.mask
        self.tokens, self.gates = inputs[:3], inputs[3:6]
        self.B, self.T, self.H = inputs.q.shape[:3]
        self.narrow, self.wide = inputs.q.dtype, wide
        self.groups = run.groups(self.T)
        self.total = sum(count for *_, count in self.groups)
        self.norm = None
        if inputs.weight is not None and inputs.bias is not None:
            pair = (inputs.weight, inputs.bias)
            self.norm = tuple(x.to(self.narrow).repeat(self.B, 1)[:, None] for x in pair)

    def cut(self, begin: int, width: int) -> list[Tensor]:
        return [self.heads(x, begin, width) for x in self.tokens]

    def heads(self, x: Tensor, begin: int, width: int) -> Tensor:
        return x[:, begin : begin + width].transpose(1, 2).reshape(-1, width, x.shape[-1])

    def put(self, out: Tensor, begin: int, x: Tensor) -> None:
        """The inverse of `heads`: writes [X, C, V] into [B, T, H, V]."""
        out[:, begin : begin + x.shape[1]] = x.unflatten(0, (self.B, self.H)).transpose(1, 2)

    def gate_leaves(self, group) -> list[Tensor | None]:
        """lr, log momentum and log decay of a group, [L or 1, chunks, X, C] each."""
        begin, width, count = group
        leaves = []
        for gate in self.gates:
            if gate is None:
                leaves.append(None)
                continue
            x = gate[:, begin : begin + width * count].to(self.wide)
            x = x.reshape(self.B, count, width, self.H, -1).permute(4, 1, 0, 3, 2)
            leaves.append(x.reshape(-1, count, self.B * self.H, width))
        if leaves[0] is None:
            shape = (1, count, self.B * self.H, width)
            leaves[0] = self.tokens[0].new_zeros(shape, dtype=self.wide)
        return leaves

    def gates_of(self, leaves, group) -> ChunkGates:
        begin, width, count = group
        layers = max(len(x) for x in leaves if x is not None)
        leaves = [x if x is None else x.expand(layers, -1, -1, -1) for x in leaves]
        if self.mask is None:
            return chunk_gates(*leaves)
        exists = self.mask[:, begin : begin + width * count].reshape(self.B, count, 1, width)
        exists = exists.transpose(0, 1).expand(-1, -1, self.H, -1)
        return chunk_gates(*leaves, mask=exists.reshape(1, count, -1, width))

    def low(self, weights) -> list:
        return [W if W is None else W.to(self.narrow) for W in weights]

    def ends_at(self, chunk: int) -> Tensor | bool:
        """Whether this chunk is the row's last, [X, 1, 1]; a plain bool where rows agree."""
        if self.run.last is None:
            return chunk == self.total - 1
        return (self.run.last == chunk).repeat_interleave(self.H)[:, None, None]


def gates_at(gates: ChunkGates, chunk: int, layers: int) -> list[ChunkGates]:
    """One chunk's gates for each layer, out of [L or 1, chunks, X, ...]."""
    sets = len(gates.beta)
    return [gates.map(lambda x, i=i % sets: x[i, chunk]) for i in range(layers)]


def pick_rows(rows: Tensor | bool, new: list[Tensor], old: list[Tensor]) -> list[Tensor]:
    if isinstance(rows, bool):
        return new if rows else old
    return [torch.where(rows, a, b) for a, b in zip(new, old, strict=True)]


def forward(run: Run, inputs: Inputs, M, S, A, *, keep: bool, anchor: bool):
    """Retrieved [B, T, H, V]; M, S and, if `anchor`, the last chunk's first M; if `keep`, states.

    M, S and A are lists of [X, in, out]; S is empty without momentum, A where the first chunk
    begins at M.
    """
    chunks, at, kept = Chunks(run, inputs, M[0].dtype), 0, []
    out, last, S = torch.empty_like(inputs.v), A or M, S or [None] * len(M)
    for group in chunks.groups:
        begin, width, count = group
        if at:
            M = [F.hardshrink(W, TINY) for W in M]
            S = [s if s is None else F.hardshrink(s, TINY) for s in S]
        kept += [*M, *present(S)] if keep else []
        gates = chunks.gates_of(chunks.gate_leaves(group), group)
        for i in range(count):
            last = pick_rows(chunks.ends_at(at), M, last) if at else last
            q, k, v = chunks.cut(begin + i * width, width)
            each, first = gates_at(gates, i, len(M)), M if at else A or M
            w = write_pass(chunks.low(first), k, v, chunks.norm, run)
            y = q
            for j, (W, s) in enumerate(zip(chunks.low(M), chunks.low(S), strict=True)):
                x = ACTIVATIONS[run.activation](y) if j else y
                y, _ = read_layer(x, W, s, w.h[j], w.d[j], each[j])
            chunks.put(out, begin + i * width, residual_norm(q, y, chunks.norm, run.norm_eps))
            M, S = end_pass(M, S, w, each)
            at += 1
    return out, [*M, *present(S), *(last if anchor else [])], kept


def present(weights) -> list[Tensor]:
    return [w for w in weights if w is not None]


class Gradients:
    """What the backward adds up over chunks: every [B, T, ...] input's, and the running state's."""

    def __init__(self, chunks: Chunks, g_M, g_S):
        self.q, self.k, self.v = (torch.empty_like(x) for x in chunks.tokens)
        self.gates = [None if x is None else torch.empty_like(x) for x in chunks.gates]
        self.norm = [torch.zeros_like(x, dtype=chunks.wide) for x in chunks.norm or ()]
        self.M, self.S, self.A = g_M, g_S, []

    def inputs(self, chunks: Chunks) -> list[Tensor | None]:
        norm = [x.view(chunks.B, chunks.H, -1).sum(0) for x in self.norm] or [None, None]
        return [self.q, self.k, self.v, *self.gates, *norm]


def backward(run: Run, inputs: Inputs, M, S, A, kept, g_out, g_M, g_S, g_anchor):
    """Gradients in `forward`'s inputs (but the mask) and in M, S and A, from those in its results;
    `kept` are the states it kept."""
    chunks = Chunks(run, inputs, M[0].dtype)
    layers, momentum, at = len(M), bool(S), chunks.total
    g = Gradients(chunks, g_M, g_S or [None] * layers)
    for n, group in reversed(list(enumerate(chunks.groups))):
        at -= group[2]
        state = kept[n * len(kept) // len(chunks.groups) :]
        M, S = state[:layers], state[layers : 2 * layers] if momentum else [None] * layers
        leaves = [x if x is None else x.requires_grad_() for x in chunks.gate_leaves(group)]
        with torch.enable_grad():
            gates = chunks.gates_of(leaves, group)
        steps = walk(chunks, group, gates, M, S, [] if at else A)
        g_gates = gates.map(torch.zeros_like)
        for i in reversed(range(group[2])):
            g_first = chunk_back(chunks, steps.pop(), g_out, g, gates_at(g_gates, i, layers))
            if A and at + i == 0:
                g.A = g_first
            else:
                g.M = [a.add_(b) for a, b in zip(g.M, g_first, strict=True)]
            if g_anchor and (ends := chunks.ends_at(at + i)) is not False:
                g_first = g.A or g.M
                for a, b in zip(g_first, g_anchor, strict=True):
                    a.add_(b * ends)
        gates_back(chunks, group, leaves, gates, g_gates, g)
    return g.inputs(chunks), [*g.M, *present(g.S), *g.A]


def walk(chunks: Chunks, group, gates, M, S, A) -> list[tuple]:
    """The group's chunks once more, without reading: tokens, state, gates and writes of each."""
    begin, width, count = group
    steps = []
    for i in range(count):
        each, low = gates_at(gates, i, len(M)), chunks.low(M)
        begin_i = begin + i * width
        q, k, v = chunks.cut(begin_i, width)
        first = chunks.low(A) if A and i == 0 else low
        w = write_pass(first, k, v, chunks.norm, chunks.run)
        each = [g.map(Tensor.detach) for g in each]
        steps.append((begin_i, (q, k, v), M, S, low, first, w, each))
        if i + 1 < count:
            M, S = end_pass(M, S, w, each)
    return steps


def chunk_back(chunks: Chunks, step, g_out, g: Gradients, g_gates) -> list[Tensor]:
    """One chunk: from the gradient after it to the one before it. Returns that of its first M."""
    begin, (q, k, v), M, S, low, first, w, gates = step
    run, act, L = chunks.run, ACTIVATIONS[chunks.run.activation], len(M)
    low_S = chunks.low(S)
    x, y, R = [q], [], []
    for i in range(L):
        if i:
            x.append(act(y[-1]))
        if i + 1 < L or chunks.norm is not None:
            y_i, R_i = read_layer(x[i], low[i], low_S[i], w.h[i], w.d[i], gates[i])
            y.append(y_i)
        else:
            R_i = x[i] @ w.h[i].mT
        R.append(R_i)
    g_y = chunks.heads(g_out, begin, q.shape[1])
    g_q = None
    if chunks.norm is not None:
        unit, scale = standardise(y[-1], chunks.run.norm_eps)
        for total, part in zip(g.norm, (g_y * unit, g_y), strict=True):
            total.add_(part.sum(1, keepdim=True, dtype=total.dtype))
        g_q, g_y = g_y, standardise_back(g_y * chunks.norm[0], unit, scale)
    g_h, g_d = [], []
    for i in reversed(range(L)):
        layer = (x[i], R[i], low[i], low_S[i], w.h[i], w.d[i], gates[i])
        g_x, g_h_i, g_d_i, reads = read_layer_back(*layer, g_y, g_gates[i])
        g_M, g_S = g.M[i], g.S[i]
        end_back(M[i], S[i], w.h[i], w.d[i], gates[i], g_M, g_S, g_h_i, g_d_i, g_gates[i])
        g.M[i], g.S[i] = state_back(gates[i], g_M, g_S, reads, x[i])
        g_h.insert(0, g_h_i)
        g_d.insert(0, g_d_i)
        g_y = g_x if i == 0 else g_x * slope(y[i - 1], run.activation)
    chunks.put(g.q, begin, g_y if g_q is None else g_y + g_q)
    g_k, g_v, g_first = write_back(chunks, first, k, v, w, g_h, g_d, g)
    chunks.put(g.k, begin, g_k)
    chunks.put(g.v, begin, g_v)
    return g_first


def read_layer_back(x, R, W, S, h, d, gates: ChunkGates, g_y, g_gates: ChunkGates):
    """Gradients in x, h, d and, for the state's own, beta g_y and phi g_y."""
    G, beta = gates.writes.to(x.dtype), gates.beta.to(x.dtype)
    g_P = g_y @ d.mT
    g_R = g_P * G
    g_gates.writes.sub_(g_P * R)
    U = g_y @ W.mT
    g_gates.beta.add_((U * x).sum(-1, keepdim=True))
    g_x = (beta * U).baddbmm_(g_R, h, alpha=-1)
    reads = [beta * g_y, None]
    if gates.surprise is not None and g_gates.surprise is not None:
        phi, U = gates.surprise.phi.to(x.dtype), g_y @ S.mT
        g_gates.surprise.phi.add_((U * x).sum(-1, keepdim=True))
        g_x.addcmul_(phi, U)
        reads[1] = phi * g_y
    return g_x, (g_R.mT @ x).neg_(), ((R * G).mT @ g_y).neg_(), reads


def end_back(M, S, h, d, gates: ChunkGates, g_M, g_S, g_h, g_d, g_gates: ChunkGates) -> None:
    """Adds `layer_end`'s gradients in h, d and the gates, from those in the state after it."""
    low, last = g_M.to(h.dtype), gates.writes[:, -1, :, None].to(h.dtype)
    U = d @ low.mT
    g_h.addcmul_(last, U, value=-1)
    g_d.baddbmm_(last * h, low, alpha=-1)
    g_gates.writes[:, -1].sub_((U * h).sum(-1))
    g_gates.beta[:, -1].add_((M * g_M).sum((-2, -1))[:, None])
    if gates.surprise is None or g_gates.surprise is None:
        return
    low, last = g_S.to(h.dtype), gates.surprise.end_writes.to(h.dtype)
    U = d @ low.mT
    g_h.addcmul_(last, U, value=-1)
    g_d.baddbmm_(last * h, low, alpha=-1)
    phi, end, end_writes = g_gates.surprise
    end_writes.sub_((U * h).sum(-1, keepdim=True))
    phi[:, -1].add_((S * g_M).sum((-2, -1))[:, None])
    end.add_((S * g_S).sum((-2, -1), keepdim=True))


def state_back(gates: ChunkGates, g_M, g_S, reads, x):
    """The state's gradient before the chunk, but for what the gradient point adds."""
    before = add_product(gates.beta[:, -1:] * g_M, x.mT, reads[0])
    if gates.surprise is None:
        return before, g_S
    g_S = (gates.surprise.end * g_S).addcmul_(gates.surprise.phi[:, -1:], g_M)
    return before, add_product(g_S, x.mT, reads[1])


def write_back(chunks: Chunks, first, k, v, w: Writes, g_h, g_d, g: Gradients):
    """Through the inner gradients: second derivatives of the memory's loss. g_h, g_d are spent."""
    L, curve = len(first), chunks.run.activation
    g_z, g_first = [], [torch.zeros_like(W, dtype=chunks.wide) for W in first]
    for i in range(L - 1):
        g_t = g_d[i] * w.slope[i]
        g_z.append(g_d[i] * w.t[i] * curvature(w.z[i], curve))
        g_d[i + 1].baddbmm_(g_t, first[i + 1])
        add_product(g_first[i + 1], g_t.mT, w.d[i + 1])
    parts = output_error_back(
        g_d[-1], k, w.z[-1], v, chunks.norm, chunks.run.objective, chunks.run.norm_eps
    )
    g_residual, g_last, g_v, g_norm = parts
    for total, part in zip(g.norm, g_norm or (), strict=True):
        total.add_(part.sum(1, keepdim=True, dtype=total.dtype))
    for i in reversed(range(L)):
        if g_last is not None:
            add_product(g_first[i], w.h[i].mT, g_last)
            g_h[i].baddbmm_(g_last, first[i].mT)
        if i:
            g_last = g_z[i - 1].addcmul_(g_h[i], w.slope[i - 1])
    g_k = g_h[0] if g_residual is None else g_h[0] + g_residual
    return g_k, g_v, g_first


def gates_back(chunks: Chunks, group, leaves, gates, g_gates, g: Gradients) -> None:
    """From the gradients in a group's `ChunkGates` to those in its gates, by autograd."""
    pairs = zip(gates.tensors(), g_gates.tensors(), strict=True)
    pairs = [(x, g_x) for x, g_x in pairs if x.requires_grad]
    outputs, sums = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(outputs, [x for x in leaves if x is not None], sums))
    begin, width, count = group
    for leaf, into in zip(leaves, g.gates, strict=True):
        part = None if leaf is None else next(found)
        if part is None or into is None:
            continue
        part = part.reshape(-1, count, chunks.B, chunks.H, width).permute(2, 1, 4, 3, 0)
        piece = into[:, begin : begin + width * count]
        piece.copy_(part.reshape(piece.shape))
