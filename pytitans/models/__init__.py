"""The Hugging Face classes. Importing them registers them with the Auto classes."""

from pytitans.models.configuration_titans import TitansConfig
from pytitans.models.modeling_titans import TitansForCausalLM, TitansModel, TitansPreTrainedModel

__all__ = ["TitansConfig", "TitansForCausalLM", "TitansModel", "TitansPreTrainedModel"]
