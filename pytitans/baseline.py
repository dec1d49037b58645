"""What to compare with: models of the field with as many parameters as a Titans model.

    transformer               sliding-window Transformer: Hugging Face's Mistral
    llama                     Transformer++, full attention: Hugging Face's Llama
    mamba2_hf                 Hugging Face's Mamba2
    gated_deltanet, deltanet, retnet, mamba2, ttt_mlp_like
                              that layer of `pytitans.mixers`, each followed by SwiGLU
    samba_like                mamba2, then a sliding window, then SwiGLU
    gated_deltanet_h2_like    the same with mamba2 and gated_deltanet in turn

Samba (https://arxiv.org/abs/2406.07522) has Mamba-1, and a feed-forward layer after each of Mamba
and attention, where ours has one after both. Gated DeltaNet-H2 (https://arxiv.org/abs/2412.06464)
repeats Mamba-2, Gated DeltaNet, attention, where ours has attention after each of the two.
"""

from typing import Any

from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    Mamba2Config,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from pytitans.mixers import MIXERS
from pytitans.models import TitansConfig
from pytitans.presets import count_parameters

HYBRIDS = {"samba_like": ["mamba2"], "gated_deltanet_h2_like": ["mamba2", "gated_deltanet"]}
BASELINES = ("transformer", "llama", "mamba2_hf", *MIXERS, *HYBRIDS)
STATE = 128  # Mamba-2's features of B and C
MAMBA_HEAD = 64  # and of x in each head
CHUNK = 64  # tokens that it computes together, which changes nothing but its speed


def baseline_like(config: TitansConfig, name: str = "transformer") -> PreTrainedConfig:
    """The baseline of config's width, depth, heads and vocabulary.

    Attention spans what the Titans model's spans. The feed-forward layers are made wider or
    narrower until the baseline has the parameters of the Titans model, to half a unit of width in
    each layer. Mamba2 has none: its depth is chosen, then the size of its state.

    Raises:
        ValueError: an unknown name; a baseline that has more parameters without feed-forward.
    """
    if name not in BASELINES:
        raise ValueError(f"baseline {name!r} is unknown: choose one of {', '.join(BASELINES)}")
    if name == "mamba2_hf":
        return mamba_like(config)
    if name in ("transformer", "llama"):
        baseline = transformer_like(config, name)
    else:
        fields = config.to_dict() | {
            "variant": "mal" if name in HYBRIDS else "lmm",
            "recurrence": HYBRIDS.get(name, name),
            "window": attention_span(config),
            "num_persistent": 0,
        }
        baseline = TitansConfig.from_dict(fields)
    return widened(baseline, config)


def widened(model: PreTrainedConfig, like: TitansConfig) -> PreTrainedConfig:
    """`model`, with feed-forward layers so wide that it has the parameters of `like`.

    Raises:
        ValueError: it has more parameters without feed-forward layers.
    """
    width, layers = model.hidden_size, model.num_hidden_layers
    more = round((count_parameters(like) - count_parameters(model)) / (3 * width * layers))
    if model.intermediate_size + more < 1:
        raise ValueError(
            f"a {model.model_type} of hidden_size={width} has more parameters than the Titans "
            f"model even without feed-forward layers: widen its, intermediate_size="
            f"{like.intermediate_size}, by {1 - model.intermediate_size - more} or more"
        )
    model.intermediate_size += more
    return model


def build_baseline(config: TitansConfig, name: str) -> PreTrainedModel:
    """The model of `baseline_like`, with first weights drawn."""
    return AutoModelForCausalLM.from_config(baseline_like(config, name))


def attention_span(config: TitansConfig) -> int:
    return config.segment_len if config.variant == "mac" else config.window


def shared(config: TitansConfig) -> dict[str, Any]:
    """Fields that are called the same everywhere."""
    names = (
        "vocab_size", "hidden_size", "num_hidden_layers", "initializer_range",
        "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
    )  # fmt: skip
    return {name: getattr(config, name) for name in names}


def transformer_like(config: TitansConfig, name: str) -> LlamaConfig | MistralConfig:
    """Not yet of equal parameters."""
    fields: dict[str, Any] = shared(config) | {
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_attention_heads,
        "head_dim": config.hidden_size // config.num_attention_heads,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": 2**22,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rms_norm_eps": config.rms_norm_eps,
    }
    if name == "llama":
        return LlamaConfig(**fields)
    return MistralConfig(**fields, sliding_window=attention_span(config))


def mamba_like(config: TitansConfig) -> Mamba2Config:
    """Layers until they come nearest with a state of 128, then the state that makes it even."""
    wanted, width = count_parameters(config), 2 * config.hidden_size
    head = MAMBA_HEAD if width % MAMBA_HEAD == 0 else width // config.num_attention_heads

    fields: dict[str, Any] = shared(config) | {
        "expand": 2,
        "head_dim": head,
        "num_heads": width // head,
        "n_groups": 1,
        "chunk_size": CHUNK,
        "layer_norm_epsilon": config.rms_norm_eps,
    }

    def of(layers: int, state: int) -> Mamba2Config:
        chosen: dict[str, Any] = fields | {"num_hidden_layers": layers, "state_size": state}
        return Mamba2Config(**chosen)

    def size(layers: int, state: int) -> int:
        return count_parameters(of(layers, state))

    one = size(1, STATE)
    layer = size(2, STATE) - one
    layers = max(1, round(1 + (wanted - one) / layer))
    now, per_unit = size(layers, STATE), size(layers, STATE + 1) - size(layers, STATE)
    state = STATE + round((wanted - now) / per_unit)
    if state < 1:
        raise ValueError(
            f"mamba2_hf of hidden_size={config.hidden_size} has more parameters than the Titans "
            "model even with one layer: give that more layers, or a smaller vocabulary"
        )
    return of(layers, state)
