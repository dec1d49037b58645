"""Evaluations: does a model remember? One file a task; `task.py` says what a task is.

`streaming.py` reads examples through a model's cache, `run.py` a whole grid of them, `report.py`
makes tables and pictures of the results, `command.py` is `titans eval` and `titans report`.
"""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerFast

from pytitans.evals.babilong import TASKS as BABILONG
from pytitans.evals.babilong import Babilong
from pytitans.evals.haystack import PYTHON
from pytitans.evals.niah import KINDS as NIAH
from pytitans.evals.niah import Niah, Passkey
from pytitans.evals.recall import Recall
from pytitans.evals.state_tracking import GROUPS, StateTracking
from pytitans.evals.task import Example, Task, collate

TASK_NAMES = (
    "passkey",
    *NIAH,
    *(f"babilong_{task}" for task in BABILONG),
    "recall",
    *GROUPS,
)

__all__ = ["TASK_NAMES", "Example", "Task", "collate", "load_task"]


def load_task(
    name: str,
    tokenizer: PreTrainedTokenizerFast,
    *,
    files: Sequence[str] = (),
    babi: str | None = None,
    vocab_size: int | None = None,
    **options: Any,
) -> Task:
    """The task of that name; see its file for the options. vocab_size: of `recall`'s tokens."""
    prose = tuple(files) or (PYTHON,)
    if name == "passkey":
        return Passkey(tokenizer, **options)
    if name in NIAH:
        return Niah(name, tokenizer, prose, **options)
    if name.startswith("babilong_") and name.removeprefix("babilong_") in BABILONG:
        if babi is None:
            raise ValueError(f"{name} needs bAbI: give tasks_1-20_v1-2, a folder or zip, by --babi")
        return Babilong(name, tokenizer, babi, prose, **options)
    if name == "recall":
        return Recall(**({} if vocab_size is None else {"vocab_size": vocab_size}), **options)
    if name in GROUPS:
        return StateTracking(name, **options)
    raise ValueError(f"{name!r} is no task: choose {', '.join(TASK_NAMES)}")
