"""The field's memories as configurations of the one operator.

    retrieved, state = recurrence("gated_deltanet")(q, k, v, lr, log_decay=log_decay)

A `Recurrence` is four choices: what the memory is, what a token's loss is, how it forgets, and how
it learns. With row vectors, as everywhere here (M_t maps k to k M_t; papers often write its
transpose), each linear one is what its paper prints:

    linear_attention  M_t = M_{t-1} + k_t^T v_t                                arXiv 2006.16236
    retnet            M_t = gamma_h M_{t-1} + k_t^T v_t                        arXiv 2307.08621
    mamba2            M_t = exp(dt_t A) M_{t-1} + dt_t k_t^T v_t               arXiv 2405.21060
    deltanet          M_t = M_{t-1} - lr_t k_t^T (k_t M_{t-1} - v_t)           arXiv 2406.06484
    gated_deltanet    M_t = (1 - lr_t k_t^T k_t) decay_t M_{t-1} + lr_t k_t^T v_t   arXiv 2412.06464
    titans_linear     S_t = momentum_t S_{t-1} - lr_t k_t^T (k_t M_{t-1} - v_t),
                      M_t = decay_t M_{t-1} + S_t                    arXiv 2501.00663, appendix C

and the others take their gradients where a chunk began:

    ttt_linear        M(x) = x + LayerNorm(x M)                                arXiv 2407.04620
    ttt_mlp_like      M(x) = x + LayerNorm(gelu(x M_1) M_2)                    the same
    titans_deep       M(x) = silu(x M_1) M_2, momentum and decay               arXiv 2501.00663

These are the memories alone: projections, convolutions, feature maps, rotations of q and k, output
norms and gates are a layer's. Axes: see `pytitans.shapes`.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pytitans.ops import Backend, MemoryState, initial_state, neural_memory
from pytitans.ops.gates import LOG_ZERO
from pytitans.ops.naive import Activation, Gate, Norm, Objective

TILE = 64  # tokens computed together where the result does not depend on how many


@dataclass(frozen=True, kw_only=True)
class Recurrence:
    """A memory's rule, called like `pytitans.ops.neural_memory` without its options.

    >>> delta = recurrence("deltanet")
    >>> retrieved, state = delta(q, k, v, lr)  # and on: delta(q, k, v, lr, state=state)
    >>> wide_ttt = replace(recurrence("ttt_mlp_like"), chunk_size=64)

    Args:
        depth, activation, norm: the memory: layers of its MLP, what is between them, and whether
            it is x + LayerNorm(MLP(x)).
        objective: a token's loss, "l2" or "dot".
        decay: "none"; "fixed": RetNet's 1 - 2^(-5-h) for head h; "gated": the caller's, applied to
            M_{t-1} when it takes in the surprise; "gated_first": the caller's, applied before the
            error is taken (Gated DeltaNet).
        momentum: whether surprise outlives its token.
        chunk_size: tokens that share one gradient point; None: each token's gradient is taken at
            the memory before it, exactly, which needs depth 1 and no norm.
    """

    depth: int = 1
    activation: Activation = "silu"
    norm: bool = False
    objective: Objective = "l2"
    decay: Literal["none", "fixed", "gated", "gated_first"] = "none"
    momentum: bool = False
    chunk_size: int | None = None

    def __post_init__(self):
        if self.chunk_size is None and (self.depth > 1 or self.norm):
            raise ValueError(
                f"depth={self.depth}, norm={self.norm}: only a linear memory without norm has "
                "exact gradients per token; set chunk_size"
            )
        if self.chunk_size is not None and self.decay == "gated_first":
            raise ValueError(
                "decay='gated_first' takes each token's error at the memory before it; "
                f"chunk_size={self.chunk_size} must be None"
            )

    def __call__(
        self,
        q: Float[Tensor, "B T H K"],
        k: Float[Tensor, "B T H K"],
        v: Float[Tensor, "B T H V"],
        lr: Gate = None,
        log_momentum: Gate = None,
        log_decay: Gate = None,
        state: MemoryState | None = None,
        *,
        norm: Norm | None = None,
        mask: Bool[Tensor, "B T"] | None = None,
        backend: Backend = "auto",
    ) -> tuple[Float[Tensor, "B T H V"], MemoryState]:
        """What was retrieved, and the state after the last token.

        lr None: steps of 1. state None: a linear memory of zeros. norm None where the rule has one:
        weight 1, bias 0. All else as in `neural_memory`.

        Raises:
            ValueError: a gate the rule lacks, or none where it needs one; a deep memory without
                state; whatever `neural_memory` refuses.
        """
        self.check(log_momentum, log_decay, state, norm)
        wide = torch.promote_types(k.dtype, torch.float32)
        if state is None:
            state = initial_state((k.new_zeros(*heads(k), k.shape[3], v.shape[3], dtype=wide),))
        if lr is None:
            lr = k.new_ones(k.shape[:3], dtype=wide)
        if self.norm and norm is None:
            weight = k.new_ones(k.shape[2], v.shape[3], dtype=wide)
            norm = (weight, torch.zeros_like(weight))
        if self.decay == "fixed":
            log_decay = retention(k.shape[2], wide, k.device).expand(k.shape[:3])
        elif self.decay == "gated_first" and log_decay is not None:
            lr, v, log_decay = forget_first(lr, v, log_decay)
        per_token = self.chunk_size is None and self.objective == "l2"  # "dot": the same everywhere
        return neural_memory(
            q, k, v, lr, log_momentum, log_decay, state, chunk_size=self.chunk_size or TILE,
            objective=self.objective, activation=self.activation, norm=norm, online=per_token,
            mask=mask, backend=backend,
        )  # fmt: skip

    def check(self, log_momentum, log_decay, state, norm) -> None:
        gated = self.decay in ("gated", "gated_first")
        for name, gate, has in (
            ("log_momentum", log_momentum, self.momentum),
            ("log_decay", log_decay, gated),
        ):
            if has != (gate is not None):
                raise ValueError(f"{name} is {'missing' if has else 'not part'} of {self}")
        if norm is not None and not self.norm:
            raise ValueError(f"norm is not part of {self}")
        if self.depth > 1 and state is None:
            raise ValueError(f"depth={self.depth}: give the state to start from, initial_state(M)")
        if state is not None and len(state.M) != self.depth:
            raise ValueError(f"the state has {len(state.M)} layers, the rule depth={self.depth}")


def heads(x: Tensor) -> tuple[int, int]:
    return x.shape[0], x.shape[2]


def retention(num_heads: int, dtype: torch.dtype, device) -> Float[Tensor, "H"]:
    """log gamma of RetNet's heads: gamma_h = 1 - 2^(-5-h)."""
    return torch.log1p(-torch.exp2(-5 - torch.arange(num_heads, dtype=dtype, device=device)))


def forget_first(lr: Tensor, v: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """lr, v and log_decay with which decaying after the error equals decaying before it.

    lr (k decay M - v) = (lr decay) (k M - v / decay): exact, except that a decay below e^-30 counts
    as e^-30 so that v / decay is finite.
    """
    if v.dtype == torch.float16:
        raise ValueError("decay='gated_first' divides v by the decay; float16 cannot hold that")
    log_decay = log_decay.clamp(min=LOG_ZERO)
    larger = torch.exp(-log_decay).reshape(*v.shape[:3], 1)
    return lr * log_decay.exp().reshape(lr.shape), (v * larger).to(v.dtype), log_decay


LINEAR_ATTENTION = Recurrence(objective="dot")
DELTANET = Recurrence()
TTT_LINEAR = Recurrence(norm=True, chunk_size=16)
TITANS_LINEAR = Recurrence(decay="gated", momentum=True)

RECURRENCES: dict[str, Recurrence] = {
    "linear_attention": LINEAR_ATTENTION,
    "retnet": replace(LINEAR_ATTENTION, decay="fixed"),
    "mamba2": replace(LINEAR_ATTENTION, decay="gated"),
    "deltanet": DELTANET,
    "gated_deltanet": replace(DELTANET, decay="gated_first"),
    "ttt_linear": TTT_LINEAR,
    "ttt_mlp_like": replace(TTT_LINEAR, depth=2, activation="gelu"),
    "titans_linear": TITANS_LINEAR,
    "titans_deep": replace(TITANS_LINEAR, depth=2, chunk_size=16),
}


def recurrence(name: str) -> Recurrence:
    """A published memory by name, as its paper's equations have it.

    linear_attention: without normaliser, which is one more column of ones in v: its answer is the
        number to divide by. q and k come with their feature map.
    retnet: q and k come rotated; the fixed decays follow from the number of heads.
    mamba2: q, k, v, lr are its C, B, x and dt, log_decay is dt A; the skip D x is the layer's.
    deltanet, gated_deltanet: lr is beta; log_decay is log alpha; keys of norm 1.
    ttt_linear: lr is 2 eta, their loss having no 1/2; their target v - k for LayerNorm(k M) is v
        for the whole of M(k). To the paper's equations the released code adds a learned bias and a
        factor that falls with a token's place in its chunk; its LayerNorm has 1e-6, not 1e-5.
    ttt_mlp_like: the same, and unlike the published model without its two biases and with the
        erf form of GELU instead of the tanh form.
    titans_linear: lr is theta (appendix C's loss has a 1/2).
    titans_deep: lr is 2 theta. The paper's first version; its camera-ready has a forget gate for
        each channel and M(x) = x + LayerNorm(MLP(x)) with GELU, of which
        `replace(recurrence("titans_deep"), norm=True, activation="gelu")` has the latter.
    """
    if name not in RECURRENCES:
        raise ValueError(f"recurrence {name!r} is unknown: choose one of {', '.join(RECURRENCES)}")
    return RECURRENCES[name]
