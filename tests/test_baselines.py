"""Baselines: as many parameters as the Titans model, and all that is done with one: training,
reading on through a cache, padding, files."""

import pytest
import torch
from tiny import stream, tiny_config
from transformers import AutoModelForCausalLM

from pytitans.attention import WindowAttention
from pytitans.baseline import BASELINES, baseline_like, build_baseline
from pytitans.cache import TitansCache
from pytitans.evals.streaming import Stream, context_limit
from pytitans.info import describe, flops_per_token
from pytitans.mixers import MIXERS, GatedDeltaNet, Mamba2
from pytitans.models import TitansConfig, TitansForCausalLM
from pytitans.models.configuration_titans import RECURRENCES
from pytitans.presets import count_parameters

OURS = [name for name in BASELINES if name not in ("transformer", "llama", "mamba2_hf")]


@pytest.fixture(params=BASELINES)
def baseline(request):
    torch.manual_seed(0)
    return build_baseline(tiny_config("mac", intermediate_size=64), request.param).eval()


@pytest.fixture(params=OURS)
def ours(request) -> TitansForCausalLM:
    """Weights large enough that the memory matters, in float64."""
    torch.manual_seed(0)
    model = build_baseline(tiny_config("mal", intermediate_size=64), request.param)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.double().eval()


def test_a_configuration_knows_every_layer():
    assert ("titans", *MIXERS) == RECURRENCES


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize(
    ("variant", "shape"),
    [
        ("mac", {"hidden_size": 64, "num_hidden_layers": 2}),
        ("mal", {"hidden_size": 128, "num_hidden_layers": 2, "intermediate_size": 384}),
        ("lmm", {"hidden_size": 96, "num_hidden_layers": 4, "num_persistent": 32}),
    ],
)
def test_parameters_are_the_titans_model_s(name, variant, shape):
    config = TitansConfig(variant=variant, **shape)
    baseline = baseline_like(config, name)
    assert count_parameters(baseline) == pytest.approx(count_parameters(config), rel=0.01)
    assert (baseline.hidden_size, baseline.vocab_size) == (config.hidden_size, config.vocab_size)
    if name != "mamba2_hf":
        assert baseline.num_hidden_layers == config.num_hidden_layers
        assert baseline.num_attention_heads == config.num_attention_heads


def test_layers_take_turns():
    """Mamba-2, Gated DeltaNet and again, each before attention, over the Titans model's span."""
    config = tiny_config("mac", num_hidden_layers=3, intermediate_size=64)
    blocks = [x.block for x in build_baseline(config, "gated_deltanet_h2_like").model.layers]
    assert [type(block.memory) for block in blocks] == [Mamba2, GatedDeltaNet, Mamba2]
    assert all(isinstance(block.attention, WindowAttention) for block in blocks)
    assert all(block.attention.window == config.segment_len for block in blocks)


def test_it_learns(baseline):
    """The same eight tokens again and again: 40 steps halve the loss."""
    baseline.train()
    ids = torch.randint(16, (1, 8), generator=torch.Generator().manual_seed(1)).repeat(4, 3)
    optimizer = torch.optim.AdamW(baseline.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = baseline(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_a_checkpoint_is_the_model(baseline, ids, tmp_path):
    baseline.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, weight in baseline.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], weight, rtol=0, atol=0)
    torch.testing.assert_close(again(ids).logits, baseline(ids).logits)


@pytest.mark.parametrize("cuts", [[37], [1] * 37, [1, 2, 1, 20, 1, 12], [30, 7]])
def test_the_harness_reads_in_pieces(baseline, ids, cuts):
    """Several tokens after several, one after one and mixed: what the whole text at once gives."""
    stream, out = Stream(baseline), []
    with torch.inference_mode():
        for piece in ids.split(cuts, dim=1):
            out.append(stream.read(piece))
        torch.testing.assert_close(torch.cat(out, 1), baseline(ids).logits, rtol=1e-4, atol=1e-5)


def test_all_but_full_attention_read_without_end(baseline):
    limit = context_limit(baseline)
    assert (limit is None) == (baseline.config.model_type != "llama")


def test_a_saved_cache_goes_on(ours, ids, tmp_path):
    want = ours(ids).logits
    out, cache = stream(ours, ids[:, :20], [13, 7])
    cache.save(tmp_path / "read.safetensors", ours)
    loaded = TitansCache.load(tmp_path / "read.safetensors", ours)
    more, _ = stream(ours, ids[:, 20:], [1, 16], loaded)
    torch.testing.assert_close(torch.cat([out, more], 1), want)


def test_padded_rows_are_as_if_alone_and_go_on(ours, ids):
    lengths, more = [37, 20, 9], ids.flip(1)[:, :6]
    mask = torch.stack([(torch.arange(37) >= 37 - n).long() for n in lengths])
    padded = torch.zeros_like(ids)
    for row, n in enumerate(lengths):
        padded[row, 37 - n :] = ids[row, :n]
    out = ours(padded, attention_mask=mask, use_cache=True)
    after, _ = stream(ours, more, [2, 4], out.cache)
    for row, n in enumerate(lengths):
        whole = ours(torch.cat([ids[row : row + 1, :n], more[row : row + 1]], dim=1)).logits[0]
        torch.testing.assert_close(out.logits[row, 37 - n :], whole[:n])
        torch.testing.assert_close(after[row], whole[n:])


def test_packed_documents_are_read_alone(ours, ids):
    places = torch.cat([torch.arange(25), torch.arange(12)])[None].expand(3, -1)
    packed = ours(ids, position_ids=places, use_cache=False).logits
    torch.testing.assert_close(packed[:, :25], ours(ids[:, :25]).logits)
    torch.testing.assert_close(packed[:, 25:], ours(ids[:, 25:]).logits)


def test_info_says_what_is_known(baseline):
    text = describe(baseline.config)
    assert f"{baseline.num_parameters():,}" in text
    constant = baseline.config.model_type in ("titans", "mistral")
    assert ("FLOPs per token, forward" in text) is constant
    assert ("memory state" in text) is (baseline.config.model_type == "titans")


def test_flops_of_a_linear_memory_by_hand():
    """Read and write 2 K V each; the delta rule reads for its error too. Within a tile of 64."""
    sizes = {}
    for name in ("deltanet", "retnet"):
        config = tiny_config("lmm", recurrence=name, num_persistent=0)
        model = TitansForCausalLM(config)
        linear = sum(2 * m.weight.numel() for m in model.modules() if hasattr(m, "in_features"))
        sizes[name] = (flops_per_token(model) - linear) // config.num_hidden_layers
    K = 8
    assert sizes["deltanet"] == 2 * (6 * K * K + 2 * 64 * 2 * K + 2 * 64 * 64)
    assert sizes["retnet"] == 2 * (4 * K * 2 * K + 2 * 64 * 3 * K + 2 * 64 * 64)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny_config("mac", recurrence="retnet"), "'retnet' with variant='mac'"),
        (lambda: tiny_config("mag", recurrence=["titans", "mamba2"]), "'mamba2' with variant"),
        (lambda: tiny_config("lmm", recurrence="rwkv"), "'rwkv' is unknown"),
        (lambda: tiny_config("lmm", recurrence=[]), "names no memory"),
        (lambda: baseline_like(tiny_config("mac"), "rwkv"), "'rwkv' is unknown: choose one of"),
        (
            lambda: baseline_like(
                tiny_config("lmm", intermediate_size=1, memory_depth=1), "mamba2"
            ),
            "more parameters .* intermediate_size=1, by",
        ),
    ],
)
def test_what_cannot_be_built_is_said(make, message):
    with pytest.raises(Exception, match=message):
        make()
