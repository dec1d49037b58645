"""Every named memory is what its paper prints: each is written out here by hand, for one head, in
the paper's own form (linear memories mostly as S [V, K], with columns k and v)."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from pytitans.ops import MemoryState, initial_state
from pytitans.recurrences import RECURRENCES, Recurrence, recurrence

B, T, H, K, V = 2, 70, 3, 4, 5  # longer than a tile of 64


# The papers' recurrences: tokens of one head in, what they read and the last memory out


def linear_attention(h, q, k, v):
    S, read = torch.zeros(V, K).to(q), []
    for t in range(T):
        S = S + torch.outer(v[t], k[t])
        read.append(S @ q[t])
    return torch.stack(read), (S.T,)


def retnet(h, q, k, v):
    gamma = 1 - 2.0 ** (-5 - h)
    S, read = torch.zeros(K, V).to(q), []  # S_n = gamma S_{n-1} + K_n^T V_n
    for t in range(T):
        S = gamma * S + k[t][:, None] @ v[t][None, :]
        read.append((q[t][None, :] @ S)[0])
    return torch.stack(read), (S,)


def mamba2(h, C, B, x, dt, A):
    S, read = torch.zeros(V, K).to(x), []  # h_t = exp(dt A) h_{t-1} + dt B x, y_t = C h_t
    for t in range(T):
        S = torch.exp(dt[t] * A) * S + torch.outer(dt[t] * x[t], B[t])
        read.append(S @ C[t])
    return torch.stack(read), (S.T,)


def deltanet(h, q, k, v, beta):
    S, read = torch.zeros(V, K).to(q), []
    for t in range(T):
        S = S @ (torch.eye(K).to(q) - beta[t] * torch.outer(k[t], k[t]))
        S = S + beta[t] * torch.outer(v[t], k[t])
        read.append(S @ q[t])
    return torch.stack(read), (S.T,)


def gated_deltanet(h, q, k, v, beta, log_alpha):
    S, read = torch.zeros(V, K).to(q), []
    for t in range(T):
        S = S @ (log_alpha[t].exp() * (torch.eye(K).to(q) - beta[t] * torch.outer(k[t], k[t])))
        S = S + beta[t] * torch.outer(v[t], k[t])
        read.append(S @ q[t])
    return torch.stack(read), (S.T,)


def titans_linear(h, q, k, v, theta, log_eta, log_keep):
    M, S, read = torch.zeros(V, K).to(q), torch.zeros(V, K).to(q), []
    for t in range(T):
        gradient = M @ torch.outer(k[t], k[t]) - torch.outer(v[t], k[t])
        S = log_eta[t].exp() * S - theta[t] * gradient
        M = log_keep[t].exp() * M + S
        read.append(M @ q[t])
    return torch.stack(read), (M.T,)


def layer_norm(z, weight, bias):
    return (z - z.mean()) / (z.var(unbiased=False) + 1e-5).sqrt() * weight + bias


def learn(h, q, k, loss, answer, W, step, size):
    """W_t = step(t, W_{t-1}, gradient of the loss at the chunk's first W); read with W_t."""
    read = []
    for t in range(q.shape[0]):
        anchor = W if t % size == 0 else anchor
        u = torch.autograd.grad(loss(anchor, t), anchor, create_graph=True)
        W = step(t, W, u)
        read.append(answer(W, q[t]))
    return torch.stack(read), W


def ttt(h, q, k, v, eta, weight, bias, W, mlp):
    def f(W, x):
        return x + layer_norm(mlp(W, x), weight[h], bias[h])

    def reconstruction(W, t):  # of v - k by what is added to k, without a 1/2
        return (layer_norm(mlp(W, k[t]), weight[h], bias[h]) - (v[t] - k[t])).square().sum()

    def descend(t, W, u):
        return tuple(w - eta[t] * g for w, g in zip(W, u, strict=True))

    return learn(h, q, k, reconstruction, f, W, descend, 16)


def ttt_linear(h, q, k, v, eta, weight, bias, *W):
    return ttt(h, q, k, v, eta, weight, bias, W, lambda W, x: x @ W[0])


def ttt_mlp(h, q, k, v, eta, weight, bias, *W):
    return ttt(h, q, k, v, eta, weight, bias, W, lambda W, x: F.gelu(x @ W[0]) @ W[1])


def titans_deep(h, q, k, v, theta, log_eta, log_keep, *W):
    def f(W, x):
        z = x @ W[0]
        return (z * torch.sigmoid(z)) @ W[1]

    def loss(W, t):
        return (f(W, k[t]) - v[t]).square().sum()

    S = [torch.zeros_like(w) for w in W]

    def step(t, W, u):
        S[:] = [log_eta[t].exp() * s - theta[t] * g for s, g in zip(S, u, strict=True)]
        return tuple(log_keep[t].exp() * w + s for w, s in zip(W, S, strict=True))

    return learn(h, q, k, loss, f, W, step, 16)


# Each beside the preset: the inputs by the paper's names, and how the preset is called on them


def draw(seed=0, V=V):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def gate():
        return F.logsigmoid(normal(B, T, H) + 2)

    x = {"q": normal(B, T, H, K), "k": F.normalize(normal(B, T, H, K), dim=-1)}
    x |= {"v": normal(B, T, H, V), "step": normal(B, T, H).sigmoid()}
    x |= {"momentum": gate(), "decay": gate(), "A": -normal(H).exp()}
    x |= {"weight": 1 + 0.3 * normal(H, V), "bias": 0.3 * normal(H, V)}
    for i, (a, b) in enumerate(pairwise([K, 7, V])):
        x[f"W{i}"] = 0.4 * normal(B, H, a, b)
    return x | {"W": 0.4 * normal(B, H, K, V)}


QKV = ("q", "k", "v")
GATES = ("momentum", "decay")
CASES = {
    "linear_attention": (linear_attention, QKV, lambda f, q, k, v: f(q, k, v)),
    "retnet": (retnet, QKV, lambda f, q, k, v: f(q, k, v)),
    "mamba2": (
        mamba2,
        (*QKV, "step", "A"),
        lambda f, C, B, x, dt, A: f(C, B, x, dt, log_decay=dt * A),
    ),
    "deltanet": (deltanet, (*QKV, "step"), lambda f, q, k, v, beta: f(q, k, v, beta)),
    "gated_deltanet": (
        gated_deltanet,
        (*QKV, "step", "decay"),
        lambda f, q, k, v, beta, log_alpha: f(q, k, v, beta, log_decay=log_alpha),
    ),
    "titans_linear": (
        titans_linear,
        (*QKV, "step", *GATES),
        lambda f, *tokens: f(*tokens),
    ),
    "ttt_linear": (
        ttt_linear,
        (*QKV, "step", "weight", "bias", "W"),
        lambda f, q, k, v, eta, weight, bias, *W: f(
            q, k, v, 2 * eta, state=initial_state(W), norm=(weight, bias)
        ),
    ),
    "ttt_mlp_like": (
        ttt_mlp,
        (*QKV, "step", "weight", "bias", "W0", "W1"),
        lambda f, q, k, v, eta, weight, bias, *W: f(
            q, k, v, 2 * eta, state=initial_state(W), norm=(weight, bias)
        ),
    ),
    "titans_deep": (
        titans_deep,
        (*QKV, "step", *GATES, "W0", "W1"),
        lambda f, q, k, v, theta, log_eta, log_keep, *W: f(
            q, k, v, 2 * theta, log_eta, log_keep, initial_state(W)
        ),
    ),
}


def inputs_of(name) -> list[torch.Tensor]:
    x = draw(V=K if "ttt" in name else V)
    if "ttt" in name or "deep" in name:
        x["step"] = x["step"] / 20  # gradients of a chunk add up
    return [x[key].requires_grad_() for key in CASES[name][1]]


def written_out(name, inputs):
    """The paper's recurrence for every row and head: what is read, and the last weights."""
    paper, names, _ = CASES[name]

    def one(b, h, key, x):
        if key in ("weight", "bias"):
            return x  # learned for all rows
        if key == "A":
            return x[h]
        return x[b, h] if key.startswith("W") else x[b, :, h]

    rows = [
        [
            paper(h, *(one(b, h, key, x) for key, x in zip(names, inputs, strict=True)))
            for h in range(H)
        ]
        for b in range(B)
    ]
    read = torch.stack([torch.stack([r for r, _ in row], dim=1) for row in rows])
    layers = range(len(rows[0][0][1]))
    return read, [
        torch.stack([torch.stack([W[i] for _, W in row]) for row in rows]) for i in layers
    ]


def test_every_recurrence_is_written_out_here():
    assert CASES.keys() == RECURRENCES.keys()


@pytest.mark.parametrize("name", RECURRENCES)
def test_equals_the_published_recurrence(name):
    inputs = inputs_of(name)
    read, last = written_out(name, inputs)
    retrieved, state = CASES[name][2](recurrence(name), *inputs)
    torch.testing.assert_close(retrieved, read)
    torch.testing.assert_close(list(state.M), last)
    g = torch.Generator().manual_seed(1)
    sums = [torch.randn(x.shape, generator=g, dtype=x.dtype) for x in (read, *last)]
    expected = torch.autograd.grad([read, *last], inputs, sums)
    torch.testing.assert_close(
        torch.autograd.grad([retrieved, *state.M], inputs, sums), expected, rtol=1e-6, atol=1e-9
    )


@pytest.mark.parametrize("name", RECURRENCES)
def test_streaming_equals_one_call(name):
    rule, x = recurrence(name), draw(V=K)
    gates = [x["step"] / 20, x["momentum"], x["decay"]]
    gates[1] = gates[1] if rule.momentum else None
    gates[2] = gates[2] if rule.decay.startswith("gated") else None
    M = (x["W"][..., :K],) if rule.depth == 1 else (x["W0"], x["W1"])
    whole, end = rule(x["q"], x["k"], x["v"], *gates, initial_state(M))
    state, pieces = initial_state(M), []
    for begin, stop in pairwise([0, 1, 19, 50, T]):
        cut = [None if a is None else a[:, begin:stop] for a in (x["q"], x["k"], x["v"], *gates)]
        piece, state = rule(*cut, state)
        pieces.append(piece)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole)
    torch.testing.assert_close(state.M, end.M)


def test_linear_attention_normaliser_is_a_column_of_ones():
    x = draw()
    q, k = (F.elu(x[name]) + 1 for name in "qk")  # Katharopoulos et al., eq. 7
    ones = torch.ones(B, T, H, 1, dtype=torch.float64)
    read, _ = recurrence("linear_attention")(q, k, torch.cat([x["v"], ones], dim=-1))
    scores = torch.einsum("bthk,bshk->bhts", q, k).tril()
    weights = scores / scores.sum(-1, keepdim=True)
    expected = torch.einsum("bhts,bshv->bthv", weights, x["v"])
    torch.testing.assert_close(read[..., :V] / read[..., V:], expected)


@pytest.mark.parametrize("decay", [0.0, 1e-20, 1e-8, 1.0])
def test_gated_deltanet_forgets_all_or_nothing(decay):
    """In float32, at gates whose reciprocal is huge: as exact as where it is 1."""
    x = {name: t.float() for name, t in draw().items()}
    log_decay = torch.zeros(B, T, H)
    log_decay[:, 30] = torch.tensor(decay).log()
    names = [*QKV, "step"]
    inputs = [x[name].requires_grad_() for name in names] + [log_decay.requires_grad_()]
    read, _ = recurrence("gated_deltanet")(*inputs[:4], log_decay=inputs[4])
    wide = [t.detach().double().requires_grad_() for t in inputs]
    expected, _ = written_out("gated_deltanet", wide)
    torch.testing.assert_close(read.double(), expected, rtol=1e-4, atol=1e-5)
    got = torch.autograd.grad(read.sum(), inputs)
    for a, b in zip(got[:4], torch.autograd.grad(expected.sum(), wide)[:4], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-3)
    assert got[4].isfinite().all()


def test_padding_leaves_a_fixed_decay_alone():
    x, rule = draw(), recurrence("retnet")
    _, state = rule(x["q"], x["k"], x["v"])
    padded = [torch.cat([x[name], torch.ones(B, 6, H, x[name].shape[3])], dim=1) for name in QKV]
    mask = torch.arange(T + 6).expand(B, -1) < T
    _, after = rule(*padded, mask=mask)
    torch.testing.assert_close(after.M, state.M)


def test_a_variant_is_a_replace():
    x = inputs_of("ttt_linear")
    narrow, wide = recurrence("ttt_linear"), replace(recurrence("ttt_linear"), chunk_size=64)
    q, k, v, eta = x[:4]
    with torch.no_grad():
        one, other = narrow(q, k, v, eta)[0], wide(q, k, v, eta)[0]
    torch.testing.assert_close(one[:, :16], other[:, :16])
    assert not torch.allclose(one, other)


def test_what_a_rule_lacks_or_needs_is_said():
    x = draw()
    q, k, v, step, gate = (x[name] for name in (*QKV, "step", "decay"))
    with pytest.raises(ValueError, match="log_decay is not part"):
        recurrence("deltanet")(q, k, v, step, log_decay=gate)
    with pytest.raises(ValueError, match="log_momentum is missing"):
        recurrence("titans_linear")(q, k, v, step, log_decay=gate)
    with pytest.raises(ValueError, match="norm is not part"):
        recurrence("deltanet")(q, k, v, step, norm=(x["weight"], x["bias"]))
    with pytest.raises(ValueError, match="give the state"):
        recurrence("titans_deep")(q, k, v, step, gate, gate)
    with pytest.raises(ValueError, match="has 2 layers"):
        recurrence("deltanet")(q, k, v, step, state=MemoryState((q, q), (q, q), (q, q)))
    with pytest.raises(ValueError, match="float16"):
        recurrence("gated_deltanet")(q, k, v.half(), step, log_decay=gate)
    with pytest.raises(ValueError, match="set chunk_size"):
        Recurrence(depth=2)
    with pytest.raises(ValueError, match="must be None"):
        Recurrence(decay="gated_first", chunk_size=16)
    with pytest.raises(ValueError, match=r"'rwkv' is unknown: choose one of linear_attention"):
        recurrence("rwkv")
