"""What to compare with: a sliding-window Transformer with as many parameters as a Titans model."""

import torch
from transformers import MistralConfig, MistralForCausalLM

from pytitans.models import TitansConfig
from pytitans.presets import count_parameters


def baseline_like(config: TitansConfig) -> MistralConfig:
    """Hugging Face's Mistral (Llama with a window) of config's width, depth, heads and vocabulary.

    Its window is what the Titans model's attention spans. Its feed-forward layers are made wider or
    narrower until it has the parameters of the Titans model, to half a unit of width in each layer.
    """
    baseline = MistralConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_attention_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        sliding_window=config.segment_len if config.variant == "mac" else config.window,
        max_position_embeddings=2**22,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        rms_norm_eps=config.rms_norm_eps,
        initializer_range=config.initializer_range,
        tie_word_embeddings=config.tie_word_embeddings,
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    per_unit = 3 * config.hidden_size * config.num_hidden_layers
    with torch.device("meta"):
        parameters = MistralForCausalLM(baseline).num_parameters()
    wider = round((count_parameters(config) - parameters) / per_unit)
    baseline.intermediate_size = max(1, baseline.intermediate_size + wider)
    return baseline
