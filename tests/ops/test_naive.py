"""The definition against recurrences written out by hand, one number at a time."""

import pytest
import torch
from operator_cases import call, make_inputs, state_of
from torch import einsum

from pytitans.ops.naive import NORM_EPS, apply_memory, naive_memory


def test_delta_rule_by_hand():
    """No momentum, nothing forgotten, one-token chunks: M += lr k (v - M^T k)^T."""
    x = make_inputs(depth=1, off=("log_momentum", "log_decay"))
    got = call(naive_memory, x, chunk_size=1)["retrieved"]
    M = x["M0"]
    for t in range(x["q"].shape[1]):
        error = x["v"][:, t] - einsum("bhk,bhkv->bhv", x["k"][:, t], M)
        M = M + einsum("bh,bhk,bhv->bhkv", x["lr"][:, t], x["k"][:, t], error)
        torch.testing.assert_close(got[:, t], einsum("bhk,bhkv->bhv", x["q"][:, t], M))


def test_titans_recurrence_by_hand():
    """Equations 13 and 14 with the gradient of a chunk's tokens at its first memory."""
    x = make_inputs(depth=1, T=7)
    got = call(naive_memory, x, chunk_size=3)
    M, S, first = x["M0"], x["S0"], x["M0"]
    momentum, decay = (x[name].exp()[..., None, None] for name in ("log_momentum", "log_decay"))
    for t in range(7):
        first = M if t % 3 == 0 else first
        error = einsum("bhk,bhkv->bhv", x["k"][:, t], first) - x["v"][:, t]
        u = einsum("bhk,bhv->bhkv", x["k"][:, t], error)
        S = momentum[:, t] * S - x["lr"][:, t, :, None, None] * u
        M = decay[:, t] * M + S
        torch.testing.assert_close(got["retrieved"][:, t], einsum("bhk,bhkv->bhv", x["q"][:, t], M))
    torch.testing.assert_close((got["M0"], got["S0"], got["anchor0"]), (M, S, first))
    assert got["position"] == 1


def test_hebbian_rule_by_hand():
    """The dot objective writes v at k, whatever the memory holds: linear attention with decay."""
    x = make_inputs(depth=1, off=("log_momentum",))
    got = call(naive_memory, x, chunk_size=4, objective="dot")["retrieved"]
    M = x["M0"]
    for t in range(x["q"].shape[1]):
        write = einsum("bh,bhk,bhv->bhkv", x["lr"][:, t], x["k"][:, t], x["v"][:, t])
        M = x["log_decay"][:, t].exp()[..., None, None] * M + write
        torch.testing.assert_close(got[:, t], einsum("bhk,bhkv->bhv", x["q"][:, t], M))


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_a_deep_memory_is_an_mlp_with_residual_and_norm(activation):
    x = make_inputs(depth=3, V=4, norm=True)
    M, norm = state_of(x).M, (x["weight"][:, None], x["bias"][:, None])
    got = apply_memory(M, x["q"].transpose(1, 2), activation, norm, NORM_EPS)[1, 1, 2]
    act = getattr(torch.nn.functional, activation)
    y = x["q"][1, 2, 1]
    y = act(act(y @ M[0][1, 1]) @ M[1][1, 1]) @ M[2][1, 1]
    unit = (y - y.mean()) / (y.var(correction=0) + NORM_EPS).sqrt()
    torch.testing.assert_close(got, x["q"][1, 2, 1] + unit * x["weight"][1] + x["bias"][1])


def test_a_token_that_is_masked_does_not_exist():
    x = make_inputs(T=6)
    mask = torch.tensor([True, False, True, True, False, True]).expand(2, 6)
    kept = {n: t[:, mask[0]] if t.ndim > 2 and t.shape[1] == 6 else t for n, t in x.items()}
    got, want = (
        call(naive_memory, x, chunk_size=3, mask=mask),
        call(naive_memory, kept, chunk_size=3),
    )
    assert not got["retrieved"][:, ~mask[0]].any()
    torch.testing.assert_close(got["retrieved"][:, mask[0]], want["retrieved"])
    torch.testing.assert_close([got["M0"], got["S1"]], [want["M0"], want["S1"]])
    assert got["position"].tolist() == [1, 1] and want["position"] == 1
