"""Attention of the three hybrids: inside segments (MAC), or in a sliding window (MAG, MAL).

Both see persistent tokens always. Rotary embedding turns the first half of every head's features;
persistent keys live in the other half alone, so how much a token attends to them cannot depend on
where it stands, at two million tokens as at two. Everything goes through
`scaled_dot_product_attention`. Axes: see `pytitans.shapes`.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pytitans.layers import rotary_table, rotate


class KeysValues(NamedTuple):
    k: Tensor  # [B, H, n, head_dim]
    v: Tensor


class Attention(nn.Module):
    """Projections shared by both kinds; subclasses say who sees whom. Returns [B, T, dim], heads
    side by side: the block owns the output projection."""

    def __init__(self, dim: int, num_heads: int, rope_theta: float = 10_000.0):
        super().__init__()
        if dim % num_heads or (dim // num_heads) % 4:
            raise ValueError(
                f"dim={dim} in num_heads={num_heads} heads: head size must be a multiple of 4"
            )
        self.num_heads, self.head_dim, self.rope_theta = num_heads, dim // num_heads, rope_theta
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)

    def project(self, x: Tensor) -> list[Tensor]:
        """q, k and v, each [B, H, T, head_dim], not turned yet."""
        heads = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        return list(heads.permute(2, 0, 3, 1, 4))

    def keys_values(self, x: Tensor) -> KeysValues:
        """Keys and values of tokens that ask nothing."""
        D = x.shape[-1]
        heads = F.linear(x, self.qkv.weight[D:]).unflatten(-1, (2, self.num_heads, self.head_dim))
        return KeysValues(*heads.permute(2, 0, 3, 1, 4))

    def persistent(self, tokens: Tensor, batch_size: int) -> KeysValues:
        """Keys, without a place, and values of persistent tokens [1, P, dim]."""
        k, v = self.keys_values(tokens)
        placed = self.head_dim // 2
        k = torch.cat([torch.zeros_like(k[..., :placed]), k[..., placed:]], dim=-1)
        return KeysValues(*(x.expand(batch_size, -1, -1, -1) for x in (k, v)))

    def table(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary angles of tokens at these positions, [..., T, head_dim / 4]."""
        return rotary_table(positions, self.head_dim // 2, self.rope_theta)


def attend(q: Tensor, parts: list[KeysValues], mask: Tensor | None) -> Tensor:
    """[B, H, T, head_dim] over the parts' keys side by side -> [B, T, H * head_dim].

    mask: boolean, or added to the scores in q's dtype; None where all keys are seen.
    """
    k, v = parts[0] if len(parts) == 1 else (torch.cat(x, dim=2) for x in zip(*parts, strict=True))
    narrow = q.device.type == "cpu" and q.dtype == torch.bfloat16
    if narrow and mask is not None and k.shape[2] <= FEW_KEYS:
        return matmul_attention(q, k, v, mask).transpose(1, 2).flatten(2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


FEW_KEYS = 512  # more, and all scores at once cost more memory than they save time


def matmul_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """SDPA by plain products: twice to three times as fast as torch's in bfloat16 on CPUs
    (docs/performance.md)."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -torch.inf)
    (B, H, t, size), n = q.shape, k.shape[2]
    mask = mask.expand(B, H, t, n).flatten(0, 1) if mask.ndim == 4 else mask.expand(B * H, t, n)
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    scores = torch.baddbmm(mask, q, k.mT, alpha=size**-0.5)
    return torch.bmm(scores.softmax(dim=-1), v).unflatten(0, (B, H))


class WindowState(NamedTuple):
    """The window's last keys (not turned) and values, the newest at the right, and how many of them
    are tokens: an int where all rows agree, else [B]."""

    past: KeysValues
    filled: int | Tensor


class WindowAttention(Attention):
    """Each token sees the persistent ones, itself and the window - 1 tokens before it (Fig. 3b)."""

    def __init__(self, dim: int, num_heads: int, window: int, rope_theta: float = 10_000.0):
        super().__init__(dim, num_heads, rope_theta)
        if window < 1:
            raise ValueError(f"window={window} is not a number of tokens: use 1 or more")
        self.window = window

    def initial_state(self, x: Tensor) -> WindowState:
        none = x.new_zeros(x.shape[0], self.num_heads, 0, self.head_dim)
        return WindowState(KeysValues(none, none), 0)

    def forward(
        self, x: Tensor, persistent: Tensor, state: WindowState, lengths: Tensor | None = None
    ) -> tuple[Tensor, WindowState]:
        """x [B, T, dim], persistent [1, P, dim] -> [B, T, dim] and the state after T tokens."""
        B, T, _ = x.shape
        q, k, v = self.project(x)
        past = state.past.k.shape[2]
        seen = KeysValues(
            torch.cat([state.past.k.to(k.dtype), k], 2), torch.cat([state.past.v.to(v.dtype), v], 2)
        )
        cos, sin = self.table(torch.arange(past + T, device=x.device))
        placed = KeysValues(rotate(seen.k, (cos, sin)), seen.v)
        q = rotate(q, (cos[past:], sin[past:]))
        fixed = self.persistent(persistent, B)
        first = min(T, self.window)
        head = KeysValues(*(y[:, :, : past + first] for y in placed))
        mask = self.first_mask(first, past, state.filled, fixed.k.shape[2], x.device)
        out = [attend(q[:, :, :first], [fixed, head], mask)]
        if first < T:
            out.append(self.later_blocks(q, placed, fixed, past))
        return torch.cat(out, dim=1), self.after(seen, state, past, T, lengths)

    def first_mask(self, T, past, filled, P, device) -> Tensor:
        """Who sees whom among `past` cached tokens and the call's first T <= window."""
        row = torch.arange(past, past + T, device=device)[:, None]
        column = torch.arange(past + T, device=device)
        reach = row - column
        seen = (reach >= 0) & (reach < self.window)
        if isinstance(filled, Tensor):
            seen = seen & (column >= past - filled[:, None, None, None])
        always = torch.ones(*seen.shape[:-1], P, dtype=torch.bool, device=device)
        return torch.cat([always, seen], dim=-1)

    def later_blocks(self, q, placed, fixed, past) -> Tensor:
        """Tokens behind the first window, a window at a time: each block sees itself and the block
        before it, under one mask for all."""
        W, B, T = self.window, q.shape[0], q.shape[2]
        blocks = -(-T // W) - 1
        pad = (blocks + 1) * W - T
        q = F.pad(q[:, :, W:], (0, 0, 0, pad)).unflatten(2, (blocks, W)).transpose(1, 2)

        def beside(always: Tensor, x: Tensor) -> Tensor:  # [B n, H, P + 2 W, K]
            cut = F.pad(x[:, :, past:], (0, 0, 0, pad)).unflatten(2, (blocks + 1, W))
            cut, always = cut.transpose(1, 2), always[:, None].expand(-1, blocks, -1, -1, -1)
            return torch.cat([always, cut[:, :-1], cut[:, 1:]], dim=3).flatten(0, 1)

        row, column = (
            torch.arange(W, device=q.device)[:, None],
            torch.arange(2 * W, device=q.device),
        )
        P = fixed.k.shape[2]
        mask = torch.ones(W, P + 2 * W, dtype=torch.bool, device=q.device)
        mask[:, P:] = (column > row) & (column <= row + W)
        seen = KeysValues(*(beside(*both) for both in zip(fixed, placed, strict=True)))
        out = attend(q.flatten(0, 1), [seen], mask)
        return out.unflatten(0, (B, blocks)).flatten(1, 2)[:, : T - W]

    def after(self, seen, state, past, T, lengths) -> WindowState:
        keep = self.window - 1
        if lengths is None:
            kept = KeysValues(*(x[:, :, max(past + T - keep, 0) :] for x in seen))
            filled = state.filled + T
            limit = kept.k.shape[2]
            if isinstance(filled, Tensor):
                return WindowState(kept, filled.clamp(max=limit))
            return WindowState(kept, min(filled, limit))
        index = past + lengths[:, None] - keep + torch.arange(keep, device=lengths.device)
        index = index.clamp(min=0)[:, None, :, None].expand(-1, self.num_heads, -1, self.head_dim)
        kept = KeysValues(*(x.gather(2, index) for x in seen))
        return WindowState(kept, (state.filled + lengths).clamp(max=keep))


class SegmentAttention(Attention):
    """Inside a segment of MAC: token i sees the persistent tokens, the memory's answers h_j and the
    tokens j, j <= i, of its own segment, and nothing else (Fig. 3a, made causal in h)."""

    def forward(self, q, persistent: KeysValues, answers: KeysValues, tokens: KeysValues, mask):
        """q [B, H, t, head_dim]: the queries of a piece; answers and tokens: those of its segment
        up to the piece's end; mask: see there."""
        return attend(q, [persistent, answers, tokens], mask)

    def mask(self, offset: int | Tensor, q: Tensor, persistent: KeysValues, tokens: KeysValues):
        """Who sees whom if `offset` (int or [B]) tokens of the segment went before q's: 0 or minus
        infinity, [t, P + 2 n] or [B, 1, t, P + 2 n]."""
        t, n = q.shape[2], tokens.k.shape[2]
        first = offset[:, None, None] if isinstance(offset, Tensor) else offset
        place = torch.arange(t, device=q.device) + first  # [t] or [B, 1, t]
        seen = torch.arange(n, device=q.device) <= place[..., None]
        always = seen.new_ones(*seen.shape[:-1], persistent.k.shape[2])
        mask = torch.cat([always, seen, seen], dim=-1)
        return torch.zeros_like(mask, dtype=q.dtype).masked_fill_(~mask, -torch.inf)
