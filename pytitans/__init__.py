"""PyTitans: a neural memory that learns at test time, and the four Titans models built on it.

    from pytitans import TitansConfig, TitansForCausalLM   # the models (Hugging Face classes)
    from pytitans import NeuralMemory                      # the memory as a layer
    from pytitans.ops import neural_memory                 # the operator

Importing `pytitans` makes the Auto classes of transformers know Titans checkpoints, whichever of
the two is imported first, and imports neither torch nor transformers by itself.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pytitans._auto_classes import register_when_imported

if TYPE_CHECKING:
    from pytitans.blocks import LMM, MAC, MAG, MAL
    from pytitans.cache import TitansCache
    from pytitans.memory import NeuralMemory
    from pytitans.models import (
        TitansConfig,
        TitansForCausalLM,
        TitansForecastingConfig,
        TitansForForecasting,
        TitansForSequenceClassification,
        TitansModel,
    )
    from pytitans.ops import MemoryState, initial_state, neural_memory, retrieve
    from pytitans.recurrences import recurrence

__version__ = "0.1.0"

_HOME = {
    "LMM": "blocks",
    "MAC": "blocks",
    "MAG": "blocks",
    "MAL": "blocks",
    "MemoryState": "ops",
    "NeuralMemory": "memory",
    "TitansCache": "cache",
    "TitansConfig": "models",
    "TitansForCausalLM": "models",
    "TitansForForecasting": "models",
    "TitansForSequenceClassification": "models",
    "TitansForecastingConfig": "models",
    "TitansModel": "models",
    "initial_state": "ops",
    "neural_memory": "ops",
    "recurrence": "recurrences",
    "retrieve": "ops",
}

__all__ = [
    "LMM",
    "MAC",
    "MAG",
    "MAL",
    "MemoryState",
    "NeuralMemory",
    "TitansCache",
    "TitansConfig",
    "TitansForCausalLM",
    "TitansForForecasting",
    "TitansForSequenceClassification",
    "TitansForecastingConfig",
    "TitansModel",
    "initial_state",
    "neural_memory",
    "recurrence",
    "retrieve",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'pytitans' has no attribute {name!r}")
    return getattr(import_module(f"pytitans.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


register_when_imported()
