"""The field's layers: each is written out here token by token, in its paper's form and for one
sequence, from the layer's own weights."""

import math

import pytest
import torch
import torch.nn.functional as F

from pytitans.mixers import MIXERS, Mixer
from pytitans.recurrences import recurrence

DIM, HEADS, K, T = 16, 2, 8, 70  # longer than a tile of 64, more than four chunks of 16


def make(name: str, dtype=torch.float64) -> Mixer:
    torch.manual_seed(0)
    layer = MIXERS[name](DIM, HEADS)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return layer.to(dtype)


@pytest.fixture(params=MIXERS)
def layer(request) -> Mixer:
    return make(request.param)


def tokens(rows=2, n=T) -> torch.Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.randn(rows, n, DIM, generator=g, dtype=torch.float64)


# The papers' layers


def convolved(layer, x):
    """silu(sum_i w_i x_{t-i}) of each feature, by hand."""
    y = x @ layer.qkv.weight.T
    padded = torch.cat([y.new_zeros(3, y.shape[1]), y])
    return F.silu(sum(layer.conv.weight[i] * padded[i : i + len(y)] for i in range(4)))


def heads(y):
    """[T, parts D] -> q, k [T, H, K] and v [T, H, V]."""
    q, k, v = y[:, :DIM], y[:, DIM : 2 * DIM], y[:, 2 * DIM :]
    return [z.reshape(len(y), HEADS, -1) for z in (q, k, v)]


def rms(z, weight):
    return z / (z.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def delta(q, k, v, beta, alpha):
    """S_t = alpha_t S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T; o_t = S_t q_t; by head."""
    S, read = torch.zeros(HEADS, v.shape[-1], K).double(), []
    for t in range(len(q)):
        erase = torch.eye(K) - beta[t, :, None, None] * k[t, :, :, None] * k[t, :, None, :]
        S = alpha[t, :, None, None] * S @ erase
        S = S + beta[t, :, None, None] * v[t, :, :, None] * k[t, :, None, :]
        read.append((S @ q[t, :, :, None])[..., 0])
    return torch.stack(read)


def unit_heads(layer, x):
    q, k, v = heads(convolved(layer, x))
    return q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True), v


def gated_deltanet(layer, x):
    q, k, v = unit_heads(layer, x)
    beta, a = (x @ layer.to_gates.weight.T).reshape(-1, 2, HEADS).unbind(1)
    alpha = torch.exp(-layer.A_log.exp() * torch.log1p(torch.exp(a + layer.dt_bias)))
    o = rms(delta(q, k, v, 1 / (1 + torch.exp(-beta)), alpha), layer.head_norm.weight)
    return (o.flatten(1) * F.silu(x @ layer.to_open.weight.T)) @ layer.out.weight.T


def deltanet(layer, x):
    q, k, v = unit_heads(layer, x)
    beta = torch.sigmoid(x @ layer.to_gates.weight.T)
    o = rms(delta(q, k, v, beta, torch.ones_like(beta)), layer.head_norm.weight)
    return o.flatten(1) @ layer.out.weight.T


def turned(z, n):
    """Pairs as complex numbers, by n theta each."""
    theta = 10_000.0 ** (-torch.arange(0, K, 2).double() / K)
    pairs = torch.complex(z[..., : K // 2], z[..., K // 2 :]) * torch.exp(1j * n * theta)
    return torch.cat([pairs.real, pairs.imag], dim=-1)


def retnet(layer, x):
    q, k, v = heads(x @ layer.qkv.weight.T)
    gamma = 1 - 2.0 ** (-5 - torch.arange(HEADS).double())
    S, read = torch.zeros(HEADS, K, 2 * K).double(), []
    for n in range(len(x)):
        S = gamma[:, None, None] * S + turned(k[n] / math.sqrt(K), n)[:, :, None] * v[n][:, None]
        read.append((turned(q[n], n)[:, None] @ S)[:, 0])
    o = rms(torch.stack(read), layer.head_norm.weight).flatten(1)
    return (F.silu(x @ layer.to_open.weight.T) * o) @ layer.out.weight.T


def mamba2(layer, x):
    C, B, v = heads(convolved(layer, x))
    dt = torch.log1p(torch.exp(x @ layer.to_gates.weight.T + layer.dt_bias))
    h, read = torch.zeros(HEADS, 2 * K, K).double(), []
    for t in range(len(x)):
        keep = torch.exp(-dt[t] * layer.A_log.exp())[:, None, None]
        h = keep * h + dt[t][:, None, None] * v[t, :, :, None] * B[t, :, None, :]
        read.append((h @ C[t, :, :, None])[..., 0] + layer.D[:, None] * v[t])
    y = torch.stack(read).flatten(1) * F.silu(x @ layer.to_open.weight.T)
    return rms(y, layer.norm.weight) @ layer.out.weight.T


def layer_norm(z, weight, bias, eps):
    return (z - z.mean(-1, keepdim=True)) / (z.var(-1, False, keepdim=True) + eps).sqrt() * (
        weight
    ) + bias


def ttt_mlp(layer, x):
    q, k, v = unit_heads(layer, x)
    eta = 0.1 / K * torch.sigmoid(x @ layer.to_gates.weight.T + layer.lr_bias)

    def f(W, z, h):
        inner = F.gelu(z @ W[0]) @ W[1]
        return z + layer_norm(inner, layer.norm_weight[h], layer.norm_bias[h], 1e-5)

    columns = []
    for h in range(HEADS):
        W, read = [layer.M_0[0][h], layer.M_0[1][h]], []
        for t in range(len(x)):
            anchor = [w.detach().requires_grad_() for w in W] if t % 16 == 0 else anchor
            loss = 0.5 * (f(anchor, k[t, h], h) - v[t, h]).square().sum()
            u = torch.autograd.grad(loss, anchor)
            W = [w - eta[t, h] * g for w, g in zip(W, u, strict=True)]
            read.append(f(W, q[t, h], h))
        columns.append(torch.stack(read))
    z = torch.cat(columns, dim=-1)
    z = layer_norm(z, layer.norm.weight, layer.norm.bias, 1e-6)
    gate = x @ layer.to_open.weight.T
    gate = 0.5 * gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
    return (gate * z) @ layer.out.weight.T


PAPERS = {
    "gated_deltanet": gated_deltanet,
    "deltanet": deltanet,
    "retnet": retnet,
    "mamba2": mamba2,
    "ttt_mlp_like": ttt_mlp,
}


def test_every_layer_is_written_out_here():
    assert PAPERS.keys() == MIXERS.keys()


@pytest.mark.parametrize("name", MIXERS)
def test_equals_the_published_layer(name):
    layer, x = make(name), tokens()
    assert layer.rule == recurrence(name)
    y, _ = layer(x)
    want = torch.stack([PAPERS[name](layer, row) for row in x])
    torch.testing.assert_close(y, want, rtol=1e-7, atol=1e-9)


def test_streaming_equals_one_call(layer):
    """At cuts of every kind; RetNet's angles go on from piece to piece."""
    x = tokens()
    want, end = layer(x)
    state, pieces = None, []
    for piece in x.split([1, 3, 16, 1, 1, 48], dim=1):
        y, state = layer(piece, state)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), want)
    torch.testing.assert_close(state.memory.M, end.memory.M)
    torch.testing.assert_close(state.tail, end.tail)


def test_future_tokens_do_not_matter(layer):
    x = tokens()
    other = torch.cat([x[:, :41], tokens(n=29).flip(2)], dim=1)
    torch.testing.assert_close(layer(x)[0][:, :41], layer(other)[0][:, :41], rtol=0, atol=1e-12)
    assert not torch.allclose(layer(x)[0][:, 41:], layer(other)[0][:, 41:])


def test_tokens_that_do_not_exist_change_nothing(layer):
    """Rows of different length, and how each goes on."""
    x, lengths = tokens(rows=3), [33, 70, 0]
    y, state = layer(x, None, torch.tensor(lengths))
    more = tokens(rows=3, n=9)
    after, _ = layer(more, state)
    for row, n in enumerate(lengths):
        alone, end = layer(x[row : row + 1, :n])
        torch.testing.assert_close(y[row, :n], alone[0])
        torch.testing.assert_close(after[row], layer(more[row : row + 1], end)[0][0])


def test_every_parameter_gets_a_gradient(layer):
    layer(tokens())[0].square().sum().backward()
    for name, p in layer.named_parameters():
        assert p.grad is not None and (p.grad != 0).any(), name


def test_state_is_float32_whatever_the_model(layer):
    low = layer.to(torch.bfloat16)
    y, state = low(tokens().bfloat16())
    assert y.dtype == torch.bfloat16 and y.isfinite().all()
    assert all(W.dtype == torch.float32 for W in state.memory.M)
    with torch.autocast("cpu", torch.bfloat16):
        _, state = layer.float()(tokens().float())
    assert all(W.dtype == torch.float32 for W in state.memory.M)


def test_low_precision_is_near(layer):
    """bfloat16 weights and tokens: as far from float64 as rounding both once, ten times."""
    x = tokens().bfloat16()
    got = layer.to(torch.bfloat16)(x)[0].double()
    want = layer.double()(x.double())[0]
    assert (got - want).norm() < 10 * 2**-8 * want.norm()


@pytest.mark.parametrize("name", ["gated_deltanet", "mamba2"])
def test_rates_start_as_published(name):
    torch.manual_seed(0)
    layer = MIXERS[name](512, 128)
    rates, dt = layer.A_log.exp(), F.softplus(layer.dt_bias)
    assert 1 <= rates.min() < 2 and 15 < rates.max() <= 16
    assert 0.99e-3 <= dt.min() < 2e-3 and 0.05 < dt.max() <= 0.101


def test_an_impossible_shape_is_refused():
    with pytest.raises(ValueError, match="dim=30"):
        MIXERS["deltanet"](30, 4)
