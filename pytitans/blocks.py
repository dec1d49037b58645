"""The four ways of the paper to join a memory to attention: MAC, MAG, MAL, and LMM without any.

Each block maps x [B, T, dim] and its state to x + (what it adds) and the state after the last
token. A sequence may be cut anywhere: nothing but the state connects two calls. `lengths` [B]: how
many of the T tokens are a row's own (they come first); the rest change no state and no other token.
Axes: see `pytitans.shapes`.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from pytitans.attention import KeysValues, SegmentAttention, WindowAttention, WindowState
from pytitans.layers import RMSNorm, rotate, silu_mul
from pytitans.memory import LayerState, NeuralMemory
from pytitans.ops import MemoryState
from pytitans.state import advance, batch_of, pick_rows, put


class Gate(nn.Module):
    """Joins attention's output y and the memory's m (section 4.1, 4.2): both normalised with
    learned vectors, the memory through SiLU, then multiplied and mixed."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm_y, self.norm_m = RMSNorm(dim), RMSNorm(dim)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, y: Tensor, m: Tensor) -> Tensor:
        return self.out(silu_mul(self.norm_m(m), self.norm_y(y)))


class Block(nn.Module):
    """What the four share: a norm before, and persistent tokens (eq. 19)."""

    def __init__(self, dim: int, memory: NeuralMemory, num_persistent: int):
        super().__init__()
        self.norm = RMSNorm(dim)
        self.memory = memory
        self.persistent = nn.Parameter(torch.empty(1, num_persistent, dim))
        nn.init.normal_(self.persistent, std=0.02)

    def read_persistent(self) -> tuple[Tensor, LayerState]:
        """The memory's state once it has read the persistent tokens, and its answers to them.

        They are the same for every row, so one row reads them; they end a chunk, so that the
        sequence's own chunks begin at its first token.
        """
        answers, (memory, tail) = self.memory(self.norm(self.persistent))
        memory = MemoryState(memory.M, memory.S, memory.M, 0)
        return answers, LayerState(memory, tail)


class LMM(Block):
    """The memory alone, after the persistent tokens."""

    def initial_state(self, x: Tensor) -> LayerState:
        return batch_of(self.read_persistent()[1], x.shape[0])

    def forward(self, x: Tensor, state: LayerState | None = None, lengths: Tensor | None = None):
        state = self.initial_state(x) if state is None else state
        y, state = self.memory(self.norm(x), state, lengths)
        return x + y, state


class MAGState(NamedTuple):
    memory: LayerState
    window: WindowState


class MAG(Block):
    """Memory as a gate: a sliding window and the memory side by side over the same tokens
    (eqs. 26-28)."""

    def __init__(self, dim, memory, attention: WindowAttention, num_persistent):
        super().__init__(dim, memory, num_persistent)
        self.attention = attention
        self.gate = Gate(dim)

    def initial_state(self, x: Tensor) -> MAGState:
        memory = batch_of(self.read_persistent()[1], x.shape[0])
        return MAGState(memory, self.attention.initial_state(x))

    def forward(self, x: Tensor, state: MAGState | None = None, lengths: Tensor | None = None):
        memory, window = self.initial_state(x) if state is None else state
        u = self.norm(x)
        y, window = self.attention(u, self.norm(self.persistent), window, lengths)
        m, memory = self.memory(u, memory, lengths)
        return x + self.gate(y, m), MAGState(memory, window)


class MALState(NamedTuple):
    memory: LayerState
    window: WindowState
    persistent: Tensor  # [B, P, dim], with what the memory answered them


class MAL(Block):
    """Memory as a layer: a sliding window over what the memory has made of the sequence
    (eqs. 29-31), each with its residual, as in Samba."""

    def __init__(self, dim, memory, attention: WindowAttention, num_persistent):
        super().__init__(dim, memory, num_persistent)
        self.attention = attention
        self.attention_norm = RMSNorm(dim)
        self.out = nn.Linear(dim, dim, bias=False)

    def initial_state(self, x: Tensor) -> MALState:
        answers, memory = self.read_persistent()
        persistent = self.persistent + answers
        window = self.attention.initial_state(x)
        return MALState(*batch_of((memory, window, persistent), x.shape[0]))

    def forward(self, x: Tensor, state: MALState | None = None, lengths: Tensor | None = None):
        memory, window, persistent = self.initial_state(x) if state is None else state
        m, memory = self.memory(self.norm(x), memory, lengths)
        x = x + m
        u = self.attention_norm(torch.cat([persistent.to(x.dtype), x], dim=1))
        P = persistent.shape[1]
        y, window = self.attention(u[:, P:], u[:1, :P], window, lengths)
        return x + self.out(y), MALState(memory, window, persistent)


class MACState(NamedTuple):
    memory: LayerState
    frozen: tuple[Tensor, ...]  # M as it stood when the segment began: what the segment reads
    tail: Tensor  # of the convolution that makes its queries
    answers: KeysValues  # h_j of the segment so far
    tokens: KeysValues  # its tokens
    position: int | Tensor  # how many


class MAC(Block):
    """Memory as a context: each segment attends to what the memory recalls for its tokens, and what
    attention makes of them, with its residual, is written back (eqs. 21-25).

    Without the residual, keys are averages over a segment until attention has learned to point,
    which it has no reason to before the memory is of use: recall was not learned. The residual is
    the normalised input: the input itself, in a first layer an embedding, is half the size of that
    average (docs/log.md).
    """

    def __init__(self, dim, memory, attention: SegmentAttention, num_persistent, segment_len: int):
        super().__init__(dim, memory, num_persistent)
        if segment_len < 1:
            raise ValueError(f"segment_len={segment_len} is not a number of tokens: use 1 or more")
        self.segment_len = segment_len
        self.attention = attention
        self.memory_norm = RMSNorm(dim)
        self.gate = Gate(dim)

    def initial_state(self, x: Tensor) -> MACState:
        memory = self.memory.initial_state(x.shape[0])
        heads, size = self.attention.num_heads, self.attention.head_dim
        none = KeysValues(*[x.new_zeros(x.shape[0], heads, 0, size)] * 2)
        tail = memory.tail[..., : x.shape[-1]]
        return MACState(memory, memory.memory.M, tail, none, none, 0)

    def forward(self, x: Tensor, state: MACState | None = None, lengths: Tensor | None = None):
        now = self.initial_state(x) if state is None else state
        u, begin, T = self.norm(x), now.position, x.shape[1]
        asked, tail = self.memory.queries(u, now.tail, lengths)
        q, k, v = self.attention.project(u)
        steps = torch.arange(T, device=x.device)
        steps = begin[:, None, None] + steps if isinstance(begin, Tensor) else begin + steps
        cos, sin = (y.to(q.dtype) for y in self.attention.table(steps % self.segment_len))
        q, k = rotate(q, (cos, sin)), rotate(k, (cos, sin))
        persistent = self.attention.persistent(self.norm(self.persistent), x.shape[0])
        sizes = self.pieces(begin, T, lengths)
        # cut at once: a slice for each piece would cost its backward the whole length each time;
        # only what the next piece waits for is done piece by piece
        by_token = (asked, self.memory.to_open(u), u)
        by_token = zip(*(y.split(sizes, 1) for y in by_token), strict=True)
        by_head = zip(*(y.split(sizes, -2) for y in (q, k, v, cos, sin)), strict=True)
        attended, written, masks, left = [], [], {}, lengths
        for size, tokens, heads in zip(sizes, by_token, by_head, strict=True):
            real = None if left is None else left.clamp(0, size)
            y, m, now = self.read_piece(tokens, heads, persistent, now, real, masks)
            attended.append(y)
            written.append(m)
            left = None if left is None else left - size
        y, m = torch.cat(attended, dim=1), torch.cat(written, dim=1)
        m = self.memory.answer(m, self.memory.to_open(self.memory_norm(u + y)))
        return x + self.gate(y, m), now._replace(tail=tail)

    def pieces(self, position: int | Tensor, T: int, lengths: Tensor | None) -> list[int]:
        """How many tokens at a time, so that no row crosses the end of its segment in a piece; one
        piece of none if there are none."""
        sizes, left = [], lengths
        while T:
            room = self.segment_len - position
            size = min(int(room.min()) if isinstance(room, Tensor) else room, T)
            position = advance(
                position, size, None if left is None else left.clamp(0, size), self.segment_len
            )
            sizes.append(size)
            T, left = T - size, None if left is None else left - size
        return sizes or [0]

    def read_piece(self, tokens, heads, persistent, state: MACState, real, masks: dict):
        """Part of one segment: recall, attend, write. Returns what attention and the memory say."""
        (asked, opened, u), (q, k, v, cos, sin) = tokens, heads
        place, t = state.position, q.shape[2]
        frozen = pick_rows(place == 0, state.memory.memory.M, state.frozen)
        h = self.memory.read(asked, opened, MemoryState(frozen, (), ()))
        h = self.attention.keys_values(h)
        answers = put(
            state.answers, KeysValues(rotate(h.k, (cos, sin)), h.v), place, self.segment_len
        )
        now = put(state.tokens, KeysValues(k, v), place, self.segment_len)
        if isinstance(place, Tensor):
            mask = self.attention.mask(place, q, persistent, now)
        elif t == 1:  # it sees all there is
            mask = None
        else:  # the same for every whole segment
            mask = masks.get((place, t))
            if mask is None:
                mask = masks[place, t] = self.attention.mask(place, q, persistent, now)
        y = self.attention(q, persistent, answers, now, mask)
        m, memory = self.memory.write(self.memory_norm(u + y), state.memory, real)
        position = advance(place, t, real, self.segment_len)
        return y, m, MACState(memory, frozen, state.tail, answers, now, position)
