"""The exact per-token form of a linear memory: gradients at M_{t-1}, any tile.

With u_t = k_t (outer) e_t and e_t = k_t M_{t-1} - v_t, the errors of a tile solve a triangular
system whose weights are `ops.chunk`'s G, beta and phi one row down, before the token's write:

    (I + G_s * (K K^T)) e = beta_s * (K M) + phi_s * (K S) - V

after which reading and the tile's end are `ops.chunk`'s with h = K and d = e. The result does not
depend on the tile. With momentum off this is the delta rule with decay after the error; the same
recurrence with momentum is derived in MDN (https://arxiv.org/abs/2605.05838). Axes: see
`pytitans.shapes`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from pytitans.ops.chunk import chunk_end, chunk_gates, gate_layers, read_chunk
from pytitans.ops.naive import MemoryState


def before_write(row: Tensor, first: float) -> Tensor:
    """Gate weights one row down: what stood before each token's write."""
    return F.pad(row[..., :-1, :], (0, 0, 1, 0), value=first)


def online_memory(
    q,
    k,
    v,
    lr,
    log_momentum,
    log_decay,
    state,
    *,
    chunk_size,
    objective="l2",
    activation="silu",
    norm=None,
    online=True,
    mask=None,
):
    """Same contract as `pytitans.ops.naive.naive_memory` with online=True; depth 1, no norm."""
    (M,), (S,), _, position = state
    B, T = q.shape[:2]
    wide, narrow = M.dtype, q.dtype
    retrieved = []
    for begin in range(0, T, chunk_size):
        tile = slice(begin, min(begin + chunk_size, T))
        q_, k_, v_ = (x[:, tile].transpose(1, 2) for x in (q, k, v))
        (lr_,), *logs = (
            gate_layers(x, tile.start, tile.stop, wide, 1) for x in (lr, log_momentum, log_decay)
        )
        lr_ = q_.new_zeros(q_.shape[:3], dtype=wide) if lr_ is None else lr_
        exists = None if mask is None else mask[:, None, tile]
        g = chunk_gates(lr_, logs[0][0], logs[1][0], mask=exists)
        if objective == "dot":
            d = -v_
        else:
            kw = k_.to(wide)
            right = before_write(g.beta, 1.0) * (kw @ M) - v_
            if g.phi is not None:
                right = right + before_write(g.phi, 0.0) * (kw @ S)
            weights = before_write(g.writes_in_M, 0.0) * (kw @ kw.mT)
            d = torch.linalg.solve_triangular(weights, right, upper=False, unitriangular=True)
        layers = [(M.to(narrow), S.to(narrow), k_, d.to(narrow))]
        retrieved.append(read_chunk(q_, layers, [g], activation, None))
        (M,), (S,) = chunk_end((M,), (S,), layers, [g])
    out = torch.cat(retrieved, dim=2).transpose(1, 2)
    if mask is not None:
        out = out.masked_fill(~mask[..., None, None], 0.0)
    alike = mask is None and isinstance(position, int)
    position = 0 if alike else torch.zeros(B, dtype=torch.long, device=q.device)
    return out, MemoryState((M,), (S,), (M,), position)
