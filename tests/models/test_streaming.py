"""One call, many calls: the same numbers."""

from itertools import pairwise

import pytest
import torch
from tiny import stream, tiny_model


@pytest.mark.parametrize(
    "cuts", [[1] * 37, [5, 8, 1, 13, 10], [8, 8, 21], [36, 1], [0, 8, 0, 29, 0]]
)
def test_streaming_equals_one_call(model, ids, cuts):
    want, end = stream(model, ids, [37])
    got, cache = stream(model, ids, cuts)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    torch.testing.assert_close(cache.states, end.states, rtol=0, atol=1e-10)
    assert cache.tokens == end.tokens == 37


@pytest.mark.parametrize("cuts", [[5, 8, 1, 13, 10], [36, 1]])
def test_in_float32_as_well(variant, ids, cuts):
    model = tiny_model(variant).float()
    want, end = stream(model, ids, [37])
    got, cache = stream(model, ids, cuts)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
    torch.testing.assert_close(cache.states, end.states, rtol=0, atol=1e-4)


def test_random_cuts(model):
    """Many of them, at any place of chunk (4), window (6) and segment (8)."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(16, (2, 70), generator=draw)
    want, end = stream(model, ids, [70])
    for _ in range(8):
        places = torch.randint(1, 70, (6,), generator=draw).unique().tolist()
        cuts = [b - a for a, b in pairwise([0, *places, 70])]
        got, cache = stream(model, ids, cuts)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
        torch.testing.assert_close(cache.states, end.states, rtol=0, atol=1e-10)


def test_gradients_flow_through_the_state(model, ids):
    """Back-propagation through time: cutting a sequence does not change its gradients."""
    x = model.get_input_embeddings()(ids).detach().requires_grad_()
    whole = model(inputs_embeds=x).logits[:, -1].square().sum()
    first = model(inputs_embeds=x[:, :21], use_cache=True)
    rest = model(inputs_embeds=x[:, 21:], cache=first.cache)
    want, got = (torch.autograd.grad(y, x)[0] for y in (whole, rest.logits[:, -1].square().sum()))
    torch.testing.assert_close(got, want)


def test_no_persistent_tokens_and_no_convolution(variant, ids):
    """The paper's ablations stream as well."""
    model = tiny_model(
        variant, num_persistent=0, conv_size=0, memory_momentum=False, memory_depth=1
    )
    want, _ = stream(model, ids, [37])
    got, _ = stream(model, ids, [10, 1, 26])
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_with_several_memories_a_head(variant, ids):
    """In pieces as in one call; the future does not matter; every parameter has a gradient."""
    model = tiny_model(variant, memories_per_head=2)
    want, end = stream(model, ids, [37])
    got, cache = stream(model, ids, [5, 8, 1, 13, 10])
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    torch.testing.assert_close(cache.states, end.states, rtol=0, atol=1e-10)
    other = torch.cat([ids[:, :30], 15 - ids[:, 30:]], dim=1)
    torch.testing.assert_close(model(other).logits[:, :30], want[:, :30], rtol=0, atol=1e-12)
    model(ids, labels=ids).loss.backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []
