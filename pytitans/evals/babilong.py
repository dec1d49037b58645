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
        files: background text, as `titans train --data` takes it, or its Haystack, which several
            tasks can share.
        split: of bAbI, "test" or "train".
        folder: "en-10k" (BABILong's: 10,000 questions to train on) or "en" (1,000).
        indexes: JSON of the questions to test, as BABILong's babilong_test_100_idxs.json, in the
            order of its examples; without it they are drawn.
        whole: an example is a story with all its questions, each asked where bAbI asks it, as far
            as it fits: to train on, where one question at the end of a text teaches little.
    """

    def __init__(
        self,
        name: str,
        tokenizer: PreTrainedTokenizerFast,
        babi: str | Path,
        files: Sequence[str] | Haystack = (PYTHON,),
        *,
        split: Literal["test", "train"] = "test",
        folder: Literal["en", "en-10k"] = "en-10k",
        indexes: str | Path | None = None,
        whole: bool = False,
    ):
        if whole and indexes is not None:
            raise ValueError("indexes are of single questions, and whole=True asks for stories")
        self.name, self.tokenizer = name, tokenizer
        self.background = files if isinstance(files, Haystack) else Haystack(tokenizer, files)
        self.said: dict[str, np.ndarray] = {}
        task = name.removeprefix("babilong_")
        stories = stories_of(read_babi(babi, folder, task, split))
        self.questions = [question for story in stories for question in story]
        self.stories = stories if whole else [[question] for question in self.questions]
        self.indexes = None if indexes is None else json.loads(Path(indexes).read_text())[task]
        self.chance = 1 / len({question.answer for question in self.questions})

    def draw(self, rng, index, length, depth) -> Example:
        check_depth(self, depth)
        story = self.story(rng, index, length)
        facts = [self.ids(f" {fact}") for fact in story[-1].facts]
        used = self.size_of(story)
        if length and used > length:
            raise ValueError(f"length={length} is too short for {self.name}: it takes {used} here")
        background = self.sentences(rng, length - used) if length else []
        places = np.sort(rng.integers(len(background) + 1, size=len(facts)))
        pieces, asked, done = [start_of(self.tokenizer)], [], 0
        for told, (place, fact) in enumerate(zip(places, facts, strict=True), 1):
            pieces += [*background[done:place], fact]
            done = place
            for question in story[:-1]:
                if len(question.facts) == told:
                    pieces += [*self.asked(question), self.ids("\n")]
                    asked.append(len(pieces) - 2)
        pieces += [*background[done:], *self.asked(story[-1])]
        return Example.of_pieces(pieces, [*asked, len(pieces) - 1])

    def asked(self, question: Question) -> tuple[np.ndarray, np.ndarray]:
        """The question, and its answer."""
        return self.ids(f"\n{question.question}\nAnswer:"), self.ids(f" {question.answer}")

    def size_of(self, story: Sequence[Question]) -> int:
        """Tokens of a story without background."""
        facts = [self.ids(f" {fact}") for fact in story[-1].facts]
        asked = [piece for question in story for piece in self.asked(question)]
        between = (len(story) - 1) * len(self.ids("\n"))
        return between + sum(map(len, [start_of(self.tokenizer), *facts, *asked]))

    def story(self, rng: np.random.Generator, index: int, length: int) -> list[Question]:
        """The one to ask of; of those drawn, the first that fits into the length."""
        for _ in range(1000):
            number = int(rng.integers(len(self.stories)))
            if self.indexes is not None:
                number = self.indexes[index % len(self.indexes)]
            story = self.stories[number]
            if length and self.indexes is None:
                while story and self.size_of(story) > length:
                    story = story[:-1]  # told as far as it fits
            if story:
                return story
        raise ValueError(f"length={length} is too short for the facts of {self.name}")

    def ids(self, text: str) -> np.ndarray:
        """Of a fact, question or answer; bAbI has few different ones, and says them often."""
        if text not in self.said:
            self.said[text] = continuation(self.tokenizer, text)
        return self.said[text]

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


def stories_of(text: str) -> list[list[Question]]:
    """Every story's questions, each with the facts told before it; earlier questions are no facts.

    A line is `number fact`, or `number question<tab>answer<tab>supporting facts`; a story begins
    with number 1.
    """
    found: list[list[Question]] = []
    facts: list[str] = []
    for line in text.strip().splitlines():
        number, _, rest = line.partition(" ")
        if number == "1":
            facts = []
            found.append([])
        sentence, *answer = rest.split("\t")
        if answer:
            found[-1].append(Question(tuple(facts), sentence.strip(), answer[0]))
        else:
            facts.append(sentence.strip())
    return [story for story in found if story]
