"""Tables and pictures of files of results: `titans report a.json b.json --output folder`.

A row is a model. Runs of one model, or of models whose names differ in a seed alone (`mal-seed0`,
`mal-seed1`), are one row: the mean over the runs, and "±" their standard deviation. Where one of
them was asked no more because it had found nothing in shorter texts (`--give_up`), it counts as 0.

    report.md                     all tables
    NAME-accuracy.png             a task over length, a line for each row
    NAME-MODEL-depth.png          a task over length and depth, for each row
    positions.png                 bits per byte over position, a line for each row
"""

import math
import re
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from pytitans.evals.results import read_results
from pytitans.evals.run import by_position
from pytitans.report import new_axes

SEED = re.compile(r"[-_.]?seed[-_]?\d+|[-_]s\d+$")
COLOURS = ("#2b6cb0", "#c05621", "#2f855a", "#6b46c1", "#b83280", "#4a5568", "#b7791f", "#0987a0")
LOOKS = [(line, colour) for line in ("-", "--") for colour in COLOURS]
Runs = dict[str, list[dict[str, Any]]]  # row -> its runs' results


def write_report(files: Sequence[str | Path], folder: str | Path) -> list[Path]:
    """Writes report.md and its pictures into the folder; returns what was written."""
    tasks: dict[str, Runs] = {}
    for path in files:
        result = read_results(path)
        tasks.setdefault(result["task"], {}).setdefault(row_of(result), []).append(result)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sections, written = [], []
    for task, runs in sorted(tasks.items()):
        table, pictures = section_of(task, runs, folder)
        written += pictures
        links = "".join(f"\n\n![{path.stem}]({path.name})" for path in pictures)
        sections.append(f"## {task}\n\n{table}{links}\n\n{details(runs)}")
    report = folder / "report.md"
    report.write_text("# Evaluation\n\n" + "\n\n".join(sections) + "\n")
    return [report, *written]


def section_of(task: str, runs: Runs, folder: Path) -> tuple[str, list[Path]]:
    name = re.sub(r"\W+", "-", task)
    if task == "positions":
        return position_table(runs), [plot_positions(runs, folder / "positions.png")]
    if task == "lm_eval":
        return harness_table(runs), []
    pictures = []
    if len(lengths_of(runs)) > 1:
        pictures.append(plot_accuracy(task, runs, folder / f"{name}-accuracy.png"))
    for row, results in runs.items():
        if len(depths_of(results)) > 1:
            model = re.sub(r"[^\w.-]+", "-", row)
            path = folder / f"{name}-{model}-depth.png"
            pictures.append(plot_depths(task, row, results, path))
    return accuracy_table(runs), pictures


def section_of_results(result: dict[str, Any]) -> str:
    """The table of a single run."""
    runs = {row_of(result): [result]}
    tables = {"positions": position_table, "lm_eval": harness_table}
    return tables.get(result["task"], accuracy_table)(runs)


def row_of(result: dict[str, Any]) -> str:
    """The model's name, its folder's name if it is one, without the seed."""
    name = result.get("label") or Path(str(result["model"]["name"])).name
    return SEED.sub("", name) or name


def details(runs: Runs) -> str:
    """What was run: a line for each file."""
    lines = []
    for row, results in runs.items():
        for result in results:
            model, software = result["model"], result["software"]
            made = f"pytitans {software.get('pytitans')}, commit {short(software)}"
            state = "" if result["finished"] else " **not finished**"
            what = f"{model['class']}, {model['parameters']:,} parameters"
            which = f"weights {model['weights'][:10]}, seed {result['seed']}"
            lines.append(f"- {row}: {what}, {which}, {made}: `{result['command']}`{state}")
    return "\n".join(lines)


def short(software: dict[str, Any]) -> str:
    """The commit's first digits; "+" if its source had been changed."""
    commit = str(software.get("commit"))
    return commit[:10] + "+" * commit.endswith("+")


def lengths_of(runs: Runs) -> list[int]:
    cells = [cell for results in runs.values() for result in results for cell in result["cells"]]
    return sorted({cell["length"] for cell in cells if "accuracy" in cell})


def depths_of(results: Sequence[dict[str, Any]]) -> list[float]:
    found = {cell["depth"] for result in results for cell in result["cells"] if "accuracy" in cell}
    return sorted(depth for depth in found if depth is not None)


def accuracy_at(result: dict[str, Any], length: int, depth: float | None = None) -> float | None:
    """A run's mean accuracy over all examples of that length (and depth)."""
    cells = [cell for cell in result["cells"] if cell["length"] == length and "accuracy" in cell]
    if depth is not None:
        cells = [cell for cell in cells if cell["depth"] == depth]
    count = sum(cell["samples"] for cell in cells)
    return sum(cell["accuracy"] * cell["samples"] for cell in cells) / count if count else None


def accuracies(
    results: Sequence[dict[str, Any]], length: int, depth: float | None = None
) -> list[float | None]:
    """`accuracy_at` of each run of a model. One that gave up before this length counts as 0 beside
    others that were asked: a mean of those that go on alone would be too good."""
    runs: dict[tuple, dict[str, Any]] = {}
    for result in results:  # a run's short and long texts may be in files of their own
        run = result.get("label"), result["model"]["name"], result["model"]["weights"]
        cells = runs.setdefault((*run, result["seed"]), {"cells": []})["cells"]
        cells += result["cells"]
    found = [accuracy_at(run, length, depth) for run in runs.values()]
    if all(value is None for value in found):
        return found
    return [
        0.0 if value is None and gave_up(run, length) else value
        for run, value in zip(runs.values(), found, strict=True)
    ]


def gave_up(run: dict[str, Any], length: int) -> bool:
    """Whether the longest text it was asked was shorter than that, and none of its kind right."""
    longest = max((cell["length"] for cell in run["cells"] if "accuracy" in cell), default=length)
    return longest < length and accuracy_at(run, longest) == 0


def spread(values: Sequence[float | None]) -> tuple[float, float] | None:
    """Mean and standard deviation (of several) over runs."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    mean = sum(known) / len(known)
    if len(known) == 1:
        return mean, 0.0
    return mean, math.sqrt(sum((x - mean) ** 2 for x in known) / (len(known) - 1))


def shown(values: Sequence[float | None], show: Callable[[float], str]) -> str:
    """A table's cell; "" if nothing is known."""
    found = spread(values)
    if found is None:
        return ""
    several = sum(value is not None for value in values) > 1
    return show(found[0]) + (f" ± {show(found[1])}" if several else "")


def table_of(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def accuracy_table(runs: Runs) -> str:
    """Rows: models; columns: lengths; accuracy in percent over all depths."""
    lengths = lengths_of(runs)
    rows = []
    for row, results in runs.items():
        found = [accuracies(results, n) for n in lengths]
        rows.append([row, *(shown(values, lambda x: f"{100 * x:.1f}") for values in found)])
    return "Accuracy in percent.\n\n" + table_of(["model", *map(size, lengths)], rows)


def position_table(runs: Runs) -> str:
    """Rows: models; columns: positions, and all of them together; bits per byte."""
    bins = {row: [by_position(result["cells"]) for result in found] for row, found in runs.items()}
    firsts = sorted({part["first"] for parts in bins.values() for run in parts for part in run})
    rows = []
    for row, parts in bins.items():
        cells = []
        for first in firsts:
            values = [p["bits_per_byte"] for run in parts for p in run if p["first"] == first]
            cells.append(shown(values, lambda x: f"{x:.4f}"))
        whole = [
            sum(p["nats"] for p in run) / math.log(2) / max(1, sum(p["bytes"] for p in run))
            for run in parts
        ]
        rows.append([row, *cells, shown(whole, lambda x: f"{x:.4f}")])
    header = [f"from {size(first)}" if first else "from 0" for first in firsts]
    text = "Bits per byte by position in the document.\n\n"
    return text + table_of(["model", *header, "all"], rows)


def harness_table(runs: Runs) -> str:
    """Rows: models; columns: the harness's tasks, with the metric papers print."""
    columns = sorted(
        {
            (cell["name"], cell["metric"])
            for found in runs.values()
            for r in found
            for cell in r["cells"]
        }
    )
    rows = []
    for row, results in runs.items():
        cells = []
        for name, metric in columns:
            values = [
                cell["value"]
                for result in results
                for cell in result["cells"]
                if (cell["name"], cell["metric"]) == (name, metric)
            ]
            share = metric.startswith(("acc", "exact"))
            cells.append(
                shown(values, lambda x, share=share: f"{100 * x:.1f}" if share else f"{x:.3f}")
            )
        rows.append([row, *cells])
    return table_of(["model", *(f"{name} {metric}" for name, metric in columns)], rows)


def size(tokens: int) -> str:
    """4096 -> 4K, 2097152 -> 2M, 500 -> 500."""
    for unit, many in (("M", 2**20), ("K", 2**10)):
        if tokens >= many and tokens % many == 0:
            return f"{tokens // many}{unit}"
    return f"{tokens:,}"


def plot_accuracy(task: str, runs: Runs, path: Path) -> Path:
    """Accuracy over length; of several runs the mean, and each of them as a thin line."""
    figure, axes = new_axes(7, 4.2, xlabel="tokens", ylabel="accuracy, %", title=task)
    lengths = lengths_of(runs)
    for (line, colour), (row, results) in zip(cycle(LOOKS), runs.items(), strict=False):
        found = [accuracies(results, n) for n in lengths]
        means = [mean and 100 * mean[0] for mean in map(spread, found)]
        known = [i for i, mean in enumerate(means) if mean is not None]
        if not known:
            continue
        axes.plot(
            known, [means[i] for i in known], f"o{line}",
            color=colour, label=row, markersize=4, clip_on=False, zorder=3,
        )  # fmt: skip
        each = list(zip(*found, strict=True))  # a run's accuracies over lengths
        for run in each if len(each) > 1 else ():
            percent = [math.nan if value is None else 100 * value for value in run]
            axes.plot(percent, line, color=colour, linewidth=0.8, alpha=0.35)
    axes.set_xticks(range(len(lengths)), [size(n) for n in lengths])
    axes.set_ylim(0, 102)
    axes.grid(axis="y", alpha=0.3)
    name_lines(figure, axes)
    figure.savefig(path, dpi=120)
    return path


def name_lines(figure: Any, axes: Any) -> None:
    """A legend beside the picture, in the order in which the lines end."""
    lines, names = axes.get_legend_handles_labels()
    order = sorted(range(len(lines)), key=lambda i: -lines[i].get_ydata()[-1])
    figure.legend(
        [lines[i] for i in order], [names[i] for i in order],
        loc="outside right upper", frameon=False, fontsize="small",
    )  # fmt: skip


def plot_depths(task: str, row: str, results: Sequence[dict[str, Any]], path: Path) -> Path:
    """The heat map: how often the needle was found, by length and depth."""
    lengths, depths = lengths_of({row: list(results)}), depths_of(results)
    grid = [[spread(accuracies(results, n, d)) for n in lengths] for d in depths]
    values = [[math.nan if x is None else 100 * x[0] for x in line] for line in grid]
    figure, axes = new_axes(
        2.2 + 0.75 * len(lengths), 1.6 + 0.45 * len(depths),
        xlabel="tokens", ylabel="depth of the needle, %", title=f"{task}: {row}",
    )  # fmt: skip
    image = axes.imshow(values, cmap="viridis", vmin=0, vmax=100, aspect="auto")
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            if not math.isnan(value):
                ink = "black" if value > 60 else "white"
                axes.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=8, color=ink)
    axes.set_xticks(range(len(lengths)), [size(n) for n in lengths])
    axes.set_yticks(range(len(depths)), [f"{d:g}" for d in depths])
    axes.spines[:].set_visible(False)
    figure.colorbar(image, label="accuracy, %")
    figure.savefig(path, dpi=120)
    return path


def plot_positions(runs: Runs, path: Path) -> Path:
    """Bits per byte over position, each bin at its end; of several runs the mean, and each of them
    as a thin line."""
    figure, axes = new_axes(7, 5.4, xlabel="tokens read", ylabel="bits per byte", title="positions")
    for (line, colour), (row, results) in zip(cycle(LOOKS), runs.items(), strict=False):
        curves = [
            {part["last"] + 1: part["bits_per_byte"] for part in by_position(result["cells"])}
            for result in results
        ]
        x = sorted(set().union(*curves))
        means = [spread([curve.get(last) for curve in curves]) for last in x]
        y = [mean[0] if mean else math.nan for mean in means]
        axes.plot(x, y, f"o{line}", color=colour, markersize=3.5, label=row, zorder=3)
        for curve in curves if len(curves) > 1 else ():
            axes.plot(curve.keys(), curve.values(), line, color=colour, linewidth=0.6, alpha=0.25)
    axes.set_xscale("log", base=2)
    ticks = sorted(
        {p["last"] + 1 for f in runs.values() for r in f for p in by_position(r["cells"])}
    )
    axes.set_xticks(ticks, [size(tick) for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    name_lines(figure, axes)
    figure.savefig(path, dpi=120)
    return path
