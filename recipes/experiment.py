"""What the experiments share: every model trained alike, its learning rate swept, runs kept.

    python recipes/needle.py                     all models, three seeds: hours
    python recipes/needle.py                     again: what is done is kept
    python recipes/needle.py --models mal llama --seeds 0 --jobs 2
    python recipes/needle.py --report            the tables of what is there

A recipe says what a run trains on and what it is asked (`Experiment`); this file runs it:

1. Each model is trained with seed 0 at each learning rate of the sweep, all else equal. The one
   with the lowest loss on texts that are neither trained on nor tested is chosen; all are written
   to `sweep.json`.
2. It is trained with the other seeds at that rate.
3. Each of these is evaluated by `titans eval`, and `titans report` makes the tables.

Everything is below --output: `MODEL-seed0/` a trained model, `results/*.json` what it scored. A
stopped run goes on with the same command. All models have the parameters of the MAL model
(`pytitans/baseline.py`), the same texts in the same order, as many learning rates to choose from.
"""

import argparse
import json
import os
import shutil
import sys
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

DONE = "done.json"


TITANS = ("mal", "mag", "mac", "lmm")
LINEAR = tuple(f"linear_{name}" for name in TITANS)  # with memories of one layer
WIDE = tuple(f"wide_{name}" for name in TITANS)  # and two of them a head: values twice as wide
WHOLE = ("llama",)  # keeps the whole text: too much beyond MOST tokens
MOST = 16384
SHAPE = {
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 384,
    "memory_expansion": 2,
    "window": 64,
    "segment_len": 64,
    "initializer_range": 0.06,  # 0.02 is for widths of thousands: see docs/log.md
}


def all_models() -> tuple[str, ...]:
    from pytitans.baseline import BASELINES

    return (*TITANS, *BASELINES, *LINEAR, *WIDE)


def build(name: str, shape: dict[str, Any], seed: int, **changes: Any):
    """The model of that name: of `shape`, fields of TitansConfig, and of the parameters that MAL
    has with that shape; its first weights drawn with the seed. `changes` are made to a Titans model
    alone. linear_NAME is a Titans model with linear memories, wide_NAME one with two of them for
    each head, as Gated DeltaNet and Mamba-2 have values twice as wide as keys."""
    import torch
    from transformers import AutoModelForCausalLM

    from pytitans import TitansConfig
    from pytitans.baseline import baseline_like, widened

    like = TitansConfig(variant="mal", **shape)
    torch.manual_seed(seed)
    fields = titans_fields(name)
    if fields:
        config = widened(TitansConfig(**shape | fields | changes), like)
    else:
        config = baseline_like(like, name)
    return AutoModelForCausalLM.from_config(config)


def titans_fields(name: str) -> dict[str, Any]:
    """The fields of TitansConfig by which a Titans model of that name differs from others; none of
    a baseline."""
    if name not in (*TITANS, *LINEAR, *WIDE):
        return {}
    fields: dict[str, Any] = {"variant": name.rpartition("_")[2]}
    if name not in TITANS:
        fields["memory_depth"] = 1
    if name in WIDE:
        fields["memories_per_head"] = 2
    return fields


def lengths_to(lengths: Sequence[str], longest: int, whole: bool) -> list[str]:
    """Those of the lengths to ask a model."""
    from pytitans.evals.command import length_of

    most = min(longest, MOST) if whole else longest
    return [length for length in lengths if length_of(length) <= most]


def asked_in_parts(
    task: str, parts: Sequence[tuple[str, Sequence[str], int]], longest: int, whole: bool
) -> dict[str, list[str]]:
    """Options of `titans eval` for each part of a task, by the name of its results: the task's and
    a suffix. parts: suffix, lengths, samples a length; one without a length to ask is left out."""
    found = {}
    for suffix, lengths, samples in parts:
        asked = lengths_to(lengths, longest, whole)
        if asked:
            found[task + suffix] = ["--task", task, "--lengths", *asked, "--samples", str(samples)]
    return found


class Experiment(ABC):
    """One recipe. `models`: the names it knows, in the order of the table."""

    models: Sequence[str]
    command: Sequence[str] = ("eval",)  # of titans, that evaluates a model

    def __init__(self, args: argparse.Namespace):
        self.args = args

    def steps(self, count: int) -> int:
        """So many steps, or --share of them."""
        return max(1, round(count * self.args.share))

    @abstractmethod
    def train(self, name: str, folder: Path, rate: float, seed: int) -> float:
        """Trains and saves a model in the folder, from a checkpoint there if there is one; its loss
        on held-out texts, by which learning rates are compared."""

    @abstractmethod
    def evaluations(self, name: str) -> dict[str, list[str]]:
        """Arguments of `titans eval`, without model and output, by the name of the result."""

    def rates(self, name: str) -> Sequence[float]:
        """The learning rates to choose from."""
        return self.args.rates

    def swept(self, name: str) -> str:
        """The model whose best learning rate this one is given."""
        return name


def train_once(experiment: Experiment, name: str, folder: Path, rate: float, seed: int) -> float:
    """`Experiment.train`, once: its outcome is kept beside the model."""
    done = folder / DONE
    if not done.exists():
        loss = experiment.train(name, folder, rate, seed)
        done.write_text(json.dumps({"rate": rate, "seed": seed, "loss": loss}))
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
    return json.loads(done.read_text())["loss"]


def sweep_job(experiment: Experiment, name: str, rate: float, output: Path) -> None:
    train_once(experiment, name, output / "sweep" / f"{name}-lr{rate:g}", rate, seed=0)


def seed_job(experiment: Experiment, name: str, seed: int, output: Path) -> None:
    rate = chosen(experiment.swept(name), output)
    folder, done = output / f"{name}-seed{seed}", output / "sweep" / f"{name}-lr{rate:g}"
    if (folder / DONE).exists() and json.loads((folder / DONE).read_text())["rate"] != rate:
        shutil.rmtree(folder)  # of an earlier, smaller sweep
        for result in (output / "results").glob(f"*-{folder.name}.json"):
            result.unlink()
    if seed == 0 and not folder.exists() and done.exists():
        shutil.copytree(done, folder)
    train_once(experiment, name, folder, rate, seed)
    evaluate(experiment, name, seed, output)


def evaluate(experiment: Experiment, name: str, seed: int, output: Path) -> None:
    from pytitans.cli import main as titans

    folder = output / f"{name}-seed{seed}"
    for result, argv in experiment.evaluations(name).items():
        if result.endswith("_long") and lost(output, result.removesuffix("_long"), folder.name):
            continue
        path = output / "results" / f"{result}-{name}-seed{seed}.json"
        finished = path.exists() and json.loads(path.read_text())["finished"]
        if not finished:
            where = ["--model", str(folder), "--label", folder.name, "--output", str(path)]
            command = [*experiment.command, *argv, *where]
            if titans(command):
                raise RuntimeError(f"titans {' '.join(command)} failed")


def lost(output: Path, result: str, model: str) -> bool:
    """Whether nothing was right at the longest length that was asked."""
    cells = json.loads((output / "results" / f"{result}-{model}.json").read_text())["cells"]
    longest = max(cell["length"] for cell in cells)
    return not any(cell["accuracy"] for cell in cells if cell["length"] == longest)


def losses(name: str, output: Path) -> dict[float, float]:
    """Held-out loss by learning rate, of what is there."""
    found = {}
    for path in sorted((output / "sweep").glob(f"{name}-lr*/{DONE}")):
        done = json.loads(path.read_text())
        found[done["rate"]] = done["loss"]
    return dict(sorted(found.items()))


def chosen(name: str, output: Path) -> float:
    found = losses(name, output)
    return min(found, key=lambda rate: found[rate])


def attempt(job, *args) -> str | None:
    """Runs a job on one thread; what went wrong, if something did. One that fails leaves the
    others alone."""
    import torch

    torch.set_num_threads(1)
    try:
        job(*args)
    except Exception:  # whatever it is, the other models go on, and it is told at the end
        return traceback.format_exc()
    return None


def end_with_parent() -> None:
    """Ends a worker whose parent was killed; it would go on training, beside whoever takes over."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def run_all(jobs: Sequence[tuple], workers: int) -> list[str]:
    """Runs the jobs, `workers` at a time; a line for each; returns the failures."""
    failures = []
    with ProcessPoolExecutor(workers, get_context("spawn"), end_with_parent) as pool:
        futures = {pool.submit(attempt, *job): job for job in jobs}
        for number, future in enumerate(as_completed(futures), 1):
            job = futures[future]
            what = f"{job[0].__name__.removesuffix('_job')} {job[2]} {job[3]:g}"
            error = future.result()
            print(f"[{number}/{len(jobs)}] {what}: {'failed' if error else 'done'}", flush=True)
            if error:
                failures.append(f"{what}\n{error}")
    return failures


def write_sweep(experiment: Experiment, output: Path) -> None:
    """Of all that is there, also what earlier calls have swept."""
    there = sorted(path.parent.name for path in (output / "sweep").glob(f"*/{DONE}"))
    names = [*experiment.models, *(name.rpartition("-lr")[0] for name in there)]
    found = {name: losses(name, output) for name in dict.fromkeys(names)}
    table = {
        name: {
            "losses": {f"{rate:g}": loss for rate, loss in rates.items()},
            "chosen": chosen(name, output),
        }
        for name, rates in found.items()
        if rates
    }
    (output / "results").mkdir(parents=True, exist_ok=True)
    (output / "results" / "sweep.json").write_text(json.dumps(table, indent=1) + "\n")


def report(output: Path) -> None:
    from pytitans.cli import main as titans

    found = sorted(str(p) for p in (output / "results").glob("*.json") if p.stem != "sweep")
    if found:
        titans(["report", *found, "--output", str(output / "report")])


def run(
    make, description: str, output: str, add_arguments=lambda parser: None, seeds=(0, 1, 2)
) -> int:
    """The command of a recipe: `make(args)` is its Experiment."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="*", help="some of the models, in order (default: all)")
    parser.add_argument("--seeds", type=int, nargs="*", default=list(seeds))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs side by side")
    parser.add_argument("--output", type=Path, default=Path(output))
    parser.add_argument("--rates", type=float, nargs="*", default=[1e-3, 2e-3, 4e-3],
        help="learning rates to choose from")  # fmt: skip
    parser.add_argument("--share", type=float, default=1.0, help="of the steps, to try it out")
    parser.add_argument("--report", action="store_true", help="run nothing, report what is there")
    add_arguments(parser)
    args = parser.parse_args()
    experiment = make(args)
    unknown = set(args.models or ()) - set(experiment.models)
    if unknown:
        known = ", ".join(experiment.models)
        parser.error(f"unknown models {', '.join(sorted(unknown))}: choose of {known}")
    names = args.models or list(experiment.models)
    output = Path(str(args.output).format(**vars(args)))
    return run_experiment(experiment, names, output, lambda: report(output))


def run_experiment(
    experiment: Experiment, names: Sequence[str], output: Path, show: Callable[[], None]
) -> int:
    """Sweep, seeds, then `show()`, the tables; with --report these alone. Returns the exit code."""
    args, failures = experiment.args, []
    if not args.report:
        os.environ["OMP_NUM_THREADS"] = "1"  # of the runs side by side, each has one
        leaders = dict.fromkeys(map(experiment.swept, names))
        sweep = [
            (sweep_job, experiment, name, rate, output)
            for name in leaders for rate in experiment.rates(name)
        ]  # fmt: skip
        failures += run_all(sweep, args.jobs)
        ready = [name for name in names if losses(experiment.swept(name), output)]
        seeded = [(seed_job, experiment, x, seed, output) for seed in args.seeds for x in ready]
        failures += run_all(seeded, args.jobs)
        write_sweep(experiment, output)
    show()
    for failure in failures:
        print(failure, file=sys.stderr)
    return 1 if failures else 0


def sweeps(before: dict[str, Any], output: Path) -> dict[str, Any]:
    """The sweep of a results file that was there, and over it that of the runs in `output`."""
    path = output / "results" / "sweep.json"
    return before["sweep"] | (json.loads(path.read_text()) if path.exists() else {})


def with_earlier(
    before: Sequence[dict[str, Any]], now: Sequence[dict[str, Any]], *keys: str
) -> list[dict[str, Any]]:
    """The scores of a results file that was there, but for models whose runs are here: what was run
    elsewhere stays in the table. keys: what says whose a score is."""
    here = {tuple(score[key] for key in keys) for score in now}
    kept = [score for score in before if tuple(score[key] for key in keys) not in here]
    return [*kept, *now]
