"""The commands `titans eval --task NAME` and `titans report`."""

import re
from typing import TYPE_CHECKING, Any

from pytitans.options import new_parser, parse

if TYPE_CHECKING:
    from jsonargparse import Namespace

COMMAND = "eval --task NAME"
HARNESS = "lm_eval:"
LENGTHS = ("1K", "4K", "16K")
LENGTH = re.compile(r"(\d+)([KMkm]?)")


def eval_task(argv: list[str]) -> int:
    """Runs a task on a model; prints the table, and writes the results."""
    from pytitans.data.text import SPLITS
    from pytitans.evals.streaming import PIECE

    parser = new_parser(COMMAND, "Runs a task on a model: does it remember?")
    add = parser.add_argument
    add("--task", type=str, required=True, help="a needle task, ...; see the end of this help")
    add("--model", type=str, required=True, help="folder or hub name of a causal model")
    add("--lengths", type=str, nargs="+", default=list(LENGTHS), help="tokens, as 65536, 64K or 2M")
    add("--depths", type=float, nargs="*", help="where the needle is, in %%; the task's own")
    add("--samples", type=int, default=16, help="examples for each length and depth")
    add("--seed", type=int, default=0, help="the same seed makes the same examples")
    add("--data.files", type=str, nargs="*", default=[], metavar="FILES",
        help="text of the haystack, or to score by position; short: --data")  # fmt: skip
    add("--data.validation", type=str, nargs="*", default=[], metavar="FILES",
        help="as in training, for --split")  # fmt: skip
    add("--data.test", type=str, nargs="*", default=[], metavar="FILES", help="likewise")
    add("--split", type=str, default="all", help=f"of the text: {', '.join(SPLITS)}, all")
    add("--limit", type=int | None, help="bytes of each document (positions), examples (lm_eval)")
    add("--babi", type=str | None, help="folder or zip of bAbI's tasks_1-20_v1-2, for babilong")
    add("--babi_indexes", type=str | None, help="JSON of the questions to test")
    add("--pairs", type=int | None, help="keys of recall; length / 16")
    add("--local", type=str | None, help="folder with the harness's data as JSON lines")
    add("--window", type=int | None, help="read only the last so many tokens")
    add("--piece", type=int, default=PIECE, help="tokens that are read at once")
    add("--batch_size", type=int | None, help="examples side by side; what fits 32K tokens")
    add("--bf16", type=bool, default=False, help="bf16 autocast instead of the model's own type")
    add("--give_up", type=bool, default=False,
        help="ask nothing longer once nothing of a length is right")  # fmt: skip
    add("--label", type=str | None, help="the model's name in reports")
    add("--output", type=str | None, help="JSON of the results; a run that is there goes on")
    options = parse(parser, COMMAND, argv)

    from pytitans.cli import load_model, model_folder, quiet
    from pytitans.data.tokenizer import check_vocabulary, load_tokenizer
    from pytitans.evals.report import section_of_results
    from pytitans.evals.results import Results, command_line, describe_model, describe_software

    check_options(options)
    quiet()
    folder = model_folder(options.model)
    tokenizer = load_tokenizer(folder)
    runner, asked = prepare(options, folder, tokenizer)
    model = load_model(folder)
    if options.task not in WITHOUT_TOKENIZER:
        check_vocabulary(tokenizer, model.config.get_text_config().vocab_size)
    results = Results(
        options.output,
        {
            "task": options.task.partition(":")[0],
            "options": asked,
            "seed": options.seed,
            "label": options.label,
            "model": describe_model(model, options.model),
            "software": describe_software(),
            "command": command_line("eval", argv),
        },
    )
    runner(model, results)
    print(section_of_results(results.facts))
    if options.output:
        print(f"\nsaved: {options.output}")
    return 0


WITHOUT_TOKENIZER = {"recall", "parity", "modular_addition", "s5"}  # their tokens mean nothing


def prepare(options: "Namespace", folder: str, tokenizer: Any):
    """What will run a model, and the options that make the results what they are. Whatever is wrong
    with them is said here, before a model is loaded."""
    from pytitans.data.text import TextData, head, load_text
    from pytitans.evals import load_task
    from pytitans.evals.run import run_positions, run_task
    from pytitans.evals.streaming import context_limit, position_limit

    reading = {"piece": options.piece, "bf16": options.bf16}
    asked: dict[str, Any] = {"window": options.window, "bf16": options.bf16}
    if options.task.startswith(HARNESS):
        from pytitans.evals.harness import run_harness

        names = options.task.removeprefix(HARNESS).split(",")
        asked |= {"tasks": names, "local": options.local is not None, "limit": options.limit}
        sources = {"babi": options.babi, "files": options.data.files}
        lengths = [length_of(x) for x in options.lengths]

        def harness(model, results):
            run_harness(
                model, tokenizer, folder, names, results,
                local=options.local, limit=options.limit, batch_size=options.batch_size or 8,
                seed=options.seed, lengths=lengths, **sources, **reading,
            )  # fmt: skip

        return harness, asked
    if options.task == "positions":
        if not options.data.files:
            raise ValueError("positions needs documents: give files by --data")
        text = TextData(
            files=options.data.files, validation=options.data.validation, test=options.data.test
        )
        found = load_text(text, (options.split,))[options.split]
        documents = [part for document in found for part in head([document], options.limit)]

        def score(model, results):
            window = context_limit(model) if options.window is None else options.window
            run_positions(model, tokenizer, documents, results, window=window, **reading)

        return score, asked
    made = {"pairs": options.pairs} if options.task == "recall" else {}
    if options.task.startswith("babilong_"):
        made["indexes"] = options.babi_indexes
    size = min(8192, len(tokenizer) if len(tokenizer) != 258 else 256)
    task = load_task(
        options.task, tokenizer,
        files=options.data.files, babi=options.babi, vocab_size=size, **made,
    )  # fmt: skip
    lengths, depths = [length_of(x) for x in options.lengths], options.depths or None
    for length in lengths:  # too short, or no depth: known before hours of the others
        task.example(0, length=length, depth=(depths or task.depths)[0], seed=options.seed)
    asked |= made | {"files": list(options.data.files)}

    def run(model, results):
        window = position_limit(model) if options.window is None else options.window
        run_task(
            model, task, results,
            lengths=lengths, depths=depths, samples=options.samples, seed=options.seed,
            window=window, batch_size=options.batch_size, give_up=options.give_up, **reading,
        )  # fmt: skip

    return run, asked


def check_options(options: "Namespace") -> None:
    for name in ("samples", "piece", "batch_size", "window", "limit"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be 1 or more")


def length_of(text: str) -> int:
    """64K -> 65536, 2M -> 2097152."""
    found = LENGTH.fullmatch(text)
    if found is None:
        raise ValueError(f"{text!r} is no length: write tokens as 65536, 64K or 2M")
    return int(found[1]) * {"": 1, "K": 2**10, "M": 2**20}[found[2].upper()]


def report(argv: list[str]) -> int:
    """Writes tables and pictures of results."""
    parser = new_parser("report", "Tables and pictures of what `titans eval --task` has written.")
    parser.add_argument("files", type=str, nargs="+", help="JSON files of results")
    parser.add_argument("--output", type=str, default="report", help="folder to write into")
    options = parse(parser, "report", argv)

    from pytitans.evals.report import write_report

    written = write_report(options.files, options.output)
    print(written[0].read_text(), end="")
    print(f"\nsaved: {' '.join(str(path) for path in written)}")
    return 0
