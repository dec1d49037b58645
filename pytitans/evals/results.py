"""A file of results: what was asked of which model, and what came of it. Written while it grows.

    {"version": 1, "task": "niah_single_1", "options": {...}, "seed": 0, "samples": 16,
     "model": {"name": "runs/mal", "class": "TitansForCausalLM", "parameters": 667376,
               "weights": ...},
     "software": {"pytitans": "0.1.0", "commit": ..., "torch": ..., "transformers": ...},
     "command": "titans eval ...", "finished": true, "cells": [...]}

A run that is stopped goes on where it was with the same command: what is there is not done again.
Other lengths, depths or more samples are added to it. A file of another task, seed or model is
never written over.
"""

import hashlib
import json
import os
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

VERSION = 1
ASKED = ("task", "options", "seed")  # what makes two runs the same, beside the model's weights


class Results:
    """The facts of a run, and its cells; saved to `path`, if there is one, whenever told."""

    def __init__(self, path: str | Path | None, facts: dict[str, Any]):
        self.path = None if path is None else Path(path)
        self.facts: dict[str, Any] = {"version": VERSION, **facts, "finished": False, "cells": []}
        if self.path is not None and self.path.exists():
            self.take_up(self.path)

    def take_up(self, path: Path) -> None:
        """Goes on with the cells of an earlier run of the same question and model."""
        past, now = read_results(path), json.loads(json.dumps(self.facts))
        asked = [(key, past.get(key), now.get(key)) for key in ASKED]
        asked += [("model", *(x.get("model", {}).get("weights") for x in (past, now)))]
        for key, before, after in asked:
            if before != after:
                raise ValueError(
                    f"{str(path)!r} holds results of another run: its {key} is {short(before)}, "
                    f"now {short(after)}; choose another --output"
                )
        self.facts["cells"] = past["cells"]

    @property
    def cells(self) -> list[dict[str, Any]]:
        return self.facts["cells"]

    def cell(self, **place: Any) -> dict[str, Any]:
        """The cell of that place, a new one if there is none."""
        for cell in self.cells:
            if all(key in cell and cell[key] == value for key, value in place.items()):
                return cell
        self.cells.append(dict(place))
        return self.cells[-1]

    def save(self, finished: bool = False) -> None:
        self.facts["finished"] = finished
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            fresh = self.path.with_name(f".{self.path.name}.{os.getpid()}")
            fresh.write_text(json.dumps(self.facts, indent=1) + "\n")
            fresh.replace(self.path)  # at once: a reader sees the old file or the new one


def read_results(path: str | Path) -> dict[str, Any]:
    """A file of results; ValueError if it is none."""
    try:
        found = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(path)!r} cannot be read as results: {error}") from error
    if not isinstance(found, dict) or "cells" not in found or found.get("version") != VERSION:
        raise ValueError(f"{str(path)!r} is no file of results that `titans eval --task` writes")
    return found


def describe_model(model: PreTrainedModel, name: str) -> dict[str, Any]:
    """What was evaluated; `weights` is the SHA-256 of all of them."""
    digest = hashlib.sha256()
    for key, weight in sorted(model.state_dict().items()):
        digest.update(f"{key} {weight.dtype} {tuple(weight.shape)}".encode())
        raw = weight.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(memoryview(raw.numpy()))
    return {
        "name": name,
        "class": type(model).__name__,
        "parameters": model.num_parameters(),
        "weights": digest.hexdigest(),
    }


def describe_software() -> dict[str, Any]:
    found: dict[str, Any] = {"python": sys.version.split()[0]}
    for name in ("pytitans", "torch", "transformers", "lm_eval"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found | {"commit": commit()}


def commit() -> str | None:
    """The git commit of this package's source, with "+" if it has been changed since; None where it
    is installed from elsewhere."""
    folder = Path(__file__).parent
    git = ["git", "-C", str(folder)]
    try:
        root = subprocess.run(
            [*git, "rev-parse", "--show-toplevel"], capture_output=True, text=True
        )
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--", str(folder.parent)],
            capture_output=True,
            text=True,
        )
    except OSError:
        return None
    ours = root.returncode == 0 and Path(root.stdout.strip()) == folder.parent.parent
    if not ours or head.returncode:
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def command_line(command: str, argv: list[str]) -> str:
    return shlex.join(["titans", *command.split(), *argv])


def short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 120 else text[:117] + "..."
