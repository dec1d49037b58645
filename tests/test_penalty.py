"""The price on open gates: what it is, whom it reaches, what it does."""

import pytest
import torch
from tiny import VARIANTS, gates_of, tiny_config

from pytitans import TitansForCausalLM
from pytitans.baseline import build_baseline
from pytitans.penalty import CLOSED, MARGIN, GatePenalty


def model(variant: str, **changes) -> TitansForCausalLM:
    torch.manual_seed(0)
    return TitansForCausalLM(tiny_config(variant, **changes)).train()


IDS = torch.arange(24).view(2, 12) % 16


@pytest.mark.parametrize("variant", VARIANTS)
def test_closing_costs_nothing_more_once_closed_with_a_margin(variant):
    net = model(variant, num_persistent=0)
    penalty = GatePenalty(net)
    net(input_ids=IDS, use_cache=False)
    assert penalty.take() > 0.1
    assert penalty.take() == 0  # it is told once
    with torch.no_grad():
        for layer in net.model.layers:
            layer.block.memory.to_gates.bias.fill_(min(CLOSED.values()) - MARGIN)
    net(input_ids=IDS, use_cache=False)
    assert penalty.take() == 0


def test_is_the_mean_logit_above_closed_of_step_and_forgetting_alone():
    net = model("lmm", num_hidden_layers=1, num_persistent=0)
    memory = net.model.layers[0].block.memory
    with torch.no_grad():
        for gate, at in (("lr", 1.0), ("momentum", 9.0), ("decay", 2.0)):
            number = memory.gates.index(gate)
            size = memory.num_heads * memory.depth
            memory.to_gates.bias[number * size : (number + 1) * size] = at
    penalty = GatePenalty(net)
    net(input_ids=IDS, use_cache=False)
    expected = 1.0 - CLOSED["lr"] + MARGIN + 2.0 - CLOSED["decay"] + MARGIN
    assert penalty.take().item() == pytest.approx(expected, rel=1e-5)


def test_gates_close_under_it_and_not_without():
    for price, closed in ((1.0, True), (0.0, False)):
        net = model("mag")
        penalty = GatePenalty(net)
        optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
        for _ in range(80):
            loss = net(input_ids=IDS, labels=IDS, use_cache=False).loss
            (loss + price * penalty.take()).backward()
            optimizer.step()
            optimizer.zero_grad()
        lr, _, log_decay = gates_of(
            net.model.layers[0].block.memory,
            net.model.layers[0].block.norm(net.model.embed_tokens(IDS)),
        )
        assert bool((lr == 0).all() and (log_decay == 0).all()) is closed


def test_reading_and_baselines_cost_nothing():
    net = model("mal")
    penalty = GatePenalty(net)
    with torch.no_grad():
        net(input_ids=IDS)
    net.eval()(input_ids=IDS)
    assert penalty.take() == 0
    baseline = build_baseline(tiny_config("mal"), "gated_deltanet").train()
    penalty = GatePenalty(baseline)
    baseline(input_ids=IDS)
    assert penalty.take() == 0
