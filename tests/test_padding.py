"""Padding, at any side, and rows that stand at different places: as if each row were alone."""

import pytest
import torch
from tiny import stream

from pytitans.memory import LayerState


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
        end = out.cache.fork()
        end.batch_select_indices(torch.tensor([row]))
        for got, want in zip(end.states, alone.cache.states, strict=True):
            assert_memory_is(got, want)


def assert_memory_is(got, want) -> None:
    """Memory, momentum, convolution and the place in the chunk; attention's past is seen to go on
    rightly below (behind a row's own tokens it holds what is never looked at)."""
    got, want = (x if isinstance(x, LayerState) else x.memory for x in (got, want))
    (M, S, _, place), (M_alone, S_alone, _, place_alone) = got.memory, want.memory
    torch.testing.assert_close((M, S), (M_alone, S_alone), rtol=0, atol=1e-12)
    torch.testing.assert_close(got.tail, want.tail, rtol=0, atol=1e-12)
    assert int(place) == int(place_alone)


def test_a_row_of_padding_alone_changes_nothing(model, ids):
    """As when one of several streams has nothing new."""
    cache = model(ids[:, :10], use_cache=True).cache
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1] = 0
    model(ids[:, 10:19], attention_mask=mask, cache=cache)
    got, _ = stream(model, ids[:, 19:], [18], cache)
    whole = torch.cat([ids[1:2, :10], ids[1:2, 19:]], dim=1)
    torch.testing.assert_close(got[1], model(whole).logits[0, 10:])
    torch.testing.assert_close(got[0], model(ids[:1]).logits[0, 19:])


def test_padding_gets_no_gradient_and_gives_none(model, ids):
    mask = torch.stack([(torch.arange(37) >= 37 - n).long() for n in (37, 20, 9)])
    x = model.get_input_embeddings()(ids).detach().requires_grad_()
    out = model(inputs_embeds=x, attention_mask=mask).logits
    (reach,) = torch.autograd.grad(out[mask.bool()].square().sum(), x)
    assert (reach[~mask.bool()] == 0).all()
    assert (reach[mask.bool()].abs().amax(-1) > 0).all()
    one = model.get_input_embeddings()(ids[1:2, 17:]).detach().requires_grad_()
    (alone,) = torch.autograd.grad(model(inputs_embeds=one).logits.square().sum(), one)
    torch.testing.assert_close(reach[1, 17:], alone[0])


@pytest.mark.parametrize("cuts", [[11], [1] * 11, [4, 7]])
def test_rows_of_different_length_go_on(model, ids, cuts):
    """After a left-padded prompt each row stands elsewhere in its chunk, segment and window."""
    lengths, more = [37, 20, 9], ids.flip(1)[:, :11]
    mask = torch.stack([(torch.arange(37) >= 37 - n).long() for n in lengths])
    padded = torch.zeros_like(ids)
    for row, n in enumerate(lengths):
        padded[row, 37 - n :] = ids[row, :n]
    cache = model(padded, attention_mask=mask, use_cache=True).cache
    got, _ = stream(model, more, cuts, cache)
    for row, n in enumerate(lengths):
        whole = torch.cat([ids[row : row + 1, :n], more[row : row + 1]], dim=1)
        torch.testing.assert_close(got[row], model(whole).logits[0, n:])
