"""The harness's tasks from local files, by its own prompts; perplexity with the state carried."""

import gzip
import json
import math
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny_model

from pytitans.data.tokenizer import byte_tokenizer

# What the harness and its dependencies warn of when they are imported is not ours to mend.
pytestmark = [pytest.mark.filterwarnings("ignore")]
BYTES = byte_tokenizer()
ROWS = {
    "piqa": {"query": "How to rest?", "choices": ["Sit.", "Run."], "gold": 1},
    "hellaswag": {"query": "Cooking: A man peels. he", "choices": list("abcd"), "gold": 2},
    "winogrande": {
        "context_options": ["Sara met Sam so Sara", "Sara met Sam so Sam"],
        "continuation": "left.",
        "gold": 1,
    },
    "arc_easy": {"query": "Which is hot?", "choices": ["ice", "fire", "snow"], "gold": 1},
    "siqa": {"context": "Ann ran.", "question": "Why?", "choices": list("xyz"), "gold": 2},
    "boolq": {"passage": "P.", "question": "is it", "choices": ["no", "yes"], "gold": 1},
    "lambada_openai": {"context": "He took his", "continuation": "hat"},
}
WIKI = (
    " \n = First = \n \n Some text . \n \n = = Part = = \n \n More . \n"
    " = Second = \n \n The end . \n"
)


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, row in ROWS.items():
        with gzip.open(folder / f"{name}.jsonl.gz", "wt") as file:
            file.write(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    (folder / "raw").mkdir()
    (folder / "raw" / "wiki.test.raw").write_text(WIKI)
    return folder


@pytest.fixture(scope="module")
def model():
    return tiny_model("mal", vocab_size=258, bos_token_id=256, eos_token_id=256).float()


@pytest.fixture(scope="module")
def harness():
    from pytitans.evals import harness

    return harness


def test_prompts_are_the_harnesss(local, harness):
    """The whole of what is scored, for a row of each file, by the harness's own configuration."""
    expected = {
        "piqa": ("Question: How to rest?\nAnswer:", 1, ["Sit.", "Run."]),
        "hellaswag": ("Cooking: A man peels. He", 2, list("abcd")),
        "winogrande": (1, "left.", ["Sara met Sam so Sara", "Sara met Sam so Sam"]),
        "arc_easy": ("Question: Which is hot?\nAnswer:", 1, ["ice", "fire", "snow"]),
        "social_iqa": ("Q: Ann ran. Why?\nA:", 2, list("xyz")),
        "boolq": ("P.\nQuestion: is it?\nAnswer:", 1, ["no", "yes"]),
        "lambada_openai": ("He took his", " hat", None),
    }
    manager = harness.task_manager(list(expected), {})
    for name, (text, target, choices) in expected.items():
        changes = harness.override(name, BYTES, str(local), None, (), (64,), 0)
        group = {"group": "local", "task": [{"task": name} | changes]}
        task = manager.load([group])["tasks"][name]
        row = next(iter(task.eval_docs))
        assert (task.doc_to_text(row), task.doc_to_target(row)) == (text, target)
        if choices:
            assert task.doc_to_choice(row) == choices


def test_wikitext_is_split_at_top_headings(local, harness):
    pages = [row["page"] for row in harness.wikitext(local / "raw" / "wiki.test.raw")]
    assert [page.split("\n")[0] for page in pages] == [" = First = ", " = Second = "]
    assert "".join(pages) == WIKI.removeprefix(" \n")


@torch.inference_mode()
def test_rolling_perplexity_carries_the_state(model, harness):
    text = "It was the best of times, it was the worst of times. " * 8
    lm = harness.CarryingLM(model, BYTES, batch_size=1, piece=50, max_length=64)
    (found,) = lm.loglikelihood_rolling([SimpleNamespace(args=(text,))])
    ids = torch.tensor([[256, *text.encode()]])
    assert found == pytest.approx(-model(ids, labels=ids).loss.item() * len(text), rel=1e-4)


def test_a_run_ends_in_cells(local, model, harness, tmp_path):
    from pytitans.evals.report import write_report
    from pytitans.evals.results import Results, describe_model

    facts = {"task": "lm_eval", "options": {}, "seed": 0, "command": "titans eval"}
    facts |= {"model": describe_model(model, "mal"), "software": {}}
    results = Results(tmp_path / "a.json", facts)
    harness.run_harness(model, BYTES, "", ["piqa", "wikitext"], results, local=str(local))
    found = {(cell["name"], cell["metric"]): cell["value"] for cell in results.cells}
    assert found["piqa", "acc"] in (0.0, 1.0)
    nats = found["wikitext", "bits_per_byte"] * math.log(2)
    assert math.exp(nats) == pytest.approx(found["wikitext", "byte_perplexity"])
    (report,) = write_report([tmp_path / "a.json"], tmp_path)
    assert "wikitext bits_per_byte" in report.read_text()


def test_data_that_cannot_be_fetched_are_asked_for(harness):
    message = r"'piqa' could not .* its file piqa in .*--local FOLDER"
    with pytest.raises(ValueError, match=message), harness.reaching_the_hub("piqa"):
        raise ConnectionError("no hub")
    # a task that has no local form
    with pytest.raises(ValueError, match=r"connection$"), harness.reaching_the_hub("babilong_qa1"):
        raise ConnectionError("no hub")
