"""The models to compare with: by hand where that can be, and as Hugging Face models."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pytitans.data.series import Windows
from pytitans.forecasting.backtest import averages, score
from pytitans.forecasting.baselines import BASELINES, build_baseline
from pytitans.models.configuration_titans_forecasting import TitansForecastingConfig
from pytitans.models.modeling_titans_forecasting import TitansForForecasting

SHAPE = {"context_length": 32, "prediction_length": 12, "num_input_channels": 3}
SMALL = {
    "patchtst": {"patch_length": 8, "patch_stride": 8, "d_model": 16, "ffn_dim": 16},
    "itransformer": {"d_model": 16, "ffn_dim": 16, "num_attention_heads": 2},
}


def build(name: str, **changes):
    config, model = BASELINES[name]
    torch.manual_seed(0)
    return model(config(**SHAPE, **SMALL.get(name, {}), **changes)).eval()


@pytest.mark.parametrize("name", BASELINES)
def test_shapes_loss_and_files(name, tmp_path):
    model, (past, future) = build(name), (torch.randn(2, 32, 3), torch.randn(2, 12, 3))
    out = model(past_values=past, future_values=future)
    assert out.prediction_outputs.shape == future.shape
    torch.testing.assert_close(out.loss, F.mse_loss(out.prediction_outputs, future))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)(past_values=past).prediction_outputs
    torch.testing.assert_close(again, out.prediction_outputs)


@pytest.mark.parametrize("name", ["dlinear", "rlinear", "itransformer"])
def test_loss_is_chosen(name):
    past, future = torch.randn(2, 32, 3), 3 * torch.randn(2, 12, 3)
    out = build(name, loss="huber")(past_values=past, future_values=future)
    error = (out.prediction_outputs - future).abs()
    huber = torch.where(error < 1, error.square() / 2, error - 0.5).mean()
    torch.testing.assert_close(out.loss, huber)


def test_dlinear_by_hand():
    """The trend is the mean of 25 rows around, the ends repeated; both parts are mapped alone."""
    model, past = build("dlinear").double(), torch.randn(1, 32, 3).double()
    rows = torch.cat([past[:, :1].expand(1, 12, 3), past, past[:, -1:].expand(1, 12, 3)], dim=1)
    trend = torch.stack([rows[:, i : i + 25].mean(1) for i in range(32)], dim=1)
    rest = past - trend
    want = model.trend.weight @ trend[0] + model.rest.weight @ rest[0]
    want = want + (model.trend.bias + model.rest.bias)[:, None]
    torch.testing.assert_close(model(past_values=past).prediction_outputs[0], want)


def test_rlinear_is_titans_without_its_memory():
    """Its map beside a memory that says nothing, as both are before the first step."""
    rlinear, past = build("rlinear").double(), torch.randn(2, 32, 3).double()
    torch.nn.init.normal_(rlinear.linear.weight)
    titans = TitansForForecasting(
        TitansForecastingConfig(context_length=32, prediction_length=12, num_input_channels=3)
    )
    titans = titans.double().eval()
    assert titans.skip is not None
    titans.skip.load_state_dict(rlinear.linear.state_dict())
    torch.testing.assert_close(
        titans(past_values=past).prediction_outputs, rlinear(past_values=past).prediction_outputs
    )


def test_patchtst_has_its_papers_head():
    """Every patch has weights of its own in the forecast; Hugging Face maps their mean."""
    model = build_baseline("patchtst", channels=7, context=336, horizon=96, season=24)
    assert model.head.projection.weight.shape == (96, 41 * 16)


def test_seasonal_naive_by_hand():
    model = build("seasonal_naive", season=5)
    past = torch.arange(32.0)[None, :, None]
    out = model(past_values=past).prediction_outputs.flatten().tolist()
    assert out == [27, 28, 29, 30, 31, 27, 28, 29, 30, 31, 27, 28]


def test_itransformer_sees_variables_as_a_set_and_levels_not_at_all():
    model, past = build("itransformer").double(), torch.randn(2, 32, 3).double()
    out = model(past_values=past).prediction_outputs
    turned = model(past_values=past.flip(2)).prediction_outputs.flip(2)
    torch.testing.assert_close(turned, out)
    moved = model(past_values=past + 7).prediction_outputs
    torch.testing.assert_close(moved, out + 7)


@pytest.mark.parametrize("batch_size", [3, 256])
def test_score_by_hand(batch_size):
    """Every window, step and variable counts once, the last, smaller batch too."""
    values = np.random.default_rng(0).normal(size=(60, 3))
    windows = Windows(values, 40, 60, 32, 12)
    model = build("seasonal_naive", season=1)
    error = np.stack([values[o - 1] - values[o : o + 12] for o in range(40, 49)])
    found = score(model, windows, batch_size)
    assert found.windows == 9
    assert found.mse == pytest.approx((error**2).mean(), rel=1e-5)
    assert found.mae == pytest.approx(np.abs(error).mean(), rel=1e-5)


def test_averages():
    cells = [{"mse": 1.0, "mae": 2.0}, {"mse": 3.0, "mae": 3.0}]
    assert averages(cells) == {"mse": 2.0, "mae": 2.5}
