"""What an evaluation is: a task that makes examples, the same for the same length, depth and seed.

    task = load_task("niah_single_1", tokenizer)
    example = task.example(0, length=65536, depth=50)     # the first of them
    ids, targets = task.batch(32, length=1024, seed=7)    # to train on: [32, 1024] each

An example is a sequence of tokens and some questions about it: at position `at[i]` the model's
most likely next token should be `expected[i]`. Questions with the same number in `answer` are one
answer, right if all of its tokens are. Where an answer stands in the sequence itself, after the
question (needles, BABILong), all its tokens being the likeliest given the right ones before is the
same as greedy decoding writing it: both take the argmax, and as long as all are right both have
read the same. So one pass over the sequence decides, and nothing is generated.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pytitans.data.windows import IGNORED


@dataclass(frozen=True)
class Example:
    """ids [T]; at, expected, answer [N]: see above. `at` is in ascending order."""

    ids: np.ndarray
    at: np.ndarray
    expected: np.ndarray
    answer: np.ndarray

    @property
    def answers(self) -> int:
        """How many answers are asked for."""
        return int(self.answer[-1]) + 1

    @classmethod
    def of_pieces(cls, pieces: Iterable[np.ndarray | Sequence[int]], asked: Sequence[int]):
        """The pieces in a row, of which those with the numbers `asked` are the answers."""
        pieces = [np.asarray(piece) for piece in pieces]
        ends = np.cumsum([len(piece) for piece in pieces])
        places = [np.arange(ends[i] - len(pieces[i]), ends[i]) for i in asked]
        ids = np.concatenate(pieces)
        at = np.concatenate(places)
        answer = np.repeat(np.arange(len(asked)), [len(place) for place in places])
        return cls(ids, at - 1, ids[at], answer)

    def targets(self) -> np.ndarray:
        """[T]: what the logits at each token should say; IGNORED where nothing is asked."""
        targets = np.full(len(self.ids), IGNORED, dtype=np.int64)
        targets[self.at] = self.expected
        return targets


class Task(ABC):
    """A source of examples. `name` and the options that made it identify it.

    depths: where the thing to be found is, in percent of the text before it, as asked by default;
    (None,) for a task that has no such place. chance: accuracy of a guess.
    """

    name: str
    depths: Sequence[float | None] = (None,)
    chance: float = 0.0

    @abstractmethod
    def draw(
        self, rng: np.random.Generator, index: int, length: int, depth: float | None
    ) -> Example:
        """The index-th example, with all that is left to chance taken from `rng`."""

    def example(
        self, index: int, *, length: int, depth: float | None = None, seed: int = 0
    ) -> Example:
        """The index-th example, the same whenever and in whatever order it is asked for."""
        place = 0 if depth is None else 1 + round(1000 * depth)
        rng = np.random.default_rng([seed, length, place, index])
        return self.draw(rng, index, length, depth)

    def examples(
        self, count: int, *, length: int, depth: float | None = None, seed: int = 0, first: int = 0
    ) -> Iterator[Example]:
        for index in range(first, first + count):
            yield self.example(index, length=length, depth=depth, seed=seed)

    def batch(
        self, count: int, *, length: int, depth: float | None = None, seed: int = 0, first: int = 0
    ) -> tuple[Tensor, Tensor]:
        """`count` examples to train on, from number `first` on: ids [count, T], targets [count, T].

        The targets belong to the logits of the same position: they are not shifted any more.

        >>> loss = cross_entropy(model(ids).logits.mT, targets)  # targets of IGNORED have no loss
        """
        found = self.examples(count, length=length, depth=depth, seed=seed, first=first)
        return collate(list(found))


def collate(examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """ids and targets [B, T]; shorter ones are filled up with 0 after their end, where a causal
    model's answers are not touched by it."""
    longest = max(len(example.ids) for example in examples)
    ids = np.zeros((len(examples), longest), dtype=np.int64)
    targets = np.full((len(examples), longest), IGNORED, dtype=np.int64)
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = example.ids
        targets[row, example.at] = example.expected
    return torch.from_numpy(ids), torch.from_numpy(targets)


def check_depth(task: Task, depth: float | None) -> None:
    if depth is not None and (task.depths == (None,) or not 0 <= depth <= 100):
        raise ValueError(
            f"{task.name} has no depth: leave it out"
            if task.depths == (None,)
            else f"depth={depth} must be 0 to 100, in percent of the text before the needle"
        )
