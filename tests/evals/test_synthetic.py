"""Recall is Zoology's task, state tracking a group's, mentions are told twice: loops say so."""

import re
from itertools import permutations

import numpy as np
import pytest

from pytitans.data.tokenizer import byte_tokenizer
from pytitans.evals import load_task
from pytitans.evals.haystack import Haystack
from pytitans.evals.mentions import Mentions
from pytitans.evals.recall import Recall
from pytitans.evals.state_tracking import GROUPS, StateTracking, prefix_products


@pytest.mark.parametrize(
    "length, pairs, vocabulary", [(64, 4, 8192), (48, 12, 100), (64, None, 32)]
)
def test_recall_by_its_definition(length, pairs, vocabulary):
    task = Recall(vocabulary, pairs)
    for index in range(5):
        example = task.example(index, length=length)
        count = pairs or length // 16
        told = dict(
            zip(example.ids[0 : 2 * count : 2], example.ids[1 : 2 * count : 2], strict=True)
        )
        assert len(told) == count == len(set(told.values()))
        assert all(1 <= key < vocabulary // 2 <= value < vocabulary for key, value in told.items())
        asked = {
            int(example.ids[t]): int(v) for t, v in zip(example.at, example.expected, strict=True)
        }
        assert asked == told  # each key comes back, once
        assert (example.at >= 2 * count).all() and (example.at % 2 == 0).all()
        assert (np.diff(example.at) > 0).all() and len(example.ids) == length
        assert list(example.answer) == list(range(count))


def test_recalls_gaps_follow_the_power_law():
    """Against numpy's own draw without replacement, as the original makes it: which gap is drawn
    first matters, since it is the first key's."""
    task, rng, space, count = Recall(256, 40), np.random.default_rng(0), 2000, 40
    p = np.arange(1, space + 1) ** (task.power - 1)
    drawn = np.array([task.gaps(rng, space, count) for _ in range(1000)])
    theirs = np.array([rng.choice(space, count, replace=False, p=p / p.sum()) for _ in range(1000)])
    assert all(len(set(row)) == count for row in drawn)
    ours, other = (np.log1p(x).mean(0) for x in (drawn, theirs))
    assert np.abs(ours - other).max() < 0.4  # 5 standard errors
    assert other[-1] - other[0] > 1
    near = [(x[:, 0] == 0).mean() for x in (drawn, theirs)]
    assert near[0] == pytest.approx(near[1], abs=0.06) and near[1] > 0.1


def test_recall_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="pairs=20"):
        Recall(64, 20).example(0, length=64)


@pytest.mark.parametrize("name", GROUPS)
def test_groups_are_groups(name):
    table, n = GROUPS[name](), len(GROUPS[name]())
    assert (table[0] == np.arange(n)).all() and (table[:, 0] == np.arange(n)).all()
    assert all(sorted(row) == list(range(n)) for row in table)
    a, b, c = np.random.default_rng(0).integers(n, size=(3, 200))
    assert (table[table[a, b], c] == table[a, table[b, c]]).all()
    assert (name == "s5") == bool((table != table.T).any())


def test_states_are_what_a_loop_comes_to():
    ids = StateTracking("parity").example(0, length=77)
    assert (ids.expected == np.cumsum(ids.ids) % 2).all()
    ids = StateTracking("modular_addition").example(0, length=77)
    assert (ids.expected == np.cumsum(ids.ids) % 5).all()
    example, elements = StateTracking("s5").example(0, length=77), list(permutations(range(5)))
    state = tuple(range(5))
    for token, expected in zip(example.ids, example.expected, strict=True):
        state = tuple(elements[token][i] for i in state)  # the latest is applied last
        assert elements[expected] == state


@pytest.mark.parametrize("length", [1, 2, 3, 8, 13])
def test_prefix_products_of_any_length(length):
    table = GROUPS["s5"]()
    elements = np.random.default_rng(1).integers(120, size=length)
    expected, state = [], 0
    for element in elements:
        state = table[element, state]
        expected.append(state)
    assert prefix_products(table, elements).tolist() == expected


def test_tasks_load_by_name():
    for name in ("recall", *GROUPS):
        assert (
            load_task(name, byte_tokenizer(), vocab_size=256).example(0, length=64).ids.max() < 256
        )


FORMS = ("{word}{number} ", "It is said that {word} has {number}. ")


@pytest.mark.parametrize("letters, prose", [(2, False), (None, False), (None, True)])
def test_mentions_ask_for_every_number_that_was_told_before(letters, prose):
    hay = Haystack(byte_tokenizer()) if prose else None
    options = {"letters": letters, "forms": FORMS, "gap": 12, "prose": hay}
    task = Mentions(byte_tokenizer(), words=(3, 5), **options)
    for index in range(8):
        example = task.example(index, length=400)
        text = bytes(example.ids.astype(np.uint8)).decode()
        assert len(example.ids) == len(text) == 400
        name = "[a-z]{2}" if letters else "[a-z]+-[a-z]+"
        told: dict[str, str] = {}
        wanted: list[tuple[int, str]] = []
        for found in re.finditer(rf"(?:^| )({name})(?: has )?([0-9]{{1,3}})(?:[ .]|$)", text):
            word, number = found.groups()
            wanted += [(found.start(2), number)] * (word in told)
            assert told.setdefault(word, number).startswith(number)  # the last one may be cut
        asked = [example.answer == i for i in range(example.answers)]
        answers = [bytes(example.expected[i].astype(np.uint8)).decode() for i in asked]
        starts = [int(example.at[i][0]) + 1 for i in asked]
        assert list(zip(starts, answers, strict=True)) == wanted
        assert len(wanted) > len(told) > 1


def test_mentions_of_more_words_than_there_are_and_of_none_twice():
    with pytest.raises(ValueError, match="letters=1"):
        Mentions(byte_tokenizer(), letters=1, words=(2, 27))
    with pytest.raises(ValueError, match="length=16"):
        Mentions(byte_tokenizer()).example(0, length=16)


def test_mentions_with_long_hay_are_told_twice_in_a_short_text_too():
    task = Mentions(byte_tokenizer(), gap=500)
    assert all(task.example(index, length=200).answers for index in range(50))
