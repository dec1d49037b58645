"""The fused row operations against plain torch in float64: values and every gradient."""

import pytest
import torch
import torch.nn.functional as F

from pytitans.layers import RMSNorm, ShortConv, SwiGLU, silu_mul
from pytitans.memory import NeuralMemory
from pytitans.ops import rows

CLOSE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}  # relative, of the norm

pytestmark = pytest.mark.skipif(rows.kernel() is None, reason="no C++ compiler")


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request):
    torch.manual_seed(0)
    return request.param


def same(module, tokens, dtype, monkeypatch):
    """`module(*tokens)` in dtype, fused, against the module in float64, which is plain torch: the
    inputs are numbers both dtypes can hold."""
    tokens = [x.to(dtype) for x in tokens]
    calls = []
    monkeypatch.setattr(
        rows, "call", lambda name, *a, do=rows.call: (calls.append(name), do(name, *a))
    )
    got = values_and_gradients(module, tokens)
    assert calls, "the fused way was not taken"
    calls.clear()
    expected = values_and_gradients(module.double(), [x.double() for x in tokens])
    assert not calls, "float64 is plain torch's"
    for a, b in zip(got, expected, strict=True):
        assert (a.double() - b).norm() <= CLOSE[dtype] * b.norm() + 1e-9, (a, b)


def values_and_gradients(module, tokens):
    module.zero_grad()
    tokens = [x.clone().requires_grad_() for x in tokens]
    out = module(*tokens)
    out = list(out) if isinstance(out, (tuple, list)) else [out]
    flat = [y for x in out for y in (x if isinstance(x, list) else [x])]
    torch.manual_seed(1)
    weights = [torch.randn(y.shape, dtype=torch.float64).bfloat16().double() for y in flat]
    sum((y.double() * w).sum() for y, w in zip(flat, weights, strict=True)).backward()
    grads = [x.grad for x in (*tokens, *module.parameters())]
    return [x.detach() for x in (*flat, *grads)]


@pytest.mark.parametrize("shape", [(3, 7, 16), (2, 300, 64), (1, 1, 5)])
def test_rms_norm(shape, dtype, monkeypatch):
    norm = RMSNorm(shape[-1])
    torch.nn.init.normal_(norm.weight)
    same(norm, [3 * torch.randn(shape)], dtype, monkeypatch)


class Gate(torch.nn.Module):
    def forward(self, a, b):
        return silu_mul(a, b)


def test_gate(dtype, monkeypatch):
    same(Gate(), [torch.randn(2, 300, 33), torch.randn(2, 300, 33)], dtype, monkeypatch)


def test_gate_of_rows_that_are_not_contiguous(dtype):
    a, b = torch.randn(2, 40, 6, 10).to(dtype).transpose(1, 2).unbind(2)[:2]
    torch.testing.assert_close(silu_mul(a, b), F.silu(a) * b, rtol=2e-2, atol=1e-3)


class Halves(torch.nn.Module):
    """SwiGLU between its projections."""

    def forward(self, both):
        if rows.ready(both):
            return rows.SwiGLU.apply(both)
        a, b = both.chunk(2, dim=-1)
        return F.silu(a) * b


def test_swiglu(dtype, monkeypatch):
    same(Halves(), [torch.randn(2, 200, 2 * 48)], dtype, monkeypatch)


def test_swiglu_layer_uses_it():
    layer, x = SwiGLU(8, 12), torch.randn(2, 5, 8)
    expected = layer.double()(x.double())
    torch.testing.assert_close(layer.float()(x).double(), expected, rtol=1e-4, atol=1e-6)


class Conv(torch.nn.Module):
    def __init__(self, size, parts, units, heads, head_dim):
        super().__init__()
        self.conv = ShortConv(parts * heads * head_dim, size)
        self.how = {"parts": parts, "units": units, "group": head_dim}

    def forward(self, x, tail):
        return self.conv(x, tail, **self.how)


@pytest.mark.parametrize("tokens", [1, 2, 3, 50, 200])
@pytest.mark.parametrize(("parts", "units"), [(3, 2), (1, 1), (1, 0)])
@pytest.mark.parametrize("size", [4, 1, 2])
def test_short_conv(tokens, parts, units, size, dtype, monkeypatch):
    """Also the gradient that comes back through the tail, and the one that leaves through it."""
    heads, head_dim = 3, 20
    x = torch.randn(2, tokens, parts * heads * head_dim)
    tail = torch.randn(2, size - 1, parts * heads * head_dim)
    if size == 1:  # nothing to go on from
        tail = tail.zero_()
    same(Conv(size, parts, units, heads, head_dim), [x, tail], dtype, monkeypatch)


@pytest.mark.parametrize("momentum", [True, False])
@pytest.mark.parametrize("decay", [True, False])
def test_gates(momentum, decay):
    """In float32, from logits far below where a gate closes to far above where it opens."""
    torch.manual_seed(0)
    memory = NeuralMemory(12, 3, depth=2, momentum=momentum, decay=decay)
    torch.nn.init.normal_(memory.to_gates.weight, std=0.3)
    x = [torch.randn(2, 60, *size).bfloat16().float() for size in ((12,), (3, 4), (3, 4), (3, 4))]

    def run(memory, x):
        memory.zero_grad()
        gates = [g for g in memory.gate_values(*x) if g is not None]
        torch.manual_seed(1)
        sum(
            (g.double() * torch.randn(g.shape, dtype=torch.float64)).sum() for g in gates
        ).backward()
        return [g.detach() for g in gates], [p.grad for p in memory.to_gates.parameters()]

    values, grads = run(memory, x)
    exact, exact_grads = run(memory.double(), [part.double() for part in x])
    assert [len(values), values[0].dtype] == [1 + momentum + decay, torch.float32]
    assert (values[0] == 0).any()
    assert (values[0] > 0).any()
    for a, b in zip([*values, *grads], [*exact, *exact_grads], strict=True):
        assert (a.double() - b).norm() < 1e-4 * b.norm()  # log(1 - decay) near 1 is steep


def test_closed_gate_reopens_only_where_that_lowers_the_loss():
    logits = torch.full((1, 1, 1, 2), -9.0, requires_grad=True)
    (lr,) = rows.Gates.apply(logits, False, False, 1.0, 0.03, 1e-4)
    (lr * torch.tensor([1.0, -1.0])).sum().backward()
    assert lr.eq(0).all()
    closed, wanted = logits.grad.flatten()
    assert closed == 0
    assert wanted < 0


def test_without_a_compiler_the_layers_are_plain_torch(monkeypatch):
    x = torch.randn(2, 9, 12)
    memory = NeuralMemory(12, 3)
    fused, _ = memory(x)
    monkeypatch.setattr(rows, "kernel", lambda: None)
    plain, _ = memory(x)
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-5)
