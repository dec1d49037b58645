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

from pytitans.ops.chunk_plain import layer_end, read_layer
from pytitans.ops.gates import chunk_gates
from pytitans.ops.naive import NORM_EPS, MemoryState


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
    norm_eps=NORM_EPS,
    online=True,
    mask=None,
):
    """Same contract as `pytitans.ops.naive.naive_memory` with online=True; depth 1, no norm."""
    (M,), (S,), _, position = state
    B, T, H = q.shape[:3]
    wide, narrow, M, S = M.dtype, q.dtype, M.flatten(0, 1), S.flatten(0, 1)
    retrieved = []
    for begin in range(0, T, chunk_size):
        tile = slice(begin, begin + chunk_size)
        q_, k_, v_ = (heads_first(x[:, tile]) for x in (q, k, v))
        lr_, momentum, decay = (
            None if x is None else heads_first(x[:, tile].reshape(B, -1, H, 1)).squeeze(-1).to(wide)
            for x in (lr, log_momentum, log_decay)
        )
        lr_ = q_.new_zeros(q_.shape[:2], dtype=wide) if lr_ is None else lr_
        exists = None if mask is None else mask[:, tile].repeat_interleave(H, dim=0)
        g = chunk_gates(lr_, momentum, decay, mask=exists)
        if objective == "dot":
            d = -v_
        else:
            kw = k_.to(wide)
            right = before_write(g.beta, 1.0) * (kw @ M) - v_
            if g.surprise is not None:
                right = right + before_write(g.surprise.phi, 0.0) * (kw @ S)
            weights = before_write(g.writes, 0.0) * (kw @ kw.mT)
            d = torch.linalg.solve_triangular(weights, right, upper=False, unitriangular=True)
        d = d.to(narrow)
        y, _ = read_layer(q_, M.to(narrow), S.to(narrow), k_, d, g)
        retrieved.append(y.unflatten(0, (B, H)).transpose(1, 2))
        M, S = layer_end(M, S, k_, d, g)
    out = torch.cat(retrieved, dim=1)
    if mask is not None:
        out = out.masked_fill(~mask[..., None, None], 0.0)
    alike = mask is None and isinstance(position, int)
    position = 0 if alike else torch.zeros(B, dtype=torch.long, device=q.device)
    M, S = (x.unflatten(0, (B, H)) for x in (M, S))
    return out, MemoryState((M,), (S,), (M,), position)


def heads_first(x: Tensor) -> Tensor:
    """[B, T, H, K] -> [B H, T, K]."""
    return x.transpose(1, 2).flatten(0, 1)
