"""Classes of DNA: every model on one data set, by one command.

    python recipes/genomics.py GUE/prom_core_notata
    python recipes/genomics.py GUE/tf/0
    python recipes/genomics.py human_enhancers_cohn.test.tsv.gz
    python recipes/genomics.py human_nontata_promoters.test.tsv.gz
    python recipes/genomics.py GUE/tf/0 --models mal llama cnn_wide --seeds 0 --jobs 2
    python recipes/genomics.py GUE/tf/0 --report

Every model has the parameters of the MAL model and sees the same sequences in the same order; only
`cnn` keeps its published size, and both CNNs, which learn slower and cost next to nothing, take 2.5
times the steps. Learning rate: the one of three with the best MCC on the dev set at seed 0. Each
run keeps its weights of the best evaluation on the dev set. The test set is looked at once, by the
runs that were chosen. Where there is no published split, one table is split 7:1:2 with seed 0.

All is below --output; a stopped recipe goes on with the same command. The table and all scores go
to --results/NAME.md and NAME.json. How runs are kept: `recipes/experiment.py`.
"""

import argparse
import json
import os
import statistics
from pathlib import Path
from typing import Any

from experiment import (
    LINEAR,
    TITANS,
    WIDE,
    Experiment,
    run_experiment,
    sweeps,
    titans_fields,
    with_earlier,
)

CNNS = ("cnn", "cnn_wide")
MODELS = (*TITANS, *LINEAR, *WIDE, "llama", "mamba2_hf", "gated_deltanet", *CNNS)
RATES = (1e-3, 2e-3, 4e-3)
CNN_STEPS = 2.5  # times those of the others: ten epochs of GUE, as published for the CNN
SHAPE: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "memory_expansion": 2,
    "window": 64,
    "segment_len": 64,
    "initializer_range": 0.06,
}
IDS: dict[str, Any] = {"vocab_size": 7, "bos_token_id": 5, "eos_token_id": 5, "pad_token_id": 6}
BUDGET: dict[str, Any] = {"steps": 2000, "batch": 64, "strands": "none"}
BUDGETS: dict[str, dict[str, Any]] = {  # by the data set's name; others have the above
    "tf-0": {"strands": "both"},
    "human_enhancers_cohn": {"steps": 800, "batch": 32, "strands": "both"},
    "human_nontata_promoters": {"steps": 800, "batch": 64},
}


class Genomics(Experiment):
    models = MODELS
    command = ("dna", "evaluate")

    def budget(self) -> dict[str, Any]:
        return BUDGET | BUDGETS.get(self.args.name, {})

    def train(self, name: str, folder: Path, rate: float, seed: int) -> float:
        """1 - MCC on the dev set."""
        from pytitans.cli import main as titans
        from pytitans.train import last_checkpoint

        if last_checkpoint(folder):
            argv = ["--resume", str(folder)]
        else:
            argv = self.options(name, folder, rate, seed)
        if titans(["dna", "train", *argv]):
            raise RuntimeError(f"titans dna train {' '.join(argv)} failed")
        return 1 - json.loads((folder / "run.json").read_text())["dev"]["mcc"]

    def options(self, name: str, folder: Path, rate: float, seed: int) -> list[str]:
        budget = self.budget()
        steps = budget["steps"] * (CNN_STEPS if name in CNNS else 1)
        options = {
            "--data.reverse_complement": budget["strands"],
            "--train.output_dir": folder,
            "--train.learning_rate": rate,
            "--train.seed": seed,
            "--train.max_steps": self.steps(steps),
            "--train.per_device_train_batch_size": budget["batch"],
            "--train.report_to": "none",
        } | {f"--model.{key}": value for key, value in self.shape(name).items()}
        pairs = [word for key, value in options.items() for word in (key, str(value))]
        return ["--data", self.args.data, *pairs]

    def shape(self, name: str) -> dict[str, Any]:
        """SHAPE and the model's variant; of a Titans model its own fields too, with feed-forward
        layers that give it the parameters of MAL."""
        from pytitans import TitansConfig
        from pytitans.baseline import widened

        fields = titans_fields(name)
        if not fields:
            return SHAPE | {"variant": name}
        like = TitansConfig(variant="mal", **IDS, **SHAPE)
        own = TitansConfig(**IDS, **SHAPE | fields)
        fields["intermediate_size"] = widened(own, like).intermediate_size
        return SHAPE | fields

    def evaluations(self, name: str) -> dict[str, list[str]]:
        return {"test": ["--split", "test"]}


def found_rows(experiment: Genomics, output: Path) -> list[dict[str, Any]]:
    """A row for each model that was tested: means and standard deviations over its seeds."""
    rows = []
    for name in experiment.models:
        runs = []
        for path in sorted((output / "results").glob(f"test-{name}-seed*.json")):
            facts = json.loads((output / path.stem.removeprefix("test-") / "run.json").read_text())
            runs.append((json.loads(path.read_text()), facts))
        if not runs:
            continue
        row: dict[str, Any] = {
            "model": name,
            "parameters": runs[0][1]["parameters"],
            "learning_rate": runs[0][1]["learning_rate"],
            "steps": runs[0][1]["steps"],
            "epochs": runs[0][1]["epochs"],
            "seeds": [facts["seed"] for _, facts in runs],
            "seconds": [facts["seconds"] for _, facts in runs],
            "dev_mcc": [facts["dev"]["mcc"] for _, facts in runs],
        }
        rows.append(row | {x: [test[x] for test, _ in runs] for x in ("mcc", "accuracy")})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Percentages, best MCC first."""
    lines = [
        "| model | parameters | learning rate | dev MCC | test MCC | test accuracy | minutes |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: -statistics.mean(row["mcc"])):
        cells = [spread(row[key]) for key in ("dev_mcc", "mcc", "accuracy")]
        minutes = f"{statistics.mean(row['seconds']) / 60:.1f}"
        lines.append(
            f"| {row['model']} | {row['parameters']:,} | {row['learning_rate']:g} | "
            + " | ".join([*cells, minutes]) + " |"
        )  # fmt: skip
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    mean = f"{100 * statistics.mean(values):.1f}"
    return mean if len(values) < 2 else f"{mean} ± {100 * statistics.stdev(values):.1f}"


def report(experiment: Genomics, output: Path, results: Path) -> None:
    """NAME.json with every score, and NAME.md with the table of the test set. Models that are in
    NAME.json already and have no runs here stay in both, if they had the same budget."""
    from pytitans.evals.results import describe_software

    rows, name = found_rows(experiment, output), experiment.args.name
    if not rows:
        return
    one = next((output / "results").glob("test-*.json"))
    test = json.loads(one.read_text())
    path = results / f"{name}.json"
    budget = {"budget": experiment.budget(), "share": experiment.args.share}
    before = json.loads(path.read_text()) if path.exists() else {}
    if any(before.get(key) != value for key, value in budget.items()):
        before = {"sweep": {}, "rows": []}
    rows = with_earlier(before["rows"], rows, "model")
    found = {
        "task": "dna", "name": name, "data": experiment.args.data, "split": test["sets"],
        "test_sequences": test["sequences"], "titans": SHAPE, **budget,
        "software": describe_software(),
        "sweep": sweeps(before, output),
        "rows": rows,
    }  # fmt: skip
    results.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    seeds = sorted({seed for row in rows for seed in row["seeds"]})
    text = (
        f"# {name}\n\n{test['sequences']:,} test sequences ({test['sets']}); other strand: "
        f"{experiment.budget()['strands']}. Per cent; mean and standard deviation of seeds "
        f"{', '.join(map(str, seeds))}.\n\n{table(rows)}\n"
    )
    (results / f"{name}.md").write_text(text)
    print(text)


def name_of(data: str) -> str:
    """GUE/tf/0 -> tf-0, promoters.test.tsv.gz -> promoters."""
    path = Path(data)
    if not path.is_dir():
        return path.name.split(".")[0]
    return "-".join(path.absolute().parts[-2:]).removeprefix("GUE-")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("data", help="a folder of GUE, or a table of sequences and labels")
    add("--models", nargs="*", choices=MODELS, default=list(MODELS))
    add("--seeds", type=int, nargs="*", default=[0, 1, 2])
    add("--rates", type=float, nargs="*", default=list(RATES), help="to choose from")
    add("--jobs", type=int, default=os.cpu_count() or 1, help="runs side by side")
    add("--share", type=float, default=1.0, help="of the steps, to try it out")
    add("--output", type=Path, help="runs/genomics/NAME")
    add("--results", type=Path, default=Path("results/genomics"))
    add("--report", action="store_true", help="run nothing, report what is there")
    args = parser.parse_args()
    args.name = name_of(args.data)
    output, experiment = args.output or Path("runs/genomics", args.name), Genomics(args)
    return run_experiment(
        experiment, args.models, output, lambda: report(experiment, output, args.results)
    )


if __name__ == "__main__":
    raise SystemExit(main())
