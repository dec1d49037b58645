"""What a model costs, from its configuration alone: parameters, state, FLOPs. Nothing is allocated.

FLOPs of a token in a forward pass, a multiply-add counted as two; training is three times as many:

    linear layers   2 for each weight
    attention       4 for each feature and each key that a token sees on average
    memory          per head: 2P [keys] + 2(P - K h) [errors] + 2rP [queries] + 2rP [writes]
                    + 2C sum(in + out) [within the chunk] + 2C^2 [gates]

P weights of widths K -> h -> ... -> V, r = 2 with momentum, else 1, chunks of C tokens, each layer
from `in` to `out`. MAC reads a second time, at 2P. A memory whose steps are the values themselves
(RetNet, Mamba-2) spares keys and errors. Persistent tokens, read once, are left out. FLOPs are not
said of full attention, where they grow with the text, nor of Hugging Face's Mamba2.
"""

from collections.abc import Iterator

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from pytitans.memory import NeuralMemory
from pytitans.mixers import Mixer
from pytitans.models import TitansConfig
from pytitans.recurrences import TILE

CONTEXTS = {"4K": 4096, "128K": 2**17, "2M": 2**21}
REST = "gates, norms, persistent tokens"
PARTS = {"embed": "embedding", "lm_head": "embedding", "memory.": "memory", "mlp.": "feed-forward"}


def describe(config: PreTrainedConfig) -> str:
    """The table that `titans info` prints."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    lines = [("model", f"{config.model_type} {getattr(config, 'variant', '')}".strip())]
    lines += [("parameters", f"{model.num_parameters():,}")]
    lines += [(f"  {part}", f"{count:,}") for part, count in parameters_by_part(model).items()]
    sizes = [state_bytes(memory) for memory in memories(model)]
    if sizes:
        lines += [("memory state, per layer and sequence", in_bytes(max(sizes)))]
        lines += [("  all layers, at any length", in_bytes(sum(sizes)))]
    if isinstance(config, TitansConfig) or getattr(config, "sliding_window", None):
        forward = flops_per_token(model)
        lines += [("FLOPs per token, forward", f"{forward:,}")]
        lines += [("FLOPs per token, training", f"{3 * forward:,}")]
    lines += [("KV cache of a full-attention Transformer of this shape, bf16", "")]
    lines += [(f"  {name} tokens", in_bytes(kv_cache(config, n))) for name, n in CONTEXTS.items()]
    width = max(len(name) for name, value in lines if value) + 2
    return "\n".join(f"{name:<{width}}{value:>20}".rstrip() for name, value in lines)


def parameters_by_part(model: PreTrainedModel) -> dict[str, int]:
    """Embedding, attention, memory, feed-forward and the rest; tied weights once, all in all."""
    parts = dict.fromkeys(["embedding", "attention", "memory", "feed-forward", REST], 0)
    for name, weight in model.named_parameters():
        part = next((part for key, part in PARTS.items() if key in name), None)
        if part is None:
            part = "attention" if "attention." in name or "attn." in name else REST
        parts[part] += weight.numel()
    return {part: count for part, count in parts.items() if count}


def flops_per_token(model: PreTrainedModel) -> int:
    """See the module's docstring."""
    config = model.config
    linear = sum(2 * m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))
    spans = config.num_hidden_layers * keys_seen(config)
    memory = sum(memory_flops(m, config.variant == "mac") for m in memories(model))
    return int(linear + 4 * config.hidden_size * spans + memory)


def keys_seen(config: PreTrainedConfig) -> float:
    """Keys that a token of a long text attends to, on average, in one layer."""
    if not isinstance(config, TitansConfig):
        return config.sliding_window
    if config.variant == "lmm":
        return 0
    if config.variant == "mac":  # what the memory recalls for the segment's tokens, and they
        return config.num_persistent + config.segment_len + 1
    return config.num_persistent + config.window


def memories(model: PreTrainedModel) -> Iterator[NeuralMemory | Mixer]:
    return (module for module in model.modules() if isinstance(module, (NeuralMemory, Mixer)))


def state_bytes(memory: NeuralMemory | Mixer) -> int:
    state = memory.initial_state(1).memory
    return sum(W.numel() * W.element_size() for W in (*state.M, *state.S, *state.anchor))


def memory_flops(memory: NeuralMemory | Mixer, reads_twice: bool) -> float:
    """Of writing and reading one token, all memories."""
    M = memory.initial_state(1).memory.M
    shapes = [W.shape[-2:] for W in M]
    if isinstance(memory, NeuralMemory):
        C, momentum, learns = memory.chunk_size, "momentum" in memory.gates, True
    else:
        C, momentum = memory.rule.chunk_size or TILE, memory.rule.momentum
        learns = memory.rule.objective == "l2"
    P, r = sum(a * b for a, b in shapes), 2 if momentum else 1
    first = shapes[0][0] * shapes[0][1]
    within = 2 * C * sum(a + b for a, b in shapes) + 2 * C * C
    errors = 2 * P + 2 * (P - first) if learns else 0
    each = errors + 4 * r * P + within + (2 * P if reads_twice else 0)
    return M[0].shape[1] * each


def kv_cache(config: PreTrainedConfig, tokens: int) -> int:
    """Bytes of keys and values, two each, for every layer, feature and token."""
    return 2 * 2 * config.num_hidden_layers * config.hidden_size * tokens


def in_bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:,.4g} {unit}"
        size /= 1024
    return f"{size:,.4g} GiB"
