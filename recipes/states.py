"""State tracking: after every token, which state is a small machine in?

    python recipes/states.py --task parity         every model, three seeds
    python recipes/states.py --task s5 --models mal gated_deltanet --seeds 0

Word problems of groups (`pytitans/evals/state_tracking.py`), trained on at most 64 tokens and asked
up to 1,024. The tables are of the share of right states, by length: a model that has learned the
machine is right at every length.

Counting modulo 2 takes a step that turns around what is stored, which a memory can make where each
token has a gradient point of its own: Titans has chunks of one token here. `linear_lmm` has a
memory of one layer, `chunk16_lmm` the chunks that it has elsewhere. How runs are kept:
`recipes/experiment.py`.
"""

import argparse
from pathlib import Path

from experiment import SHAPE, TITANS, Experiment, all_models, build, run

from pytitans.data.tokenizer import byte_tokenizer
from pytitans.evals import load_task
from pytitans.evals.state_tracking import GROUPS
from pytitans.evals.training import Stage, answer_loss, task_arguments, train_on_tasks

CHUNK16 = "chunk16_lmm"
LENGTHS = ("64", "128", "256", "1K")


class States(Experiment):
    models = (*all_models(), CHUNK16)

    def build(self, name: str, seed: int):
        if name == CHUNK16:
            return build("lmm", SHAPE, seed)
        # steps of up to 2 in each layer of the memory
        return build(name, SHAPE, seed, chunk_size=1, memory_max_step=4 if name in TITANS else 2)

    def train(self, name: str, folder: Path, rate: float, seed: int) -> float:
        task = load_task(self.args.task, byte_tokenizer())
        stages = [
            Stage([task], 2, 16, steps=self.steps(200), fill=2048),
            Stage([task], 2, 64, steps=self.steps(400), fill=2048),
        ]
        model, args = self.build(name, seed), task_arguments(folder, rate, seed)
        train_on_tasks(model, byte_tokenizer(), stages, args, rest=0.0)
        return answer_loss(model, task, length=64, texts=64, seed=seed)

    def evaluations(self, name: str) -> dict[str, list[str]]:
        return {
            self.args.task: ["--task", self.args.task, "--lengths", *LENGTHS, "--samples", "32"]
        }


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--task", choices=list(GROUPS), default="parity")


if __name__ == "__main__":
    raise SystemExit(run(States, __doc__, "runs/states-{task}", add_arguments))
