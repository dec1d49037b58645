"""TitansConfig: the shape of a Titans model, in Hugging Face's names."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import AutoConfig

VARIANTS = ("mac", "mag", "mal", "lmm")
RECURRENCES = ("titans", "gated_deltanet", "deltanet", "retnet", "mamba2", "ttt_mlp_like")


@strict
class TitansConfig(PreTrainedConfig):
    """Configuration of `TitansModel` and its heads.

    >>> TitansConfig(variant="mag", hidden_size=128, num_attention_heads=4, window=256)

    Args:
        variant: "mac" (memory as a context), "mag" (as a gate), "mal" (as a layer), "lmm" (alone).
        vocab_size: 258 is the byte tokenizer's: 256 bytes, then <bos>/<eos> and <pad>.
        hidden_size: width of the residual stream.
        num_hidden_layers: blocks, each followed by a feed-forward layer.
        num_attention_heads: of attention, and of the memory: each head has a memory of its own.
        intermediate_size: width of the feed-forward layers (SwiGLU).
        memories_per_head: memories that share a head's queries, keys and gates: of linear ones,
            values so many times as wide.
        memory_depth: layers of the memory's MLP, 1 (linear) to 4. Paper: 2.
        memory_expansion: its hidden width over its input width. Paper: 4.
        memory_activation: "silu" or "gelu" (the paper's camera-ready; slower on CPUs).
        memory_norm: M(x) = x + LayerNorm(MLP(x)) instead of MLP(x).
        memory_momentum: False leaves momentum out (the paper's ablation).
        memory_decay: False leaves forgetting out (likewise).
        memory_max_step: what the largest steps of a chunk add up to: see `NeuralMemory`.
        conv_size: of the convolution on the memory's q, k, v; 0 leaves it out.
        chunk_size: tokens that share one gradient point of the memory; part of what is trained.
        segment_len: MAC's attention span, in tokens.
        window: MAG's and MAL's attention reach, in tokens.
        num_persistent: learned tokens that every token sees.
        recurrence: what the memory is: "titans", or a layer of `pytitans.mixers` to compare with
            ("lmm" and "mal" alone have these); several: one for each layer, in turn.
        classifier_pooling: of the hidden states, for classes of sequences: "mean" or "last".
    """

    model_type = "titans"
    keys_to_ignore_at_inference = ["cache"]  # noqa: RUF012 - the parent's declaration

    variant: str = "mac"
    vocab_size: int = 258
    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    intermediate_size: int = 512
    memories_per_head: int = 1
    memory_depth: int = 2
    memory_expansion: int | float = 4
    memory_activation: Literal["silu", "gelu"] = "silu"
    memory_norm: bool = True
    memory_momentum: bool = True
    memory_decay: bool = True
    memory_max_step: int | float = 2.0
    conv_size: int = 4
    chunk_size: int = 16
    segment_len: int = 128
    window: int = 128
    num_persistent: int = 4
    recurrence: str | list[str] = "titans"
    classifier_pooling: Literal["mean", "last"] = "mean"
    rope_theta: int | float = 10_000.0
    rms_norm_eps: int | float = 1e-6
    initializer_range: int | float = 0.02
    tie_word_embeddings: bool = True
    use_cache: bool = True
    bos_token_id: int | None = 256
    eos_token_id: int | None = 256
    pad_token_id: int | None = 257

    @property
    def recurrences(self) -> list[str]:
        """The memories of the first layers; further layers repeat them."""
        return [self.recurrence] if isinstance(self.recurrence, str) else self.recurrence

    def validate_titans(self):
        """Every number a model is built from, checked before anything is built."""
        if self.variant not in VARIANTS:
            raise ValueError(f"variant={self.variant!r} is unknown: choose one of {VARIANTS}")
        for name in self.recurrences:
            if name not in RECURRENCES:
                raise ValueError(f"recurrence {name!r} is unknown: choose from {RECURRENCES}")
            if name != "titans" and self.variant not in ("lmm", "mal"):
                raise ValueError(
                    f"recurrence={name!r} with variant={self.variant!r}: only a Titans memory is "
                    "read and written as MAC and MAG do; use variant 'lmm' or 'mal'"
                )
        for name in (
            "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
            "intermediate_size", "memories_per_head", "memory_depth", "chunk_size", "segment_len",
            "window",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 1 or more")
        if self.hidden_size % (4 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a multiple of 4 times "
                f"num_attention_heads={self.num_attention_heads}"
            )
        if self.memory_max_step <= 1:
            raise ValueError(f"memory_max_step={self.memory_max_step} must be above 1: use 2")
        if not self.recurrences:
            raise ValueError("recurrence=[] names no memory: give one, or one for each layer")
        if self.num_persistent < 0 or self.conv_size < 0 or self.memory_expansion <= 0:
            raise ValueError(
                "num_persistent and conv_size must be 0 or more and memory_expansion above 0; got "
                f"{self.num_persistent}, {self.conv_size} and {self.memory_expansion}"
            )


AutoConfig.register("titans", TitansConfig, exist_ok=True)

# needs this file, and registers itself
import pytitans.models.configuration_titans_forecasting  # noqa: E402, F401
