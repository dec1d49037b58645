"""`ops.chunk_plain`'s forward and backward in one C++ call: every head's chunks in cache.

The kernel (`kernel/chunks.cpp`) needs nothing but a C++ compiler (`ops.native`). Where it cannot be
built `available` says so, once in the log, and the plain form is used.

State, gates, sums and elementwise work are float32 (or float64). Where q, k and v are bfloat16 and
the processor multiplies such numbers (AVX512_BF16), both sides of every product are rounded to
bfloat16; elsewhere a text in bfloat16 is multiplied in the state's dtype.
"""

import ctypes
import functools
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pytitans.ops import native
from pytitans.ops.chunk_plain import GROUP, Inputs, Run

MAX_LAYERS = 8

Weights = ctypes.c_void_p * MAX_LAYERS


def fields(kind, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class Args(ctypes.Structure):
    """The kernel's `Args`, field by field."""

    _fields_ = (
        *fields(ctypes.c_int64, "B T H L chunk offset dot gelu group normed momentum gate_layers"),
        ("width", ctypes.c_int64 * (MAX_LAYERS + 1)),
        *fields(ctypes.c_void_p, "q k v lr log_momentum log_decay weight bias mask last"),
        *fields(Weights, "M0 S0 A0"),
        ("out", ctypes.c_void_p),
        *fields(Weights, "M1 S1 anchor"),
        *fields(ctypes.c_void_p, "kept g_out"),
        *fields(Weights, "g_M1 g_S1 g_anchor"),
        *fields(ctypes.c_void_p, "g_q g_k g_v g_lr g_log_momentum g_log_decay g_weight g_bias"),
        *fields(Weights, "g_M0 g_S0 g_A0"),
        ("norm_eps", ctypes.c_double),
    )


FLOAT32, FLOAT64, BFLOAT16 = range(3)  # the kernel's `Kind`


class Kernel(NamedTuple):
    run: Any  # the library's function
    rounds: bool  # whether products of bfloat16 are compiled in


@functools.cache
def kernel() -> Kernel | None:
    """The built kernel, or None (with one line in the log that says why)."""
    library = native.load(Path(__file__).parent / "kernel" / "chunks.cpp")
    if library is None:
        return None
    run = library.pytitans_chunks
    run.argtypes = [ctypes.POINTER(Args), ctypes.c_int, ctypes.c_int, ctypes.c_int]
    run.restype = ctypes.c_int
    return Kernel(run, bool(library.pytitans_bfloat16()))


def available(inputs: Inputs, weights: list[Tensor], layers: int) -> bool:
    """Whether the kernel can take this call: CPU tensors, a state in float32 or float64."""
    wide = weights[0].dtype
    return (
        wide in (torch.float32, torch.float64)
        and all(x is None or x.device.type == "cpu" for x in (*inputs, *weights))
        and all(w.dtype == wide for w in weights)
        and layers <= MAX_LAYERS
        and kernel() is not None
    )


def rounds(inputs: Inputs, wide: torch.dtype) -> bool:
    """Whether products take bfloat16: where the whole text is, and the kernel has them."""
    built, text = kernel(), (inputs.q, inputs.k, inputs.v)
    low = all(x.dtype == torch.bfloat16 for x in text) and wide == torch.float32
    return low and built is not None and built.rounds


class Call:
    """One call's `Args` and the tensors its addresses belong to."""

    def __init__(self, run: Run, inputs: Inputs, M, S, A):
        self.wide, self.low = M[0].dtype, rounds(inputs, M[0].dtype)
        self.text = torch.bfloat16 if self.low else self.wide
        lr, log_momentum, log_decay = self.gates(inputs[3:6])
        self.inputs = Inputs(
            self.tokens(inputs.q),
            self.tokens(inputs.k),
            self.tokens(inputs.v),
            lr,
            log_momentum,
            log_decay,
            self.hold(inputs.weight),
            self.hold(inputs.bias),
            None if inputs.mask is None else inputs.mask.contiguous(),
        )
        B, T, H, K = inputs.q.shape
        self.heads = B * H
        widths = [K, *(W.shape[-1] for W in M)]
        self.size = sum(W[0].numel() for W in (*M, *S))
        self.args = Args(
            B=B, T=T, H=H, L=len(M), chunk=run.chunk_size, offset=run.offset, group=GROUP,
            dot=run.objective == "dot", gelu=run.activation == "gelu",
            normed=inputs.weight is not None, momentum=bool(S), gate_layers=self.gate_layers,
            width=(ctypes.c_int64 * (MAX_LAYERS + 1))(*widths), norm_eps=run.norm_eps,
        )  # fmt: skip
        self.point(**self.inputs._asdict(), last=run.last)
        self.point_layers(M0=M, S0=S, A0=A)
        first = -(-(T - (head := min(T, -run.offset % run.chunk_size))) // run.chunk_size)
        self.groups = -(-(first + (head > 0)) // GROUP)

    def hold(self, x: Tensor | None) -> Tensor | None:
        return None if x is None else x.detach().to(self.wide).contiguous()

    def tokens(self, x: Tensor) -> Tensor:
        return x.detach().to(self.text).contiguous()

    def gates(self, gates) -> list[Tensor | None]:
        """[B, T, H, layers] each, with as many layers as the gate that has most."""
        layers = [x.shape[3] if x.ndim == 4 else 1 for x in gates if x is not None]
        self.gate_layers = max(layers, default=1)
        spread = [x if x is None or x.ndim == 4 else x[..., None] for x in gates]
        return [
            x if x is None else self.hold(x.expand(*x.shape[:3], self.gate_layers)) for x in spread
        ]

    def point(self, **tensors: Tensor | None) -> None:
        for name, x in tensors.items():
            setattr(self.args, name, None if x is None else x.data_ptr())

    def point_layers(self, **tensors) -> None:
        for name, layers in tensors.items():
            setattr(self.args, name, Weights(*(x.data_ptr() for x in layers)))

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.wide)

    def start(self, backward: bool) -> None:
        kind = BFLOAT16 if self.low else FLOAT64 if self.wide == torch.float64 else FLOAT32
        threads = min(torch.get_num_threads(), self.heads)
        built = kernel()
        assert built is not None, "`available` was not asked"
        if built.run(ctypes.byref(self.args), kind, backward, threads):
            raise MemoryError("no memory for the kernel's buffers")


def forward(run: Run, inputs: Inputs, M, S, A, *, keep: bool, anchor: bool):
    """Same contract as `chunk_plain.forward`."""
    M, S, A = ([w.contiguous() for w in part] for part in (M, S, A))
    call = Call(run, inputs, M, S, A)
    out = torch.empty(inputs.v.shape, dtype=call.text)
    M1, S1, last = ([torch.empty_like(w) for w in part] for part in (M, S, M if anchor else []))
    kept = [call.empty(call.groups, call.heads, call.size)] if keep else []
    call.point(out=out, kept=kept[0] if keep else None)
    call.point_layers(M1=M1, S1=S1, anchor=last)
    call.start(backward=False)
    return out.to(inputs.v.dtype), [*M1, *S1, *last], kept


def backward(run: Run, inputs: Inputs, M, S, A, kept, g_out, g_M, g_S, g_anchor):
    """Same contract as `chunk_plain.backward`."""
    M, S, A = ([w.contiguous() for w in part] for part in (M, S, A))
    call = Call(run, inputs, M, S, A)
    g_out, *held = call.tokens(g_out), *(x.contiguous() for x in (*g_M, *g_S, *g_anchor))
    found = {n: x if x is None else torch.empty_like(x) for n, x in call.inputs._asdict().items()}
    del found["mask"]
    if inputs.weight is not None:  # the kernel's sums are each row's own
        rows = (*inputs.q.shape[::2], inputs.v.shape[-1])
        found |= {"weight": call.empty(*rows), "bias": call.empty(*rows)}
    g_weights = [torch.empty_like(w) for w in (*M, *S, *A)]
    parts = (len(M), len(M) + len(S))
    call.point(g_out=g_out, kept=kept[0])
    call.point(**{f"g_{name}": x for name, x in found.items()})
    call.point_layers(
        g_M1=held[: parts[0]], g_S1=held[parts[0] : parts[1]], g_anchor=held[parts[1] :],
        g_M0=g_weights[: parts[0]], g_S0=g_weights[parts[0] : parts[1]], g_A0=g_weights[parts[1] :],
    )  # fmt: skip
    call.start(backward=True)
    return [like(g, x) for g, x in zip(found.values(), inputs[:-1], strict=True)], g_weights


def like(g: Tensor | None, x: Tensor | None) -> Tensor | None:
    """A gradient as its input is: summed over the layers or rows the input was spread over."""
    if g is None or x is None:
        return None
    if x.ndim == 2:  # the norm's
        g = g.sum(0)
    elif x.ndim == 3:
        g = g.sum(-1)
    elif g.shape != x.shape:
        g = g.sum(-1, keepdim=True)
    return g.to(x.dtype)
