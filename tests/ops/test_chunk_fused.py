"""The kernel is optional: without a compiler the plain form answers, after one line in the log.

Its products of bfloat16 are held against the definition in float64, on the same rounded tokens.
"""

import logging
from itertools import pairwise

import pytest
import torch
from operator_cases import GATES, call, cut, gradients, make_inputs, state_of

from pytitans.ops import chunk_fused
from pytitans.ops.chunk import chunk_memory
from pytitans.ops.naive import naive_memory

TEXT = ("q", "k", "v")


@pytest.fixture
def nothing_built(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    chunk_fused.kernel.cache_clear()
    yield tmp_path
    chunk_fused.kernel.cache_clear()


def test_without_a_compiler_plain_torch_answers(nothing_built, monkeypatch, caplog):
    inputs = make_inputs()
    want = call(chunk_memory, inputs, chunk_size=4)
    monkeypatch.setenv("CXX", "no-such-compiler")
    chunk_fused.kernel.cache_clear()
    caplog.clear()
    for _ in range(3):
        got = call(chunk_memory, inputs, chunk_size=4)
    torch.testing.assert_close(got, want)
    (line,) = caplog.records
    assert line.levelno == logging.WARNING and "no-such-compiler" in line.getMessage()


def test_a_compiler_that_fails_is_quoted(nothing_built, monkeypatch, caplog):
    monkeypatch.setenv("CXX", "false")
    assert chunk_fused.kernel() is None
    assert len(caplog.records) == 1
    assert not list(nothing_built.rglob("*.so"))


def test_the_kernel_leaves_denormals_as_they_were():
    """It flushes them to zero for itself, not for the threads that called it."""
    call(chunk_memory, {n: t.float() for n, t in make_inputs(B=4).items()}, chunk_size=4)
    assert (torch.full((64,), 1e-38) * 0.1).count_nonzero() == 64


@pytest.fixture
def bfloat16():
    built = chunk_fused.kernel()
    if built is None or not built.rounds:
        pytest.skip("no products of bfloat16 here: such a text is multiplied in float32")


def rounded(text=torch.bfloat16, **options):
    """The same inputs twice: the text in its dtype and the rest in float32, and all in float64.

    Weights as at a model's start, or depth 4 would enlarge every rounding by what it enlarges.
    """
    x = make_inputs(**{"T": 40, "K": 16, "V": 16, "hidden": 24, "lr": 0.02} | options)
    low = {}
    for name, t in x.items():
        if name[0] in "MSa":  # 0.3 times a normal number
            t = t.detach() / 0.3 / t.shape[-2] ** 0.5 * (0.1 if name[0] == "S" else 1)
        dtype = text if name in TEXT else torch.float32
        low[name] = t if t is None else t.detach().to(dtype)
    exact = {n: t if t is None else t.double().requires_grad_() for n, t in low.items()}
    return {n: t if t is None else t.requires_grad_() for n, t in low.items()}, exact


def assert_near(got, want, allowed=1.5e-2):
    """By the norm of the difference; the position exactly."""
    for name in want:
        error = (got[name].double() - want[name].double()).norm()
        assert error <= allowed * want[name].double().norm(), (name, error / want[name].norm())


def assert_computes(low, exact, allowed=1.5e-2, **options):
    """Values, state and every gradient, each in its input's dtype."""
    got, want = call(chunk_memory, low, **options), call(naive_memory, exact, **options)
    found = gradients(got, low)
    assert got["retrieved"].dtype == low["v"].dtype and got["M0"].dtype == torch.float32
    assert all(found[n].dtype == low[n].dtype for n in found)
    assert_near(got, want, allowed)
    assert_near(found, gradients(want, exact), allowed)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("chunk_size", [1, 16, 40])
def test_bfloat16_is_near_the_definition(bfloat16, chunk_size, depth, norm):
    assert_computes(*rounded(depth=depth, norm=norm), chunk_size=chunk_size, norm_eps=0.25)


@pytest.mark.parametrize("objective", ["l2", "dot"])
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_bfloat16_for_every_objective_and_activation(bfloat16, activation, objective):
    options = {"activation": activation, "objective": objective, "norm_eps": 0.25}
    assert_computes(*rounded(depth=3, norm=True), chunk_size=16, **options)


@pytest.mark.parametrize("off", [("lr",), ("log_momentum",), ("log_decay",), GATES])
@pytest.mark.parametrize("per_layer", [(), GATES])
def test_bfloat16_with_gates_off_or_for_each_layer(bfloat16, per_layer, off):
    assert_computes(*rounded(per_layer=per_layer, off=off), chunk_size=16)


WIDTHS = [(5, 3, 7), (16, 33, 50), (64, 48, 130), (33, 17, 15)]


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("chunk_size", [24, 40, 64])
def test_bfloat16_at_any_width(bfloat16, chunk_size, widths):
    """Pairs of an odd number of terms, and vectors that are not full."""
    K, V, hidden = widths
    assert_computes(*rounded(K=K, V=V, hidden=hidden, T=67), chunk_size=chunk_size)


@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("chunk_size", [24, 40, 64])
def test_float32_at_any_width(chunk_size, widths):
    K, V, hidden = widths
    inputs = rounded(text=torch.float32, K=K, V=V, hidden=hidden, T=67)
    assert_computes(*inputs, allowed=1e-5, chunk_size=chunk_size)


@pytest.mark.parametrize("position", [0, 5, torch.tensor([3, 9])])
def test_bfloat16_with_rows_of_their_own_lengths(bfloat16, position):
    mask = torch.ones(2, 40, dtype=torch.bool)
    mask[0, 29:] = mask[1, :11] = mask[1, 20:23] = False
    assert_computes(*rounded(), chunk_size=16, position=position, mask=mask)


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("cuts", [(17,), (1, 2, 3, 30), range(1, 40)])
def test_bfloat16_may_be_cut_anywhere(bfloat16, cuts, norm):
    low, _ = rounded(norm=norm)
    options = {"chunk_size": 16, "norm_eps": 0.25}
    whole = call(chunk_memory, low, **options)
    if norm:
        options["norm"] = (low["weight"], low["bias"])
    state, parts = state_of(low), []
    for begin, end in pairwise([0, *cuts, 40]):
        piece = cut(low, begin, end)
        out, state = chunk_memory(*(piece[n] for n in (*TEXT, *GATES)), state, **options)
        parts.append(out)
    got = {"retrieved": torch.cat(parts, 1)}
    for part in ("M", "S", "anchor"):
        got |= {f"{part}{i}": t for i, t in enumerate(getattr(state, part))}
    assert_near(got, {n: whole[n] for n in got})


def test_bfloat16_needs_the_whole_text(bfloat16):
    """One operand in float32, and products are float32."""
    low, exact = rounded()
    low["v"] = low["v"].detach().float().requires_grad_()
    want = call(naive_memory, exact, chunk_size=16)
    assert_near(call(chunk_memory, low, chunk_size=16), want, allowed=1e-5)
