"""The released models: they load by name, have their cards, and do what these say."""

import json
import math
from pathlib import Path

import pytest

from pytitans.cli import load_model, model_folder
from pytitans.data.tokenizer import load_tokenizer
from pytitans.evals import load_task
from pytitans.evals.streaming import score_examples
from pytitans.evaluate import scoring
from pytitans.released import FOLDER, released, released_folder


def test_each_has_a_card_and_what_made_it():
    assert released()
    for name in released():
        folder = FOLDER / name
        card = (folder / "README.md").read_text()
        assert card.startswith("---\n") and f"--model {name}" in card
        run = json.loads((folder / "run.json").read_text())
        assert load_model(str(folder)).num_parameters() == run["parameters"]
        assert run["command"].split()[0].startswith("recipes/")


def test_a_name_is_a_folder_of_the_package_unless_there_is_one_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert model_folder("needle") == released_folder("needle") == str(FOLDER / "needle")
    assert released_folder("no-such-model") is None and model_folder("gpt2") == "gpt2"
    Path("needle").mkdir()
    Path("needle", "config.json").touch()
    assert model_folder("needle") == "needle"


@pytest.mark.parametrize("name", ["niah_single_1", "niah_single_2"])
def test_needle_finds_numbers_in_longer_texts_than_it_was_trained_on(name):
    """In the documentation of Python, of which it has read nothing."""
    folder = model_folder("needle")
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    task = load_task(name, tokenizer)
    examples = list(task.examples(4, length=8192, depth=10, seed=3))
    with scoring(model, bf16=False):
        scores = score_examples(model, examples)
    assert sum(score.exact for score in scores) >= 3
    assert math.fsum(score.nll for score in scores) / 4 < 0.2
