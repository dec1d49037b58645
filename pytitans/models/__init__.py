"""The Hugging Face classes, imported when first used. Importing one registers it with the Auto
classes of transformers, whose own import triggers ours: hence nothing heavy here."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytitans.models.configuration_titans import TitansConfig
    from pytitans.models.configuration_titans_forecasting import TitansForecastingConfig
    from pytitans.models.modeling_titans import (
        TitansForCausalLM,
        TitansModel,
        TitansPreTrainedModel,
    )
    from pytitans.models.modeling_titans_forecasting import TitansForForecasting
    from pytitans.models.sequence_classification import TitansForSequenceClassification

_HOME = {
    "TitansConfig": "configuration_titans",
    "TitansForCausalLM": "modeling_titans",
    "TitansForForecasting": "modeling_titans_forecasting",
    "TitansForSequenceClassification": "sequence_classification",
    "TitansForecastingConfig": "configuration_titans_forecasting",
    "TitansModel": "modeling_titans",
    "TitansPreTrainedModel": "modeling_titans",
}

__all__ = [
    "TitansConfig",
    "TitansForCausalLM",
    "TitansForForecasting",
    "TitansForSequenceClassification",
    "TitansForecastingConfig",
    "TitansModel",
    "TitansPreTrainedModel",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'pytitans.models' has no attribute {name!r}")
    return getattr(import_module(f"pytitans.models.{_HOME[name]}"), name)
