"""What stands between a layer's matrix products, fused on CPUs: one pass where torch makes many.

`ready` says whether the tensors at hand can take that way (CPU, float32 or bfloat16, and a compiler
was there); where not, the layers use plain torch, which is also what torch.compile sees. Arithmetic
is float32 whatever the tokens' dtype. Axes: see `pytitans.shapes`.
"""

import functools
from ctypes import c_double, c_int, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import function

from pytitans.ops import native

once_differentiable: Any = function.once_differentiable  # its type hides the arguments' names

ARGUMENTS = {  # i: int, n: int64, d: double, p: pointer
    "rms_norm": "iinndpppp",
    "rms_norm_back": "iinnpppppp",
    "silu_mul": "iinnpnpnp",
    "silu_mul_back": "iinnpnpnppnpn",
    "conv": "iinnnnnnnpppp",
    "conv_back": "iinnnnnnnppppppp",
    "gates": "nniidddpppp",
    "gates_back": "nniidddppppp",
}
KINDS = {"i": c_int, "n": c_int64, "d": c_double, "p": c_void_p}


@functools.cache
def kernel():
    """The built functions by name, or None."""
    library = native.load(Path(__file__).parent / "kernel" / "rows.cpp")
    if library is None:
        return None
    found = {name: getattr(library, f"pytitans_{name}") for name in ARGUMENTS}
    for name, entry in found.items():
        entry.argtypes, entry.restype = [KINDS[c] for c in ARGUMENTS[name]], None
    return found


def ready(*tokens: Tensor) -> bool:
    """Whether these tensors, of one dtype, can take the fused way."""
    dtype = tokens[0].dtype
    return (
        dtype in (torch.float32, torch.bfloat16)
        and all(x.dtype == dtype and x.device.type == "cpu" for x in tokens)
        and not torch.compiler.is_compiling()
        and kernel() is not None
    )


def call(name: str, *arguments) -> None:
    functions = kernel()
    assert functions is not None, "`ready` was not asked"
    functions[name](*(x.data_ptr() if isinstance(x, Tensor) else x for x in arguments))


def how(x: Tensor) -> tuple[int, int]:
    return int(x.dtype == torch.bfloat16), torch.get_num_threads()


class RMSNorm(torch.autograd.Function):
    """x / rms(x) * weight over the last axis, in x's dtype."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float):
        x, wide = x.contiguous(), weight.float()
        D = x.shape[-1]
        y, scale = torch.empty_like(x), torch.empty(x.numel() // D)
        call("rms_norm", *how(x), len(scale), D, eps, x, wide, y, scale)
        ctx.save_for_backward(x, wide, scale)
        ctx.weight_dtype = weight.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g_y):
        x, weight, scale = ctx.saved_tensors
        g_x, g_weight = torch.empty_like(x), torch.empty_like(weight)
        numbers = *how(x), len(scale), x.shape[-1]
        call("rms_norm_back", *numbers, x, weight, scale, g_y.contiguous(), g_x, g_weight)
        return g_x, g_weight.to(ctx.weight_dtype), None


class SiluMul(torch.autograd.Function):
    """silu(a) * b."""

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor):
        a, b = a.contiguous(), b.contiguous()
        y, D = torch.empty_like(a), a.shape[-1]
        call("silu_mul", *how(a), a.numel() // D, D, a, D, b, D, y)
        ctx.save_for_backward(a, b)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g_y):
        a, b = ctx.saved_tensors
        g_a, g_b, D = torch.empty_like(a), torch.empty_like(b), a.shape[-1]
        at = *how(a), a.numel() // D, D
        call("silu_mul_back", *at, a, D, b, D, g_y.contiguous(), g_a, D, g_b, D)
        return g_a, g_b


class SwiGLU(torch.autograd.Function):
    """silu(a) * b of [a, b] [..., 2 D]."""

    @staticmethod
    def forward(ctx, both: Tensor):
        both = both.contiguous()
        D = both.shape[-1] // 2
        y = both.new_empty(*both.shape[:-1], D)
        b = both.data_ptr() + D * both.element_size()
        call("silu_mul", *how(both), y.numel() // D, D, both, 2 * D, b, 2 * D, y)
        ctx.save_for_backward(both)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g_y):
        (both,) = ctx.saved_tensors
        g_both, D = torch.empty_like(both), both.shape[-1] // 2
        b, g_b = (x.data_ptr() + D * both.element_size() for x in (both, g_both))
        at = *how(both), g_y.numel() // D, D
        call(
            "silu_mul_back", *at, both, 2 * D, b, 2 * D, g_y.contiguous(), g_both, 2 * D, g_b, 2 * D
        )
        return g_both


class ConvSilu(torch.autograd.Function):
    """The short convolution and SiLU: x [B, T, D], tail [B, reach, D], weight [reach + 1, D] ->
    `parts` tensors [B, T, D / parts], the first `units` of them of norm 1 by groups of `group`
    features, and the tail to go on from."""

    @staticmethod
    def forward(ctx, x: Tensor, tail: Tensor, weight: Tensor, parts: int, units: int, group: int):
        x, tail, wide = x.contiguous(), tail.contiguous(), weight.float().contiguous()
        (B, T, D), reach = x.shape, tail.shape[1]
        part = D // parts
        y = [x.new_empty(B, T, part) for _ in range(parts)]
        ctx.numbers = *how(x), B, T, D, reach, group, units * part, part
        call("conv", *ctx.numbers, x, tail, wide, pointers(y))
        ctx.save_for_backward(x, tail, wide)
        ctx.weight_dtype = weight.dtype
        end = x[:, T - reach :] if reach <= T else torch.cat([tail[:, T:], x], dim=1)
        return *y, end.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        x, tail, weight = ctx.saved_tensors
        T, reach = x.shape[1], tail.shape[1]
        *g_y, g_end = (g.contiguous() for g in grads)
        g_x, g_tail = torch.empty_like(x), torch.empty_like(tail)
        g_weight = torch.empty_like(weight)
        call("conv_back", *ctx.numbers, x, tail, weight, pointers(g_y), g_x, g_tail, g_weight)
        kept = min(reach, T)
        g_x[:, T - kept :] += g_end[:, reach - kept :]
        g_tail[:, kept:] += g_end[:, : reach - kept]
        return g_x, g_tail, g_weight.to(ctx.weight_dtype), None, None, None


def pointers(tensors: list[Tensor]):
    return (c_void_p * len(tensors))(*(x.data_ptr() for x in tensors))


class Gates(torch.autograd.Function):
    """Logits [..., kinds, H, L] in float32 to lr and, of the kinds there are, log_momentum and
    log_decay, [..., H, L] each. floors: of the step size and of forgetting, see
    `pytitans.memory.closing_gate`."""

    @staticmethod
    def forward(ctx, logits: Tensor, momentum: bool, decay: bool, largest: float, *floors: float):
        logits = logits.contiguous()
        kinds = 1 + momentum + decay
        shape = (*logits.shape[:-3], *logits.shape[-2:])
        D = shape[-1] * shape[-2]
        out = [logits.new_empty(shape) for _ in range(kinds)]
        ctx.numbers = out[0].numel() // D, D, int(momentum), int(decay), largest, *floors
        call("gates", *ctx.numbers, logits, *placed(out, momentum))
        ctx.save_for_backward(logits)
        ctx.set_materialize_grads(False)
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        (logits,) = ctx.saved_tensors
        g_logits = torch.empty_like(logits)
        grads = [None if g is None else g.contiguous() for g in grads]
        call("gates_back", *ctx.numbers, logits, *placed(grads, bool(ctx.numbers[2])), g_logits)
        return g_logits, *[None] * 5


def placed(tensors: list, momentum: bool) -> list:
    """One entry each for the step size, the momentum and the decay; None where it is left out."""
    lr, *rest = tensors
    return [lr, rest.pop(0) if momentum else None, rest.pop(0) if rest else None]
