"""BABILong qa1 to qa3: facts scattered over books, trained at up to 4K bytes, asked up to 1M.

    python recipes/babilong.py --babi tasks_1-20_v1-2.zip --data "books/*.txt.xz"
    python recipes/babilong.py --babi tasks_1-20_v1-2.zip --data "books/*.txt.xz" --models mal

One model for the three tasks. Stories alone come first, then stories in 1K and 4K bytes of the
training books. Asked are questions of bAbI's test file in the test books (`recipes/books.yaml` says
which), of Llama, which keeps the whole text, up to 16K. How runs are kept:
`recipes/experiment.py`.
"""

import argparse
from pathlib import Path

from experiment import SHAPE, WHOLE, Experiment, all_models, build, lengths_to, run
from language import split_books

from pytitans.data.tokenizer import byte_tokenizer
from pytitans.evals.babilong import Babilong
from pytitans.evals.command import length_of
from pytitans.evals.training import Stage, answer_loss, task_arguments, train_on_tasks

TASKS = ("babilong_qa1", "babilong_qa2", "babilong_qa3")
LENGTHS = ("0K", "1K", "2K", "4K", "8K", "16K", "64K", "256K", "1M")


class Facts(Experiment):
    models = all_models()

    def __init__(self, args: argparse.Namespace):
        super().__init__(args)
        self.books, self.test = split_books(args.data)

    def train(self, name: str, folder: Path, rate: float, seed: int) -> float:
        tokenizer = byte_tokenizer()
        tasks = [self.to_train_on(x, tokenizer) for x in TASKS]
        stages = [
            Stage(tasks, 0, 0, steps=self.steps(600), fill=8192),
            Stage(tasks, 1024, 1024, steps=self.steps(300), fill=8192),
            Stage(tasks, 1024, 4096, steps=self.steps(200), fill=8192),
        ]
        model = build(name, SHAPE, seed)
        train_on_tasks(model, tokenizer, stages, task_arguments(folder, rate, seed))
        losses = [answer_loss(model, x, length=1024, texts=48, seed=seed) for x in tasks]
        return sum(losses) / len(losses)

    def to_train_on(self, task: str, tokenizer) -> Babilong:
        """bAbI's 10,000 questions to train on, or its 1,000 where the former are missing."""
        for folder in ("en-10k", "en"):
            try:
                return Babilong(
                    task, tokenizer, self.args.babi, self.books, split="train", folder=folder
                )
            except ValueError as error:
                missing = error
            print(f"{task}: {missing}", flush=True)
        raise missing

    def evaluations(self, name: str) -> dict[str, list[str]]:
        lengths = lengths_to(LENGTHS, self.args.longest, name in WHOLE)
        rest = ["--babi", self.args.babi, "--data", *self.test, "--samples", str(self.args.samples)]
        return {x: ["--task", x, "--lengths", *lengths, *rest] for x in TASKS}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--babi", required=True, help="bAbI's tasks_1-20_v1-2, a folder or zip")
    parser.add_argument("--data", nargs="+", required=True, help="the books: files or globs")
    parser.add_argument("--longest", type=length_of, default=length_of("1M"))
    parser.add_argument("--samples", type=int, default=32)


if __name__ == "__main__":
    raise SystemExit(run(Facts, __doc__, "runs/babilong", add_arguments))
