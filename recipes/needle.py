"""A needle in a haystack: trained on at most 4K bytes, asked in up to 4M.

    python recipes/needle.py                       every model, three seeds
    python recipes/needle.py --models mal --seeds 0 --longest 64K
    python recipes/needle.py --report

RULER's S-NIAH-1 (`pytitans/evals/niah.py`), in bytes: a word's 7-digit number in noise. Short texts
come first, since that is how a model learns to recall at all (docs/log.md). Llama, which keeps the
whole text, is asked up to 16K; no model is asked more once it finds nothing. How runs are made and
kept: `recipes/experiment.py`.
"""

import argparse
from pathlib import Path

from experiment import SHAPE, WHOLE, Experiment, all_models, asked_in_parts, build, run

from pytitans.data.tokenizer import byte_tokenizer
from pytitans.evals import load_task
from pytitans.evals.command import length_of
from pytitans.evals.training import Stage, answer_loss, task_arguments, train_on_tasks

SHORT, LONG = ("1K", "2K", "4K", "8K", "16K", "64K"), ("256K", "1M", "2M", "4M")


class Needle(Experiment):
    models = all_models()

    def train(self, name: str, folder: Path, rate: float, seed: int) -> float:
        tokenizer = byte_tokenizer()
        passkey, needle = (load_task(x, tokenizer) for x in ("passkey", "niah_single_1"))
        stages = [
            Stage([passkey], 96, 128, steps=self.steps(250), fill=4096),
            Stage([passkey], 96, 256, steps=self.steps(100), fill=4096),
            Stage([needle], 448, 640, steps=self.steps(200), fill=4096),
            Stage([needle], 448, 2048, steps=self.steps(150), gate_penalty=0.03),
            Stage([needle], 1024, 4096, steps=self.steps(50), gate_penalty=0.03),
        ]
        model = build(name, SHAPE, seed)
        train_on_tasks(model, tokenizer, stages, task_arguments(folder, rate, seed))
        return answer_loss(model, needle, length=1024, texts=64, seed=seed)

    def evaluations(self, name: str) -> dict[str, list[str]]:
        parts = ("", SHORT, self.args.samples), ("_long", LONG, 1)
        asked = asked_in_parts("niah_single_1", parts, self.args.longest, name in WHOLE)
        return {result: [*options, "--give_up", "true"] for result, options in asked.items()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--longest", type=length_of, default=length_of("4M"))
    parser.add_argument("--samples", type=int, default=8, help="for each of five depths, to 64K")


if __name__ == "__main__":
    raise SystemExit(run(Needle, __doc__, "runs/needle", add_arguments))
