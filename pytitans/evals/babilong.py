"""BABILong: questions about a few facts, which are scattered over the text of books.

Kuratov et al., "BABILong: Testing the Limits of LLMs with Long Context Reasoning-in-a-Haystack",
arXiv 2406.10149; the questions are of bAbI (Weston et al., arXiv 1502.05698), tasks qa1 to qa5.

    babilong_qa1   where a person is: one supporting fact
    babilong_qa2   where a thing is: two
    babilong_qa3   where a thing was before it was somewhere: three
    babilong_qa4   relations of two places
    babilong_qa5   who gave what to whom

Data: bAbI's `tasks_1-20_v1-2`, a folder or a zip (or a .tar.gz unpacked), by `babi`; books by
`files`. Examples are made as the authors make theirs: every question of a story is one, with the
facts told before it; sentences of the books, of 10 tokens or more, are drawn from a random place;
the facts go between them at random places, in their order.

Prompt: the text, a new line, the question, a new line, "Answer:". Metric: greedy decoding writes
the answer's one word.

Where this differs from BABILong:
- `length` counts all tokens of the example, the question and the answer too; theirs counts the
  text alone. 0 stands for the facts alone, as theirs.
- The instructions and examples of its zero-shot prompt are left out: they are for models that
  follow instructions. The harness's tasks have them (`--task lm_eval:babilong_qa1`).
- Its judge looks for the answer among the labels in a generated text; ours wants it at once.
- Sentence ends by a rule (`haystack.py`), theirs by NLTK's.
- A story whose facts do not fit into `length` is not drawn; theirs grow beyond the length.
"""

import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from pytitans.evals.haystack import PYTHON, Haystack, continuation, start_of
from pytitans.evals.task import Example, Task, check_depth

TASKS = ("qa1", "qa2", "qa3", "qa4", "qa5")
SHORTEST = 10  # tokens of a background sentence


class Question(NamedTuple):
    facts: tuple[str, ...]
    question: str
    answer: str


class Babilong(Task):
    """One of the five.

    Args:
        babi: the folder or zip of bAbI.
        files: background text, as `titans train --data` takes it.
        split: of bAbI, "test" or "train".
        folder: "en-10k" (BABILong's: 10,000 questions to train on) or "en" (1,000).
        indexes: JSON of the questions to test, as BABILong's babilong_test_100_idxs.json, in the
            order of its examples; without it they are drawn.
    """

    def __init__(
        self,
        name: str,
        tokenizer: PreTrainedTokenizerFast,
        babi: str | Path,
        files: Sequence[str] = (PYTHON,),
        *,
        split: Literal["test", "train"] = "test",
        folder: Literal["en", "en-10k"] = "en-10k",
        indexes: str | Path | None = None,
    ):
        self.name, self.tokenizer = name, tokenizer
        self.background = Haystack(tokenizer, files)
        self.facts: dict[str, np.ndarray] = {}
        task = name.removeprefix("babilong_")
        self.questions = questions_of(read_babi(babi, folder, task, split))
        self.indexes = None if indexes is None else json.loads(Path(indexes).read_text())[task]
        self.chance = 1 / len({question.answer for question in self.questions})

    def draw(self, rng, index, length, depth) -> Example:
        check_depth(self, depth)
        question, facts = self.question(rng, index, length)
        ask = continuation(self.tokenizer, f"\n{question.question}\nAnswer:")
        answer = continuation(self.tokenizer, f" {question.answer}")
        start = start_of(self.tokenizer)
        used = sum(len(piece) for piece in (start, *facts, ask, answer))
        if length and used > length:
            raise ValueError(f"length={length} is too short for {self.name}: it takes {used} here")
        background = self.sentences(rng, length - used) if length else []
        places = np.sort(rng.integers(len(background) + 1, size=len(facts)))
        pieces, done = [start], 0
        for place, fact in zip(places, facts, strict=True):
            pieces += [*background[done:place], fact]
            done = place
        pieces += [*background[done:], ask, answer]
        return Example.of_pieces(pieces, [len(pieces) - 1])

    def question(
        self, rng: np.random.Generator, index: int, length: int
    ) -> tuple[Question, list[np.ndarray]]:
        """The one to ask, and its facts' ids; of those drawn, the first that leaves room for it."""
        for _ in range(1000):
            number = int(rng.integers(len(self.questions)))
            if self.indexes is not None:
                number = self.indexes[index % len(self.indexes)]
            question = self.questions[number]
            facts = [self.fact(fact) for fact in question.facts]
            rest = len(question.question) + len(question.answer) + 16
            if not length or self.indexes is not None or sum(map(len, facts)) + rest <= length:
                return question, facts
        raise ValueError(f"length={length} is too short for the facts of {self.name}")

    def fact(self, text: str) -> np.ndarray:
        """Its ids; bAbI has few different facts, and says them often."""
        if text not in self.facts:
            self.facts[text] = continuation(self.tokenizer, f" {text}")
        return self.facts[text]

    def sentences(self, rng: np.random.Generator, length: int) -> list[np.ndarray]:
        """`length` tokens of background, in sentences, short ones left out, the last one cut."""
        found: list[np.ndarray] = []
        missing = length
        while missing > 0:
            for sentence in self.background.sentences(rng, missing + missing // 8 + 1000)[:-1]:
                if len(sentence) >= SHORTEST and missing > 0:
                    found.append(sentence[:missing])
                    missing -= len(found[-1])
        return found


def read_babi(babi: str | Path, folder: str, task: str, split: str) -> str:
    """The text of a task's file, `folder/qa1_..._test.txt` at any depth of the folder or zip."""
    babi = Path(babi).expanduser()
    ending = f"_{split}.txt"

    def fits(name: str) -> bool:
        path = Path(name)
        return (
            path.parent.name == folder
            and path.name.startswith(f"{task}_")
            and (path.name.endswith(ending))
        )

    if babi.is_file() and zipfile.is_zipfile(babi):
        with zipfile.ZipFile(babi) as archive:
            for name in archive.namelist():
                if fits(name):
                    return archive.read(name).decode()
    elif babi.is_dir():
        for path in sorted(babi.rglob(f"{task}_*{ending}")):
            if fits(str(path)):
                return path.read_text()
    raise ValueError(
        f"{str(babi)!r} holds no {folder}/{task}_..._{split}.txt: give the folder or zip of bAbI's "
        "tasks_1-20_v1-2 by --babi"
    )


def questions_of(text: str) -> list[Question]:
    """Every question, with the facts its story has told before; earlier questions are no facts.

    A line is `number fact`, or `number question<tab>answer<tab>supporting facts`; a story begins
    with number 1.
    """
    found, facts = [], []
    for line in text.strip().splitlines():
        number, _, rest = line.partition(" ")
        if number == "1":
            facts = []
        sentence, *answer = rest.split("\t")
        if answer:
            found.append(Question(tuple(facts), sentence.strip(), answer[0]))
        else:
            facts.append(sentence.strip())
    return found
