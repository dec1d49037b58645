"""The released models: they load by name, have their cards, and do what these say."""

import math
import random
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from pytitans.cli import load_model, model_folder
from pytitans.data.tokenizer import load_tokenizer
from pytitans.evals import load_task
from pytitans.evals.mentions import Mentions
from pytitans.evals.streaming import score_examples
from pytitans.evaluate import scoring
from pytitans.released import FOLDER, released, released_folder


def test_each_has_a_card_that_says_its_size():
    assert released()
    for name in released():
        card = (FOLDER / name / "README.md").read_text()
        assert card.startswith("---\n") and f"--model {name}" in card
        assert f"{load_model(str(FOLDER / name)).num_parameters():,} parameters" in card


def test_a_name_is_a_folder_of_the_package_unless_there_is_one_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert model_folder("needle") == released_folder("needle") == str(FOLDER / "needle")
    assert released_folder("no-such-model") is None and model_folder("gpt2") == "gpt2"
    Path("needle").mkdir()  # a folder of needles
    assert model_folder("needle") == str(FOLDER / "needle")
    Path("needle", "config.json").touch()
    assert model_folder("needle") == "needle"


def test_needle_finds_numbers_behind_twice_as_much_as_it_was_trained_on():
    folder = model_folder("needle")
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    task = load_task("niah_single_1", tokenizer)
    examples = list(task.examples(4, length=8192, depth=10, seed=3))
    with scoring(model, bf16=False):
        scores = score_examples(model, examples)
    assert [score.exact for score in scores] == [1.0] * 4


def test_needles_tells_which_of_several_numbers_is_whose():
    folder = model_folder("needles")
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    forms = (
        "One of the special magic numbers for {word} is: {number}. ",
        "The special magic number for {word} mentioned in the provided text is {number}. ",
    )
    task = Mentions(tokenizer, forms=forms, words=(4, 6), digits=7, gap=100)
    examples = list(task.examples(8, length=2048, seed=3))
    with scoring(model, bf16=False):
        scores = score_examples(model, examples)
    # Right by chance in a quarter at most, if it knew the numbers and not whose they are.
    assert sum(score.accuracy for score in scores) / len(scores) > 0.6


def test_books_predicts_english_and_no_other_bytes():
    folder = model_folder("books")
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    text = (
        "The rain had stopped before they reached the village, and the old man, who had said "
        "nothing since the bridge, asked her whether she still meant to go on that night. "
    )
    english, shuffled = text * 8, "".join(random.Random(0).sample(text * 8, 8 * len(text)))
    found = {}
    for name, content in (("english", text), ("again", english), ("shuffled", shuffled)):
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(content).input_ids]])
        with scoring(model, bf16=False):
            logits = model(ids, use_cache=False).logits
        found[name] = cross_entropy(logits[0, :-1], ids[0, 1:]).item() / math.log(2)
    assert found["english"] < 2.5 < 4 < found["shuffled"]
    assert found["again"] < found["english"] - 0.05  # what it has read, it need not guess
