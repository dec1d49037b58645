"""Classifiers by name: Titans, what to compare with at equal parameters, the CNN."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel

from pytitans.baseline import BASELINES, baseline_like
from pytitans.genomics.cnn import GenomicCNNConfig
from pytitans.models import TitansConfig
from pytitans.models.configuration_titans import VARIANTS
from pytitans.models.sequence_classification import BackboneClassifierConfig

CNNS = ("cnn", "cnn_wide")
CLASSIFIERS = (*VARIANTS, *BASELINES, *CNNS)


def classifier_config(
    name: str, like: TitansConfig, classes: Sequence[str], length: int
) -> PreTrainedConfig:
    """The configuration of the classifier `name`.

    like: a Titans model, with as many parameters as which a baseline is made; "cnn" keeps its
    published size, "cnn_wide" has as many filters as make up those parameters. length: bases of the
    longest sequence, which is what a CNN reads.
    """
    if name not in CLASSIFIERS:
        raise ValueError(f"{name!r} is no classifier: choose one of {', '.join(CLASSIFIERS)}")
    labels: dict[str, Any] = {"id2label": dict(enumerate(classes))}
    labels["label2id"] = {label: i for i, label in labels["id2label"].items()}
    if name in VARIANTS:
        return TitansConfig.from_dict(like.to_dict() | labels | {"variant": name})
    if name in CNNS:
        narrow = GenomicCNNConfig(input_length=length, **labels)
        wide = TitansConfig.from_dict(like.to_dict() | labels)
        return narrow if name == "cnn" else widened_cnn(narrow, count_parameters(wide))
    baseline = baseline_like(like, name)
    if isinstance(baseline, TitansConfig):
        return TitansConfig.from_dict(baseline.to_dict() | labels)
    pooling = like.classifier_pooling
    return BackboneClassifierConfig(backbone_config=baseline, classifier_pooling=pooling, **labels)


def widened_cnn(config: GenomicCNNConfig, wanted: int) -> GenomicCNNConfig:
    """The CNN with as many more filters, in the published proportion, as come nearest to `wanted`
    parameters."""

    def of(filters: int) -> GenomicCNNConfig:
        blocks = [filters, filters // 2, filters // 4]
        return GenomicCNNConfig.from_dict(config.to_dict() | {"filters": blocks})

    few, many = 4, 8
    while count_parameters(of(many)) < wanted:
        many *= 2
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (middle, many) if count_parameters(of(middle)) < wanted else (few, middle)
    return min(of(few), of(many), key=lambda found: abs(count_parameters(found) - wanted))


def count_parameters(config: PreTrainedConfig) -> int:
    """Of the classifier; nothing is allocated."""
    with torch.device("meta"):
        return build(config).num_parameters()


def build(config: PreTrainedConfig) -> PreTrainedModel:
    return AutoModelForSequenceClassification.from_config(config)
