"""What to compare with: DLinear, RLinear, iTransformer, PatchTST (Hugging Face's), and repeating a
season.

All take `past_values` [B, context, V] and `future_values` [B, horizon, V] and return an output with
`loss` and `prediction_outputs` [B, horizon, V], as Hugging Face's PatchTST does. The loss is MSE,
as in their papers, if not asked otherwise.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import PatchTSTConfig, PatchTSTForPrediction, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.utils.generic import ModelOutput

from pytitans.models.modeling_titans_forecasting import EPS, POINT_LOSS


@dataclass
class ForecastOutput(ModelOutput):
    """`loss` where there are future values, and `prediction_outputs` [B, horizon, V]."""

    loss: Tensor | None = None
    prediction_outputs: Tensor | None = None


def forecast_output(prediction: Tensor, future: Tensor | None, kind: str = "mse") -> ForecastOutput:
    loss = None if future is None else POINT_LOSS[kind](prediction, future)
    return ForecastOutput(loss=loss, prediction_outputs=prediction)


@strict
class SeriesConfig(PreTrainedConfig):
    """What all have, with the names of Hugging Face's PatchTST."""

    context_length: int = 96
    prediction_length: int = 96
    num_input_channels: int = 1


def scaled(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x [B, V, context], each variable shifted and scaled alone (RevIN's); and by what."""
    loc = x.mean(-1, keepdim=True)
    scale = (x.var(-1, keepdim=True, correction=0) + EPS).sqrt()
    return (x - loc) / scale, loc, scale


def start_linear(layer: nn.Linear) -> None:
    """As torch's linear layers start, which is as the authors' do."""
    reach = layer.in_features**-0.5
    init.uniform_(layer.weight, -reach, reach)
    if layer.bias is not None:
        init.uniform_(layer.bias, -reach, reach)


@strict
class DLinearConfig(SeriesConfig):
    """DLinear's shape; kernel_size: rows of the moving average that is the trend."""

    model_type = "dlinear"

    kernel_size: int = 25
    loss: Literal["mse", "mae", "huber"] = "mse"


class DLinear(PreTrainedModel):
    """A linear map of the trend and one of the rest, the same for all variables
    (https://arxiv.org/abs/2205.13504)."""

    config: DLinearConfig
    config_class = DLinearConfig

    def __init__(self, config: DLinearConfig):
        super().__init__(config)
        sizes = config.context_length, config.prediction_length
        self.trend, self.rest = nn.Linear(*sizes), nn.Linear(*sizes)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            start_linear(module)

    def forward(self, past_values: Tensor, future_values: Tensor | None = None, **kwargs):
        x, size = past_values.mT, self.config.kernel_size
        padded = F.pad(x, ((size - 1) // 2, size // 2), mode="replicate")
        trend = F.avg_pool1d(padded, size, stride=1)
        return forecast_output(
            (self.trend(trend) + self.rest(x - trend)).mT, future_values, self.config.loss
        )


@strict
class RLinearConfig(SeriesConfig):
    """RLinear's shape."""

    model_type = "rlinear"

    loss: Literal["mse", "mae", "huber"] = "mse"


class RLinear(PreTrainedModel):
    """A linear map of the scaled look-back, the same for all variables, and scaled back
    (https://arxiv.org/abs/2305.10721): what is left of `TitansForForecasting` without its memory,
    so that the two tell what that is worth. It starts at zero, too."""

    config: RLinearConfig
    config_class = RLinearConfig

    def __init__(self, config: RLinearConfig):
        super().__init__(config)
        self.linear = nn.Linear(config.context_length, config.prediction_length)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            init.zeros_(module.weight)
            init.zeros_(module.bias)

    def forward(self, past_values: Tensor, future_values: Tensor | None = None, **kwargs):
        x, loc, scale = scaled(past_values.mT)
        out = self.linear(x) * scale + loc
        return forecast_output(out.mT, future_values, self.config.loss)


@strict
class ITransformerConfig(SeriesConfig):
    """iTransformer's shape."""

    model_type = "itransformer"

    d_model: int = 128
    num_hidden_layers: int = 2
    num_attention_heads: int = 8
    ffn_dim: int = 128
    dropout: float = 0.1
    loss: Literal["mse", "mae", "huber"] = "mse"


class ITransformer(PreTrainedModel):
    """Each variable's look-back is a token; a Transformer encoder over the variables; a linear map
    to its future (https://arxiv.org/abs/2310.06625). Without the authors' tokens of the time of
    day, week and year."""

    config: ITransformerConfig
    config_class = ITransformerConfig

    def __init__(self, config: ITransformerConfig):
        super().__init__(config)
        self.embed = nn.Linear(config.context_length, config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        layer = nn.TransformerEncoderLayer(
            config.d_model, config.num_attention_heads, config.ffn_dim, config.dropout, "gelu",
            batch_first=True,
        )  # fmt: skip
        self.encoder = nn.TransformerEncoder(
            layer, config.num_hidden_layers, nn.LayerNorm(config.d_model)
        )
        self.head = nn.Linear(config.d_model, config.prediction_length)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Torch's own start, layer by layer."""
        if isinstance(module, nn.Linear):
            start_linear(module)
        elif isinstance(module, nn.MultiheadAttention):
            init.xavier_uniform_(module.in_proj_weight)
            init.zeros_(module.in_proj_bias)
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)

    def forward(self, past_values: Tensor, future_values: Tensor | None = None, **kwargs):
        x, loc, scale = scaled(past_values.mT)
        hidden = self.encoder(self.dropout(self.embed(x)))
        out = self.head(hidden) * scale + loc
        return forecast_output(out.mT, future_values, self.config.loss)


@strict
class SeasonalNaiveConfig(SeriesConfig):
    """season: rows after which the series is taken to repeat itself."""

    model_type = "seasonal_naive"

    season: int = 24


class SeasonalNaive(PreTrainedModel):
    """The last season, again and again; nothing is learned."""

    config: SeasonalNaiveConfig
    config_class = SeasonalNaiveConfig

    def __init__(self, config: SeasonalNaiveConfig):
        super().__init__(config)
        self.place = nn.Parameter(torch.zeros(1), requires_grad=False)  # to have a device
        self.post_init()

    def forward(self, past_values: Tensor, future_values: Tensor | None = None, **kwargs):
        steps = torch.arange(self.config.prediction_length, device=past_values.device)
        season = past_values[:, -self.config.season :]
        return forecast_output(season[:, steps % season.shape[1]], future_values)


BASELINES: dict[str, tuple[Any, Any]] = {
    "dlinear": (DLinearConfig, DLinear),
    "rlinear": (RLinearConfig, RLinear),
    "itransformer": (ITransformerConfig, ITransformer),
    "patchtst": (PatchTSTConfig, PatchTSTForPrediction),
    "seasonal_naive": (SeasonalNaiveConfig, SeasonalNaive),
}


def build_baseline(
    name: str, channels: int, context: int, horizon: int, season: int, **shape: Any
) -> PreTrainedModel:
    """The baseline in its paper's shape for small sets (PatchTST's for ETTh), but for `shape`."""
    config, model = BASELINES[name]
    sizes = {
        "context_length": context, "prediction_length": horizon, "num_input_channels": channels
    }  # fmt: skip
    papers: dict[str, Any] = {}
    if name == "seasonal_naive":
        papers = {"season": season}
    elif name == "patchtst":
        # As its authors have it where Hugging Face's defaults differ: each patch has weights of its
        # own in the forecast (there: the mean of all patches, which hardly learns), learned
        # positions, norms after each sublayer and no dropout before the last map.
        papers = {
            "patch_length": min(16, context), "patch_stride": 8, "d_model": 16, "ffn_dim": 128,
            "num_attention_heads": 4, "attention_dropout": 0.0, "positional_dropout": 0.3,
            "ff_dropout": 0.3, "path_dropout": 0.3, "head_dropout": 0.0, "pooling_type": None,
            "positional_encoding_type": "random", "pre_norm": False,
        }  # fmt: skip
    return model(config(**sizes, **papers | shape))
