"""Trains the small models that come with the package, `pytitans/released/NAME`.

    python recipes/release.py needle --data "books/*.txt.xz"
    python recipes/release.py needles --data "books/*.txt.xz"
    python recipes/release.py books --data "books/*.txt.xz"

`needle` finds a number or a UUID in long texts (RULER's S-NIAH-1 to 3), `books` predicts the bytes
of English novels. `needles` is to tell which of several numbers is asked for (MK-NIAH-1, MV- and
MQ-NIAH); it does not yet and is not released (docs/log.md).
Each takes about an hour of one core, or less, and goes on where it was stopped. The books held out
are those of `recipes/books.yaml`. The models of the package are those of seed 0.
"""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiment import SHAPE, build
from language import HELD_OUT, split_books
from transformers import AutoModelForCausalLM

from pytitans.data.text import TextData
from pytitans.data.tokenizer import byte_tokenizer
from pytitans.evals import load_task
from pytitans.evals.haystack import Haystack
from pytitans.evals.mentions import Mentions
from pytitans.evals.niah import Passkey
from pytitans.evals.training import Stage, task_arguments, train_on_tasks
from pytitans.train import TrainArguments, last_checkpoint, train

KEPT = (
    "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    "tokenizer_config.json", "run.json", "loss.png",
)  # fmt: skip


def needle(files: list[str], folder: Path, seed: int) -> None:
    books, _ = split_books(files)
    tokenizer = byte_tokenizer()
    names = "single_1 single_2 single_3 multikey_1 multivalue multiquery"
    noise, prose, uuid, key, value, query = (
        load_task(f"niah_{name}", tokenizer, files=books) for name in names.split()
    )
    passkeys = [Passkey(tokenizer), Passkey(tokenizer, digits=12)]
    learn = [  # a UUID's 36 letters take longest to learn
        Stage(passkeys[:1], 96, 128, steps=200, fill=4096),
        Stage(passkeys, 112, 192, steps=100, fill=4096),
        Stage([uuid, noise, uuid, prose], 512, 640, steps=800),
        Stage([uuid, key, prose, query, uuid, value], 1024, 1024, steps=800),
        Stage(
            [uuid, noise, prose, key, uuid, value, prose, query],
            1024, 4096, steps=700, gate_penalty=0.05,
        ),
    ]  # fmt: skip
    # Several needles need gates open to each; without them, gates can close on all else.
    close = [Stage([uuid, noise, uuid, prose], 1024, 4096, steps=2000, gate_penalty=0.2)]
    train_twice("mal", folder, seed, (learn, 2e-3), (close, 1e-3))


def needles(files: list[str], folder: Path, seed: int) -> None:
    """First words and numbers side by side, dozens in a text; then ever more between the two."""
    novels, _ = split_books(files)
    tokenizer = byte_tokenizer()

    def mentions(*forms: str, **options: Any) -> Mentions:
        return Mentions(tokenizer, forms=[form + " {number}. " for form in forms], **options)

    beside = ("{word}", "{word}:", "{word} is", "{word} is:", "{word} is now")
    far = ("{word} is:", "{word} in the text is", "{word} mentioned in the text is")
    ruler = (
        "One of the special magic numbers for {word} is:",
        "The special magic number for {word} mentioned in the provided text is",
    )
    adjacent = [
        Mentions(tokenizer, forms=["{word}{number} "], letters=count, digits=min(count, 3))
        for count in (1, 2, 3, 4)
    ]
    words = mentions(*beside[:2])
    aside = mentions(*beside)
    apart = [
        mentions(*beside[2:], gap=8),
        mentions(*far[:2], gap=20),
        mentions(*far, gap=20, digits=4),
        mentions(far[0], ruler[1], gap=20, digits=5),
        mentions(*ruler, gap=30, digits=7),
        mentions(*ruler, gap=120, digits=7, words=(3, 6)),
    ]
    hay = Haystack(tokenizer, novels)
    in_prose = [
        mentions(*ruler, gap=gap, digits=7, words=(3, 6), prose=hay) for gap in (60, 120, 240, 500)
    ]
    names = "single_1 single_2 multikey_1 multivalue multiquery"
    noise, prose, key, value, query = (
        load_task(f"niah_{name}", tokenizer, files=novels) for name in names.split()
    )
    bind = [
        *(Stage([task], 256, 512, steps=200, fill=4096) for task in adjacent),
        Stage([words], 256, 512, steps=250, fill=4096),
        Stage([aside, aside, words], 256, 512, steps=600, fill=4096),
        *(Stage([task, task, task, aside], 256, 1024, steps=300, fill=4096) for task in apart[:-1]),
        Stage([apart[-1]] * 3 + [aside], 640, 1024, steps=300, fill=4096),
    ]
    mixed = [in_prose[2], key, query, key, prose, in_prose[3], key, value, noise]
    near = [*in_prose[:2], key, in_prose[1], key, prose]
    find = [
        Stage(near, 768, 1024, steps=1800, fill=4096),
        Stage(mixed, 1024, 2048, steps=1400, fill=4096),
        Stage(mixed, 1024, 4096, steps=400, gate_penalty=0.05),
        Stage(mixed, 1024, 4096, steps=300, gate_penalty=0.2),
    ]
    train_twice("wide_lmm", folder, seed, (bind, 3e-3), (find, 2e-3))


def train_twice(
    name: str,
    folder: Path,
    seed: int,
    first: tuple[Sequence[Stage], float],
    second: tuple[Sequence[Stage], float],
) -> None:
    """A model of that name, trained by the first stages at their rate in `folder`/learned, and from
    there by the second ones at theirs. The first run is made once."""
    learned = folder / "learned"

    def run(model, stages: Sequence[Stage], rate: float, folder: Path, seed: int) -> None:
        args = task_arguments(folder, rate, seed, save_steps=0.1)
        train_on_tasks(model, byte_tokenizer(), stages, args)

    if not (learned / "run.json").exists():
        run(build(name, SHAPE, seed), *first, learned, seed)
    run(AutoModelForCausalLM.from_pretrained(learned).train(), *second, folder, seed + 1)


def books(files: list[str], folder: Path, seed: int) -> None:
    args = TrainArguments(
        output_dir=str(folder), max_steps=4000, learning_rate=2e-3, seed=seed,
        per_device_train_batch_size=4, eval_steps=0.1, save_steps=0.1, carry=True,
        report_to="none",
    )  # fmt: skip
    data = TextData(files=files, sequence_length=1024, **HELD_OUT)
    model = build("mal", SHAPE | {"window": 128, "segment_len": 128}, seed)
    train(model, byte_tokenizer(), data, args, checkpoint=last_checkpoint(folder))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=("needle", "needles", "books"))
    parser.add_argument("--data", nargs="+", required=True, help="the books: files or globs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="of the run (default: runs/released/NAME)")
    args = parser.parse_args()
    folder = args.output or Path("runs/released") / args.name
    {"needle": needle, "needles": needles, "books": books}[args.name](args.data, folder, args.seed)
    released = folder / "released"  # without checkpoints, as it is in the package
    released.mkdir(exist_ok=True)
    for name in KEPT:
        if (folder / name).exists():
            shutil.copyfile(folder / name, released / name)
    print(f"to be released, with a README.md: {released}")


if __name__ == "__main__":
    main()
