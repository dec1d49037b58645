"""TitansForecastingConfig: the shape of a forecasting model, in the names of HF's PatchTST."""

from typing import Literal

from huggingface_hub.dataclasses import strict
from transformers.models.auto.configuration_auto import AutoConfig

from pytitans.models.configuration_titans import TitansConfig


@strict
class TitansForecastingConfig(TitansConfig):
    """Configuration of `TitansForForecasting`: TitansConfig's fields, and these.

    >>> TitansForecastingConfig(num_input_channels=7, context_length=336, prediction_length=96)

    Args:
        num_input_channels: variables of the series.
        context_length: rows that a forecast looks back on.
        prediction_length: rows that are forecast.
        patch_length: rows of a token.
        patch_stride: rows from a token's first to the next one's; patches end with the look-back.
        scaling: "std" shifts and scales each variable by mean and deviation of its look-back, and
            the forecast back (RevIN); None leaves the values as they are.
        loss: of the point forecast: "mse", "mae" or "huber".
        quantiles: forecast beside the point, each trained by its pinball loss.
        channel_mixing: a layer that mixes the variables after the memory over time; without it each
            variable is a row of its own.
        linear_skip: a linear map from look-back to forecast, added to what the memory says.
        dropout: of embedded patches, and of what the horizon is made from.
    """

    model_type = "titans_forecasting"

    variant: str = "lmm"
    vocab_size: int = 1  # patches are embedded, not tokens
    hidden_size: int = 32
    num_hidden_layers: int = 1
    num_attention_heads: int = 2
    intermediate_size: int = 64
    memory_expansion: int | float = 2
    chunk_size: int = 16
    segment_len: int = 16
    window: int = 16
    use_cache: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    num_input_channels: int = 1
    context_length: int = 96
    prediction_length: int = 96
    patch_length: int = 16
    patch_stride: int = 16
    scaling: Literal["std"] | None = "std"
    loss: Literal["mse", "mae", "huber"] = "mse"
    quantiles: list[float] | tuple[float, ...] = ()
    channel_mixing: bool = False
    linear_skip: bool = True
    dropout: int | float = 0.2

    def validate_forecasting(self):
        for name in ("num_input_channels", "prediction_length", "patch_length", "patch_stride"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be 1 or more")
        over = self.context_length - self.patch_length
        if over < 0 or over % self.patch_stride:
            raise ValueError(
                f"context_length={self.context_length} is no patch of {self.patch_length} and so "
                f"many strides of {self.patch_stride}: {self.context_length} - "
                f"{self.patch_length} must be a multiple of {self.patch_stride}, 0 included"
            )
        if self.patch_stride > self.patch_length:
            raise ValueError(
                f"patch_stride={self.patch_stride} over patch_length={self.patch_length} would "
                "leave rows unread"
            )
        if not all(0 < q < 1 for q in self.quantiles) or list(self.quantiles) != sorted(
            set(self.quantiles)
        ):
            raise ValueError(f"quantiles={list(self.quantiles)} must ascend between 0 and 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be 0 or more and below 1")


AutoConfig.register("titans_forecasting", TitansForecastingConfig, exist_ok=True)
