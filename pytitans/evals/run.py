"""Runs: a task over lengths and depths, or documents by position, into a file of results."""

import math
import time
from collections.abc import Sequence
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from pytitans.data.text import Document
from pytitans.evals.positions import score_document
from pytitans.evals.results import Results
from pytitans.evals.streaming import PIECE, score_examples
from pytitans.evals.task import Task
from pytitans.evaluate import scoring

BATCH_TOKENS = 2**15  # examples are read side by side while they have no more tokens together
METRICS = ("accuracy", "exact", "last", "nll")


def run_task(
    model: PreTrainedModel,
    task: Task,
    results: Results,
    *,
    lengths: Sequence[int],
    depths: Sequence[float | None] | None = None,
    samples: int = 16,
    seed: int = 0,
    window: int | None = None,
    piece: int = PIECE,
    batch_size: int | None = None,
    bf16: bool = False,
    give_up: bool = False,
    progress: bool = True,
) -> Results:
    """Scores `samples` examples at each length and depth (None: the task's own), the short ones
    first, and saves after each batch. A cell holds the score of every example, and their means.

    batch_size None: as many as have 32,768 tokens together. give_up: once nothing of a length is
    right, at any depth, nothing longer is asked.
    """
    places = [(n, d) for n in sorted(lengths) for d in (task.depths if depths is None else depths)]
    vocabulary = model.config.get_text_config().vocab_size
    bar = tqdm(
        total=sum(max(n, 1) for n, _ in places) * samples,
        unit="token", unit_scale=True, dynamic_ncols=True, disable=None if progress else True,
    )  # fmt: skip
    with scoring(model, bf16), bar:
        for length, depth in places:
            if give_up and lost(results, length):
                continue
            cell = results.cell(length=length, depth=depth)
            scores = cell.setdefault("scores", [])
            bar.set_description(f"{task.name} {length:,}" + at_depth(depth), refresh=False)
            bar.update(max(length, 1) * len(scores))
            rows = batch_size or max(1, BATCH_TOKENS // max(length, 1024))
            while len(scores) < samples:
                began, first = time.perf_counter(), len(scores)
                count = min(rows, samples - first)
                examples = list(
                    task.examples(count, length=length, depth=depth, seed=seed, first=first)
                )
                check_ids(task, examples, vocabulary)
                advance = bar.update if length else lambda tokens: None
                found = score_examples(model, examples, window=window, piece=piece, advance=advance)
                if not length:
                    bar.update(count)
                scores += [[round(x, 6) for x in score] for score in found]
                cell["seconds"] = cell.get("seconds", 0.0) + time.perf_counter() - began
                cell["tokens"] = cell.get("tokens", 0) + sum(len(x.ids) for x in examples)
                summarise(cell)
                results.save()
            bar.set_postfix_str(f"accuracy {cell['accuracy']:.2f}", refresh=False)
    results.save(finished=True)
    return results


def lost(results: Results, length: int) -> bool:
    """Whether some shorter length was asked and none of its answers was right."""
    shorter = {cell["length"] for cell in results.cells if cell["length"] < length}
    return any(
        not any(cell.get("accuracy") for cell in results.cells if cell["length"] == n)
        for n in shorter
    )


def summarise(cell: dict[str, Any]) -> None:
    """Means over the cell's examples, and the standard error of the accuracy."""
    columns = list(zip(*cell["scores"], strict=True))
    for name, column in zip(METRICS, columns, strict=True):
        cell[name] = sum(column) / len(column)
    spread = sum((x - cell["accuracy"]) ** 2 for x in columns[0]) / max(1, len(columns[0]) - 1)
    cell["stderr"] = math.sqrt(spread / len(columns[0]))
    cell["samples"] = len(columns[0])


def at_depth(depth: float | None) -> str:
    return "" if depth is None else f" at {depth:g} %"


def check_ids(task: Task, examples, vocabulary: int) -> None:
    largest = max(max(int(x.ids.max()), int(x.expected.max())) for x in examples)
    if largest >= vocabulary:
        raise ValueError(
            f"{task.name} has token ids up to {largest}, the model's vocab_size is {vocabulary}"
        )


def run_positions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    documents: Sequence[Document],
    results: Results,
    *,
    window: int | None = None,
    piece: int = PIECE,
    bf16: bool = False,
    progress: bool = True,
) -> Results:
    """Scores the documents by position and saves after each. A cell holds a document's bins."""
    bar = tqdm(
        total=sum(len(document.text.encode()) for document in documents),
        unit="B", unit_scale=True, dynamic_ncols=True, disable=None if progress else True,
    )  # fmt: skip
    with scoring(model, bf16), bar:
        for name, text in documents:
            size = len(text.encode())
            bar.set_description(name[-40:], refresh=False)
            cell = results.cell(document=name)
            if cell.get("bytes") == size:
                bar.update(size)
                continue
            began = time.perf_counter()
            cell["bins"] = score_document(
                model, tokenizer, text, window=window, piece=piece, advance=bar.update
            )
            cell["bytes"], cell["seconds"] = size, time.perf_counter() - began
            results.save()
    results.save(finished=True)
    return results


def by_position(cells: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The bins of all documents together: first, last, documents, tokens, bytes, bits_per_byte,
    perplexity."""
    found: dict[int, dict[str, Any]] = {}
    for cell in cells:
        for part in cell.get("bins", []):
            both = found.setdefault(
                part["first"],
                {"first": part["first"], "last": part["last"], "documents": 0}
                | dict.fromkeys(("tokens", "bytes", "nats"), 0),
            )
            both["documents"] += 1
            for key in ("tokens", "bytes", "nats"):
                both[key] += part[key]
    for both in found.values():
        both["bits_per_byte"] = both["nats"] / math.log(2) / max(1, both["bytes"])
        both["perplexity"] = math.exp(min(700, both["nats"] / both["tokens"]))
    return [found[first] for first in sorted(found)]
