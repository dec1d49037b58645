"""`online_memory` is the definition with online=True, and its tile does not matter."""

import pytest
import torch
from operator_cases import assert_any_cut, assert_is_the_definition, call, make_inputs

from pytitans.ops.chunk import chunk_memory
from pytitans.ops.online import online_memory

ALL_GATES = ("lr", "log_momentum", "log_decay")


@pytest.mark.parametrize("chunk_size", [1, 3, 11, 64])
@pytest.mark.parametrize("objective", ["l2", "dot"])
def test_is_the_definition(objective, chunk_size):
    options = {"online": True, "objective": objective, "chunk_size": chunk_size}
    assert_is_the_definition(online_memory, make_inputs(depth=1), **options)


@pytest.mark.parametrize("off", [(name,) for name in ALL_GATES] + [ALL_GATES])
@pytest.mark.parametrize("per_layer", [(), ALL_GATES])
def test_is_the_definition_with_gates_off(per_layer, off):
    inputs = make_inputs(depth=1, per_layer=per_layer, off=off)
    assert_is_the_definition(online_memory, inputs, chunk_size=4, online=True)


@pytest.mark.parametrize("value", [0.0, -torch.inf])
@pytest.mark.parametrize("gate", ["log_momentum", "log_decay"])
def test_is_the_definition_at_gates_of_0_and_1(gate, value):
    inputs = make_inputs(depth=1)
    with torch.no_grad():
        inputs[gate][:, 2:9:3] = value
    assert_is_the_definition(online_memory, inputs, chunk_size=5, online=True)


@pytest.mark.parametrize("off", [(), ("log_momentum",)])
def test_is_the_definition_with_padding(off):
    mask = torch.tensor([[c == "x" for c in row] for row in ("..x.xxxxxx.", "xxxxx......")])
    inputs = make_inputs(depth=1, off=off)
    assert_is_the_definition(online_memory, inputs, chunk_size=4, online=True, mask=mask)


@pytest.mark.parametrize("cuts", [[1, 2, 3], [4, 8], [5, 6, 10]])
def test_any_cut_equals_one_call(cuts):
    assert_any_cut(online_memory, make_inputs(depth=1), cuts, chunk_size=4, online=True)


def test_one_token_chunks_are_online():
    inputs = make_inputs(depth=1)
    want = call(chunk_memory, inputs, chunk_size=1)
    torch.testing.assert_close(call(online_memory, inputs, chunk_size=4, online=True), want)


def test_a_repeated_key_is_learned_at_any_stable_step():
    """Steps up to 2 (without momentum) contract on a repeated unit key: the tile adds nothing."""
    inputs = make_inputs(depth=1, T=64, off=("log_momentum", "log_decay"))
    key = inputs["k"][:, :1].expand_as(inputs["k"])
    value = inputs["v"][:, :1].expand_as(inputs["v"])
    inputs |= {"q": key, "k": key, "v": value, "lr": torch.full_like(inputs["lr"], 1.8)}
    got = call(online_memory, inputs, chunk_size=16, online=True)["retrieved"]
    torch.testing.assert_close(got[:, -1], value[:, -1], atol=1e-5, rtol=0)
