"""The small parts every block uses: RMSNorm, SwiGLU, ShortConv, rotary embedding.

Rows of a batch may end at different tokens: `lengths` [B] says how many of a call's T tokens are a
row's own (they come first), None that all are. Axes: see `pytitans.shapes`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pytitans.ops import rows


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight, computed in float32 whatever x's dtype, returned in x's dtype."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__(dim, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        if rows.ready(x):
            return rows.RMSNorm.apply(x, self.weight, self.eps)
        return F.rms_norm(x.to(self.weight.dtype), self.normalized_shape, self.weight, self.eps).to(
            x.dtype
        )


class SwiGLU(nn.Module):
    """Llama's feed-forward layer: down(silu(gate(x)) * up(x)) (https://arxiv.org/abs/2002.05202)."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.gate_up = nn.Linear(dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        both = self.gate_up(x)
        if rows.ready(both):
            return self.down(rows.SwiGLU.apply(both))
        gate, up = both.chunk(2, dim=-1)
        return self.down(silu_mul(gate, up))


def silu_mul(a: Tensor, b: Tensor) -> Tensor:
    """silu(a) * b: a gate."""
    if rows.ready(a, b) and a.shape == b.shape:
        return rows.SiluMul.apply(a, b)
    return F.silu(a) * b


class ShortConv(nn.Module):
    """Causal depthwise convolution over tokens, the paper's section 4.4 (size 4), then SiLU.

    `forward(x [B, T, D], tail [B, size - 1, D] or None)` returns `parts` tensors [B, T, D / parts],
    the first `units` of them with norm 1 over each `group` features, and the tail that the next
    call goes on from: the last size - 1 tokens of each row. x may hold the first features only.
    It starts random, as a torch convolution does: keys that mix a token with those before it are
    what recall by context is learned from (docs/log.md).
    """

    def __init__(self, dim: int, size: int = 4):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, dim))  # weight[-1] meets the token itself
        nn.init.uniform_(self.weight, -(size**-0.5), size**-0.5)

    def forward(
        self,
        x: Tensor,
        tail: Tensor | None = None,
        lengths: Tensor | None = None,
        *,
        parts: int = 1,
        units: int = 0,
        group: int = 1,
    ) -> tuple[list[Tensor], Tensor]:
        (B, T, D), reach = x.shape, self.weight.shape[0] - 1
        weight = self.weight[:, :D]
        tail = x.new_zeros(B, reach, D) if tail is None else tail.to(x.dtype)
        if rows.ready(x, tail):
            *y, end = rows.ConvSilu.apply(x, tail, weight, parts, units, group)
            if lengths is not None:
                end = last_tokens(torch.cat([tail, x], dim=1), reach, lengths)
            return y, end
        seen, weight = torch.cat([tail, x], dim=1), weight.to(x.dtype)
        y = seen[:, reach:] * weight[-1]
        for lag in range(reach):
            y = torch.addcmul(y, seen[:, lag : lag + T], weight[lag])
        y = F.silu(y).chunk(parts, dim=-1)
        y = [unit(part, group) if i < units else part for i, part in enumerate(y)]
        return y, last_tokens(seen, reach, lengths)


def unit(x: Tensor, group: int) -> Tensor:
    """Each `group` features over their norm, in x's dtype; the norm in float32 at least."""
    wide = x.float() if x.dtype.itemsize < 4 else x
    return F.normalize(wide.unflatten(-1, (-1, group)), dim=-1, eps=1e-6).flatten(-2).to(x.dtype)


def last_tokens(seen: Tensor, count: int, lengths: Tensor | None) -> Tensor:
    """The last `count` tokens of each row of [B, count + T, ...]: `count` tokens of the past, then
    a call's T, of which `lengths` are the row's own."""
    if lengths is None:
        return seen[:, seen.shape[1] - count :]
    index = lengths[:, None] + torch.arange(count, device=seen.device)
    return seen[torch.arange(seen.shape[0], device=seen.device)[:, None], index]


def rotary_table(positions: Tensor, dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin [..., dim / 2] of rotary embedding (https://arxiv.org/abs/2104.09864).

    Angles are formed in float64: in float32 they are off by 0.1 at two million tokens.
    """
    steps = torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device)
    angles = positions[..., None].double() * theta ** (-steps / dim)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, table: tuple[Tensor, Tensor]) -> Tensor:
    """Turns the first features of [..., T, head_dim] by the table's angles, leaves the rest."""
    cos, sin = (t.to(x.dtype) for t in table)
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)
