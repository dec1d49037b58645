"""One tiny model of each variant, with weights large enough that the memory matters."""

import torch

from pytitans.models import TitansConfig, TitansForCausalLM

VARIANTS = ("mac", "mag", "mal", "lmm")


def tiny_config(variant: str, **changes) -> TitansConfig:
    shape = {
        "vocab_size": 16,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "intermediate_size": 24,
        "memory_expansion": 2,
        "chunk_size": 4,
        "segment_len": 8,
        "window": 6,
        "num_persistent": 3,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    return TitansConfig(variant=variant, **{**shape, **changes})


def tiny_model(variant: str, **changes) -> TitansForCausalLM:
    torch.manual_seed(0)
    model = TitansForCausalLM(tiny_config(variant, **changes))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
        for layer in model.model.layers:  # steps and forgetting that are felt within a few tokens
            layer.block.memory.to_gates.bias.add_(1.0)
    return model.double().eval()


def gates_of(memory, x):
    """The memory's gates for a text x that begins with it."""
    (q, k, v), _ = memory.convolve(memory.qkv(x), None, None)
    return memory.gate_values(x, q, k, v)


def stream(model, ids, cuts, cache=None):
    """Logits of the ids fed in pieces of these sizes, and the cache after them."""
    outs, begin = [], 0
    for n in cuts:
        out = model(ids[:, begin : begin + n], cache=cache, use_cache=True)
        cache, begin = out.cache, begin + n
        outs.append(out.logits)
    return torch.cat(outs, dim=1), cache
