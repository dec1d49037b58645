"""`titans dna`: what is trained is evaluated, embedded, resumed; errors are one line."""

import json
import lzma
import shutil

import numpy as np
import pytest
from safetensors import safe_open

from pytitans.cli import main

RNG = np.random.default_rng(0)
SMALL = [
    "--model.hidden_size=16", "--model.num_hidden_layers=1", "--model.num_attention_heads=2",
    "--model.intermediate_size=16", "--train.bf16=false", "--train.report_to=none",
    "--train.logging_steps=1", "--train.learning_rate=1e-2",
]  # fmt: skip


def letters(count, weights=None):
    return "".join(RNG.choice(list("ACGT"), size=count, p=weights))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Sequences rich in A or in T, and a genome of three records that repeats itself."""
    folder = tmp_path_factory.mktemp("dna")
    for split, count in (("train", 64), ("dev", 16), ("test", 20)):
        rows = [
            f"{letters(60, (0.6, 0.1, 0.2, 0.1) if i % 2 else (0.1, 0.2, 0.1, 0.6))},{i % 2}"
            for i in range(count)
        ]
        text = "sequence,label\n" + "\n".join(rows) + "\n"
        (folder / f"{split}.csv.xz").write_bytes(lzma.compress(text.encode()))
    unit = letters(7)
    (folder / "genome.fa").write_text(f">one\n{unit * 100}\n>two\n{unit * 40}\n>three\nACGTN\n")
    return folder


@pytest.fixture(scope="module")
def classifier(folder):
    where = folder / "run"
    arguments = ["--data", str(folder), "--steps", "20", "--train.output_dir", str(where)]
    arguments += ["--train.eval_steps=0.5", "--train.save_steps=0.5"]
    arguments += ["--train.per_device_train_batch_size=8"]
    assert main(["dna", "train", *arguments, *SMALL]) == 0
    return where


@pytest.fixture(scope="module")
def genome_model(folder):
    where = folder / "genome-run"
    arguments = ["--data", str(folder / "genome.fa"), "--steps", "30"]
    arguments += ["--train.output_dir", str(where), "--data.sequence_length=32"]
    arguments += ["--data.reverse_complement=none", "--model.conv_size=4"]
    assert main(["dna", "train", *arguments, *SMALL]) == 0
    return where


def test_a_classifier_is_trained_and_evaluated(classifier, folder, tmp_path, capsys):
    facts = json.loads((classifier / "run.json").read_text())
    assert facts["sizes"] == {"train": 64, "dev": 16, "test": 20} and facts["epochs"] == 2.5
    assert facts["split"] == "as published: train, dev, test"
    assert facts["dev"]["mcc"] > 0.8  # the letters alone tell the classes
    assert (classifier / "loss.png").stat().st_size > 0
    found = {}
    for strands in ("none", "average"):
        output = tmp_path / f"{strands}.json"
        options = ["--data.reverse_complement", strands, "--output", str(output)]
        assert main(["dna", "evaluate", "--model", str(classifier), *options]) == 0
        found[strands] = json.loads(output.read_text())
    assert found["none"]["sequences"] == 20 and found["none"]["accuracy"] > 0.8
    assert found["none"]["split"] == "test" and found["none"]["finished"]
    assert found["average"]["mcc"] < found["none"]["mcc"]  # the other strand says the other class
    dev = tmp_path / "dev.json"
    assert main(["dna", "evaluate", "--model", str(classifier), "--split", "dev",
                 "--output", str(dev)]) == 0  # fmt: skip
    assert json.loads(dev.read_text())["mcc"] == pytest.approx(facts["dev"]["mcc"])
    assert "MCC" in capsys.readouterr().out


def test_a_genome_is_learned_and_read_through_one_memory(genome_model, tmp_path, capsys):
    output = tmp_path / "out" / "genome.json"
    options = ["--orders", "2", "6", "--output", str(output)]
    assert main(["dna", "evaluate", "--model", str(genome_model), *options]) == 0
    facts = json.loads(output.read_text())
    assert facts["bases"] == 700 + 280 + 4  # N is not scored
    assert list(facts["parts"]) == ["train", "dev", "test"]
    assert sum(part["bases"] for part in facts["parts"].values()) == facts["bases"]
    for name in ("model", "order 6", "mixture"):
        assert facts["parts"]["test"][name] < 1.0  # it repeats itself
    assert output.with_suffix(".png").stat().st_size > 0
    assert "| model |" in capsys.readouterr().out


def test_a_genome_that_was_not_trained_on_has_no_parts(genome_model, folder, tmp_path):
    other, output = tmp_path / "other.fa.xz", tmp_path / "other.json"
    other.write_bytes(lzma.compress(f">a\n{letters(300)}\n".encode()))
    options = ["--data", str(other), "--orders", "--output", str(output)]
    assert main(["dna", "evaluate", "--model", str(genome_model), *options]) == 0
    assert list(json.loads(output.read_text())["parts"]) == ["whole"]


def test_embeddings_of_records_and_sequences(genome_model, classifier, folder, tmp_path):
    safe = tmp_path / "v.safetensors"
    arguments = ["--data", str(folder / "genome.fa"), "--output", str(safe)]
    assert main(["dna", "embed", "--model", str(genome_model), *arguments]) == 0
    with safe_open(safe, "np") as file:
        assert json.loads(file.metadata()["names"]) == ["one", "two", "three"]
        assert file.get_tensor("embeddings").shape == (3, 16)
    array = tmp_path / "v.npy"
    arguments = ["--data", str(folder / "test.csv.xz"), "--output", str(array)]
    assert main(["dna", "embed", "--model", str(classifier), *arguments]) == 0
    assert np.load(array).shape == (20, 16)


def test_a_stopped_run_goes_on(folder, tmp_path):
    arguments = ["--data", str(folder), "--train.per_device_train_batch_size=8", *SMALL]
    arguments += ["--train.eval_steps=0.5", "--train.save_steps=0.5", "--steps", "6"]
    arguments += ["--data.reverse_complement=augment", "--train.load_best_model_at_end=false"]
    arguments += ["--train.save_total_limit=2"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert main(["dna", "train", *arguments, "--train.output_dir", str(whole)]) == 0
    shutil.copytree(whole, stopped)
    (stopped / "model.safetensors").unlink()
    shutil.rmtree(stopped / "checkpoint-6")
    assert main(["dna", "train", "--resume", str(stopped)]) == 0
    same = [(x / "model.safetensors").read_bytes() for x in (whole, stopped)]
    assert same[0] == same[1]


def test_a_classifier_starts_from_a_model_of_the_next_base(genome_model, folder, tmp_path):
    arguments = ["--data", str(folder), "--start", str(genome_model), "--steps", "2", *SMALL]
    where = ["--train.output_dir", str(tmp_path / "run"), "--train.warmup_steps=0"]
    assert main(["dna", "train", *arguments, *where]) == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["dev"]


@pytest.mark.parametrize("name", ["llama", "cnn"])
def test_baselines_by_name(folder, tmp_path, name):
    where = tmp_path / name
    arguments = ["--data", str(folder), "--variant", name, "--steps", "2", *SMALL]
    assert main(["dna", "train", *arguments, "--train.output_dir", str(where)]) == 0
    assert main(["dna", "evaluate", "--model", str(where)]) == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["dna", "fly"], "'fly' is no command of dna"),
        (["dna", "train"], "no sequences to train on"),
        (["dna", "train", "--data", "a.fa", "b.csv"], "one or the other"),
        (["dna", "train", "--data", "nowhere.csv"], "'nowhere.csv' does not exist"),
        (["dna", "train", "--data", "nowhere.fa"], "nowhere.fa cannot be read"),
        (["dna", "evaluate", "--model", "nowhere"], "nothing to evaluate on"),
        (["dna", "embed", "--model", "m", "--data", "a.fa", "--output", "v.txt"], "neither .npy"),
    ],
)
def test_errors_are_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_model_of_another_kind_is_told(classifier, genome_model, folder, capsys):
    genome, table = str(folder / "genome.fa"), str(folder)
    assert main(["dna", "evaluate", "--model", str(classifier), "--data", genome]) == 2
    assert "holds a classifier" in capsys.readouterr().err
    assert main(["dna", "evaluate", "--model", str(genome_model), "--data", table]) == 2
    assert "holds no classifier" in capsys.readouterr().err


def test_help(capsys):
    for arguments in (["dna"], ["dna", "--help"]):
        assert main(arguments) == 0
    for command in ("train", "evaluate", "embed"):
        with pytest.raises(SystemExit):
            main(["dna", command, "--help"])
    assert "titans dna embed --model" in capsys.readouterr().out
