"""The paper's model sizes as configurations. The field's memories by name: `recurrences.py`.

Width, depth and heads are those of the camera-ready's Table 5 (400M has no row there: it takes the
340M one with a wider feed-forward layer); chunk 16, segment 512, window 2048 and 128 persistent
tokens are its text's. Its parameter counts fit no fixed ratio of widths, so the feed-forward width
is what makes up the named size, whichever the variant.

The memory's weights are per head here, as the table's heads suggest, where one memory of full width
would hold heads times as many.
"""

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from pytitans.models import TitansConfig


@dataclass(frozen=True)
class PaperSize:
    """A row of the camera-ready's Table 5."""

    parameters: float
    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int


PAPER_SIZES = {
    "170m": PaperSize(170e6, 12, 768, 16),
    "340m": PaperSize(340e6, 24, 1024, 16),
    "400m": PaperSize(400e6, 24, 1024, 16),
    "760m": PaperSize(760e6, 24, 1536, 16),
    "1.3b": PaperSize(1.3e9, 18, 2048, 8),
}
PAPER_RATE = 4e-4  # the peak its text gives; Table 5 has others by size


def paper_config(size: str, variant: str = "mac", **changes) -> TitansConfig:
    """The paper's model of this size: "170m", "340m", "400m", "760m" or "1.3b".

    >>> paper_config("340m", "mag").hidden_size
    1024
    """
    if size.lower() not in PAPER_SIZES:
        raise ValueError(f"preset {size!r} is unknown: choose one of {', '.join(PAPER_SIZES)}")
    row = PAPER_SIZES[size.lower()]
    fixed = {
        "variant": variant,
        "vocab_size": 32_000,  # Llama 2's
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": None,
        "hidden_size": row.hidden_size,
        "num_hidden_layers": row.num_hidden_layers,
        "num_attention_heads": row.num_attention_heads,
        "chunk_size": 16,
        "segment_len": 512,
        "window": 2048,
        "num_persistent": 128,
        **changes,
    }
    if "intermediate_size" in fixed:
        return TitansConfig(**fixed)
    narrow = TitansConfig(**fixed, intermediate_size=64)
    per_unit = 3 * row.hidden_size * row.num_hidden_layers
    missing = (row.parameters - count_parameters(narrow)) / per_unit
    return TitansConfig(**fixed, intermediate_size=64 + max(0, round(missing / 64) * 64))


def count_parameters(config: PreTrainedConfig) -> int:
    """Of the language model, tied weights once; nothing is allocated."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config).num_parameters()


def model_preset(size: str, variant: str = "mac") -> dict:
    """`paper_config` as the options that make it, for the command line."""
    config = paper_config(size, variant)
    names = [name for name in TitansConfig.__annotations__ if name in config.to_dict()]
    return {name: getattr(config, name) for name in names}
