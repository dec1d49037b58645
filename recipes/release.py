"""Trains the small models that come with the package, `pytitans/released/NAME`.

    python recipes/release.py needle --data "books/*.txt.xz"
    python recipes/release.py needles --data "books/*.txt.xz"
    python recipes/release.py books --data "books/*.txt.xz"

`needle` finds a number or a UUID in long texts (RULER's S-NIAH-1 to 3), `books` predicts the bytes
of English novels, `needles` tells which of several numbers is asked for (MK-1).
Each takes one to two hours of one core, or less, and goes on where it was stopped. The books held
out are those of `recipes/books.yaml`. The models of the package are those of seed 0.
"""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiment import SHAPE, build
from language import HELD_OUT, split_books
from transformers import AutoModelForCausalLM, PreTrainedModel

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


def needle(files: list[str], folder: Path, seed: int, **options: Any) -> None:
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
    train_in_turn(
        build("mal", SHAPE, seed), folder, seed, [Run(learn, 2e-3), Run(close, 1e-3)], **options
    )


def needles(files: list[str], folder: Path, seed: int, **options: Any) -> None:
    """First words and numbers side by side, dozens in a text; then ever more between the two.

    Attention sees 8 bytes while numbers stand beside their words, so that the memory binds them,
    and 64 from there on: it brings the word across a sentence to its number (docs/log.md).
    """
    novels, _ = split_books(files)
    tokenizer = byte_tokenizer()

    def mentions(*forms: str, words: tuple[int, int] = (3, 8), **options: Any) -> Mentions:
        forms = tuple(form + " {number}. " for form in forms)
        return Mentions(tokenizer, forms=forms, words=words, **options)

    def learned(task: Mentions, shortest: int, longest: int, most: int) -> Stage:
        return Stage([task], shortest, longest, most, fill=4096, until=0.12, review=0.25)

    adjacent = [
        Mentions(tokenizer, forms=["{word}{number} "], letters=count, digits=min(count, 3))
        for count in (1, 2, 3, 4)
    ]
    beside = ("{word}", "{word}:", "{word} is", "{word} is:", "{word} is now")
    far = ("{word} is:", "{word} in the text is", "{word} mentioned in the text is")
    ruler = (
        "One of the special magic numbers for {word} is:",
        "The special magic number for {word} mentioned in the provided text is",
    )
    bind = [
        *(learned(task, 256, 512, 600) for task in adjacent),
        *(learned(mentions(*beside[:n], words=(2, 6)), 256, 512, 800) for n in (2, 4, 5)),
    ]
    part = [
        *(learned(mentions(*beside[:n]), 256, 512, 800) for n in (2, 4, 5)),
        learned(mentions(*beside[2:], gap=8), 256, 1024, 600),
        learned(mentions(*far[:2], gap=20), 256, 1024, 600),
        learned(mentions(*far, gap=20, digits=4), 256, 1024, 600),
        learned(mentions(far[0], ruler[1], gap=20, digits=5), 256, 1024, 600),
        learned(mentions(*ruler, gap=30, digits=7), 256, 1024, 600),
        learned(mentions(*ruler, gap=120, digits=7, words=(3, 6)), 640, 1024, 600),
    ]
    hay = Haystack(tokenizer, novels)
    in_prose = [
        mentions(*ruler, gap=gap, digits=7, words=(3, 6), prose=hay) for gap in (60, 120, 240, 500)
    ]
    noise, prose, key = (
        load_task(f"niah_{name}", tokenizer, files=novels)
        for name in ("single_1", "single_2", "multikey_1")
    )
    near = [*in_prose[:2], key, in_prose[1], *in_prose[:2], key, prose]
    mixed = [in_prose[2], key, in_prose[1], key, prose, in_prose[3], key, noise]
    find = [  # seven digits are right together only once each is nearly sure
        Stage(near, 768, 1024, steps=4500, fill=4096),
        Stage(mixed, 1024, 2048, steps=1000, fill=4096),
    ]
    close = [  # the price closes gates on prose; what then opens them is a needle alone
        Stage(mixed, 1024, 4096, steps=500, gate_penalty=0.1),
        Stage(mixed, 1024, 4096, steps=400, gate_penalty=0.02),
    ]
    model = build("wide_mal", SHAPE | {"window": 8}, seed)
    runs = [
        Run(bind, 3e-3, STEADY), Run(part, 2e-3, STEADY, window=64), Run(find, 2e-3),
        Run(close, 1e-3, rest=0.0),
    ]  # fmt: skip
    train_in_turn(model, folder, seed, runs, **options)


STEADY = "constant_with_warmup"  # for stages that end when they are learned


class Run(NamedTuple):
    """Stages at one schedule of the rate. window: of attention, where it changes. rest: what a
    byte that is no answer counts; prose to be told keeps gates open on it."""

    stages: Sequence[Stage]
    rate: float
    schedule: str = "cosine"
    window: int | None = None
    rest: float = 0.1


def train_in_turn(
    model: PreTrainedModel, folder: Path, seed: int, runs: Sequence[Run], **options: Any
) -> None:
    """The last run in `folder`, the others in `folder`/part1, part2, ... Each is made once, and
    the next goes on from its weights. options: of TrainArguments."""
    for number, run in enumerate(runs):
        last = number + 1 == len(runs)
        into = folder if last else folder / f"part{number + 1}"
        if number:
            changes = {"window": run.window} if run.window else {}
            before = folder / f"part{number}"
            model = AutoModelForCausalLM.from_pretrained(before, **changes).train()
        if last or not (into / "run.json").exists():
            args = task_arguments(
                into, run.rate, seed + number, lr_scheduler_type=run.schedule, save_steps=0.1,
                save_total_limit=None, **options,
            )  # fmt: skip
            train_on_tasks(model, byte_tokenizer(), run.stages, args, rest=run.rest)


def books(files: list[str], folder: Path, seed: int, **options: Any) -> None:
    args = TrainArguments(
        output_dir=str(folder), max_steps=4000, learning_rate=2e-3, seed=seed,
        per_device_train_batch_size=4, eval_steps=0.1, save_steps=0.1, carry=True,
        report_to="none", **options,
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
    parser.add_argument("--bf16", action="store_true",
        help="products in bfloat16: 1.4 times as fast on a CPU with AMX, slow without")  # fmt: skip
    args = parser.parse_args()
    folder = args.output or Path("runs/released") / args.name
    train_it = {"needle": needle, "needles": needles, "books": books}[args.name]
    train_it(args.data, folder, args.seed, bf16=args.bf16)
    released = folder / "released"  # without checkpoints, as it is in the package
    released.mkdir(exist_ok=True)
    for name in KEPT:
        if (folder / name).exists():
            shutil.copyfile(folder / name, released / name)
    print(f"to be released, with a README.md: {released}")


if __name__ == "__main__":
    main()
