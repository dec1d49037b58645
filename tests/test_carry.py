"""Training with a memory that goes on from step to step."""

import numpy as np
import pytest
import torch
from tiny import VARIANTS, tiny_config
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from pytitans.data.text import TextData
from pytitans.data.tokenizer import byte_tokenizer
from pytitans.data.windows import LONGEST, CarriedWindows, DrawnWindows, TokenText
from pytitans.models import TitansForCausalLM
from pytitans.train import TextTrainer, TrainArguments, last_checkpoint, train

LENGTH, ROWS = 8, 2
SIZE = {"vocab_size": 258, "bos_token_id": 256, "eos_token_id": 256, "pad_token_id": 257}


def test_windows_are_those_drawn_and_stretches_are_short_and_long():
    text = TokenText([np.arange(300), np.arange(300, 1000)], eos=-1, bytes=1000, tokens=1000)
    drawn = DrawnWindows(text, LENGTH, 4000, seed=0)
    found = CarriedWindows(drawn, ROWS)
    assert len(found) == 4000
    fresh = [bool(found[i]["fresh"]) for i in range(4000)]
    assert all(torch.equal(found[i]["input_ids"], drawn[i]["input_ids"]) for i in range(0, 4000, 9))
    assert fresh[0] and fresh[::ROWS] == fresh[1::ROWS]  # the batch has one memory
    lengths = np.diff(np.flatnonzero(fresh[::ROWS]))
    assert min(lengths) == 1 and 32 < max(lengths) <= LONGEST
    assert 5 < np.median(lengths) < 13  # short and long stretches alike often: sqrt(64) = 8
    with pytest.raises(IndexError):
        found[4000]


@pytest.fixture
def data(tmp_path):
    words = "".join(chr(97 + i % 23) + " cat"[i % 4] for i in range(600))
    for name in ("a", "b", "held-out"):
        (tmp_path / f"{name}.txt").write_text(name + words)
    return TextData(files=[f"{tmp_path}/*.txt"], validation=["held-out"], sequence_length=LENGTH)


def arguments(folder, **changes) -> TrainArguments:
    options = {
        "max_steps": 8, "save_steps": 4, "eval_steps": 4, "warmup_steps": 1, "carry": True,
        "per_device_train_batch_size": ROWS, "learning_rate": 1e-2, "report_to": "none",
        "bf16": False, "logging_steps": 1, "seed": 3,
    }  # fmt: skip
    return TrainArguments(output_dir=str(folder), **options | changes)


def model(variant: str) -> TitansForCausalLM:
    torch.manual_seed(0)
    return TitansForCausalLM(tiny_config(variant, **SIZE))


class Seen:
    """What the model was given in training, step by step, and its losses."""

    def __init__(self, monkeypatch):
        self.steps: list[tuple[torch.Tensor, int, float]] = []
        compute = TextTrainer.compute_loss

        def spy(trainer, model, inputs, *args, **options):
            ids, training = inputs["input_ids"], model.training
            before = len(self.steps)
            loss = compute(trainer, model, inputs, *args, **options)
            if training:
                cache = inputs.get("cache")
                read = cache.tokens - ids.shape[1] if cache is not None else 0
                self.steps.append((ids, read, loss.item()))
            assert len(self.steps) <= before + 1
            return loss

        monkeypatch.setattr(TextTrainer, "compute_loss", spy)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_carried_step_has_the_loss_of_the_whole_stretch(variant, data, tmp_path, monkeypatch):
    """With a learning rate of 0: as if the stretch were one sequence."""
    seen, one = Seen(monkeypatch), model(variant)
    train(one, byte_tokenizer(), data, arguments(tmp_path / "run", learning_rate=0.0))
    reads = [read for _, read, _ in seen.steps]
    assert max(reads) >= 2 * LENGTH and reads.count(0) >= 2  # stretches, and their ends
    stretch: list[torch.Tensor] = []
    for ids, read, loss in seen.steps:
        stretch = [*stretch, ids] if read else [ids]
        assert read == LENGTH * (len(stretch) - 1)
        logits = one.eval()(torch.cat(stretch, dim=1)).logits[:, -LENGTH:-1]
        want = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).item()
        assert loss == pytest.approx(want, rel=1e-5)


def test_no_history_is_kept(data, tmp_path, monkeypatch):
    found = []
    read_on = TextTrainer.read_on

    def spy(trainer, inputs):
        carries = read_on(trainer, inputs)
        if carries and inputs["cache"] is not None:
            state = inputs["cache"].states[0].memory.M[0]
            found.append(state.requires_grad)
        return carries

    monkeypatch.setattr(TextTrainer, "read_on", spy)
    train(model("lmm"), byte_tokenizer(), data, arguments(tmp_path / "run"))
    assert found and not any(found)


def test_a_stopped_run_goes_on_with_its_memory(data, tmp_path, monkeypatch):
    whole = model("mal")
    train(whole, byte_tokenizer(), data, arguments(tmp_path / "run"))
    again, seen = model("mal"), Seen(monkeypatch)
    half = tmp_path / "run" / "checkpoint-4"
    train(again, byte_tokenizer(), data, arguments(tmp_path / "again"), checkpoint=str(half))
    assert seen.steps[0][1] > 0  # it was stopped within a stretch
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
    assert last_checkpoint(tmp_path / "again")


def test_a_model_without_a_memory_reads_the_same_windows(data, tmp_path, monkeypatch):
    seen, shape = Seen(monkeypatch), {"hidden_size": 16, "num_attention_heads": 2}
    llama = LlamaForCausalLM(
        LlamaConfig(**SIZE, **shape, intermediate_size=16, num_hidden_layers=1)
    )
    train(llama, byte_tokenizer(), data, arguments(tmp_path / "llama"))
    theirs = list(seen.steps)
    seen.steps.clear()
    train(model("lmm"), byte_tokenizer(), data, arguments(tmp_path / "lmm"))
    assert [read for _, read, _ in theirs] == [0] * 8
    for (a, *_), (b, *_) in zip(theirs, seen.steps, strict=True):
        assert torch.equal(a, b)
