"""Classes of sequences: padding anywhere changes nothing, losses as Hugging Face's, saved whole."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from tiny import tiny_config
from transformers import AutoModelForSequenceClassification, LlamaConfig, Mamba2Config

from pytitans.models import TitansForCausalLM, TitansForSequenceClassification
from pytitans.models.sequence_classification import (
    BackboneClassifierConfig,
    BackboneForSequenceClassification,
)

PAD = 15
SHAPE: dict[str, Any] = {
    "vocab_size": 16,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "pad_token_id": PAD,
}
BACKBONES = {
    "llama": LlamaConfig(
        **SHAPE, num_attention_heads=2, intermediate_size=16, bos_token_id=None, eos_token_id=None
    ),
    "mamba2": Mamba2Config(
        **SHAPE, num_heads=2, head_dim=16, expand=2, n_groups=1, state_size=4, chunk_size=4
    ),
}


def titans(variant="mal", **changes):
    torch.manual_seed(0)
    fields = {"pad_token_id": PAD, "num_labels": 3} | changes
    model = TitansForSequenceClassification(tiny_config(variant, **fields))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return model.double().eval()


def wrapped(name, **changes):
    torch.manual_seed(0)
    fields: dict[str, Any] = {"backbone_config": BACKBONES[name], "num_labels": 3} | changes
    config = BackboneClassifierConfig(**fields)
    return BackboneForSequenceClassification(config).double().eval()


@pytest.fixture(params=["mean", "last"])
def pooling(request):
    return request.param


def padded(rows, side):
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), PAD)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(longest - len(row), longest)
        ids[i, place] = row
    return ids


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["mac", "mag", "mal", "lmm", "llama", "mamba2"])
def test_padding_changes_nothing(ids, name, side, pooling):
    model = wrapped(name) if name in BACKBONES else titans(name)
    model.config.classifier_pooling = pooling
    rows = [row[:n] % PAD for row, n in zip(ids, (37, 5, 20), strict=True)]
    alone = torch.cat([model(row[None]).logits for row in rows])
    both = padded(rows, side)
    torch.testing.assert_close(model(both, attention_mask=(both != PAD).long()).logits, alone)
    torch.testing.assert_close(model(both).logits, alone)  # pad_token_id says as much
    assert not torch.allclose(alone[0], alone[1])


def test_pooling_by_hand(ids, pooling):
    model = titans(classifier_pooling=pooling)
    hidden = model.model(ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    features = hidden.mean(1) if pooling == "mean" else hidden[:, -1]
    got = model(ids, attention_mask=torch.ones_like(ids)).logits
    torch.testing.assert_close(got, features @ model.score.weight.T)


@pytest.mark.parametrize("name", ["titans", "llama"])
def test_losses_are_those_of_the_problem(ids, name):
    def out(labels, **changes):
        model = titans(**changes) if name == "titans" else wrapped(name, **changes)
        found = model(ids, labels=labels)
        return found.loss, found.logits, model.config.problem_type

    losses = torch.nn.functional
    classes = torch.tensor([0, 2, 1])
    loss, logits, problem = out(classes)
    torch.testing.assert_close(loss, losses.cross_entropy(logits, classes))
    assert problem == "single_label_classification"
    several = torch.tensor([[0.0, 1, 1], [1, 0, 0], [0, 0, 0]]).double()
    loss, logits, problem = out(several)
    torch.testing.assert_close(loss, losses.binary_cross_entropy_with_logits(logits, several))
    assert problem == "multi_label_classification"
    numbers = torch.tensor([0.5, -1, 2]).double()
    loss, logits, problem = out(numbers, num_labels=1)
    torch.testing.assert_close(loss, losses.mse_loss(logits[:, 0], numbers))
    assert problem == "regression"


def test_every_weight_gets_a_gradient_and_embeddings_serve(ids, variant):
    model, ids = titans(variant).train(), ids % PAD
    model(ids, labels=torch.tensor([0, 1, 2])).loss.backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None]
    assert not dead
    embeds = model.model.embed_tokens(ids)
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, model(ids).logits)
    assert len(model(ids, output_hidden_states=True).hidden_states) == 3


@pytest.mark.parametrize("name", ["titans", "llama", "mamba2"])
def test_saved_and_loaded_by_auto_class(tmp_path, ids, name):
    labels = {0: "enhancer", 1: "promoter", 2: "other"}
    model = titans(id2label=labels) if name == "titans" else wrapped(name, id2label=labels)
    model.float().save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert type(loaded) is type(model) and loaded.config.id2label == labels
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)


def test_a_language_model_gives_its_body(tmp_path, ids):
    torch.manual_seed(0)
    language = TitansForCausalLM(tiny_config("mal"))
    language.save_pretrained(tmp_path)
    model = TitansForSequenceClassification.from_pretrained(tmp_path, num_labels=5)
    assert model(ids).logits.shape == (3, 5)
    got, expected = (x.model(ids).last_hidden_state for x in (model.eval(), language.eval()))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("first", ["pytitans", "transformers"])
def test_auto_classes_know_it_whichever_is_imported_first(first):
    second = "transformers" if first == "pytitans" else "pytitans"
    code = (
        f"import {first}, {second}\n"
        "from transformers import AutoModelForSequenceClassification as A\n"
        "print(type(A.from_config(pytitans.TitansConfig(hidden_size=16))).__name__)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout.strip() == "TitansForSequenceClassification", found.stderr
