"""`chunk_memory` is `naive_memory`: same values, state and gradients, whatever the shapes.

Every property is asked of both its forms, in plain torch and in the C++ kernel.
"""

import pytest
import torch
from operator_cases import assert_any_cut, assert_is_the_definition, call, gradients, make_inputs

from pytitans.ops import chunk_fused
from pytitans.ops.chunk import chunk_memory
from pytitans.ops.gates import decay_matrix
from pytitans.ops.naive import naive_memory

ALL_GATES = ("lr", "log_momentum", "log_decay")


@pytest.fixture(params=["plain", "fused"], autouse=True)
def form(request, monkeypatch):
    if request.param == "plain":
        monkeypatch.setattr(chunk_fused, "available", lambda *_: False)
    elif chunk_fused.kernel() is None:
        pytest.skip("no C++ compiler here: the kernel is optional")
    return request.param


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("chunk_size", [1, 3, 11, 64])
def test_is_the_definition(chunk_size, depth):
    assert_is_the_definition(chunk_memory, make_inputs(depth=depth), chunk_size=chunk_size)


@pytest.mark.parametrize("objective", ["l2", "dot"])
@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize("depth", [1, 3])
def test_is_the_definition_for_every_objective_and_activation(depth, activation, objective):
    inputs = make_inputs(depth=depth)
    options = {"activation": activation, "objective": objective}
    assert_is_the_definition(chunk_memory, inputs, chunk_size=4, **options)


@pytest.mark.parametrize("objective", ["l2", "dot"])
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_is_the_definition_with_norm(depth, objective):
    inputs = make_inputs(depth=depth, V=4, norm=True)
    assert_is_the_definition(chunk_memory, inputs, chunk_size=4, objective=objective)


@pytest.mark.parametrize("norm_eps", [1e-8, 0.25])
def test_is_the_definition_with_any_norm_eps(norm_eps):
    inputs = make_inputs(V=4, norm=True)
    assert_is_the_definition(chunk_memory, inputs, chunk_size=4, norm_eps=norm_eps)


@pytest.mark.parametrize("per_layer", [("lr",), ("log_momentum",), ("log_decay",), ALL_GATES])
def test_is_the_definition_with_a_gate_for_each_layer(per_layer):
    assert_is_the_definition(chunk_memory, make_inputs(depth=3, per_layer=per_layer), chunk_size=4)


@pytest.mark.parametrize(
    "off", [("lr",), ("log_momentum",), ("log_decay",), ("log_momentum", "log_decay"), ALL_GATES]
)
@pytest.mark.parametrize("per_layer", [(), ALL_GATES])
def test_is_the_definition_with_gates_off(per_layer, off):
    inputs = make_inputs(depth=2, per_layer=per_layer, off=off)
    assert_is_the_definition(chunk_memory, inputs, chunk_size=4)


@pytest.mark.parametrize("value", [0.0, -torch.inf])
@pytest.mark.parametrize("gate", ["log_momentum", "log_decay"])
@pytest.mark.parametrize("per_layer", [(), ALL_GATES])
def test_is_the_definition_at_gates_of_0_and_1(per_layer, gate, value):
    inputs = make_inputs(per_layer=per_layer)
    with torch.no_grad():
        inputs[gate][:, 2:9:3] = value
        inputs[gate][1, 5:7] = value
    assert_is_the_definition(chunk_memory, inputs, chunk_size=5)


def test_is_the_definition_when_nothing_is_written():
    inputs = make_inputs()
    with torch.no_grad():
        inputs["lr"][:, 3:8] = 0.0
    assert_is_the_definition(chunk_memory, inputs, chunk_size=4)


@pytest.mark.parametrize("position", [1, 3])
@pytest.mark.parametrize("T", [1, 2, 11])
def test_is_the_definition_in_an_open_chunk(T, position):
    assert_is_the_definition(chunk_memory, make_inputs(T=T), chunk_size=4, position=position)


def test_is_the_definition_with_a_position_for_each_row():
    inputs = make_inputs(B=3, V=4, norm=True)
    position = torch.tensor([1, 3, 2])
    assert_is_the_definition(chunk_memory, inputs, chunk_size=4, position=position)


PADDED = {
    "left": "..xxxxxxxxx",
    "right": "xxxxx......",
    "gaps": "x.xx..xxx.x",
    "nothing": "...........",
}


@pytest.mark.parametrize("rows", [("left", "right"), ("gaps", "nothing"), ("right", "gaps")])
@pytest.mark.parametrize("off", [(), ("log_momentum",), ("log_decay",)])
def test_is_the_definition_with_padding(rows, off):
    mask = torch.tensor([[c == "x" for c in PADDED[row]] for row in rows])
    inputs = make_inputs(per_layer=("log_decay",) if not off else (), off=off)
    assert_is_the_definition(chunk_memory, inputs, chunk_size=3, mask=mask)


@pytest.mark.parametrize("pad", PADDED)
def test_padding_is_as_if_the_token_were_not_there(pad):
    mask = torch.tensor([[c == "x" for c in PADDED[pad]]])
    inputs = make_inputs(B=1)
    real = {n: t[:, mask[0]] if n in ("q", "k", "v", *ALL_GATES) else t for n, t in inputs.items()}
    got = call(chunk_memory, inputs, chunk_size=4, mask=mask)
    want = call(naive_memory, real, chunk_size=4) if mask.any() else None
    assert not got["retrieved"][~mask].any()
    if want is None:
        return torch.testing.assert_close((got["M0"], got["S1"]), (inputs["M0"], inputs["S1"]))
    torch.testing.assert_close(got["retrieved"][mask], want["retrieved"][0])
    names = ("M0", "M1", "S0", "S1", "anchor0", "anchor1")
    torch.testing.assert_close([got[n] for n in names], [want[n] for n in names])
    assert got["position"].item() == want["position"]


@pytest.mark.parametrize(
    "options", [{"depth": 1}, {"depth": 2}, {"depth": 2, "norm": True, "V": 2}], ids=str
)
def test_gradcheck(options):
    inputs = make_inputs(**{"B": 1, "T": 4, "H": 1, "K": 2, "V": 3, "hidden": 3} | options)

    def outputs(*leaves):
        named = call(chunk_memory, dict(zip(inputs, leaves, strict=True)), chunk_size=3)
        return [t for name, t in named.items() if name != "position"]

    assert torch.autograd.gradcheck(outputs, tuple(inputs.values()))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("chunk_size", [1, 4, 7])
def test_any_cut_equals_one_call(chunk_size, seed):
    inputs = make_inputs(T=23, norm=True, V=4, per_layer=("lr",))
    g = torch.Generator().manual_seed(seed)
    cuts = sorted((1 + torch.randperm(22, generator=g)[: 2 + 3 * seed]).tolist())
    assert_any_cut(chunk_memory, inputs, cuts, chunk_size=chunk_size)


def test_any_cut_equals_one_call_with_padding():
    mask = torch.rand(2, 23, generator=torch.Generator().manual_seed(0)) < 0.7
    for position in (0, torch.tensor([1, 3])):
        inputs, options = make_inputs(T=23), {"position": position, "chunk_size": 4}
        assert_any_cut(chunk_memory, inputs, [1, 2, 9, 15], mask=mask, **options)


def test_gradients_flow_through_a_cut():
    inputs, options = make_inputs(T=10), {"chunk_size": 4}
    first = [inputs[n][:, :6] for n in ("q", "k", "v", *ALL_GATES)]
    second = [inputs[n][:, 6:] for n in ("q", "k", "v", *ALL_GATES)]

    def in_pieces(*tokens_and_state, **options):
        out, state = chunk_memory(*first, tokens_and_state[6], **options)
        rest, state = chunk_memory(*second, state, **options)
        return torch.cat([out, rest], dim=1), state

    want, got = (call(op, inputs, **options) for op in (naive_memory, in_pieces))
    torch.testing.assert_close(gradients(got, inputs), gradients(want, inputs))


def test_only_what_needs_a_gradient_gets_one():
    inputs = {n: t.detach() for n, t in make_inputs(norm=True, V=4).items()}
    for name in ("v", "log_decay", "S1", "bias"):
        only = inputs | {name: inputs[name].clone().requires_grad_()}
        want, got = (
            call(op, only, chunk_size=4)["retrieved"].sum() for op in (naive_memory, chunk_memory)
        )
        torch.testing.assert_close(
            torch.autograd.grad(got, only[name]), torch.autograd.grad(want, only[name])
        )


def test_products_of_gates_never_divide():
    log_gate = torch.tensor([-0.5, -torch.inf, 0.0, -200.0, -1e-7])
    want = torch.eye(5)
    for i in range(5):
        for j in range(i):
            want[i, j] = log_gate[j + 1 : i + 1].sum().exp()
    torch.testing.assert_close(decay_matrix(log_gate), want)


def test_a_second_derivative_is_refused():
    inputs = make_inputs()
    got = call(chunk_memory, inputs, chunk_size=4)["retrieved"].sum()
    with pytest.raises(RuntimeError, match="create_graph=True"):
        torch.autograd.grad(got, inputs["v"], create_graph=True)


@pytest.mark.parametrize("chunk_size", [16, 40, 64])
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_float32_is_close_to_float64(activation, chunk_size):
    """Widths and chunks of whole vectors and not: the kernel's every tile."""
    exact = make_inputs(B=1, T=150, K=32, V=72, hidden=80, lr=0.02)
    low = {n: t.detach().float().requires_grad_() for n, t in exact.items()}
    options = {"chunk_size": chunk_size, "activation": activation}
    got, want = (call(chunk_memory, x, **options) for x in (low, exact))
    for a, b in ((got, want), (gradients(got, low), gradients(want, exact))):
        for name in set(b) - {"position"}:
            error = (a[name].double() - b[name]).abs().max()
            assert error <= 1e-5 * b[name].abs().max(), name


def test_more_layers_than_the_kernel_has_room_for():
    inputs = make_inputs(depth=9, T=5, off=("log_momentum",))
    assert_is_the_definition(chunk_memory, inputs, chunk_size=3)


def test_states_are_kept_only_for_a_backward():
    inputs = {n: t.detach() for n, t in make_inputs().items()}
    assert call(chunk_memory, inputs, chunk_size=4)["retrieved"].grad_fn is None
    inputs["v"].requires_grad_()
    with torch.no_grad():
        assert call(chunk_memory, inputs, chunk_size=4)["retrieved"].grad_fn is None
