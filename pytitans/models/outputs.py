"""What the models return, and what a cache is called.

transformers calls it `cache` from 5.24 on, `past_key_values` before. Here it is `cache` with every
version, as an argument of the models and in their outputs; the older name goes on as a second one.
"""

from dataclasses import dataclass, fields

from torch import Tensor
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.generic import ModelOutput

from pytitans.cache import TitansCache

# among the arguments that `generate` hands on
CACHE = (
    "cache" if "cache" in {f.name for f in fields(CausalLMOutputWithPast)} else "past_key_values"
)


def one_cache(cache: TitansCache | None, past_key_values: TitansCache | None) -> TitansCache | None:
    """The cache, by whichever of its names it was given."""
    if cache is not None and past_key_values is not None:
        raise ValueError("cache and past_key_values are two names of one thing: give the first")
    return past_key_values if cache is None else cache


class OlderName:
    """Of an output with a cache."""

    cache: TitansCache | None

    @property
    def past_key_values(self) -> TitansCache | None:
        return self.cache


@dataclass
class TitansOutput(OlderName, ModelOutput):
    """Of `TitansModel`. last_hidden_state [B, T, hidden_size]; cache: what was read, where it was
    asked for; hidden_states: the input and what each layer made of it, the last one normalised."""

    last_hidden_state: Tensor | None = None
    cache: TitansCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class TitansCausalLMOutput(OlderName, ModelOutput):
    """Of `TitansForCausalLM`. loss: where there are labels; logits [B, T, vocab_size], None where
    training has too many; cache, hidden_states: as above."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    cache: TitansCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
