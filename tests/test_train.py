"""Training: the same weights whatever interrupts it, the right decay, exact figures."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pytitans.data.text import TextData, load_text
from pytitans.data.tokenizer import byte_tokenizer
from pytitans.evaluate import evaluate
from pytitans.models import TitansConfig, TitansForCausalLM
from pytitans.train import TextTrainer, TrainArguments, find_checkpoint, train

SHAPE = {
    "vocab_size": 258,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "bos_token_id": 256,
    "eos_token_id": 256,
    "pad_token_id": 257,
}


@pytest.fixture
def data(tmp_path):
    for name, words in (
        ("a", "the cat sat. "),
        ("b", "on the mat. "),
        ("held-out", "the dog sat. "),
    ):
        (tmp_path / f"{name}.txt").write_text(words * 30)
    return TextData(files=[f"{tmp_path}/*.txt"], validation=["held-out"], sequence_length=16)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True))


def arguments(folder, **changes) -> TrainArguments:
    options = {
        "max_steps": 6,
        "save_steps": 3,
        "eval_steps": 3,
        "logging_steps": 1,
        "warmup_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "report_to": "none",
        "bf16": False,
    }
    return TrainArguments(output_dir=str(folder), **options | changes)


def weights(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def run(folder, data, checkpoint=None, **changes):
    model = llama()
    facts = train(
        model, byte_tokenizer(), data, arguments(folder, **changes), checkpoint=checkpoint
    )
    return model, facts


def test_a_run_leaves_model_tokenizer_facts_curve_and_logs(tmp_path, data):
    model, facts = run(tmp_path / "run", data, report_to="tensorboard")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert torch.equal(weights(loaded), weights(model))
    assert loaded.config.use_cache
    text = "héllo"
    assert AutoTokenizer.from_pretrained(tmp_path / "run")(text).input_ids == list(text.encode())
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "run").glob("**/events.out.tfevents*"))
    saved = json.loads((tmp_path / "run" / "run.json").read_text())
    assert saved["parameters"] == model.num_parameters()
    assert saved["train_tokens"] == 6 * 4 * 16
    assert saved["bits_per_byte"] == facts["bits_per_byte"]


def test_validation_figure_is_the_one_of_titans_eval(tmp_path, data):
    model, facts = run(tmp_path / "run", data)
    held_out = load_text(data, ["validation"])["validation"]
    result = evaluate(model, byte_tokenizer(), held_out, length=16, progress=False)
    assert facts["bits_per_byte"] == pytest.approx(result["bits_per_byte"], rel=1e-5)


def test_a_resumed_run_ends_at_the_same_weights(tmp_path, data):
    whole, _ = run(tmp_path / "whole", data)
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "stopped" / "checkpoint-3")
    checkpoint = find_checkpoint(arguments(tmp_path / "stopped"), resume=True)
    resumed, _ = run(tmp_path / "stopped", data, checkpoint)
    assert torch.equal(weights(whole), weights(resumed))


def test_seconds_of_a_resumed_run_count_those_before(tmp_path, data):
    run(tmp_path / "whole", data)
    kept = tmp_path / "stopped" / "checkpoint-3"
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", kept)
    state = json.loads((kept / "trainer_state.json").read_text())
    clock = state["stateful_callbacks"]["Clock"]["attributes"]
    assert 0 < clock["seconds"] < 1000
    clock["seconds"] = 1000.0
    (kept / "trainer_state.json").write_text(json.dumps(state))
    _, facts = run(tmp_path / "stopped", data, str(kept))
    assert 1000 <= facts["seconds"] < 2000
    del state["stateful_callbacks"]["Clock"]  # another Trainer's checkpoint
    (kept / "trainer_state.json").write_text(json.dumps(state))
    _, facts = run(tmp_path / "other", data, str(kept))
    assert facts["seconds"] < 1000


def test_a_checkpoint_that_was_not_saved_to_its_end_is_passed_over(tmp_path, data):
    """The process was killed while it wrote: what it had left was the newest folder."""
    whole, _ = run(tmp_path, data)
    os.remove(tmp_path / "checkpoint-6" / "trainer_state.json")
    checkpoint = find_checkpoint(arguments(tmp_path), resume=True)
    assert checkpoint == str(tmp_path / "checkpoint-3")
    resumed, _ = run(tmp_path, data, checkpoint)
    assert torch.equal(weights(whole), weights(resumed))


def test_ctrl_c_saves_a_checkpoint_to_go_on_from(tmp_path, data):
    whole, _ = run(tmp_path / "whole", data)
    model, calls = llama(), []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGINT)

    model.register_forward_hook(interrupt)
    args = arguments(tmp_path / "stopped")
    with pytest.raises(KeyboardInterrupt, match="--resume"):
        train(model, byte_tokenizer(), data, args)
    assert json.loads((tmp_path / "stopped/checkpoint-2/config.json").read_text())["use_cache"]
    checkpoint = find_checkpoint(args, resume=True)
    resumed, _ = run(tmp_path / "stopped", data, checkpoint)
    assert torch.equal(weights(whole), weights(resumed))


def test_a_folder_that_holds_a_run_is_not_overwritten(tmp_path):
    args = arguments(tmp_path)
    assert find_checkpoint(args, resume=False) is None
    with pytest.raises(ValueError, match="no checkpoint to resume from"):
        find_checkpoint(args, resume=True)
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "trainer_state.json").touch()
    with pytest.raises(ValueError, match=r"holds a run .*another --train\.output_dir, continue"):
        find_checkpoint(args, resume=False)


def test_only_matrices_decay(tmp_path):
    model = TitansForCausalLM(TitansConfig(**SHAPE, variant="mac"))
    trainer = TextTrainer(model=model, args=arguments(tmp_path, eval_strategy="no"))
    groups = {g["weight_decay"]: g["params"] for g in trainer.create_optimizer().param_groups}
    assert set(groups) == {0.1, 0.0}
    assert all(p.ndim > 1 for p in groups[0.1])
    assert all(p.ndim < 2 for p in groups[0.0])
    assert sum(map(len, groups.values())) == len(list(model.parameters()))


def test_minutes_become_steps(tmp_path, data):
    _, facts = run(tmp_path / "run", data, max_minutes=0.005, save_steps=0.5, eval_steps=0.5)
    assert facts["steps"] >= 1
    assert facts["steps"] != 6


@pytest.mark.parametrize("option", [{"max_steps": 0}, {"max_minutes": 0.0}])
def test_no_training_at_all_is_refused(tmp_path, option):
    with pytest.raises(ValueError, match=next(iter(option))):
        arguments(tmp_path, **option)


def test_text_too_short_is_refused_before_training(tmp_path, data):
    short = TextData(files=data.files, validation=data.validation, sequence_length=2000)
    with pytest.raises(ValueError, match="too few for a sequence of 2000"):
        run(tmp_path / "run", short)
    assert not (tmp_path / "run").exists()


def test_bf16_trains(tmp_path, data):
    _, facts = run(tmp_path / "run", data, bf16=True)
    assert math.isfinite(facts["bits_per_byte"])


def test_two_processes_train_as_one_of_twice_the_batch(tmp_path, data):
    options = [
        *("--data", *data.files, "--data.validation", *data.validation),
        *("--data.sequence_length", "16", "--variant", "mac", "--steps", "2"),
        *("--model.hidden_size", "16", "--model.num_hidden_layers", "1"),
        *("--model.num_attention_heads", "2", "--model.intermediate_size", "16"),
        *("--model.segment_len", "8", "--model.chunk_size", "4", "--train.bf16", "false"),
    ]
    started = []
    for processes, batch in ((1, 4), (2, 2)):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(processes), "-m", "pytitans.cli", "train", *options]
        command += ["--train.output_dir", str(tmp_path / str(processes))]
        command += ["--train.per_device_train_batch_size", str(batch)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        started.append(subprocess.Popen(command, stderr=subprocess.PIPE, env=environment))
    for process in started:
        _, errors = process.communicate()
        assert process.returncode == 0, errors.decode()
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / n) for n in ("1", "2"))
    torch.testing.assert_close(weights(one), weights(two), rtol=1e-4, atol=1e-5)
    facts = [json.loads((tmp_path / n / "run.json").read_text()) for n in ("1", "2")]
    assert facts[0]["bits_per_byte"] == pytest.approx(facts[1]["bits_per_byte"], rel=1e-4)
