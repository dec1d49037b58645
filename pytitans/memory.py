"""NeuralMemory: the long-term memory as a layer (Titans, sections 3.1 and 4.4).

    q, k, v  linear, causal depthwise convolution, SiLU; q and k of norm 1
    gates    linear on the input and its q, k, v: one step size, momentum and decay per head and
             per memory layer
    M_t      written and read by `pytitans.ops.neural_memory`; M_0 is learned per head
    out      RMSNorm per head, a SiLU gate from the input, linear

Nothing is kept on the module: the state goes in and comes out. Axes: see `pytitans.shapes`.
"""

import math
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pytitans.layers import RMSNorm, ShortConv, silu_mul, unit
from pytitans.ops import MemoryState, initial_state, neural_memory, retrieve, rows

STEP_FLOOR = 0.03  # what the fourth power of a step's sigmoid must exceed to write anything
FORGET_FLOOR = 1e-4  # likewise to forget: horizons of 10,000 tokens are within reach
MOMENTUM_START = 0.8  # an untrained layer's momentum
EMPTY = 0.3  # size of M_0's answers without LayerNorm
# what its first and last head forget at a token: horizons of 3 to 1000
FORGET_START = (0.3, 1e-3)


class LayerState(NamedTuple):
    """What outlives a call of `NeuralMemory`: the memory, and the convolution's last tokens."""

    memory: MemoryState
    tail: Tensor  # [B, conv_size - 1, 3 D], more with several memories a head


class Closing(torch.autograd.Function):
    """max(x, 0), whose gradient also passes below 0 where it would bring x back up.

    A gate must be able to do exactly nothing, for millions of tokens; with relu's gradient a gate
    that is closed everywhere could never learn to open.
    """

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor) -> Tensor:
        (x,), (grad,) = ctx.saved_tensors, grad_outputs
        return torch.where((x > 0) | (grad < 0), grad, 0)


def closing_gate(logit: Tensor, floor: float) -> Tensor:
    """From exactly 0 to almost 1: sigmoid(logit)^4, stretched by `floor` under 0, clamped.

    The fourth power makes steps of 1 / chunk_size and of 1 equally easy to learn.
    """
    return Closing.apply((1 + floor) * logit.sigmoid().pow(4) - floor)


def closing_logit(value: float, floor: float) -> float:
    """The logit at which `closing_gate` has this value; for 0 the largest."""
    s = ((value + floor) / (1 + floor)) ** 0.25
    return math.log(s / (1 - s))


def log_kept(forgotten: Tensor) -> Tensor:
    """log of what is left, never all the way to log 0."""
    return torch.log1p(-(1 - FORGET_FLOOR) * forgotten)


class GateLogits(nn.Linear):
    """The linear map to the gates, in float32 or wider whatever the model's dtype or autocast."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            wide = torch.promote_types(self.weight.dtype, torch.float32)
            weight, bias = self.weight.to(wide), self.bias.to(wide)
            return F.linear(input.to(wide), weight, bias)


class NeuralMemory(nn.Module):
    """A memory of `num_heads` MLPs that are written and read, token by token, at test time.

    >>> memory = NeuralMemory(64, num_heads=2, chunk_size=16)
    >>> y, state = memory(torch.randn(1, 40, 64))  # and on: memory(more, state)
    >>> y.shape
    torch.Size([1, 40, 64])

    Args:
        dim: width of input and output; a multiple of num_heads.
        num_heads: independent memories, each from and to dim / num_heads features.
        per_head: memories that share a head's queries, keys and gates, each with values of its own:
            of linear ones, values so many times as wide (2 in Gated DeltaNet and Mamba-2).
        depth: layers of each memory's MLP; 1 is a linear memory.
        expansion: its hidden width over its input width (4 as in the paper).
        chunk_size: tokens that share one gradient point; a part of the trained function.
        activation: of the MLP, "silu" or "gelu".
        norm: M(x) = x + LayerNorm(MLP(x)), the camera-ready's form, instead of MLP(x).
        momentum, decay: False leaves the gate out (the paper's ablation).
        conv_size: of the convolution on q, k and v; 0 leaves it out.
        max_step: what the largest steps of a chunk add up to, over the MLP's layers. A linear
            memory is stable up to 2: with chunks of one token that turns what was stored around
            (the paper's theta of 1). Gradients of deep ones exploded with 2 for each layer
            (docs/log.md).
        forget_start: what the first and the last head forget at a token before training; those
            between lie evenly in the gate's logit. 0 to below 1.
        objective, online: see `pytitans.ops.neural_memory`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        per_head: int = 1,
        depth: int = 2,
        expansion: float = 4,
        chunk_size: int = 16,
        activation: str = "silu",
        norm: bool = True,
        momentum: bool = True,
        decay: bool = True,
        conv_size: int = 4,
        max_step: float = 2.0,
        forget_start: tuple[float, float] = FORGET_START,
        objective: str = "l2",
        online: bool = False,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim={dim} is not a multiple of num_heads={num_heads}")
        if per_head < 1:
            raise ValueError(f"per_head={per_head} is no memory: use 1, or 2 for wider values")
        if depth < 1:
            raise ValueError(f"depth={depth} layers is no memory: use 1 to 4")
        if chunk_size < 1:
            raise ValueError(f"chunk_size={chunk_size} is not a number of tokens: use 1 or more")
        if not all(0 <= rate < 1 for rate in forget_start):
            raise ValueError(f"forget_start={forget_start} is not what heads forget: 0 to below 1")
        if max_step <= 1:
            raise ValueError(f"max_step={max_step} lets no chunk store a value: use 2, above 1")
        self.dim, self.num_heads, self.head_dim = dim, num_heads, dim // num_heads
        self.per_head, self.chunk_size, self.depth = per_head, chunk_size, depth
        self.max_step, self.largest_step = max_step, max_step / (chunk_size * depth)
        self.forget_start = forget_start
        self.options = {"activation": activation, "objective": objective, "online": online}
        # of the size of M_0's answers: however small forgetting makes them, LayerNorm then cannot
        # enlarge a step without bound, and a memory that knows nothing answers nothing
        self.norm_eps = 1 / self.head_dim
        self.qkv = nn.Linear(dim, (2 + per_head) * dim, bias=False)
        self.conv = ShortConv((2 + per_head) * dim, conv_size) if conv_size else None
        self.gates = ["lr", *["momentum"] * momentum, *["decay"] * decay]
        self.to_gates = GateLogits((3 + per_head) * dim, len(self.gates) * num_heads * depth)
        hidden = round(expansion * self.head_dim)
        widths = [self.head_dim, *[hidden] * (depth - 1), self.head_dim]
        count = num_heads * per_head
        self.M_0 = nn.ParameterList(torch.empty(count, a, b) for a, b in pairwise(widths))
        self.norm_weight = nn.Parameter(torch.empty(count, self.head_dim)) if norm else None
        self.norm_bias = nn.Parameter(torch.empty(count, self.head_dim)) if norm else None
        self.head_norm = RMSNorm(self.head_dim)
        self.to_open = nn.Linear(dim, per_head * dim, bias=False)
        self.out = nn.Linear(per_head * dim, dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """M_0 keeps a key's norm, as does LayerNorm's weight; without LayerNorm its last layer
        answers little: an empty memory. The gates start so that a chunk of one repeated key moves
        the memory at most once towards its value (row sums of C about 1). Heads forget at different
        speeds, as in RetNet, and in their last layer alone: a deep memory that forgets every layer
        goes to 0, where no gradient is."""
        for W in self.M_0:
            nn.init.normal_(W, std=self.head_dim**-0.5)
        if self.norm is None:
            with torch.no_grad():
                self.M_0[-1].mul_(EMPTY)
        else:
            weight, bias = self.norm
            nn.init.constant_(weight, self.head_dim**-0.5)
            nn.init.zeros_(bias)
        nn.init.zeros_(self.to_gates.weight)
        heads, depth = self.num_heads, self.depth
        fast, slow = (closing_logit(rate, FORGET_FLOOR) for rate in self.forget_start)
        # features outlive what was learned with them
        kept = [closing_logit(0.0, FORGET_FLOOR)] * (depth - 1)
        spread = [fast + (slow - fast) * i / max(1, heads - 1) for i in range(heads)]
        start = {
            "lr": [closing_logit(1 / self.max_step, STEP_FLOOR)] * heads * depth,
            "momentum": [math.log(MOMENTUM_START / (1 - MOMENTUM_START))] * heads * depth,
            "decay": [logit for last in spread for logit in [*kept, last]],
        }
        with torch.no_grad():
            bias = [logit for name in self.gates for logit in start[name]]
            self.to_gates.bias.copy_(torch.tensor(bias))

    def initial_state(self, batch_size: int = 1) -> LayerState:
        """The state before a sequence's first token: M_0, no surprise, no tokens. What is written
        at test time is float32 or wider, whatever the model's dtype."""
        wide = [W if W.dtype.itemsize >= 4 else W.float() for W in self.M_0]
        M = tuple(W.expand(batch_size, *W.shape) for W in wide)
        reach = self.conv.weight.shape[0] - 1 if self.conv is not None else 0
        tail = self.qkv.weight.new_zeros(batch_size, reach, self.qkv.out_features)
        return LayerState(initial_state(M), tail)

    def forward(
        self, x: Tensor, state: LayerState | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, LayerState]:
        """Writes x [B, T, dim] into the memory; returns what each token retrieves, and the state.

        Each token sees its own write (eq. 15 after eqs. 13-14). `lengths` [B]: tokens of each row
        that exist; those after them write nothing.
        """
        retrieved, state = self.write(x, state, lengths)
        return self.answer(retrieved, self.to_open(x)), state

    def write(
        self, x: Tensor, state: LayerState | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, LayerState]:
        """`forward` without its last step: what the memories retrieve, [B, T, H per_head, V]."""
        if state is None:
            state = self.initial_state(x.shape[0])
        (q, k, v), tail = self.convolve(self.qkv(x), state.tail, lengths)
        mask = None
        if lengths is not None:
            mask = torch.arange(x.shape[1], device=x.device) < lengths[:, None]
        lr, momentum, decay = self.gate_values(x, q, k, v)
        lr, q, k = self.of_memories(lr), self.of_memories(q), self.of_memories(k)
        momentum = None if momentum is None else self.of_memories(momentum)
        decay = None if decay is None else self.of_memories(decay)
        retrieved, memory = neural_memory(
            q, k, v, lr, momentum, decay, state.memory,
            chunk_size=self.chunk_size, norm=self.norm, norm_eps=self.norm_eps,
            mask=mask, **self.options,
        )  # fmt: skip
        return retrieved, LayerState(memory, tail)

    @property
    def norm(self) -> tuple[Tensor, Tensor] | None:
        if self.norm_weight is None or self.norm_bias is None:
            return None
        return self.norm_weight, self.norm_bias

    def convolve(
        self, features: Tensor, tail: Tensor | None, lengths: Tensor | None
    ) -> tuple[list[Tensor], Tensor]:
        """Features [B, T, dim] or all that qkv makes to queries, or queries, keys and values, each
        [B, T, H, head_dim], values [B, T, H per_head, head_dim], queries and keys of norm 1; and
        the convolution's tail."""
        parts = features.shape[-1] // self.dim
        if self.conv is None:
            y, end = list(F.silu(features).chunk(parts, dim=-1)), features[:, :0]
            y = [unit(part, self.head_dim) if i < 2 else part for i, part in enumerate(y)]
        else:
            y, end = self.conv(
                features, tail, lengths, parts=parts, units=min(parts, 2), group=self.head_dim
            )
        y = [part.unflatten(-1, (self.num_heads, self.head_dim)) for part in y]
        if len(y) > 3:
            y[2:] = [torch.stack(y[2:], dim=3).flatten(2, 3)]
        return y, end

    def of_memories(self, x: Tensor) -> Tensor:
        """What a head has, [B, T, H, ...], for each of its memories."""
        return x if self.per_head == 1 else x.repeat_interleave(self.per_head, dim=2)

    def queries(
        self, x: Tensor, tail: Tensor | None, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Queries of all memories, for reading without writing, and the convolution's tail."""
        (q,), end = self.convolve(F.linear(x, self.qkv.weight[: self.dim]), tail, lengths)
        return self.of_memories(q), end

    def read(self, q: Tensor, opened: Tensor, state: MemoryState) -> Tensor:
        """What the memory answers to `queries` of x and to_open(x), without writing (eq. 21)."""
        options = {"activation": self.options["activation"], "norm": self.norm}
        return self.answer(retrieve(q, state, norm_eps=self.norm_eps, **options), opened)

    def answer(self, retrieved: Tensor, opened: Tensor) -> Tensor:
        """[B, T, H per_head, V] -> [B, T, dim]: each normalised, gated by the input, mixed."""
        return self.out(silu_mul(opened, self.head_norm(retrieved).flatten(2)))

    def gate_values(
        self, x: Tensor, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """lr, log_momentum and log_decay [B, T, H, L] in float32; None where left out.

        Of the input alone a first layer's gates would know one token: whether to write depends on
        what a key stands for, and that is the tokens the convolution has seen (docs/log.md).
        """
        scale = self.head_dim**0.5  # unit queries and keys, to features of the input's size
        seen = torch.cat([x, q.flatten(2) * scale, k.flatten(2) * scale, v.flatten(2)], dim=-1)
        logits = self.to_gates(seen).unflatten(-1, (len(self.gates), self.num_heads, self.depth))
        kinds = "momentum" in self.gates, "decay" in self.gates
        if rows.ready(logits) and logits.dtype == torch.float32:
            floors = STEP_FLOOR, FORGET_FLOOR
            found = list(rows.Gates.apply(logits, *kinds, self.largest_step, *floors))
            return tuple(rows.placed(found, kinds[0]))
        by_name = dict(zip(self.gates, logits.unbind(2), strict=True))
        momentum, decay = by_name.get("momentum"), by_name.get("decay")
        lr = self.largest_step * closing_gate(by_name["lr"], STEP_FLOOR)
        return (
            lr if momentum is None else lr * torch.sigmoid(-momentum),  # times 1 - momentum
            None if momentum is None else F.logsigmoid(momentum),
            None if decay is None else log_kept(closing_gate(decay, FORGET_FLOOR)),
        )
