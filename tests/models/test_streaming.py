"""One call, many calls, padded calls, generation: the same numbers."""

import pytest
import torch
from tiny import tiny_model

from pytitans.state import map_state


def stream(model, ids, cuts, cache=None):
    outs, begin = [], 0
    for n in cuts:
        out = model(ids[:, begin : begin + n], past_key_values=cache, use_cache=True)
        cache, begin = out.past_key_values, begin + n
        outs.append(out.logits)
    return torch.cat(outs, dim=1), cache


def numel(cache) -> int:
    count = 0

    def add(x):
        nonlocal count
        count += x.numel()
        return x

    for state in cache.states:
        map_state(add, state)
    return count


@pytest.mark.parametrize("cuts", [[1] * 37, [5, 8, 1, 13, 10], [8, 8, 21], [36, 1]])
def test_streaming_equals_one_call(model, ids, cuts):
    want, end = stream(model, ids, [37])
    got, cache = stream(model, ids, cuts)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    for a, b in zip(cache.states, end.states, strict=True):
        memories = [s.memory if hasattr(s, "window") or hasattr(s, "frozen") else s for s in (a, b)]
        torch.testing.assert_close(memories[0].memory, memories[1].memory)


def test_gradients_flow_through_the_state(model, ids):
    """Back-propagation through time: cutting a sequence does not change its gradients."""
    x = model.get_input_embeddings()(ids).detach().requires_grad_()
    whole = model(inputs_embeds=x).logits[:, -1].square().sum()
    first = model(inputs_embeds=x[:, :21], use_cache=True)
    rest = model(inputs_embeds=x[:, 21:], past_key_values=first.past_key_values)
    want, got = (torch.autograd.grad(y, x)[0] for y in (whole, rest.logits[:, -1].square().sum()))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("side", ["left", "right", "middle"])
def test_padding_changes_nothing(model, ids, side):
    lengths = [37, 20, 9]
    mask = torch.zeros(3, 37, dtype=torch.long)
    for row, n in enumerate(lengths):
        start = {"left": 37 - n, "right": 0, "middle": (37 - n) // 2}[side]
        mask[row, start : start + n] = 1
    padded = torch.full_like(ids, 7)
    for row, n in enumerate(lengths):
        padded[row, mask[row].bool()] = ids[row, :n]
    out = model(padded, attention_mask=mask, use_cache=True)
    for row, n in enumerate(lengths):
        alone = model(ids[row : row + 1, :n], use_cache=True)
        torch.testing.assert_close(out.logits[row, mask[row].bool()], alone.logits[0])


@pytest.mark.parametrize("cuts", [[11], [1] * 11, [4, 7]])
def test_rows_of_different_length_go_on(model, ids, cuts):
    """After a left-padded prompt each row stands elsewhere in its chunk, segment and window."""
    lengths, more = [37, 20, 9], ids.flip(1)[:, :11]
    mask = torch.stack([(torch.arange(37) >= 37 - n).long() for n in lengths])
    padded = torch.zeros_like(ids)
    for row, n in enumerate(lengths):
        padded[row, 37 - n :] = ids[row, :n]
    cache = model(padded, attention_mask=mask, use_cache=True).past_key_values
    got, _ = stream(model, more, cuts, cache)
    for row, n in enumerate(lengths):
        whole = torch.cat([ids[row : row + 1, :n], more[row : row + 1]], dim=1)
        torch.testing.assert_close(got[row], model(whole).logits[0, n:])


@pytest.mark.parametrize("prompt", [1, 5, 8, 9, 30])
def test_generate_with_cache_equals_recomputing(model, ids, prompt):
    """Prompts below, at and beyond segment (8), window (6) and chunk (4)."""
    options = {"max_new_tokens": 12, "do_sample": False}
    cached = model.generate(ids[:, :prompt], **options)
    assert torch.equal(cached, model.generate(ids[:, :prompt], use_cache=False, **options))


def test_beam_search_with_cache_equals_recomputing(model, ids):
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": 3}
    cached = model.generate(ids[:, :9], **options)
    assert torch.equal(cached, model.generate(ids[:, :9], use_cache=False, **options))


def test_left_padded_batch_generates_what_each_row_would(model, ids):
    lengths, options = [20, 13, 3], {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    mask = torch.stack([(torch.arange(20) >= 20 - n).long() for n in lengths])
    padded = torch.zeros(3, 20, dtype=torch.long)
    for row, n in enumerate(lengths):
        padded[row, 20 - n :] = ids[row, :n]
    got = model.generate(padded, attention_mask=mask, **options)
    for row, n in enumerate(lengths):
        alone = model.generate(
            ids[row : row + 1, :n], attention_mask=torch.ones(1, n, dtype=torch.long), **options
        )
        assert torch.equal(got[row, 20:], alone[0, n:])


def test_state_does_not_grow(model):
    """Bounded by one segment and window, whatever has been read."""
    ids = torch.randint(16, (1, 512), generator=torch.Generator().manual_seed(0))
    _, early = stream(model, ids[:, :64], [64])
    _, late = stream(model, ids, [512])
    assert numel(late) == numel(early)


def test_a_fork_leaves_the_original(model, ids):
    cache = model(ids[:, :11], use_cache=True).past_key_values
    fork = cache.fork()
    model(ids[:, 11:20], past_key_values=fork)
    got, _ = stream(model, ids[:, 11:], [26], cache)
    torch.testing.assert_close(got, model(ids).logits[:, 11:])


def test_cache_refuses_what_a_memory_cannot_do(model, ids):
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="cannot be unread"):
        cache.crop(3)
    with pytest.raises(ValueError, match="cache_implementation='static'"):
        model.generate(ids, max_new_tokens=2, cache_implementation="static")


def test_no_persistent_tokens_and_no_convolution(variant, ids):
    """The paper's ablations stream as well."""
    model = tiny_model(
        variant, num_persistent=0, conv_size=0, memory_momentum=False, memory_depth=1
    )
    want, _ = stream(model, ids, [37])
    got, _ = stream(model, ids, [10, 1, 26])
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
