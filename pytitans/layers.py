"""The small parts every block uses: RMSNorm, SwiGLU, ShortConv, rotary embedding.

Rows of a batch may end at different tokens: `lengths` [B] says how many of a call's T tokens are a
row's own (they come first), None that all are. Axes: see `pytitans.shapes`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight, computed in float32 whatever x's dtype, returned in x's dtype."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__(dim, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
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
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class ShortConv(nn.Module):
    """Causal depthwise convolution over tokens, the paper's section 4.4 (size 4), then SiLU.

    `forward(x [B, T, D], tail [B, size - 1, D] or None)` returns the result and the tail that the
    next call goes on from: the last size - 1 tokens of each row. `features`: those of the layer's
    that x holds. It starts random, as a torch convolution does: keys that mix a token with those
    before it are what recall by context is learned from (docs/log.md).
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
        features: slice = slice(None),
    ) -> tuple[Tensor, Tensor]:
        reach = self.weight.shape[0] - 1
        if tail is None:
            tail = x.new_zeros(x.shape[0], reach, x.shape[2])
        seen = torch.cat([tail.to(x.dtype), x], dim=1)
        T, weight = x.shape[1], self.weight[:, features].to(x.dtype)
        y = seen[:, reach:] * weight[-1]
        for lag in range(reach):
            y = torch.addcmul(y, seen[:, lag : lag + T], weight[lag])
        return F.silu(y), last_tokens(seen, reach, lengths)


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
