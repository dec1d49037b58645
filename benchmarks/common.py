"""What the benchmarks share: options, turns, memory of a process of its own, and the machine."""

import argparse
import gc
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from rich.console import Console

from pytitans.ops import chunk_fused

Key = TypeVar("Key")


def parser(description: str | None) -> argparse.ArgumentParser:
    """With the options that all have: --device, --json, --rounds, --threads and, hidden, --only:
    what a process of its own is to measure (`in_its_own_process`)."""
    p = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    p.add_argument("--json", type=Path, metavar="PATH", help="also write the numbers as JSON")
    p.add_argument("--rounds", type=int, default=3, help="that count (default: %(default)s)")
    p.add_argument("--threads", type=int, help="torch threads (default: torch's)")
    p.add_argument("--only", nargs="+", help=argparse.SUPPRESS)
    return p


def begin(args: argparse.Namespace) -> None:
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    if args.threads:
        torch.set_num_threads(args.threads)


def shape(args: argparse.Namespace) -> dict[str, Any]:
    """The options that say what was measured."""
    return {k: v for k, v in vars(args).items() if k not in ("json", "only")}


def write(path: Path | None, report: Mapping[str, Any]) -> None:
    """The report as JSON, if a path was given."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=2, default=str) + "\n")


def console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 120)


# Time


def seconds(step: Callable[[], Any], device: str) -> float:
    started = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def take_turns(
    steps: Mapping[Key, Callable[[], Any]], rounds: int, device: str
) -> dict[Key, list[float]]:
    """Seconds of each step in each round, after one round that does not count."""
    times: dict[Key, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            gc.collect()
            times[name].append(seconds(step, device))
    return {name: found[1:] for name, found in times.items()}


# Memory


def in_its_own_process(file: str, only: Sequence[str]) -> Any:
    """What `file`, with this process's options and --only, prints as its last line, read as JSON.

    Raises SystemExit, with what it said, if it fails.
    """
    command = [sys.executable, file, *sys.argv[1:], "--only", *only]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        sys.exit(f"{' '.join(only)} was not measured:\n{run.stderr}")
    return json.loads(run.stdout.splitlines()[-1])


def peak_mb(step: Callable[[], Any], device: str) -> float:
    """MB that a step needs at its peak beyond what is in use before it."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    before = status_mb("self/status", "VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    step()
    return status_mb("self/status", "VmHWM") - before


def status_mb(file: str, field: str) -> float:
    """A field of a file below /proc."""
    lines = (Path("/proc") / file).read_text().splitlines()
    return int(next(x for x in lines if x.startswith(field + ":")).split()[1]) / 1024


# The machine


def machine(device: str) -> dict[str, Any]:
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.exists() else []
    names = [x.split(":")[1].strip() for x in lines if x.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "form": "kernel" if device == "cpu" and chunk_fused.kernel() else "plain",
        "load": Path("/proc/loadavg").read_text().split()[0],
    }


def caption(about: Mapping[str, Any]) -> str:
    return (
        f"{about['gpu'] or about['cpu']}, {about['threads']} threads, torch {about['torch']}, "
        f"load {about['load']}"
    )
