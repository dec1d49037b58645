"""Language: bytes of books, and how well a model predicts them the further it has read.

    python recipes/language.py --data "books/*.txt.xz"
    python recipes/language.py --data "books/*.txt.xz" --models mal transformer --seeds 0

linear_NAME is a Titans model with memories of one layer, wide_NAME one with two of these a head, as
wide in their values as the baselines are.

Every model reads the same windows of 1,024 bytes of the training books in the same order, and
begins most of them with what it carries from the windows before. Learning
rates are compared on the validation books; the tables are of the test books, from the first byte on
with what the model carries: bits per byte by position. Files are named as Standard Ebooks names
them; the books held out are those of `recipes/books.yaml`. How runs are kept:
`recipes/experiment.py`.
"""

import argparse
import glob
from pathlib import Path

import yaml
from experiment import SHAPE, WHOLE, Experiment, all_models, build, run

from pytitans.data.text import TextData
from pytitans.data.tokenizer import byte_tokenizer
from pytitans.train import TrainArguments, last_checkpoint, train

HELD_OUT = yaml.safe_load((Path(__file__).parent / "books.yaml").read_text())["data"]
LENGTH = 1024  # bytes of a training window; what a model that keeps the whole text reads back


def split_books(files: list[str]) -> tuple[list[str], list[str]]:
    """The books to train on, and those to test with; all of them where none is held out."""
    found = [path for name in files for path in sorted(glob.glob(name))]
    if not found:
        raise SystemExit(f"--data {' '.join(files)}: no such files")
    held_out = [book for books in HELD_OUT.values() for book in books]
    kept = [path for path in found if not any(book in path for book in held_out)]
    test = [path for path in found if any(book in path for book in HELD_OUT["test"])]
    return kept or found, test or found


class Language(Experiment):
    models = all_models()

    def build(self, name: str, seed: int):
        return build(name, SHAPE | {"window": 128, "segment_len": 128}, seed)

    def train(self, name: str, folder: Path, rate: float, seed: int) -> float:
        args = TrainArguments(
            output_dir=str(folder), max_steps=self.steps(self.args.steps), learning_rate=rate,
            seed=seed, per_device_train_batch_size=4, eval_steps=0.5, eval_bytes=200_000,
            carry=True, report_to="none",
        )  # fmt: skip
        data = TextData(files=self.args.data, sequence_length=LENGTH, **HELD_OUT)
        model = self.build(name, seed)
        checkpoint = last_checkpoint(folder)
        return train(model, byte_tokenizer(), data, args, checkpoint=checkpoint)["bits_per_byte"]

    def evaluations(self, name: str) -> dict[str, list[str]]:
        argv = ["--task", "positions", "--split", "test", "--limit", str(self.args.limit)]
        argv += ["--data", *self.args.data]
        for split, books in HELD_OUT.items():
            argv += [f"--data.{split}", *books]
        return {"positions": argv + (["--window", str(LENGTH)] if name in WHOLE else [])}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", nargs="+", required=True, help="the books: files, globs, folders")
    parser.add_argument("--steps", type=int, default=600, help="of 4 windows of 1,024 bytes")
    parser.add_argument("--limit", type=int, default=2**18, help="bytes of each test book to score")


if __name__ == "__main__":
    raise SystemExit(run(Language, __doc__, "runs/language", add_arguments))
