"""BABILong qa1 to qa3: facts scattered over books, trained at up to 4K bytes, asked up to 1M.

    python recipes/babilong.py --babi tasks_1-20_v1-2.zip --data "books/*.txt.xz"
    python recipes/babilong.py --babi tasks_1-20_v1-2.zip --data "books/*.txt.xz" --models mal
    python recipes/babilong.py ... --tasks qa1 --output runs/babilong_qa1

One model for the tasks. Whole stories come first, each of their questions where bAbI asks it, then
stories in 1K and 4K bytes of the training books. Asked are questions of bAbI's test file in the
test books (`recipes/books.yaml` says which), of Llama, which keeps the whole text, up to 16K. How
runs are kept: `recipes/experiment.py`.
"""

import argparse
from pathlib import Path
from typing import Any

from experiment import SHAPE, WHOLE, Experiment, all_models, asked_in_parts, build, run
from language import split_books

from pytitans.data.tokenizer import byte_tokenizer
from pytitans.evals.babilong import Babilong
from pytitans.evals.command import length_of
from pytitans.evals.haystack import Haystack
from pytitans.evals.training import Stage, answer_loss, task_arguments, train_on_tasks

TASKS = ("qa1", "qa2", "qa3")
SHORT, LONG = ("0K", "1K", "2K", "4K", "8K", "16K", "64K"), ("256K", "1M")


class Facts(Experiment):
    models = all_models()

    def __init__(self, args: argparse.Namespace):
        super().__init__(args)
        self.books, self.test = split_books(args.data)

    def train(self, name: str, folder: Path, rate: float, seed: int) -> float:
        tokenizer = byte_tokenizer()
        books = Haystack(tokenizer, self.books)
        stories = [self.to_train_on(x, books, whole=True) for x in self.args.tasks]
        asked = [self.to_train_on(x, books) for x in self.args.tasks]
        stages = [
            Stage(stories, 0, 0, steps=self.steps(1500), fill=4096),
            Stage(stories, 1024, 1024, steps=self.steps(400), fill=4096),
            Stage([*stories, *asked], 1024, 4096, steps=self.steps(500)),
        ]
        model = build(name, SHAPE, seed)
        train_on_tasks(model, tokenizer, stages, task_arguments(folder, rate, seed))
        losses = [answer_loss(model, x, length=1024, texts=48, seed=seed) for x in asked]
        return sum(losses) / len(losses)

    def to_train_on(self, task: str, books: Haystack, **options: Any) -> Babilong:
        """bAbI's 10,000 questions to train on, or its 1,000 where the former are missing."""
        for folder in ("en-10k", "en"):
            try:
                return Babilong(
                    f"babilong_{task}", books.tokenizer, self.args.babi, books, split="train",
                    folder=folder, **options,
                )  # fmt: skip
            except ValueError as error:
                missing = error
            print(f"{task}: {missing}", flush=True)
        raise missing

    def evaluations(self, name: str) -> dict[str, list[str]]:
        rest = ["--babi", self.args.babi, "--data", *self.test]
        samples = self.args.samples
        parts = ("", SHORT, samples), ("_long", LONG, max(1, samples // 4))
        found = {}
        for task in (f"babilong_{x}" for x in self.args.tasks):
            asked = asked_in_parts(task, parts, self.args.longest, name in WHOLE)
            found |= {result: options + rest for result, options in asked.items()}
        return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--babi", required=True, help="bAbI's tasks_1-20_v1-2, a folder or zip")
    parser.add_argument("--data", nargs="+", required=True, help="the books: files or globs")
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS, help="default: all")
    parser.add_argument("--longest", type=length_of, default=length_of("1M"))
    parser.add_argument(
        "--samples", type=int, default=32, help="questions a length, to 64K; beyond, a quarter"
    )


if __name__ == "__main__":
    raise SystemExit(run(Facts, __doc__, "runs/babilong", add_arguments))
