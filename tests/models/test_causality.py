"""What a token may influence, and what it must: the faults of other implementations, one by one."""

import math

import torch
from tiny import tiny_config, tiny_model

from pytitans.models import TitansForCausalLM
from pytitans.ops import retrieve


def test_future_tokens_do_not_matter(model, ids):
    """For every position: convolution, chunk, segment and window edges included."""
    before = model(ids[:1]).logits
    changed = ids[:1].repeat(ids.shape[1], 1)
    for t in range(ids.shape[1]):
        changed[t, t:] = (changed[t, t:] + 1 + torch.arange(ids.shape[1] - t)) % 16
    after = model(changed).logits
    for t in range(ids.shape[1]):
        torch.testing.assert_close(after[t, :t], before[0, :t])


def test_a_token_sees_itself(model, ids):
    changed = ids.clone()
    changed[:, 20] = (changed[:, 20] + 1) % 16
    assert (model(changed).logits - model(ids).logits)[:, 20].abs().amax(-1).min() > 1e-3


def test_influence_beyond_segment_and_window(variant, ids):
    """One layer, so that nothing but the memory reaches this far."""
    model = tiny_model(variant, num_hidden_layers=1)
    x = model.get_input_embeddings()(ids).detach().requires_grad_()
    last = model(inputs_embeds=x).logits[:, -1]
    (reach,) = torch.autograd.grad(last.square().sum(), x)
    assert reach[:, 0].abs().amax(-1).min() > 1e-9


def test_attention_alone_does_not_reach_that_far(variant, ids):
    """The test above measures the memory: with its step switched off the influence is gone."""
    model = tiny_model(variant, num_hidden_layers=1)
    with torch.no_grad():
        memory = model.model.layers[0].block.memory
        memory.to_gates.weight.zero_()
        memory.to_gates.bias[: memory.num_heads * memory.depth] = -10.0
    x = model.get_input_embeddings()(ids).detach().requires_grad_()
    (reach,) = torch.autograd.grad(model(inputs_embeds=x).logits[:, -1].square().sum(), x)
    assert reach[:, 0].abs().max() == 0


def test_mac_writes_a_token_and_not_only_what_attention_makes_of_it(ids):
    """With an attention that says nothing, the memory still tells two texts apart."""
    model = tiny_model("mac", num_hidden_layers=1)
    block = model.model.layers[0].block
    with torch.no_grad():
        block.attention.qkv.weight[2 * block.memory.dim :] = 0  # values
    memories = [
        model(text, use_cache=True).cache.states[0].memory.memory.M
        for text in (ids, (ids + 1) % 16)
    ]
    for a, b in zip(*memories, strict=True):
        assert (a - b).abs().max() > 1e-3


def test_batch_rows_do_not_mix(model, ids):
    changed = ids.clone()
    changed[1] = (changed[1] + 3) % 16
    got, want = model(changed).logits, model(ids).logits
    torch.testing.assert_close(got[[0, 2]], want[[0, 2]])
    torch.testing.assert_close(model(ids[2:]).logits, want[2:])


def test_no_hidden_state(model, ids):
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    first = model(ids).logits
    model(ids.flip(1))
    model.generate(ids[:, :5], max_new_tokens=3)
    torch.testing.assert_close(model(ids).logits, first, rtol=0, atol=0)
    torch.testing.assert_close(dict(model.state_dict()), weights, rtol=0, atol=0)


def test_every_parameter_gets_a_gradient(variant, ids):
    """As initialised, not only after a push: `find_unused_parameters` must never be needed."""
    torch.manual_seed(0)
    model = TitansForCausalLM(tiny_config(variant)).double()
    model(ids, labels=ids).loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_random_tokens_stay_at_ln_V(variant):
    """Nothing can be learned from uniformly random tokens; a leak shows as a loss below ln V."""
    torch.manual_seed(0)
    model = TitansForCausalLM(tiny_config(variant, hidden_size=32, intermediate_size=64))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(80):
        ids = torch.randint(16, (8, 48))
        loss = model(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert abs(sum(losses[-20:]) / 20 - math.log(16)) < 0.05


def test_repeated_token_is_learned_at_test_time(variant):
    """The memory's own loss falls while a token repeats, in one call and untrained."""
    torch.manual_seed(0)
    memory = TitansForCausalLM(tiny_config(variant)).double().model.layers[0].block.memory
    x = torch.randn(1, 1, 16, dtype=torch.float64).expand(1, 64, 16)
    _, start = memory(x[:, :4])
    _, end = memory(x)
    (_, k, v), _ = memory.convolve(memory.qkv(x), None, None)
    key, value = k[:, -1:], v[:, -1:]

    def loss(state):
        return (
            (retrieve(key, state.memory, norm=memory.norm, norm_eps=memory.norm_eps) - value)
            .square()
            .sum()
        )

    assert loss(end) < loss(start)
