"""Padding, at any side, and rows that stand at different places: as if each row were alone."""

import pytest
import torch
from tiny import stream


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
