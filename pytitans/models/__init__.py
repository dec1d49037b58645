"""The Hugging Face classes, imported when first used. Importing one registers it with the Auto
classes of transformers, whose own import triggers ours: hence nothing heavy here."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pytitans.models.configuration_titans import TitansConfig
    from pytitans.models.modeling_titans import (
        TitansForCausalLM,
        TitansModel,
        TitansPreTrainedModel,
    )

__all__ = ["TitansConfig", "TitansForCausalLM", "TitansModel", "TitansPreTrainedModel"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'pytitans.models' has no attribute {name!r}")
    home = "configuration_titans" if name == "TitansConfig" else "modeling_titans"
    return getattr(import_module(f"pytitans.models.{home}"), name)
