"""The field's recurrent layers, each around its memory of `pytitans.recurrences`, to compare with.

                    q, k            v     forgets, steps                out
    GatedDeltaNet   conv, unit      2x    both from the token           RMSNorm per head, SiLU gate
    DeltaNet        conv, unit      1x    steps from the token          RMSNorm per head
    RetNet          rotated         2x    fixed for each head           RMSNorm per head, SiLU gate
    Mamba2          conv            2x    one dt for both               D x, SiLU gate, RMSNorm
    TTTMLP          conv, unit      1x    steps from the token          LayerNorm, GELU gate

v has once or twice the features of q and k, as published; the convolution (size 4, then SiLU) is
over q, k and v. A layer is called like `pytitans.memory.NeuralMemory` and its state is of the same
kind, so that LMM and MAL, the cache, padding and packing serve it as they are.

Of all of them: heads and their size are the model's, the width of keys that of the model, the
convolution has no bias, and projections start as the model's others do. Queries are not scaled by
K^-1/2, since a norm over what they retrieve follows. Axes: see `pytitans.shapes`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pytitans.layers import RMSNorm, ShortConv, rotary_table, rotate, silu_mul
from pytitans.memory import LayerState
from pytitans.ops import MemoryState, initial_state
from pytitans.recurrences import Recurrence, recurrence

A_RANGE = (1.0, 16.0)  # of the rates of forgetting at the start
DT_RANGE = (1e-3, 1e-1)  # of what they are multiplied with


class Mixer(nn.Module, ABC):
    """What the layers share: projections, the convolution, the state.

    >>> layer = DeltaNet(64, num_heads=2)
    >>> y, state = layer(torch.randn(1, 40, 64))  # and on: layer(more, state)

    Args:
        dim: width of input and output; a multiple of num_heads.
        num_heads: independent memories.
        rule: what the memories do.
        expand: features of v for each feature of q and k.
        gates: numbers for each head that a token decides.
        conv_size: of the convolution on q, k and v; 0 leaves it out.
        units: how many of q, k and v, in this order, are brought to norm 1 per head.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        rule: Recurrence,
        *,
        expand: int,
        gates: int,
        conv_size: int,
        units: int,
    ):
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim={dim} is not a multiple of num_heads={num_heads}")
        self.dim, self.num_heads, self.head_dim = dim, num_heads, dim // num_heads
        self.rule, self.units, self.parts = rule, units, 2 + expand
        self.value_dim = expand * self.head_dim
        self.qkv = nn.Linear(dim, self.parts * dim, bias=False)
        self.conv = ShortConv(self.parts * dim, conv_size) if conv_size else None
        self.to_gates = nn.Linear(dim, gates * num_heads, bias=False) if gates else None
        self.out = nn.Linear(expand * dim, dim, bias=False)
        self.M_0 = nn.ParameterList()  # a memory that does not start at 0

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draws what no projection or norm is: gates, first memories."""

    @abstractmethod
    def mix(
        self, x: Tensor, state: LayerState, lengths: Tensor | None
    ) -> tuple[Tensor, LayerState]:
        """`forward` from a given state."""

    def forward(
        self, x: Tensor, state: LayerState | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, LayerState]:
        """Writes x [B, T, dim] into the memory; returns what the layer makes of each token, which
        sees its own write, and the state. `lengths` [B]: tokens of each row that exist."""
        return self.mix(x, self.initial_state(x.shape[0]) if state is None else state, lengths)

    def initial_state(self, batch_size: int = 1) -> LayerState:
        """The state before a sequence's first token; what is written at test time is float32 or
        wider, whatever the model's dtype."""
        like = self.qkv.weight
        wide = torch.promote_types(like.dtype, torch.float32)
        zeros = like.new_zeros(self.num_heads, self.head_dim, self.value_dim, dtype=wide)
        M = tuple(W.to(wide).expand(batch_size, *W.shape) for W in (*self.M_0,) or (zeros,))
        reach = 0 if self.conv is None else self.conv.weight.shape[0] - 1
        tail = like.new_zeros(batch_size, reach, self.parts * self.dim)
        return LayerState(initial_state(M), tail)

    def tokens(
        self, x: Tensor, tail: Tensor, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q and k [B, T, H, K], v [B, T, H, V], and the convolution's tail."""
        features = self.qkv(x)
        if self.conv is None:
            q, k, *v = features.chunk(self.parts, dim=-1)
            tail = features[:, :0]
        else:
            (q, k, *v), tail = self.conv(
                features, tail, lengths, parts=self.parts, units=self.units, group=self.head_dim
            )
        v = v[0] if len(v) == 1 else torch.cat(v, dim=-1)
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)) for y in (q, k, v))
        return q, k, v, tail

    def gate_logits(self, x: Tensor) -> list[Tensor]:
        """What a token says of each gate, [B, T, H] each, in float32 at least."""
        assert self.to_gates is not None, "the layer has no gates"
        weight = self.to_gates.weight
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        with torch.autocast(x.device.type, enabled=False):
            return list(F.linear(x.to(weight.dtype), weight).split(self.num_heads, dim=-1))

    def write(
        self, q, k, v, lr, log_decay, memory: MemoryState, lengths: Tensor | None, norm=None
    ) -> tuple[Tensor, MemoryState]:
        """What the tokens retrieve, [B, T, H, V], and the memory after them."""
        mask = None
        if lengths is not None:
            mask = torch.arange(q.shape[1], device=q.device) < lengths[:, None]
        read, memory = self.rule(
            q, k, v, lr, log_decay=log_decay, state=memory, norm=norm, mask=mask
        )
        if self.rule.chunk_size is None:  # exact per token: where a chunk begins is of no account
            memory = MemoryState(memory.M, memory.S, memory.M, 0)
        return read, memory


class GatedDeltaNet(Mixer):
    """Gated DeltaNet, https://arxiv.org/abs/2412.06464, section 3.4.

        beta = sigmoid(x W_beta),   log decay = -exp(A_log) softplus(x W_a + dt_bias)

    Keys are as wide as the model where the paper's have three quarters of it.
    """

    def __init__(self, dim: int, num_heads: int, conv_size: int = 4):
        rule = recurrence("gated_deltanet")
        super().__init__(dim, num_heads, rule, expand=2, gates=2, conv_size=conv_size, units=2)
        self.A_log = nn.Parameter(torch.empty(num_heads))
        self.dt_bias = nn.Parameter(torch.empty(num_heads))
        self.head_norm = RMSNorm(self.value_dim)
        self.to_open = nn.Linear(dim, 2 * dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        draw_rates(self.A_log, self.dt_bias)

    def mix(self, x, state, lengths):
        q, k, v, tail = self.tokens(x, state.tail, lengths)
        beta, dt = self.gate_logits(x)
        log_decay = -self.A_log.to(dt.dtype).exp() * F.softplus(dt + self.dt_bias)
        read, memory = self.write(q, k, v, beta.sigmoid(), log_decay, state.memory, lengths)
        y = silu_mul(self.to_open(x), self.head_norm(read).flatten(2))
        return self.out(y), LayerState(memory, tail)


class DeltaNet(Mixer):
    """DeltaNet, https://arxiv.org/abs/2406.06484, section 3.3: beta = sigmoid(x W_beta), no gate on
    what it says."""

    def __init__(self, dim: int, num_heads: int, conv_size: int = 4):
        rule = recurrence("deltanet")
        super().__init__(dim, num_heads, rule, expand=1, gates=1, conv_size=conv_size, units=2)
        self.head_norm = RMSNorm(self.value_dim)

    def reset_parameters(self) -> None:
        """Nothing but projections and a norm."""

    def mix(self, x, state, lengths):
        q, k, v, tail = self.tokens(x, state.tail, lengths)
        (beta,) = self.gate_logits(x)
        read, memory = self.write(q, k, v, beta.sigmoid(), None, state.memory, lengths)
        return self.out(self.head_norm(read).flatten(2)), LayerState(memory, tail)


class RetNet(Mixer):
    """Multi-scale retention, https://arxiv.org/abs/2307.08621, section 2.2.

    The norm per head is RMSNorm with weights, where the paper writes GroupNorm and the authors'
    code has RMSNorm without. Pairs of features that are rotated together stand half a head apart
    instead of side by side. Rotations are counted from the call's first token: afterwards the
    memory's keys are turned back by the tokens read, which is the same by the sums of angles, and
    as exact after two million tokens as after two.
    """

    def __init__(self, dim: int, num_heads: int):
        rule = recurrence("retnet")
        super().__init__(dim, num_heads, rule, expand=2, gates=0, conv_size=0, units=0)
        self.head_norm = RMSNorm(self.value_dim)
        self.to_open = nn.Linear(dim, 2 * dim, bias=False)

    def reset_parameters(self) -> None:
        """Nothing but projections and a norm."""

    def mix(self, x, state, lengths):
        q, k, v, tail = self.tokens(x, state.tail, lengths)
        cos, sin = self.table(torch.arange(x.shape[1], device=x.device))
        table = cos[:, None], sin[:, None]  # [T, 1, K / 2]
        k = k * self.head_dim**-0.5
        q, k = rotate(q, table), rotate(k, table)
        read, memory = self.write(q, k, v, None, None, state.memory, lengths)
        y = silu_mul(self.to_open(x), self.head_norm(read).flatten(2))
        after = torch.full(x.shape[:1], x.shape[1], device=x.device)
        cos, sin = self.table(after if lengths is None else lengths)
        back = cos[:, None, None], -sin[:, None, None]  # [B, 1, 1, K / 2]
        M = tuple(rotate(W.mT, back).mT for W in memory.M)
        return self.out(y), LayerState(MemoryState(M, memory.S, M, 0), tail)

    def table(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return rotary_table(positions, self.head_dim, 10_000.0)


class Mamba2(Mixer):
    """Mamba-2, https://arxiv.org/abs/2405.21060, section 7.1: C, B and x are q, k and v.

        dt = softplus(x W_dt + dt_bias),   log decay = -exp(A_log) dt

    B and C are each head's own, of head_dim features, where the paper has one of 128 for all (its
    ngroups = 1; Hugging Face's Mamba2, the baseline "mamba2_hf", has that).
    """

    def __init__(self, dim: int, num_heads: int, conv_size: int = 4):
        rule = recurrence("mamba2")
        super().__init__(dim, num_heads, rule, expand=2, gates=1, conv_size=conv_size, units=0)
        self.A_log = nn.Parameter(torch.empty(num_heads))
        self.dt_bias = nn.Parameter(torch.empty(num_heads))
        self.D = nn.Parameter(torch.empty(num_heads))
        self.norm = RMSNorm(2 * dim)
        self.to_open = nn.Linear(dim, 2 * dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        draw_rates(self.A_log, self.dt_bias)
        nn.init.ones_(self.D)

    def mix(self, x, state, lengths):
        C, B, v, tail = self.tokens(x, state.tail, lengths)
        (logit,) = self.gate_logits(x)
        dt = F.softplus(logit + self.dt_bias)
        log_decay = -self.A_log.to(dt.dtype).exp() * dt
        read, memory = self.write(C, B, v, dt, log_decay, state.memory, lengths)
        y = (read + self.D[:, None].to(v.dtype) * v).flatten(2)
        return self.out(self.norm(silu_mul(self.to_open(x), y))), LayerState(memory, tail)


class TTTMLP(Mixer):
    """Like TTT-MLP, https://arxiv.org/abs/2407.04620, section 2: M is an MLP, 4x wide inside, that
    is trained by a step for each token on gradients shared by 16 of them.

        lr = base_lr sigmoid(x W_lr + b) / K,   base_lr = 0.1

    M_0, LayerNorm and b are learned. Unlike the published model: M has no biases; q, k and v have
    projections and a convolution of their own (published: q and k share a projection, then a
    convolution without SiLU each); q and k have norm 1 and are not rotated within the chunk; no
    factor falls with a token's place in its chunk, which the paper's equations lack too; GELU of
    the memory is erf's. The LayerNorm over what the heads retrieve is one of the whole width. M_0
    keeps a key's norm: drawn of deviation 0.02, as published for longer keys, it answers so little
    that LayerNorm's gradients blow up, and nothing is learned (docs/log.md).
    """

    BASE_LR = 0.1
    EXPANSION = 4

    def __init__(self, dim: int, num_heads: int, conv_size: int = 4):
        rule = recurrence("ttt_mlp_like")
        super().__init__(dim, num_heads, rule, expand=1, gates=1, conv_size=conv_size, units=2)
        K, hidden = self.head_dim, self.EXPANSION * self.head_dim
        shapes = (num_heads, K, hidden), (num_heads, hidden, K)
        self.M_0 = nn.ParameterList(torch.empty(shape) for shape in shapes)
        self.norm_weight = nn.Parameter(torch.empty(num_heads, K))
        self.norm_bias = nn.Parameter(torch.empty(num_heads, K))
        self.lr_bias = nn.Parameter(torch.empty(num_heads))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.to_open = nn.Linear(dim, dim, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for W in self.M_0:
            nn.init.normal_(W, std=self.head_dim**-0.5)
        nn.init.ones_(self.norm_weight)
        for bias in (self.norm_bias, self.lr_bias):
            nn.init.zeros_(bias)
        self.norm.reset_parameters()

    def mix(self, x, state, lengths):
        q, k, v, tail = self.tokens(x, state.tail, lengths)
        (logit,) = self.gate_logits(x)
        lr = self.BASE_LR / self.head_dim * torch.sigmoid(logit + self.lr_bias)
        norm = self.norm_weight, self.norm_bias
        read, memory = self.write(q, k, v, lr, None, state.memory, lengths, norm)
        y = self.norm(read.flatten(2).to(self.norm.weight.dtype)).to(x.dtype)
        y = F.gelu(self.to_open(x), approximate="tanh") * y
        return self.out(y), LayerState(memory, tail)


def draw_rates(A_log: Tensor, dt_bias: Tensor) -> None:
    """exp(A_log) uniform, softplus(dt_bias) uniform in its logarithm, as in Mamba-2."""
    low, high = (math.log(x) for x in DT_RANGE)
    with torch.no_grad():
        A_log.copy_(torch.empty_like(A_log).uniform_(*A_RANGE).log())
        dt = torch.empty_like(dt_bias).uniform_(low, high).exp()
        dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus's inverse


MIXERS: dict[str, Callable[[int, int], Mixer]] = {  # from width and heads
    "gated_deltanet": GatedDeltaNet,
    "deltanet": DeltaNet,
    "retnet": RetNet,
    "mamba2": Mamba2,
    "ttt_mlp_like": TTTMLP,
}
