"""Documents in one row: what each would be alone, in values, loss and gradients."""

import pytest
import torch
from tiny import tiny_model
from transformers import DataCollatorWithFlattening

from pytitans.models.packing import like_sized

LENGTHS = (9, 1, 20, 4, 2, 13)  # below, at and beyond chunk (4), window (6) and segment (8)


@pytest.fixture
def documents() -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(16, (n,), generator=draw) for n in LENGTHS]


def packed(documents, **options) -> dict:
    collate = DataCollatorWithFlattening(return_tensors="pt", **options)
    return collate([{"input_ids": x} for x in documents])


def alone(model, documents) -> torch.Tensor:
    return torch.cat([model(x[None], use_cache=False).logits[0] for x in documents])


@pytest.mark.parametrize("by", ["position_ids", "cu_seq_lens_q"])
def test_packed_documents_equal_the_documents_alone(model, documents, by):
    batch = packed(documents, return_flash_attn_kwargs=True)
    got = model(batch["input_ids"], **{by: batch[by]}).logits[0]
    torch.testing.assert_close(got, alone(model, documents), rtol=0, atol=1e-12)


def test_not_told_of_borders_documents_run_into_each_other(model, documents):
    got = model(packed(documents)["input_ids"]).logits[0]
    want = alone(model, documents)
    torch.testing.assert_close(got[:9], want[:9])
    assert (got[9:] - want[9:]).abs().amax(-1).min() > 1e-6


def test_loss_and_gradients_equal_those_of_the_documents_alone(model, documents):
    """The collator's labels take no loss at a document's first token, so none crosses a border.

    Gates are open: what a closed one passes depends on the sign of its gradient (`memory.Closing`),
    and a persistent token's is summed over the documents that are read together.
    """
    with torch.no_grad():
        for layer in model.model.layers:
            layer.block.memory.to_gates.bias.add_(2.0)
    model(**packed(documents)).loss.backward()
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    scored = sum(LENGTHS) - len(LENGTHS)
    for x in documents:
        if len(x) > 1:
            share = (len(x) - 1) / scored
            (model(x[None], labels=x[None], use_cache=False).loss * share).backward()
    for a, p in zip(got, model.parameters(), strict=True):
        assert p.grad is not None
        assert (a - p.grad).norm() < 1e-6 * p.grad.norm()  # the loss is float32


def test_each_document_depends_on_itself_alone(model, documents):
    batch = packed(documents)
    x = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    out = model(inputs_embeds=x, position_ids=batch["position_ids"]).logits[0]
    (reach,) = torch.autograd.grad(out[10:30].square().sum(), x)
    felt = reach[0].abs().amax(-1)
    assert felt[10:30].min() > 0
    assert felt[:10].max() == felt[30:].max() == 0


def test_rows_of_packed_documents_and_padding(model, documents):
    """Two rows, one padded at its end and one at its start: neither is a document."""
    rows = [documents[:3], documents[3:]]
    input_ids = torch.zeros(2, 30, dtype=torch.long)
    position_ids, mask = torch.zeros_like(input_ids), torch.zeros_like(input_ids)
    spans = (slice(0, 30), slice(11, 30))
    for i, (row, span) in enumerate(zip(rows, spans, strict=True)):
        input_ids[i, span] = torch.cat(row)
        position_ids[i, span] = torch.cat([torch.arange(len(x)) for x in row])
        mask[i, span] = 1
    out = model(input_ids, attention_mask=mask, position_ids=position_ids, use_cache=False)
    got = torch.cat([out.logits[i, span] for i, span in enumerate(spans)])
    torch.testing.assert_close(got, alone(model, documents), rtol=0, atol=1e-12)


def test_positions_that_merely_run_pack_nothing(model, ids):
    want = model(ids)
    got = model(ids, position_ids=torch.arange(37)[None])
    torch.testing.assert_close(got.logits, want.logits, rtol=0, atol=0)
    assert got.cache is not None
    mask = (torch.arange(37) >= 5).long().expand(3, 37)
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 0)  # as generate makes them
    got = model(ids, attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(got.logits, model(ids, attention_mask=mask).logits, rtol=0, atol=0)


def test_training_with_checkpointing(variant, documents):
    model = tiny_model(variant).train()
    batch = packed(documents)
    model(**batch).loss.backward()
    want = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    model(**batch).loss.backward()
    torch.testing.assert_close([p.grad for p in model.parameters()], want)


def test_hidden_states_of_packed_documents(model, documents):
    batch = packed(documents)
    out = model(**batch, output_hidden_states=True)
    last = model(documents[2][None], use_cache=False, output_hidden_states=True)
    for got, want in zip(out.hidden_states, last.hidden_states, strict=True):
        torch.testing.assert_close(got[0, 10:30], want[0], rtol=0, atol=1e-12)


def test_what_documents_are_padded_with_never_exceeds_their_tokens():
    lengths = torch.randint(1, 5000, (200,), generator=torch.Generator().manual_seed(0))
    groups = like_sized(lengths)
    assert sorted(torch.cat(groups).tolist()) == list(range(200))
    assert len(groups) <= 13  # doublings from 1 to 5000
    assert sum(len(g) * int(lengths[g].max()) for g in groups) < 2 * int(lengths.sum())


def test_packing_that_makes_no_sense_is_refused(ids):
    model = tiny_model("lmm")
    resets = torch.arange(37)[None] % 10
    with pytest.raises(ValueError, match="12 packed documents do not go on from a cache"):
        model(ids, position_ids=resets, use_cache=True)
    cache = model(ids, use_cache=True).cache
    with pytest.raises(ValueError, match="no cache"):
        model(ids, position_ids=resets, cache=cache)
    with pytest.raises(ValueError, match=r"position_ids \(1, 36\)"):
        model(ids, position_ids=resets[:, 1:])
    for bounds in ([0, 36], [1, 37], [0, 20, 10, 37]):
        with pytest.raises(ValueError, match="must rise from 0"):
            model(ids[:1], cu_seq_lens_q=torch.tensor(bounds))
    with pytest.raises(ValueError, match="flatten the batch"):
        model(ids, cu_seq_lens_q=torch.tensor([0, 37]))
