"""Titans as Hugging Face models: TitansModel and TitansForCausalLM.

Embedding, blocks (`pytitans.blocks`) each followed by SwiGLU, a final norm, tied logits. All state
is in the `TitansCache` that goes in and comes out.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.modeling_auto import AutoModel, AutoModelForCausalLM

from pytitans.attention import SegmentAttention, WindowAttention
from pytitans.blocks import LMM, MAC, MAG, MAL, Block
from pytitans.cache import TitansCache
from pytitans.layers import RMSNorm, ShortConv, SwiGLU
from pytitans.memory import FORGET_START, NeuralMemory
from pytitans.mixers import MIXERS, Mixer
from pytitans.models.configuration_titans import TitansConfig
from pytitans.models.outputs import CACHE, TitansCausalLMOutput, TitansOutput, one_cache
from pytitans.models.packing import find_documents, run_packed

# MAC asks its memory of earlier segments, attention has this one: horizons of 100 to 3,300 tokens
FORGET_ACROSS_SEGMENTS = (1e-2, 3e-4)


def build_memory(config: TitansConfig, layer: int) -> Any:
    """The memory of `config.recurrence` in this layer."""
    names = config.recurrences
    name = names[layer % len(names)]
    if name != "titans":
        return MIXERS[name](config.hidden_size, config.num_attention_heads)
    return NeuralMemory(
        config.hidden_size,
        config.num_attention_heads,
        per_head=config.memories_per_head,
        depth=config.memory_depth,
        expansion=config.memory_expansion,
        chunk_size=config.chunk_size,
        activation=config.memory_activation,
        norm=config.memory_norm,
        momentum=config.memory_momentum,
        decay=config.memory_decay,
        conv_size=config.conv_size,
        max_step=config.memory_max_step,
        forget_start=FORGET_ACROSS_SEGMENTS if config.variant == "mac" else FORGET_START,
    )


def build_block(config: TitansConfig, layer: int) -> Block:
    """The block of `config.variant`."""
    dim, heads = config.hidden_size, config.num_attention_heads
    memory = build_memory(config, layer)
    if config.variant == "lmm":
        return LMM(dim, memory, config.num_persistent)
    if config.variant == "mac":
        segment = SegmentAttention(dim, heads, config.rope_theta)
        return MAC(dim, memory, segment, config.num_persistent, config.segment_len)
    window = WindowAttention(dim, heads, config.window, config.rope_theta)
    kind = {"mag": MAG, "mal": MAL}[config.variant]
    return kind(dim, memory, window, config.num_persistent)


class TitansLayer(GradientCheckpointingLayer):
    """A block and its feed-forward layer, both residual."""

    def __init__(self, config: TitansConfig, layer: int):
        super().__init__()
        self.block = build_block(config, layer)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, state=None, lengths: Tensor | None = None):
        x, state = self.block(x, state, lengths)
        return x + self.mlp(self.mlp_norm(x)), state


class TitansPreTrainedModel(PreTrainedModel):
    config: TitansConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TitansLayer"]  # noqa: RUF012 - the parent's declaration
    _is_stateful = True
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Llama's: normal with `initializer_range`, norms 1; for gates and M_0 the memory's own."""
        if isinstance(module, (NeuralMemory, Mixer)):
            module.reset_parameters()
        elif isinstance(module, nn.Embedding) or (
            isinstance(module, nn.Linear) and module.bias is None  # gates have one, and their own
        ):
            init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, nn.RMSNorm):
            init.ones_(module.weight)
        elif isinstance(module, ShortConv):
            reach = module.weight.shape[0] ** -0.5
            init.uniform_(module.weight, -reach, reach)
        elif isinstance(module, Block):
            init.normal_(module.persistent, std=self.config.initializer_range)


class TitansModel(TitansPreTrainedModel):
    """The blocks: tokens, or any vectors (`inputs_embeds`), to hidden states.

    Rows of a batch may be padded anywhere (`attention_mask`): a padded token changes nothing. A row
    may hold several documents (`position_ids` that restart at 0, or `cu_seq_lens_q`, both as of
    DataCollatorWithFlattening): each is read as if it were alone.
    """

    def __init__(self, config: TitansConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            TitansLayer(config, layer) for layer in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: TitansCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        position_ids: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        past_key_values: TitansCache | None = None,
        **kwargs,
    ) -> TitansOutput:
        """input_ids [B, T] or inputs_embeds [B, T, hidden_size]; attention_mask [B, T], or
        [B, read + T] with a cache, 0 where a token does not exist. Positions matter only where
        they restart: packed documents leave no state, so they neither take nor give a cache.
        past_key_values: the cache, by its older name."""
        cache = one_cache(cache, past_key_values)
        x = self.embed(input_ids, inputs_embeds)
        order, lengths = self.real_tokens_first(attention_mask, x)
        documents = find_documents(position_ids, cu_seq_lens_q, attention_mask, x.shape[:2])
        if documents is not None:
            if use_cache or cache is not None:
                raise ValueError(
                    f"{len(documents.lengths)} packed documents do not go on from a cache, nor "
                    "leave one: give no cache, and use_cache=False"
                )
            fresh = [None] * len(self.layers)
            hidden = run_packed(lambda x, n: self.run(x, fresh, n)[0], x, documents)
            return self.output(hidden, None, output_hidden_states)
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        kept = use_cache or cache is not None
        if cache is None:
            cache = TitansCache(len(self.layers))
        x = x if order is None else take(x, order)
        hidden, states = self.run(x, cache.states, lengths)
        if kept:
            cache.advance(states, x.shape[1])
        if order is not None:
            back = order.argsort(dim=1)
            hidden = [take(h, back) for h in hidden]
        return self.output(hidden, cache if kept else None, output_hidden_states)

    def run(self, x: Tensor, states: list, lengths: Tensor | None) -> tuple[list[Tensor], list]:
        """x and what each layer makes of it, the last one normalised; and the states after."""
        ends, hidden = [], [x]
        for layer, state in zip(self.layers, states, strict=True):
            x, state = layer(x, state, lengths)
            ends.append(state)
            hidden.append(x)
        hidden[-1] = self.norm(x)
        return hidden, ends

    def output(self, hidden, cache, output_hidden_states) -> TitansOutput:
        return TitansOutput(
            last_hidden_state=hidden[-1],
            cache=cache,
            hidden_states=tuple(hidden) if output_hidden_states else None,
        )

    def embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if inputs_embeds is not None:
            if inputs_embeds.ndim != 3 or inputs_embeds.shape[-1] != self.config.hidden_size:
                raise ValueError(
                    f"inputs_embeds is [B, T, {self.config.hidden_size}]; "
                    f"got {tuple(inputs_embeds.shape)}"
                )
            if inputs_embeds.isnan().any():
                raise ValueError("inputs_embeds holds NaN: fill or drop the missing values")
            return inputs_embeds
        assert input_ids is not None  # one of the two was given
        if input_ids.ndim != 2:
            raise ValueError(f"input_ids is [B, T]; got {tuple(input_ids.shape)}")
        if input_ids.device.type == "cpu" and input_ids.numel():  # elsewhere it would wait
            low, high = (int(x) for x in input_ids.aminmax())
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(
                    f"token id {high if high >= self.config.vocab_size else low} is outside the "
                    f"vocabulary of {self.config.vocab_size}: is it this model's tokenizer?"
                )
        return self.embed_tokens(input_ids)

    def real_tokens_first(self, mask: Tensor | None, x: Tensor):
        """The order that puts each row's existing tokens first, and their number; None, None if all
        exist. Padding on any side then is padding on the right, which touches nothing."""
        if mask is None:
            return None, None
        if mask.shape[0] != x.shape[0] or mask.shape[1] < x.shape[1]:
            raise ValueError(
                f"attention_mask {tuple(mask.shape)} does not cover the tokens {tuple(x.shape[:2])}"
            )
        real = mask[:, -x.shape[1] :].bool()
        if real.all():
            return None, None
        return (~real).long().argsort(dim=1, stable=True), real.sum(1)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed_tokens = value


def take(x: Tensor, order: Tensor) -> Tensor:
    """Tokens of [B, T, D] in the order [B, T]."""
    return x.gather(1, order[..., None].expand(-1, -1, x.shape[-1]))


MANY_LOGITS = 2**26  # of which training keeps no copy: in float32 they would take 256 MiB


class TitansForCausalLM(TitansPreTrainedModel, GenerationMixin):
    """A language model: logits of the next token, the loss where `labels` are given.

    >>> model = TitansForCausalLM(TitansConfig(variant="mac"))
    >>> model(input_ids=ids, labels=ids).loss
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 - as above

    def __init__(self, config: TitansConfig):
        super().__init__(config)
        self.model = TitansModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: TitansCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        position_ids: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        past_key_values: TitansCache | None = None,
        **kwargs,
    ) -> TitansCausalLMOutput:
        """As `TitansModel.forward`. labels [B, T]: the tokens themselves, -100 where no loss is
        taken, as at the first token of each packed document (DataCollatorWithFlattening sees to
        it: the token before is another document's); logits_to_keep: only the last so many (0: all).
        """
        out = self.model(
            input_ids,
            attention_mask,
            one_cache(cache, past_key_values),
            inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            position_ids=position_ids,
            cu_seq_lens_q=cu_seq_lens_q,
        )
        if labels is not None and self.training and self.many_logits(labels):
            loss = self.loss_without_logits(out.last_hidden_state, labels, **kwargs)
            return TitansCausalLMOutput(loss=loss, cache=out.cache, hidden_states=out.hidden_states)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.vocab_size, **kwargs)
        return TitansCausalLMOutput(
            loss=loss, logits=logits, cache=out.cache, hidden_states=out.hidden_states
        )

    def prepare_inputs_for_generation(  # type: ignore - by name, what the parent takes by place
        self, input_ids, next_sequence_length: int | None = None, inputs_embeds=None, **kwargs
    ):
        """As transformers does, which looks for inputs_embeds, a prompt of vectors, by this name.
        `generate` takes input_ids to begin with what the cache has read; where they are shorter
        than that it would drop some of them."""
        if next_sequence_length is not None and next_sequence_length < 1:
            seen = kwargs[CACHE].get_seq_length()
            raise ValueError(
                f"the cache has read {seen:,} tokens, and input_ids hold no more than these: if "
                "they are new, generate with cache=cache.as_start()"
            )
        prepare = super().prepare_inputs_for_generation  # type: ignore - its protocol of self
        return prepare(
            input_ids,
            next_sequence_length=next_sequence_length,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )

    def many_logits(self, labels: Tensor) -> bool:
        return labels.numel() * self.vocab_size > MANY_LOGITS and hasattr(F, "linear_cross_entropy")

    def loss_without_logits(
        self, hidden: Tensor, labels: Tensor, num_items_in_batch=None, shift_labels=None, **kwargs
    ) -> Tensor:
        """`loss_function` by torch's chunked cross entropy: all logits are never there at once."""
        if shift_labels is None:
            shift_labels = F.pad(labels[:, 1:], (0, 1), value=-100)
        loss = F.linear_cross_entropy(
            hidden.flatten(0, 1),
            self.lm_head.weight,
            shift_labels.flatten().to(hidden.device),
            reduction="mean" if num_items_in_batch is None else "sum",
            options=nn.LinearCrossEntropyOptions(),
        )
        return loss if num_items_in_batch is None else loss / num_items_in_batch

    def _prepare_cache_for_generation(  # type: ignore - the parent says bool and returns nothing
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ) -> None:
        """As transformers does, with our cache for its dynamic one. A cache that is given serves
        several prompts, beams or returned sequences; one of another batch size is left as it is."""
        if "cache" in model_kwargs:
            model_kwargs[CACHE] = model_kwargs.pop("cache")
        given = model_kwargs.get(CACHE)
        if given is not None or generation_config.use_cache is False:
            prepare = super()._prepare_cache_for_generation  # type: ignore - its protocol of self
            prepare(generation_config, model_kwargs, generation_mode, batch_size, max_cache_length)
            if isinstance(given, TitansCache):
                ways = generation_config.num_beams or 1, generation_config.num_return_sequences or 1
                model_kwargs[CACHE] = given.for_rows(batch_size * max(ways))
            return
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation={kind!r} does not hold a memory: leave it out, "
                "a TitansCache has constant size already"
            )
        model_kwargs[CACHE] = TitansCache(self.config.num_hidden_layers)


AutoModel.register(TitansConfig, TitansModel, exist_ok=True)
AutoModelForCausalLM.register(TitansConfig, TitansForCausalLM, exist_ok=True)

# these two need this file, and register themselves
import pytitans.models.modeling_titans_forecasting  # noqa: E402
import pytitans.models.sequence_classification  # noqa: E402, F401
