"""lm-evaluation-harness with a model that remembers: its tasks, prompts and metrics.

Gao et al., "A framework for few-shot language model evaluation", github.com/EleutherAI/
lm-evaluation-harness, version 0.4.13 (`pip install 'pytitans[eval]'`).

`CarryingLM` is its Hugging Face model but for one thing: rolling perplexity (Wikitext) carries the
state through each document, where the harness scores windows that know nothing of each other.

Data come from the hub, as the harness says, or from a folder of JSON lines (`local`), one file a
task, plain or .gz, in the common form `{"query", "choices", "gold"}`; LOCAL says what each task
makes of them. They are put into the columns that the harness's own prompts use, so its
configuration is untouched. Its RULER tasks make their own data; with `files`, those in essays use
that text and sentences by our rule, where the harness fetches essays and NLTK's rules. Its BABILong
tasks, with `babi` and `files`, get examples of `babilong.py`, the first of `lengths` long, in its
own prompts.

Differences: WinoGrande's sentence is put together again from its two halves; HellaSwag's context is
parted where its last, unfinished sentence begins, if with a small letter. Wikitext from a raw
file (`wiki.test.raw`) is split at its top headings.
"""

import gzip
import json
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from pytitans.evals.positions import stream_nll
from pytitans.evals.results import Results
from pytitans.evals.streaming import PIECE, context_limit

try:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
except ModuleNotFoundError as error:
    raise ValueError(
        f"the harness's tasks need {error.name}: pip install 'pytitans[eval]'"
    ) from error

HarnessModel: Any = HFLM  # decorators hide their types
evaluate: Any = lm_eval.simple_evaluate
NO_LIMIT = 2**22  # tokens of a request, for a model that has no limit
LAST_HALF = re.compile(r"(?<=[.!?] )[a-z][^.!?]*$")  # of HellaSwag's context
HEADING = re.compile(r"^ = [^=].*[^=] = $", re.MULTILINE)


class CarryingLM(HarnessModel):
    """The harness's model, whose rolling log-likelihood reads each text as one stream."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, **options: Any):
        limit = context_limit(model)
        self.carries = limit is None
        self.piece = options.pop("piece", PIECE)
        length = options.pop("max_length", limit or NO_LIMIT)
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            max_length=length,
            **options,  # type: ignore - HFLM takes them by name, each of its own type
        )

    def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, each begun with the token that begins texts."""
        if not self.carries:
            return super().loglikelihood_rolling(requests, disable_tqdm)
        found = []
        for request in requests:
            ids = torch.tensor([self.prefix_token_id, *self.tok_encode(request.args[0])])
            with torch.inference_mode():
                parts = stream_nll(self.model, ids, self.piece)
                found.append(-sum(float(part.sum(dtype=torch.float64)) for part in parts))
        return found


def run_harness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    folder: str,
    names: Sequence[str],
    results: Results,
    *,
    local: str | None = None,
    babi: str | None = None,
    files: Sequence[str] = (),
    lengths: Sequence[int] = (4096,),
    limit: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
    bf16: bool = False,
    piece: int = PIECE,
) -> Results:
    """Runs the harness's tasks, one after another, and saves after each. A cell holds a metric.

    folder: the tokenizer's name, from which RULER's tasks load it.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it has much to say about every task
    lm = CarryingLM(model, tokenizer, batch_size=batch_size, piece=piece)
    metadata = {"tokenizer": folder, "max_seq_lengths": list(lengths)}
    manager = task_manager(names, metadata)
    for name in names:
        if any(cell["name"] == name for cell in results.cells):
            continue
        if name not in manager.all_tasks:
            raise ValueError(f"{name!r} is no task of the harness: see `lm-eval ls tasks`")
        task: Any = name
        changes = override(name, tokenizer, local, babi, files, lengths, seed)
        if changes:  # in a group, since there alone the harness changes what it knows by name
            task = {"group": "local", "task": [{"task": name} | changes]}
        essays = local_essays(files if name.startswith("niah_") else ())
        inference = torch.autocast(model.device.type, torch.bfloat16, enabled=bf16)
        with inference, essays, reaching_the_hub(name):
            found = evaluate(
                lm, tasks=[task], task_manager=manager, limit=limit,
                bootstrap_iters=0, log_samples=False, random_seed=seed, numpy_random_seed=seed,
                torch_random_seed=seed, fewshot_random_seed=seed,
            )  # fmt: skip
        for task, metrics in found["results"].items():
            for key, value in metrics.items():
                metric, _, kind = key.partition(",")
                known = isinstance(value, float) and value != -1  # RULER's of lengths not run
                if kind and known and not metric.endswith("_stderr"):
                    cell = {"name": name, "task": task, "metric": metric}
                    results.cell(**cell).update(value=value, limit=limit)
        results.save()
    results.save(finished=True)
    return results


@contextmanager
def reaching_the_hub(name: str) -> Iterator[None]:
    """Says what else there is when a task's data cannot be fetched."""
    try:
        yield
    except ConnectionError as error:
        remedy = "try again with a connection"
        if name in LOCAL:
            remedy += f", or give its file {LOCAL[name][0][0]} in a folder, --local FOLDER"
        raise ValueError(
            f"the data of {name!r} could not be fetched ({error}): {remedy}"
        ) from error


def task_manager(names: Sequence[str], metadata: dict[str, Any]) -> TaskManager:
    """The harness's list of its tasks. To look through all 14,000 takes half a minute: where the
    tasks are known, only their folders are read."""
    root, folders = Path(str(lm_eval.__file__)).parent / "tasks", set()
    for name in names:
        known = [folder for start, folder in FOLDERS.items() if name.startswith(start)]
        if not known or not (root / known[0]).is_dir():
            return TaskManager(metadata=metadata)
        folders.add(root / known[0])
    return TaskManager(metadata=metadata, include_defaults=False, include_path=sorted(folders))


def override(
    name: str,
    tokenizer: PreTrainedTokenizerFast,
    local: str | None,
    babi: str | None,
    files: Sequence[str],
    lengths: Sequence[int],
    seed: int,
) -> dict[str, Any]:
    """What to change in the harness's configuration of a task so that it reads what is at hand."""
    if name.startswith("babilong_") and babi is not None:
        return {"custom_dataset": lambda **_: babilong(name, tokenizer, babi, files, lengths, seed)}
    if local is None or name not in LOCAL:
        return {}
    stems, convert = LOCAL[name]
    rows = list(convert(find_local(Path(local).expanduser(), stems)))
    return {"custom_dataset": lambda **_: datasets_of(rows), "dataset_kwargs": None}


def datasets_of(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The rows under every name that a configuration may use."""
    import datasets

    whole = datasets.Dataset.from_list(rows)
    return {"train": whole.select([]), "validation": whole, "test": whole}


def find_local(folder: Path, stems: Sequence[str]) -> Path:
    """The file of one of these names, anywhere in the folder."""
    for stem in stems:
        for ending in (".jsonl", ".jsonl.gz", ".json", "", ".gz"):
            found = sorted(folder.rglob(f"{stem}{ending}"))
            if found:
                return found[0]
    raise ValueError(f"{str(folder)!r} has no {stems[0]}.jsonl, plain or .gz")


def read_text(path: Path) -> str:
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        return file.read().decode("utf-8")


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    for line in read_text(path).splitlines():
        if line.strip():
            yield json.loads(line)


def piqa(path: Path) -> Iterator[dict[str, Any]]:
    for row in read_rows(path):
        first, second = row["choices"]
        yield {"goal": row["query"], "sol1": first, "sol2": second, "label": row["gold"]}


def hellaswag(path: Path) -> Iterator[dict[str, Any]]:
    """The harness joins the activity and two halves of the context, the second with a capital."""
    for row in read_rows(path):
        activity, _, context = row["query"].partition(": ")
        half = LAST_HALF.search(context)
        cut = half.start() if half else len(context)
        yield {
            "activity_label": activity,
            "ctx_a": context[:cut].strip(),
            "ctx_b": context[cut:],
            "endings": row["choices"],
            "label": str(row["gold"]),
        }


def winogrande(path: Path) -> Iterator[dict[str, Any]]:
    for row in read_rows(path):
        first, second = row["context_options"]
        same = 0
        while same < min(len(first), len(second)) and first[same] == second[same]:
            same += 1
        same = first.rfind(" ", 0, same) + 1  # names may begin with the same letters
        yield {
            "sentence": f"{first[:same]}_ {row['continuation']}",
            "option1": first[same:],
            "option2": second[same:],
            "answer": str(row["gold"] + 1),
        }


def arc(path: Path) -> Iterator[dict[str, Any]]:
    for row in read_rows(path):
        labels = [chr(ord("A") + i) for i in range(len(row["choices"]))]
        yield {
            "question": row["query"],
            "choices": {"text": row["choices"], "label": labels},
            "answerKey": labels[row["gold"]],
        }


def social_iqa(path: Path) -> Iterator[dict[str, Any]]:
    for row in read_rows(path):
        answers = {f"answer{'ABC'[i]}": choice for i, choice in enumerate(row["choices"])}
        label = str(row["gold"] + 1)
        yield {"context": row["context"], "question": row["question"], "label": label} | answers


def boolq(path: Path) -> Iterator[dict[str, Any]]:
    for row in read_rows(path):
        yield {"passage": row["passage"], "question": row["question"], "label": row["gold"]}


def lambada(path: Path) -> Iterator[dict[str, Any]]:
    for row in read_rows(path):
        yield {"text": f"{row['context']} {row['continuation']}"}


def wikitext(path: Path) -> Iterator[dict[str, Any]]:
    text = read_text(path)
    starts = [match.start() for match in HEADING.finditer(text)]
    for start, stop in zip(starts, [*starts[1:], len(text)], strict=True):
        yield {"page": text[start:stop]}


FOLDERS = {  # of the harness's tasks, by how their names begin
    "piqa": "piqa",
    "hellaswag": "hellaswag",
    "winogrande": "winogrande",
    "arc_": "arc",
    "social_iqa": "siqa",
    "boolq": "super_glue",
    "lambada_": "lambada",
    "wikitext": "wikitext",
    "niah_": "ruler",
    "ruler_": "ruler",
    "babilong_": "babilong",
}
LOCAL: dict[str, tuple[Sequence[str], Callable[[Path], Iterator[dict[str, Any]]]]] = {
    "piqa": (["piqa"], piqa),
    "hellaswag": (["hellaswag"], hellaswag),
    "winogrande": (["winogrande"], winogrande),
    "arc_easy": (["arc_easy"], arc),
    "arc_challenge": (["arc_challenge"], arc),
    "social_iqa": (["siqa", "social_iqa"], social_iqa),
    "boolq": (["boolq"], boolq),
    "lambada_openai": (["lambada_openai"], lambada),
    "wikitext": (["wiki.test.raw", "wiki.test", "wikitext"], wikitext),
}


def babilong(name, tokenizer, babi, files, lengths, seed) -> dict[str, Any]:
    """A hundred examples for the harness's prompt: text and question apart."""
    from pytitans.evals import load_task

    task: Any = load_task(name, tokenizer, files=files, babi=babi)
    rows = []
    for example in task.examples(100, length=lengths[0], seed=seed):
        prompt, answer = (
            tokenizer.decode(part, skip_special_tokens=True)
            for part in (example.ids[: example.at[0] + 1], example.expected)
        )
        text, question, _ = prompt.rsplit("\n", 2)
        rows.append({"input": text, "question": question, "target": answer.strip()})
    split = name.removeprefix("babilong_")
    return datasets_of(rows) | {split: datasets_of(rows)["test"]}


class local_essays:
    """While it lasts, RULER's essays are the text of `files`, cut into sentences by our rule; with
    no files nothing is changed."""

    def __init__(self, files: Sequence[str]):
        self.files = files

    def __enter__(self):
        if not self.files:
            return
        from lm_eval.tasks.ruler import niah_utils, prepare_niah

        from pytitans.data.text import TextData, load_text
        from pytitans.evals.haystack import SENTENCE

        found = load_text(TextData(files=self.files), ("all",))["all"]
        words = " ".join(document.text for document in found).split()
        theirs = prepare_niah.get_haystack

        def get_haystack(type_haystack):
            return words if type_haystack == "essay" else theirs(type_haystack)

        def sentences(text: str) -> list[str]:
            ends = [0, *(match.end() for match in SENTENCE.finditer(text)), len(text)]
            parts = (text[a:b].strip() for a, b in pairwise(ends))
            return [part for part in parts if part]

        self.before = (theirs, prepare_niah.sent_tokenize)
        niah_utils.get_haystack = prepare_niah.get_haystack = get_haystack  # type: ignore - ours
        prepare_niah.sent_tokenize = sentences  # type: ignore - ours: nltk's data is a download
        prepare_niah.cached_sent_tokenize.cache_clear()

    def __exit__(self, *_: Any) -> None:
        if self.files:
            from lm_eval.tasks.ruler import niah_utils, prepare_niah

            niah_utils.get_haystack = prepare_niah.get_haystack = self.before[0]
            prepare_niah.sent_tokenize = self.before[1]
