"""Training on tasks: which texts, in which order; that it learns; that a stop changes nothing."""

import json
import shutil

import pytest
import torch
from tiny import tiny_config

from pytitans import TitansForCausalLM
from pytitans.data.tokenizer import byte_tokenizer
from pytitans.data.windows import IGNORED
from pytitans.evals import load_task
from pytitans.evals.training import (
    RECENT,
    Stage,
    TaskBatches,
    TaskProgress,
    answer_loss,
    task_arguments,
    train_on_tasks,
)


@pytest.fixture
def tasks():
    return [load_task(name, byte_tokenizer()) for name in ("parity", "modular_addition")]


def model(seed: int = 0) -> TitansForCausalLM:
    torch.manual_seed(seed)
    return TitansForCausalLM(tiny_config("lmm", vocab_size=8, initializer_range=0.1))


def test_batches_follow_the_stages(tasks):
    stages = [Stage(tasks[:1], 4, 8, 40, fill=64), Stage(tasks, 10, 20, 40, fill=100)]
    batches = [TaskBatches(stages, seed=3)[step] for step in range(80)]
    lengths = [batch["input_ids"].shape[1] for batch in batches]
    assert set(lengths[:40]) == {4, 5, 6, 7, 8} and min(lengths[40:]) >= 10
    assert 15 <= lengths[40:].count(20) <= 30  # half of them are the longest
    for step, batch in enumerate(batches):
        assert batch["input_ids"].shape[0] == (64 if step < 40 else 100) // lengths[step]
    digits = [bool(batch["input_ids"].max() > 1) for batch in batches]
    assert digits == [False] * 40 + [False, True] * 20  # tasks take turns


@pytest.mark.parametrize(
    "bad, told",
    [
        ({"shortest": 9}, "0 <= shortest <= longest; this is"),
        ({"steps": 0, "review": 1.0}, "steps > 0 and 0 <= review < 1; this is .*review=1.0"),
        ({"until": -0.1}, "until >= 0"),
        ({"gate_penalty": -1.0}, "gate_penalty >= 0"),
        ({"fill": 0}, "fill > 0"),
        ({"tasks": []}, "tasks, one at least"),
    ],
)
def test_a_stage_out_of_its_bounds_is_told(tasks, bad, told):
    with pytest.raises(ValueError, match=f"a stage is to have {told}"):
        Stage(**{"tasks": tasks, "shortest": 4, "longest": 8, "steps": 40} | bad)


def test_a_stage_too_short_for_its_task_is_told_before_the_first_step(tasks):
    needle = load_task("niah_multikey_1", byte_tokenizer())
    with pytest.raises(ValueError, match="length=100 is too short for niah_multikey_1"):
        TaskBatches([Stage(tasks, 4, 8, 9999), Stage([*tasks, needle], 100, 4096, 1)], seed=0)


def test_steps_of_several_batches_are_refused(tasks, tmp_path):
    args = task_arguments(tmp_path, 1e-3, 0, gradient_accumulation_steps=2)
    with pytest.raises(ValueError, match=r"1 processes x 2 accumulated batches a step; .*fill"):
        train_on_tasks(model(), byte_tokenizer(), [Stage(tasks, 4, 8, 4)], args)


def test_a_step_of_texts_without_background_holds_no_more_than_asked(tmp_path):
    """Stories are of any length, and all of a step are padded to the longest."""
    story = [f"{i} Mary went to the {'very ' * (i % 40)}old park.\n" for i in range(1, 60)]
    lines = [f"{i} Where is Mary?\tpark\t{i - 1}\n" if i % 3 == 0 else x
             for i, x in enumerate(story, 1)]  # fmt: skip
    folder = tmp_path / "en-10k"
    folder.mkdir()
    (folder / "qa1_single-supporting-fact_test.txt").write_text("".join(lines))
    (tmp_path / "book.txt").write_text("It rained. Nobody came. ")
    babi = {"files": [str(tmp_path / "book.txt")], "babi": str(tmp_path)}
    task = load_task("babilong_qa1", byte_tokenizer(), **babi)
    batches = TaskBatches([Stage([task], 0, 0, 20, fill=2048)], seed=0)
    shapes = [batches[step]["input_ids"].shape for step in range(20)]
    assert len({width for _, width in shapes}) > 5
    assert all(rows == 1 or rows * width <= 2048 for rows, width in shapes)
    assert max(rows for rows, _ in shapes) > 1


def test_no_text_comes_twice_nor_in_an_evaluation(tasks):
    stages = [Stage(tasks[1:], 32, 32, 20, fill=256)]
    seen = [tuple(row.tolist()) for b in (0, 1) for x in range(20)
            for row in TaskBatches(stages, seed=b)[x]["input_ids"]]  # fmt: skip
    assert len(set(seen)) == len(seen) == 320
    for seed in (0, 1):
        asked, _ = tasks[1].batch(100, length=32, seed=seed)
        assert not {tuple(row.tolist()) for row in asked} & set(seen)


def test_a_batch_is_the_same_whenever_asked_for(tasks):
    batches = TaskBatches([Stage(tasks, 5, 30, 9, fill=90)], seed=1)
    for step in (7, 0, 7):
        again = TaskBatches([Stage(tasks, 5, 30, 9, fill=90)], seed=1)[step]
        assert all(torch.equal(batches[step][name], again[name]) for name in again)


def test_it_learns_parity_of_short_texts(tasks, tmp_path):
    stages = [Stage(tasks[:1], 2, 4, 80, fill=256)]
    trained = model()
    before = answer_loss(trained, tasks[0], length=4, texts=32, seed=0)
    args = task_arguments(tmp_path, 2e-2, 0, warmup_steps=5, logging_steps=20, save_steps=0.5)
    facts = train_on_tasks(trained, byte_tokenizer(), stages, args, rest=0.0)
    after = answer_loss(trained, tasks[0], length=4, texts=32, seed=0)
    assert before > 0.69 and after < 0.5
    assert [line[0] for line in facts["history"]] == [20, 40, 60, 80]
    assert facts["history"][-1][2] > facts["history"][0][2]  # share of texts all right
    assert json.loads((tmp_path / "run.json").read_text())["steps"] == 80
    assert (tmp_path / "loss.png").stat().st_size > 0
    assert TitansForCausalLM.from_pretrained(tmp_path).config.use_cache


def test_goes_on_where_it_stopped(tasks, tmp_path):
    stages = [Stage(tasks, 4, 12, 12, fill=64)]

    def run(folder):
        args = task_arguments(folder, 1e-2, 0, warmup_steps=2, logging_steps=4, save_steps=6,
                              save_total_limit=None)  # fmt: skip
        trained = model()
        train_on_tasks(trained, byte_tokenizer(), stages, args, rest=0.0)
        return trained.state_dict()

    whole = run(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole" / "checkpoint-6", tmp_path / "cut" / "checkpoint-6")
    cut = run(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_a_share_of_the_steps_reviews_earlier_stages(tasks):
    stages = [
        Stage(tasks, 4, 4, 50, fill=64, review=0.5),
        Stage(tasks, 10, 10, 50, fill=64),
        Stage(tasks, 20, 20, 200, fill=64, review=0.5),
    ]
    batches = TaskBatches(stages, seed=0)
    lengths = [batches[step]["input_ids"].shape[1] for step in range(300)]
    assert (
        lengths[:100] == [4] * 50 + [10] * 50
    )  # the first has no earlier one, the second no share
    assert 75 < lengths[100:].count(20) < 125
    assert min(lengths[100:].count(4), lengths[100:].count(10)) > 30
    reviews = [bool(batches[step]["reviews"]) for step in range(300)]
    assert reviews == [step >= 100 and lengths[step] < 20 for step in range(300)]


def test_a_stage_ends_when_it_is_learned(tasks, tmp_path, monkeypatch):
    """The first ends; the second, which nobody learns, has all of its steps, however little the
    texts of the first cost that it reviews; a stop in the first changes nothing."""
    stages = [
        Stage(tasks[:1], 2, 3, 150, fill=256, until=0.3),
        Stage(tasks, 30, 30, 25, fill=64, review=0.9, until=0.4),
        Stage(tasks[:1], 2, 3, 30, fill=256, until=9.0),
    ]

    totals = []
    monkeypatch.setattr(
        TaskProgress, "on_train_end", lambda self, *_, **__: totals.append(self.bar.total)
    )

    def run(folder):
        args = task_arguments(folder, 4e-3, 0, warmup_steps=2, logging_steps=1, save_steps=20,
                              save_total_limit=None, lr_scheduler_type="constant")  # fmt: skip
        trained = model()
        facts = train_on_tasks(trained, byte_tokenizer(), stages, args, rest=0.0)
        return facts, trained.state_dict()

    facts, whole = run(tmp_path / "whole")
    steps = [stage["steps"] for stage in facts["stages"]]
    assert RECENT < steps[0] < 150 and steps[1:] == [25, RECENT + 1]
    assert facts["steps"] == sum(steps) == len(facts["history"]) == totals[0]
    losses = [line[1] for line in facts["history"][: steps[0]]]
    recent = [sum(losses[i - RECENT : i]) / RECENT for i in range(RECENT, steps[0] + 1)]
    assert recent[-2] < 0.3 < min(recent[:-2])  # one step more: its texts were drawn already

    assert steps[0] > 20, "the checkpoint is to be before the end of the first stage"
    shutil.copytree(tmp_path / "whole" / "checkpoint-20", tmp_path / "cut" / "checkpoint-20")
    again, cut = run(tmp_path / "cut")
    assert again["stages"] == facts["stages"]
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_rest_counts_all_other_tokens(tasks, tmp_path):
    """With `rest` the loss is larger by that share of the plain next-token loss."""
    losses = {}
    for rest in (0.0, 0.5):
        args = task_arguments(tmp_path / str(rest), 0.0, 0, logging_steps=1, bf16=False)
        facts = train_on_tasks(model(), byte_tokenizer(), [Stage(tasks, 9, 9, 1)], args, rest=rest)
        state = json.loads((tmp_path / str(rest) / "checkpoint-1/trainer_state.json").read_text())
        losses[rest] = state["log_history"][0]["loss"], facts["history"][0][1]
    assert losses[0.0][0] == pytest.approx(losses[0.0][1], abs=1e-4)  # the answers' alone
    ids = TaskBatches([Stage(tasks, 9, 9, 1)], seed=0)[0]["input_ids"]
    with torch.inference_mode():
        logits = model()(input_ids=ids).logits
    plain = torch.nn.functional.cross_entropy(logits[:, :-1].mT, ids[:, 1:]).item()
    assert losses[0.5][0] - losses[0.0][0] == pytest.approx(0.5 * plain, abs=1e-3)


def test_answer_loss_by_its_definition(tasks):
    found = answer_loss(model(), tasks[1], length=10, texts=16, seed=4)
    ids, targets = tasks[1].batch(16, length=10, seed=2 * 10**6 + 4)
    with torch.inference_mode():
        log_p = model().eval()(input_ids=ids).logits.log_softmax(-1)
    asked = targets != IGNORED
    assert found == pytest.approx(-log_p[asked, targets[asked]].mean().item(), rel=1e-5)
