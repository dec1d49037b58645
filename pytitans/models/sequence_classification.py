"""Classes of whole sequences: a linear layer on the mean of the hidden states, or on the last one.

`TitansForSequenceClassification`, and for comparison the same head on any other Hugging Face
backbone, `BackboneForSequenceClassification`: Llama's own reads the last token alone, Mamba2 has
none.
"""

from typing import Any, Literal, cast

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.auto.configuration_auto import AutoConfig
from transformers.models.auto.modeling_auto import AutoModel, AutoModelForSequenceClassification

from pytitans.models.configuration_titans import TitansConfig
from pytitans.models.modeling_titans import TitansModel, TitansPreTrainedModel


def pool(hidden: Tensor, mask: Tensor | None, pooling: str) -> Tensor:
    """[B, T, D] -> [B, D]: the mean over the tokens that exist (`mask` [B, T]), or the last one."""
    if mask is None:
        return hidden.mean(1) if pooling == "mean" else hidden[:, -1]
    real = mask.bool()
    if pooling == "mean":
        total = (hidden * real[..., None]).sum(1)
        return total / real.sum(1, keepdim=True).clamp(min=1)
    last = (torch.arange(real.shape[1], device=real.device) * real).argmax(1)
    return hidden[torch.arange(len(last), device=last.device), last]


class ClassificationHead:
    """What the two classes below do with their `model` and `score`."""

    config: Any
    model: Any
    score: nn.Linear
    accepts_loss_kwargs = False  # a mean over the batch: the Trainer divides it among batches

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> SequenceClassifierOutput:
        """input_ids [B, T] or inputs_embeds [B, T, hidden_size]; attention_mask [B, T], 0 where a
        token does not exist, on either side; without it `pad_token_id` does not exist.

        labels: classes [B], or numbers [B] for one label, or [B, num_labels] of 0.0 and 1.0 for
        several classes at once: Hugging Face's losses, by `config.problem_type` or what they are.
        """
        padding = self.config.pad_token_id
        if attention_mask is None and input_ids is not None and padding is not None:
            attention_mask = (input_ids != padding).long()
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            use_cache=False,
            output_hidden_states=output_hidden_states,
        )
        features = pool(out.last_hidden_state, attention_mask, self.config.classifier_pooling)
        logits, loss = self.score(features), None
        if labels is not None:
            loss_of: Any = self.loss_function  # type: ignore - of PreTrainedModel
            loss = loss_of(labels=labels, pooled_logits=logits, config=self.config)
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=out.hidden_states)


class TitansForSequenceClassification(ClassificationHead, TitansPreTrainedModel):
    """Titans with a linear layer on the mean of its hidden states (`config.classifier_pooling`).

    >>> config = TitansConfig(variant="mal", num_labels=3)
    >>> TitansForSequenceClassification(config)(ids, labels=classes).loss
    """

    def __init__(self, config: TitansConfig):
        super().__init__(config)
        self.num_labels = cast(int, config.num_labels)
        self.model = TitansModel(config)
        self.score = nn.Linear(config.hidden_size, self.num_labels, bias=False)
        self.post_init()


@strict
class BackboneClassifierConfig(PreTrainedConfig):
    """Any backbone's configuration, and how its hidden states are pooled ("mean", "last")."""

    model_type = "pytitans_backbone_classifier"
    sub_configs = {"backbone_config": AutoConfig}  # type: ignore # noqa: RUF012 - as transformers'

    backbone_config: dict | PreTrainedConfig | None = None
    classifier_pooling: Literal["mean", "last"] = "mean"
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs):
        if isinstance(self.backbone_config, dict):
            fields = dict(self.backbone_config)
            self.backbone_config = AutoConfig.for_model(fields.pop("model_type"), **fields)
        if self.pad_token_id is None and self.backbone_config is not None:
            self.pad_token_id = self.backbone_config.pad_token_id
        super().__post_init__(**kwargs)


class BackboneForSequenceClassification(ClassificationHead, PreTrainedModel):
    """The head of `TitansForSequenceClassification` on the backbone of a configuration."""

    config_class = BackboneClassifierConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: BackboneClassifierConfig):
        super().__init__(config)
        if not isinstance(config.backbone_config, PreTrainedConfig):
            raise ValueError("backbone_config is missing: give a backbone's configuration")
        self.num_labels = cast(int, config.num_labels)
        self.model = AutoModel.from_config(config.backbone_config)
        self.score = nn.Linear(config.backbone_config.hidden_size, self.num_labels, bias=False)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The head alone: the backbone has its own."""
        if module is self.score:
            std = getattr(self.config.backbone_config, "initializer_range", 0.02)
            init.normal_(self.score.weight, std=std)


AutoModelForSequenceClassification.register(
    TitansConfig, TitansForSequenceClassification, exist_ok=True
)
AutoConfig.register(BackboneClassifierConfig.model_type, BackboneClassifierConfig, exist_ok=True)
AutoModelForSequenceClassification.register(
    BackboneClassifierConfig, BackboneForSequenceClassification, exist_ok=True
)
