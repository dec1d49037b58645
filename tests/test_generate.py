"""`generate` with the cache: the same tokens as without, whatever the way of choosing them."""

import pytest
import torch


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
