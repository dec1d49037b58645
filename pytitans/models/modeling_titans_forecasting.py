"""TitansForForecasting: from the last rows of a series to the next ones.

    look-back [context, V] -> scaled, each variable alone (RevIN) -> patches, a token each
    -> blocks of TitansModel over time -> (a layer over the variables) -> the last token to all
    steps, beside a linear map of the look-back -> scaled back

The patches are PatchTST's (https://arxiv.org/abs/2211.14730), scaling is RevIN's
(https://openreview.net/forum?id=cGDAkQo1C0p), the linear path from look-back to forecast TiDE's
(https://arxiv.org/abs/2304.08424), mixing over variables after time SiMBA's
(https://arxiv.org/abs/2403.15360).

A stream goes on for ever: the memory reads each patch as the look-back leaves it behind, scaled as
it was while it was the look-back's first. A forecast reads the look-back with a memory of all that
came before; what it reads so is forgotten again, until it is left behind in its turn. Rows that
come in pieces, of any sizes, give the forecasts of one call.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import AutoModel, AutoModelForTimeSeriesPrediction
from transformers.utils.generic import ModelOutput

from pytitans.cache import TitansCache
from pytitans.models.configuration_titans_forecasting import TitansForecastingConfig
from pytitans.models.modeling_titans import TitansModel, TitansPreTrainedModel
from pytitans.models.outputs import OlderName, one_cache

EPS = 1e-5  # of RevIN: a look-back that does not move is not blown up
POINT_LOSS = {"mse": F.mse_loss, "mae": F.l1_loss, "huber": F.huber_loss}


@dataclass
class TitansForecastingOutput(OlderName, ModelOutput):
    """As of Hugging Face's PatchTSTForPrediction, and quantiles and the stream's state.

    loss: where there are future values. prediction_outputs [B, horizon, V]: the point forecast.
    quantile_outputs [B, horizon, V, Q]: ascending. loc, scale [B, 1, V]: of the look-back.
    """

    loss: Tensor | None = None
    prediction_outputs: Tensor | None = None
    quantile_outputs: Tensor | None = None
    cache: TitansCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    loc: Tensor | None = None
    scale: Tensor | None = None


class Rows(NamedTuple):
    """Values of every variable of every series of a batch, [B V, T], and which were observed."""

    values: Tensor
    observed: Tensor

    def part(self, span: slice) -> "Rows":
        return Rows(self.values[:, span], self.observed[:, span])

    def windows(self, size: int, stride: int) -> "Rows":
        """[B V, windows, size]"""
        return Rows(self.values.unfold(1, size, stride), self.observed.unfold(1, size, stride))

    def scaled(self, scaling: str | None) -> tuple[Tensor, Tensor, Tensor]:
        """The values, shifted and scaled over the last axis; what is missing is 0, the mean. And by
        what: loc and scale."""
        real = self.observed.to(self.values.dtype)
        if scaling is None:
            loc = self.values.new_zeros(*self.values.shape[:-1], 1)
            scale = torch.ones_like(loc)
        else:
            count = real.sum(-1, keepdim=True).clamp(min=1)
            loc = (self.values * real).sum(-1, keepdim=True) / count
            var = ((self.values - loc).square() * real).sum(-1, keepdim=True) / count
            scale = (var + EPS).sqrt()
        return (self.values - loc) / scale * real, loc, scale


class ChannelMixing(nn.Module):
    """An MLP over the variables, at every feature alone: x + down(gelu(up(norm(x))))."""

    def __init__(self, channels: int, dim: int, dropout: float):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.up, self.down = nn.Linear(channels, 2 * channels), nn.Linear(2 * channels, channels)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, V, D]."""
        y = self.norm(x).movedim(1, -1)
        return x + self.dropout(self.down(F.gelu(self.up(y)))).movedim(-1, 1)


class TitansForForecasting(TitansPreTrainedModel):
    """Forecasts the next rows of a series of one or more variables.

    >>> model = TitansForForecasting(TitansForecastingConfig(num_input_channels=7))
    >>> model(past_values=past, future_values=future).loss  # [B, 96, 7] each
    >>> out = model(past_values=past, use_cache=True)  # and on, as rows arrive:
    >>> out = model(past_values=rows, cache=out.cache)
    """

    config: TitansForecastingConfig  # type: ignore - of the parent's, a narrower one
    config_class = TitansForecastingConfig
    main_input_name = "past_values"
    base_model_prefix = ""  # a saved memory depends on how patches are embedded

    def __init__(self, config: TitansForecastingConfig):
        super().__init__(config)
        self.model = TitansModel(config)
        self.model.set_input_embeddings(nn.Identity())  # there are no tokens to embed
        self.embed = nn.Linear(config.patch_length, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout)
        self.mixing = None
        if config.channel_mixing:
            self.mixing = ChannelMixing(
                config.num_input_channels, config.hidden_size, config.dropout
            )
        values = config.prediction_length * (1 + len(config.quantiles))
        self.head = nn.Linear(config.hidden_size, values)
        self.skip = nn.Linear(config.context_length, values) if config.linear_skip else None
        for out in filter(None, (self.head, self.skip)):  # the first forecast is the mean
            nn.init.zeros_(out.weight)
            nn.init.zeros_(out.bias)
        self.post_init()

    def forward(
        self,
        past_values: Tensor,
        past_observed_mask: Tensor | None = None,
        future_values: Tensor | None = None,
        cache: TitansCache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        past_key_values: TitansCache | None = None,
        **kwargs,
    ) -> TitansForecastingOutput:
        """past_values [B, T, V], T of context_length or more, rows before the look-back being read
        by the memory; with a cache any T: the rows since the last call. past_observed_mask
        [B, T, V]: 0 where a value is missing. future_values [B, horizon, V]: for the loss."""
        cache = one_cache(cache, past_key_values)
        B, _, V = past_values.shape
        rows, states = self.take_in(past_values, past_observed_mask, cache)
        rows, states = self.read_history(rows, states)
        begin = rows.values.shape[1] - self.config.context_length
        point, quantiles, hidden, loc, scale = self.forecast(
            rows.part(slice(begin, None)), states, V
        )
        if use_cache or cache is not None or (use_cache is None and self.config.use_cache):
            cache = TitansCache(len(states) + 1) if cache is None else cache
            cache.advance([*states, tuple(rows)], past_values.shape[1])
        loss = None if future_values is None else self.loss(point, quantiles, future_values)
        return TitansForecastingOutput(
            loss=loss,
            prediction_outputs=point,
            quantile_outputs=quantiles,
            cache=cache,
            hidden_states=tuple(hidden) if output_hidden_states else None,
            loc=loc.view(B, V, 1).mT,
            scale=scale.view(B, V, 1).mT,
        )

    def take_in(
        self, values: Tensor, mask: Tensor | None, cache: TitansCache | None
    ) -> tuple[Rows, list[Any]]:
        """The rows that the memory has not read yet, those of earlier calls first, and its state
        after those that it has."""
        channels, context = self.config.num_input_channels, self.config.context_length
        if values.ndim != 3 or values.shape[2] != channels:
            raise ValueError(f"past_values is [B, T, {channels}]; got {tuple(values.shape)}")
        observed = torch.ones_like(values, dtype=torch.bool) if mask is None else mask.bool()
        if observed.shape != values.shape:
            raise ValueError(
                f"past_observed_mask {tuple(observed.shape)} is not of past_values' shape, "
                f"{tuple(values.shape)}"
            )
        values = values.to(self.dtype).masked_fill(~observed, 0)
        if values.isnan().any():
            raise ValueError("past_values holds NaN: mark what is missing by past_observed_mask")
        rows = Rows(values.mT.flatten(0, 1), observed.mT.flatten(0, 1))
        states: list[Any] = [None] * self.config.num_hidden_layers
        if cache is not None and cache.states[-1] is not None:
            *states, kept = cache.states
            if kept[0].shape[0] != rows.values.shape[0]:
                raise ValueError(
                    f"a cache of {kept[0].shape[0] // channels} series does not serve a batch of "
                    f"{values.shape[0]}"
                )
            pairs = zip(kept, rows, strict=True)
            rows = Rows(*(torch.cat([a, b.to(a.dtype)], dim=1) for a, b in pairs))
        if rows.values.shape[1] < context:
            raise ValueError(
                f"{rows.values.shape[1]} rows are fewer than the look-back: give "
                f"context_length={context} or more"
            )
        return rows, states

    def read_history(self, rows: Rows, states: list[Any]) -> tuple[Rows, list[Any]]:
        """The memory reads the patches that the look-back has left behind, each scaled as the
        look-back that began with it. Returns the rows that are left, less than a stride more than
        a look-back, and the states."""
        config = self.config
        steps = (rows.values.shape[1] - config.context_length) // config.patch_stride
        if not steps:
            return rows, states
        end = (steps - 1) * config.patch_stride + config.context_length
        windows = rows.part(slice(0, end)).windows(config.context_length, config.patch_stride)
        scaled, _, _ = windows.scaled(config.scaling)
        tokens = self.dropout(self.embed(scaled[..., : config.patch_length]))
        _, states = self.model.run(tokens, states, None)
        return rows.part(slice(steps * config.patch_stride, None)), states

    def forecast(self, window: Rows, states: list[Any], channels: int):
        """What follows a look-back [B V, context], the memory being in these states: the point
        [B, horizon, V], quantiles [B, horizon, V, Q], hidden states, loc and scale [B V, 1]."""
        config = self.config
        scaled, loc, scale = window.scaled(config.scaling)
        patches = scaled.unfold(1, config.patch_length, config.patch_stride)
        hidden, _ = self.model.run(self.dropout(self.embed(patches)), states, None)
        last = hidden[-1][:, -1]  # all patches' words for the horizon overfit: docs/forecasting.md
        if self.mixing is not None:
            last = self.mixing(last.unflatten(0, (-1, channels))).flatten(0, 1)
        out = self.head(self.dropout(last))
        if self.skip is not None:
            out = out + self.skip(scaled)
        out = (out * scale + loc).unflatten(1, (config.prediction_length, -1))
        out = out.unflatten(0, (-1, channels)).movedim(1, 2)
        quantiles = out[..., 1:].sort(dim=-1).values if config.quantiles else None
        return out[..., 0], quantiles, hidden, loc, scale

    def loss(self, point: Tensor, quantiles: Tensor | None, future: Tensor) -> Tensor:
        """Of the point, and the pinball losses' mean over the quantiles."""
        loss = POINT_LOSS[self.config.loss](point, future)
        if quantiles is None:
            return loss
        levels = quantiles.new_tensor(self.config.quantiles)
        error = future[..., None] - quantiles
        return loss + torch.maximum(levels * error, (levels - 1) * error).mean()


AutoModel.register(TitansForecastingConfig, TitansForForecasting, exist_ok=True)
AutoModelForTimeSeriesPrediction.register(
    TitansForecastingConfig, TitansForForecasting, exist_ok=True
)
