"""The command line: the four commands end to end, and one clear line for every error."""

import json
import re
import subprocess
import sys

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from pytitans.baseline import baseline_like
from pytitans.cli import main
from pytitans.info import memory_flops, parameters_by_part
from pytitans.memory import NeuralMemory
from pytitans.models import TitansConfig, TitansForCausalLM
from pytitans.presets import count_parameters

TINY = {
    "model.hidden_size": 16,
    "model.num_hidden_layers": 1,
    "model.num_attention_heads": 2,
    "model.intermediate_size": 16,
    "model.memory_expansion": 2,
    "model.chunk_size": 4,
    "model.segment_len": 8,
    "model.window": 8,
    "data.sequence_length": 16,
    "train.max_steps": 2,
    "train.per_device_train_batch_size": 2,
    "train.bf16": False,
    "train.report_to": "none",
}


def flags(options: dict) -> list[str]:
    return [part for name, value in options.items() for part in (f"--{name}", str(value).lower())]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty place to work in, with two texts."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text("the cat sat on the mat. " * 40)
    (tmp_path / "other.txt").write_text("the dog sat on the log. " * 20)
    return tmp_path


def train(*options: str) -> int:
    return main(["train", *flags(TINY), "--data", "book.txt", *options])


def error_of(capsys, *command: str) -> str:
    """The one line that the failing command leaves on stderr."""
    assert main(command) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("titans: error: ")
    return lines[0]


@pytest.mark.parametrize("variant", ["mac", "mag", "mal", "lmm", "transformer"])
def test_train_eval_generate(folder, capsys, variant):
    assert train("--variant", variant) == 0
    trained = json.loads((folder / "runs" / variant / "run.json").read_text())
    capsys.readouterr()
    assert main(["eval", "--model", f"runs/{variant}", "--output", "result.json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((folder / "result.json").read_text())
    assert result["split"] == "validation"
    assert result["bits_per_byte"] == pytest.approx(trained["bits_per_byte"], rel=1e-5)
    command = [
        "generate",
        "--model",
        f"runs/{variant}",
        "--prompt",
        "the c",
        "--max-new-tokens",
        "3",
    ]
    texts = []
    for _ in range(2):
        assert main(command) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert texts[0].startswith("the c")


def test_eval_of_another_text_scores_all_of_it(folder, capsys):
    train("--variant", "transformer")
    capsys.readouterr()
    assert main(["eval", "--model", "runs/transformer", "--data", "other.txt"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["split"], result["bytes"]) == ("all", 480)


def test_options_of_a_run_are_saved_and_resumed(folder, capsys):
    train("--variant", "transformer", "--train.save_steps", "1", "--train.adam_epsilon", "1e-7")
    saved = yaml.safe_load((folder / "runs/transformer/run.yaml").read_text())
    assert saved["train"]["adam_epsilon"] == 1e-7
    assert saved["model"]["memory_expansion"] == 2
    whole = AutoModelForCausalLM.from_pretrained("runs/transformer").state_dict()
    (folder / "runs/transformer").rename(folder / "moved")
    for path in (folder / "moved/checkpoint-2").iterdir():
        path.unlink()
    (folder / "moved/checkpoint-2").rmdir()
    capsys.readouterr()
    assert main(["train", "--resume", "moved"]) == 0
    again = AutoModelForCausalLM.from_pretrained("moved").state_dict()
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_file_of_options_and_overrides(folder, capsys):
    (folder / "run.yaml").write_text("model: {variant: mag, window: 24}\ntrain: {max_steps: 7}\n")
    command = ["train", "--config", "run.yaml", "--steps", "9", "--print_config"]
    with pytest.raises(SystemExit, match="0"):
        main(command)
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["model"]["variant"] == "mag"
    assert printed["model"]["window"] == 24
    assert printed["train"]["max_steps"] == 9


def test_a_preset_gives_the_shape_and_options_change_it(capsys):
    command = ["train", "--preset", "170m", "--model.window", "64", "--print_config"]
    with pytest.raises(SystemExit, match="0"):
        main(command)
    config = yaml.safe_load(capsys.readouterr().out)
    model = config["model"]
    assert (model["hidden_size"], model["num_hidden_layers"], model["window"]) == (768, 12, 64)
    assert (model["memory_depth"], model["memories_per_head"]) == (2, 1)
    assert config["train"]["learning_rate"] == 4e-4  # not that of a small model


def test_info_of_a_paper_size(capsys):
    assert main(["info", "--preset", "760m", "--variant", "mag"]) == 0
    out = capsys.readouterr().out
    for needed in ("parameters", "memory state", "FLOPs per token, training", "2M tokens"):
        assert needed in out
    total = int(out.split("parameters")[1].split()[0].replace(",", ""))
    assert total == pytest.approx(760e6, rel=0.01)
    assert "288 GiB" in out  # 2 * 24 layers * 1536 * 2 bytes * 2**21


def test_parts_sum_to_the_parameters():
    model = TitansForCausalLM(TitansConfig(variant="mac", hidden_size=32, num_hidden_layers=2))
    assert sum(parameters_by_part(model).values()) == model.num_parameters()


def test_flops_of_a_memory_by_hand():
    d, C = 16, 8
    memory = NeuralMemory(4 * d, 4, depth=2, expansion=4, chunk_size=C)
    assert memory_flops(memory, reads_twice=False) == 4 * (88 * d * d + 20 * C * d + 2 * C * C)


@pytest.mark.parametrize("variant", ["mac", "mag", "mal", "lmm"])
def test_baseline_has_equal_parameters(variant):
    config = TitansConfig(variant=variant, hidden_size=64, num_hidden_layers=2)
    baseline = AutoModelForCausalLM.from_config(baseline_like(config))
    assert baseline.num_parameters() == pytest.approx(count_parameters(config), rel=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--variant", "mamba"], "--model.variant: expected .*'lmm', 'transformer'.*, got mamba"),
        (["--model.chunk_size", "0"], "chunk_size=0 must be 1 or more"),
        (["--model.memory_max_step", "1"], "memory_max_step=1.* must be above 1"),
        (["--model.hidden_size", "18"], "hidden_size=18 must be a multiple"),
        (["--model.hidden_size", "x"], "--model.hidden_size: expected int, got x"),
        (["--model.vocab_size", "100"], "ids up to 257.*vocab_size is 100"),
        (["--train.max_step", "3"], "unrecognized arguments: --train.max_step 3"),
        (["--steps", "0"], "max_steps=0"),
        (["--config", "missing.yaml"], "missing.yaml"),
        (["--preset", "3m"], "'3m' is unknown: choose one of 170m"),
        (["--data", "missing.txt"], "'missing.txt' is no file"),
        (["--data", "empty.txt"], "text is empty .*empty.txt"),
        (["--data", "broken.xz"], "broken.xz cannot be read"),
        (["--data.sequence_length", "5000"], "too few for a sequence of 5000"),
        (["--data.tokenizer", "missing"], "no tokenizer at 'missing'"),
        (["--resume", "missing"], "'missing' holds no run"),
    ],
)
def test_bad_input_to_train_is_one_line(folder, capsys, options, message, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (folder / "empty.txt").write_text("")
    (folder / "broken.xz").write_bytes(b"not xz")
    line = error_of(capsys, "train", *flags(TINY), "--data", "book.txt", *options)
    assert re.search(message, line), line


def test_a_run_is_not_overwritten(folder, capsys):
    train("--variant", "transformer")
    capsys.readouterr()
    line = error_of(capsys, "train", *flags(TINY), "--variant", "transformer")
    assert "runs/transformer' holds a run already" in line


def test_corrupt_checkpoints_are_one_line(folder, capsys):
    train("--variant", "transformer")
    capsys.readouterr()
    weights = folder / "runs/transformer/model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    assert "holds no model that can be loaded" in error_of(
        capsys, "eval", "--model", "runs/transformer"
    )
    weights.write_bytes(whole)
    config = folder / "runs/transformer/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_hidden_layers": 2}))
    assert "does not fit its own config.json" in error_of(
        capsys, "generate", "--model", "runs/transformer"
    )
    config.unlink()
    assert error_of(capsys, "eval", "--model", "runs").endswith("no checkpoint is in it")


def test_unknown_command(capsys):
    assert "'fly' is no command: choose train, eval, read, generate, info" in error_of(
        capsys, "fly"
    )


def test_debug_shows_where(folder):
    with pytest.raises(ValueError, match=r"missing\.txt"):
        train("--data", "missing.txt", "--debug")


@pytest.mark.parametrize("command", [[], ["eval"], ["generate"]])
def test_help_teaches_and_needs_no_torch(command):
    code = (
        "import sys; from pytitans.cli import main\n"
        f"try: main([*{command!r}, '--help'])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "titans generate --model runs/mal" in done.stdout or "titans eval" in done.stdout


def test_help_of_train_is_short_and_help_all_is_whole(capsys):
    lengths = []
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit, match="0"):
            main(["train", flag])
        out = capsys.readouterr().out
        assert "titans train --variant mag" in out
        lengths.append(len(out.splitlines()))
        assert ("--train.adam_epsilon" in out) == (flag == "--help-all")
    assert lengths[0] < 110 < lengths[1]
