"""TitansForForecasting: what it is given and gives, that it streams, and what its rows may see."""

import pytest
import torch
from tiny import VARIANTS
from transformers import AutoModel, AutoModelForTimeSeriesPrediction

from pytitans import TitansCache
from pytitans.models.configuration_titans_forecasting import TitansForecastingConfig
from pytitans.models.modeling_titans_forecasting import TitansForForecasting

CONTEXT, HORIZON = 24, 5


def build(variant: str = "lmm", **changes) -> TitansForForecasting:
    """A tiny model, its weights so large that memory, head and mixing are felt."""
    shape = {
        "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16,
        "num_hidden_layers": 2, "num_input_channels": 3,
        "context_length": CONTEXT, "prediction_length": HORIZON,
        "patch_length": 8, "patch_stride": 4, "segment_len": 4, "window": 4,
    }  # fmt: skip
    torch.manual_seed(0)
    model = TitansForForecasting(TitansForecastingConfig(variant=variant, **shape | changes))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
        for layer in model.model.layers:
            layer.block.memory.to_gates.bias.add_(1.0)
    return model.double().eval()


def rows(count: int, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, count, 3, generator=torch.Generator().manual_seed(1)).double()


def forecast(model, past, **options) -> torch.Tensor:
    return model(past_values=past, **options).prediction_outputs


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("cuts", [(24, 40), (64,), (25, 1, 1, 1, 1, 35), (31, 2, 26, 5)])
def test_streaming_equals_one_call(variant, cuts):
    """Rows in pieces of any sizes, with missing ones among them, give the forecast of all rows."""
    model, past = build(variant, quantiles=[0.1, 0.9]), rows(sum(cuts))
    seen = torch.rand(past.shape, generator=torch.Generator().manual_seed(2)) > 0.2
    with torch.no_grad():
        whole, cache = model(past_values=past, past_observed_mask=seen), None
        for piece, mask in zip(past.split(cuts, 1), seen.split(cuts, 1), strict=True):
            out = model(past_values=piece, past_observed_mask=mask, cache=cache,
                use_cache=True)  # fmt: skip
            cache = out.cache
    torch.testing.assert_close(out.prediction_outputs, whole.prediction_outputs)
    torch.testing.assert_close(out.quantile_outputs, whole.quantile_outputs)
    assert cache.tokens == sum(cuts)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_memory_reads_what_the_look_back_has_left(variant):
    """Rows before the look-back matter once they fill a stride."""
    model, past = build(variant), rows(CONTEXT + 11)
    out, alone = forecast(model, past), forecast(model, past[:, 11:])
    changed = past.clone()
    changed[:, 2] += 1
    assert (forecast(model, changed) - out).abs().max() > 1e-6
    assert (alone - out).abs().max() > 1e-4
    torch.testing.assert_close(forecast(model, past[:, 8:]), alone)  # 3 rows of a stride's 4


def test_a_cache_of_one_call_can_be_forked_and_saved(tmp_path):
    model, past = build("mal"), rows(90)
    cache = model(past_values=past[:, :50], use_cache=True).cache
    cache.save(tmp_path / "power.safetensors", model)
    fork, loaded = cache.fork(), TitansCache.load(tmp_path / "power.safetensors", model)
    want = forecast(model, past)
    for each in (cache, fork, loaded):
        torch.testing.assert_close(forecast(model, past[:, 50:], cache=each), want)
    other = build("mal", chunk_size=2)
    with pytest.raises(ValueError, match="another model"):
        TitansCache.load(tmp_path / "power.safetensors", other)


def test_variables_meet_in_the_mixing_alone():
    past = rows(30)
    changed = past.clone()
    changed[..., 2] = changed[..., 2].roll(3, dims=1)
    for mixing in (False, True):
        model = build(channel_mixing=mixing)
        moved = (forecast(model, changed) - forecast(model, past)).abs().amax((0, 1))
        assert moved[2] > 1e-3
        assert (moved[:2] > 1e-6).all() if mixing else (moved[:2] == 0).all()


def test_rows_of_a_batch_do_not_mix():
    model, past = build("mac", channel_mixing=True), rows(40)
    alone = torch.cat([forecast(model, past[:1]), forecast(model, past[1:])])
    torch.testing.assert_close(forecast(model, past), alone)


def test_scaling_takes_level_and_size_away():
    past, scale, loc = rows(30), torch.tensor([2.0, 30.0, 0.5]), torch.tensor([5.0, -70.0, 0.0])
    model = build()
    moved = forecast(model, past * scale + loc)
    torch.testing.assert_close(moved, forecast(model, past) * scale + loc, atol=1e-3, rtol=1e-3)
    out = model(past_values=past)
    torch.testing.assert_close(out.loc[:, 0], past[:, -CONTEXT:].mean(1))
    plain = build(scaling=None)
    assert (forecast(plain, past + 5) - forecast(plain, past) - 5).abs().max() > 0.1


def test_missing_values_are_not_looked_at():
    model, past = build(), rows(40)
    seen = torch.ones_like(past, dtype=torch.bool)
    seen[0, 3:9, 1] = seen[1, 30, 0] = False
    nan = past.masked_fill(~seen, torch.nan)
    wrong = past.masked_fill(~seen, 1e6)
    out = forecast(model, nan, past_observed_mask=seen)
    torch.testing.assert_close(out, forecast(model, wrong, past_observed_mask=seen))
    assert (out - forecast(model, past)).abs().max() > 1e-4
    known, look_back = seen[:, -CONTEXT:], past[:, -CONTEXT:]  # scaled by what was observed alone
    got = model(past_values=nan, past_observed_mask=seen)
    torch.testing.assert_close(got.loc[1, 0, 0], look_back[1, :, 0][known[1, :, 0]].mean())
    spread = look_back[1, :, 0][known[1, :, 0]].var(correction=0)
    torch.testing.assert_close(got.scale[1, 0, 0], (spread + 1e-5).sqrt())
    with pytest.raises(ValueError, match="NaN: mark what is missing"):
        model(past_values=nan)
    assert forecast(model, nan, past_observed_mask=torch.zeros_like(seen)).isfinite().all()


def test_losses_by_hand():
    past, future = rows(24), rows(60)[:, 50 : 50 + HORIZON]
    for loss, want in (
        ("mse", lambda e: e.square().mean()),
        ("mae", lambda e: e.abs().mean()),
    ):
        out = build(loss=loss)(past_values=past, future_values=future)
        torch.testing.assert_close(out.loss, want(future - out.prediction_outputs))
    out = build(quantiles=[0.2, 0.5])(past_values=past, future_values=future)
    assert out.quantile_outputs.shape == (2, HORIZON, 3, 2)
    assert (out.quantile_outputs.diff(dim=-1) >= 0).all()
    low, mid = ((future - out.quantile_outputs[..., i]) for i in (0, 1))
    pinball = [torch.where(e > 0, q * e, (q - 1) * e) for q, e in ((0.2, low), (0.5, mid))]
    mse = (future - out.prediction_outputs).square().mean()
    torch.testing.assert_close(out.loss, mse + torch.stack(pinball).mean())


def test_every_weight_learns():
    model = build("mac", channel_mixing=True, quantiles=[0.5]).train()
    model(past_values=rows(40), future_values=rows(HORIZON)).loss.backward()
    still = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not still


def test_files_and_auto_classes(tmp_path):
    model, past = build("mag", quantiles=[0.1, 0.9]), rows(30)
    model.save_pretrained(tmp_path)
    for auto in (AutoModelForTimeSeriesPrediction, AutoModel, TitansForForecasting):
        again = auto.from_pretrained(tmp_path, dtype=torch.float64)
        assert type(again) is TitansForForecasting and list(again.config.quantiles) == [0.1, 0.9]
        torch.testing.assert_close(forecast(again, past), forecast(model, past))


@pytest.mark.parametrize(
    ("past", "options", "message"),
    [
        (rows(23), {}, r"23 rows are fewer than the look-back: give context_length=24"),
        (rows(30)[..., :2], {}, r"past_values is \[B, T, 3\]; got \(2, 30, 2\)"),
        (rows(30), {"past_observed_mask": torch.ones(2, 29, 3)}, "not of past_values' shape"),
    ],
)
def test_wrong_inputs(past, options, message):
    with pytest.raises(ValueError, match=message):
        build()(past_values=past, **options)


def test_a_cache_serves_its_own_batch():
    model = build()
    cache = model(past_values=rows(30), use_cache=True).cache
    with pytest.raises(ValueError, match="a cache of 2 series does not serve a batch of 3"):
        model(past_values=rows(3, batch=3), cache=cache)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"context_length": 30}, "context_length=30 is no patch of 8"),
        ({"context_length": 4}, "context_length=4 is no patch"),
        ({"patch_stride": 9, "context_length": 17}, "would leave rows unread"),
        ({"quantiles": [0.9, 0.1]}, "must ascend"),
        ({"quantiles": [0.0]}, "between 0 and 1"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"prediction_length": 0}, "prediction_length=0 must be 1 or more"),
    ],
)
def test_wrong_configurations(fields, message):
    with pytest.raises(Exception, match=message):
        build(**fields)
