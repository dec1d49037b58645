"""BABILong: a question's facts, all and in order, somewhere in the text; then the question."""

import json
import re
import zipfile

import pytest

from pytitans.data.tokenizer import byte_tokenizer
from pytitans.evals import load_task
from pytitans.evals.babilong import stories_of

BABI = """\
1 John travelled to the hallway.
2 Mary journeyed to the bathroom.
3 Where is John? \thallway\t1
4 Daniel went back to the bathroom.
5 John moved to the bedroom.
6 Where is John? \tbedroom\t5
1 Sandra travelled to the kitchen.
2 Where is Sandra? \tkitchen\t1
"""
BACKGROUND = "It was a dark and stormy night. The rain fell in torrents. Oh! " * 5
BYTES = byte_tokenizer()


@pytest.fixture
def babi(tmp_path):
    folder = tmp_path / "tasks_1-20_v1-2" / "en-10k"
    folder.mkdir(parents=True)
    (folder / "qa1_single-supporting-fact_test.txt").write_text(BABI)
    (folder / "qa10_indefinite-knowledge_test.txt").write_text("1 no\n2 Who?\tnobody\t1\n")
    (tmp_path / "book.txt").write_text(BACKGROUND)
    return tmp_path


def load(root, **options):
    files = [str(root / "book.txt")]
    folder = root / "tasks_1-20_v1-2"
    return load_task("babilong_qa1", BYTES, **{"files": files, "babi": str(folder), **options})


def text_of(example) -> str:
    return BYTES.decode(example.ids.tolist(), skip_special_tokens=True)


def test_questions_know_the_facts_told_before_them():
    (first, second), (third,) = stories_of(BABI)
    assert first.facts == ("John travelled to the hallway.", "Mary journeyed to the bathroom.")
    assert second.facts == (
        *first.facts,
        "Daniel went back to the bathroom.",
        "John moved to the bedroom.",
    )
    assert third == (("Sandra travelled to the kitchen.",), "Where is Sandra?", "kitchen")


@pytest.mark.parametrize("length", [400, 1000])
def test_facts_are_scattered_in_order(babi, length):
    task = load(babi)
    for index in range(8):
        example = task.example(index, length=length, seed=3)
        text = text_of(example)
        context, question, answer = text.rsplit("\n", 2)
        matches = [
            q
            for q in task.questions
            if q.question == question
            and answer == f"Answer: {q.answer}"
            and all(f in context for f in q.facts)
        ]
        assert matches
        places = [context.index(fact) for fact in matches[-1].facts]
        assert places == sorted(places)
        assert len(example.ids) == length
        assert BYTES.decode(example.expected.tolist()) == answer.removeprefix("Answer:")
        assert "Oh!" not in context  # sentences of fewer than 10 tokens are left out


@pytest.mark.parametrize("length", [0, 400])
def test_a_whole_story_is_asked_where_it_is_in_babi(babi, length):
    task = load(babi, whole=True)
    examples = [task.example(index, length=length, seed=3) for index in range(8)]
    assert {example.answers for example in examples} == {1, 2}
    for example in (x for x in examples if x.answers == 2):
        assert len(example.ids) == (length or len(example.ids))
        lines = text_of(example).split("\n")
        assert [lines[i] for i in (1, 2, 4, 5)] == [
            "Where is John?", "Answer: hallway", "Where is John?", "Answer: bedroom",
        ]  # fmt: skip
        assert "Mary journeyed to the bathroom." in lines[0]
        assert "John moved" not in lines[0] and "John moved to the bedroom." in lines[3]
        answers = [example.expected[example.answer == i] for i in (0, 1)]
        assert [BYTES.decode(x.tolist()) for x in answers] == [" hallway", " bedroom"]


def test_a_story_is_told_as_far_as_it_fits(babi):
    task = load(babi, whole=True)
    longest = max(task.size_of(story) for story in task.stories)
    examples = [task.example(index, length=longest - 1) for index in range(8)]
    assert all(example.answers == 1 for example in examples)
    assert any("Where is John?" in text_of(example) for example in examples)
    assert max(task.example(index, length=longest).answers for index in range(8)) == 2


def test_length_0_is_the_facts_alone(babi):
    example = load(babi).example(0, length=0)
    sentences = re.findall(r"[^.]+\.", text_of(example).split("\n")[0])
    assert sentences and all(sentence.strip() in BABI for sentence in sentences)


def test_zip_and_folder_are_the_same(babi, tmp_path):
    path = tmp_path / "babi.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in (tmp_path / "tasks_1-20_v1-2").rglob("*.txt"):
            archive.write(file, file.relative_to(tmp_path))
    both = [load(babi, babi=str(x)).example(0, length=300).ids for x in (path, tmp_path)]
    assert (both[0] == both[1]).all()


def test_indexes_choose_the_questions(babi, tmp_path):
    (tmp_path / "indexes.json").write_text(json.dumps({"qa1": [2, 0]}))
    task = load(babi, indexes=tmp_path / "indexes.json")
    asked = [text_of(task.example(i, length=300)).split("\n")[1] for i in range(3)]
    assert asked == ["Where is Sandra?", "Where is John?", "Where is Sandra?"]


def test_what_is_missing_is_named(babi):
    with pytest.raises(ValueError, match="by --babi"):
        load_task("babilong_qa1", BYTES)
    with pytest.raises(ValueError, match=r"en/qa1_\.\.\._test\.txt"):
        load(babi, folder="en")
    with pytest.raises(ValueError, match="too short"):
        load(babi).example(0, length=40)
    with pytest.raises(ValueError, match="indexes are of single questions"):
        load(babi, whole=True, indexes="indexes.json")
