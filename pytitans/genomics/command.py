"""The command `titans dna`: train, evaluate, embed."""

import dataclasses
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pytitans.options import (
    RUN_FILE,
    add_fields,
    add_model_arguments,
    add_train_arguments,
    new_parser,
    parse,
    resumed,
    subcommand,
)

if TYPE_CHECKING:
    from pytitans.data.dna_sets import DnaData, Labelled

HELP = """\
titans dna: models of DNA

  titans dna train       a classifier of sequences (GUE, GenomicBenchmarks, any table with
                         sequences and labels), or a model of the next base (FASTA)
  titans dna evaluate    MCC and accuracy on the test set; bits per base over a whole genome,
                         read through one memory
  titans dna embed       vectors of sequences or of FASTA records of any length

  titans dna train --data GUE/tf/0
  titans dna evaluate --model runs/dna-mal
  titans dna train --data ecoli.fa.gz --train.output_dir runs/ecoli
  titans dna evaluate --model runs/ecoli --output ecoli.json

`titans dna COMMAND --help` shows options and examples; docs/genomics.md says more."""

# What `titans dna train` does when told nothing else, on sequences and on a genome.
CLASSIFIER_RUN: dict[str, Any] = {
    "model.hidden_size": 64,
    "model.intermediate_size": 128,
    "model.memory_depth": 2,  # wide linear memories, as `titans train` has them, were not tried
    "model.memories_per_head": 1,
    "model.window": 64,
    "model.segment_len": 64,
    "model.initializer_range": 0.06,
    "train.max_steps": 2000,
    "train.per_device_train_batch_size": 64,
    "train.per_device_eval_batch_size": 128,
    "train.learning_rate": 2e-3,
    "train.warmup_steps": 0.05,
    "train.eval_steps": 0.1,
    "train.save_steps": 0.1,
    "train.save_total_limit": 2,  # of 1, the Trainer would drop all but the best when stopped
    "train.load_best_model_at_end": True,
}
GENOME_RUN: dict[str, Any] = CLASSIFIER_RUN | {
    "train.per_device_train_batch_size": 8,
    "train.per_device_eval_batch_size": 8,
    "train.load_best_model_at_end": False,
    "train.carry": True,
    "train.eval_steps": 0.25,
    "train.save_steps": 0.25,
}


def dna(argv: list[str]) -> int:
    return subcommand("dna", COMMANDS, HELP, argv)


def is_genome(files) -> bool:
    """Whether these are FASTA files, all of them."""
    from pytitans.data.dna import is_fasta

    kinds = {is_fasta(name) for name in files}
    if kinds == {True, False}:
        raise ValueError("FASTA files and labelled sequences at once: give one or the other")
    return kinds == {True}


def train_command(argv: list[str]) -> int:
    """Trains a classifier, or a model of the next base."""
    from pytitans.data.dna_sets import DnaData
    from pytitans.genomics.models import CNNS

    parser = new_parser("dna train", "Trains a classifier of DNA, or a model of the next base.")
    add = parser.add_argument
    add("--resume", type=str, metavar="FOLDER", help="go on with FOLDER's run")
    add("--start", type=str | None, help="folder of a model to start from, as of the next base")
    add_fields(parser, "data", DnaData)
    add_model_arguments(parser, CNNS)
    add_train_arguments(parser)
    parser.set_defaults(CLASSIFIER_RUN)
    argv = resumed(argv)
    options = parse(parser, "dna train", argv)
    genome = is_genome(options.data.files)
    if genome:
        parser.set_defaults(GENOME_RUN)
        options = parse(parser, "dna train", argv)

    from transformers import set_seed

    from pytitans.cli import quiet, write
    from pytitans.data.dna import nucleotide_tokenizer
    from pytitans.genomics.train import train_bases, train_classifier
    from pytitans.train import TrainArguments, find_checkpoint

    quiet()
    data, tokenizer = DnaData(**options.data.as_dict()), nucleotide_tokenizer()
    kind = "genome" if genome else "dna"
    options.train.output_dir = options.train.output_dir or f"runs/{kind}-{options.model.variant}"
    args = TrainArguments(**options.train.as_dict())
    checkpoint = find_checkpoint(args, resume=options.resume is not None)
    if genome:
        set_seed(args.seed)
        model = language_model(options, tokenizer)
        write(parser.dump(options), Path(options.train.output_dir, RUN_FILE))
        facts = train_bases(model, tokenizer, data, args, checkpoint=checkpoint)
        print(f"{facts['parameters']:,} parameters, {facts['train_tokens']:,} bases trained on")
        if facts["bits_per_byte"] is not None:  # with --train.eval_strategy no
            print(f"dev: {facts['bits_per_byte']:.4f} bits per base")
    else:
        from pytitans.data.dna_sets import load_sets

        sets = load_sets(data)
        print(f"{sets.split}; {len(sets.train.labels):,} sequences to train on", flush=True)
        set_seed(args.seed)
        model = classifier(options, tokenizer, sets)
        write(parser.dump(options), Path(options.train.output_dir, RUN_FILE))
        facts = train_classifier(model, tokenizer, sets, data, args, checkpoint=checkpoint)
        print(f"{facts['parameters']:,} parameters, {facts['epochs']:g} epochs")
        print(f"dev: MCC {facts['dev']['mcc']:.4f}, accuracy {facts['dev']['accuracy']:.4f}")
    print(f"saved: {args.output_dir} (model, tokenizer, loss.png, run.json)")
    return 0


def language_model(options, tokenizer):
    from transformers import AutoModelForCausalLM

    from pytitans.cli import load_model, model_config, model_folder
    from pytitans.genomics.models import CNNS

    if options.start:
        return load_model(model_folder(options.start))
    if options.model.variant in CNNS:
        raise ValueError(f"{options.model.variant} predicts no next base: choose another variant")
    return AutoModelForCausalLM.from_config(model_config(options, tokenizer))


def classifier(options, tokenizer, sets):
    """A classifier with first weights drawn, or with the body of the model to start from."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from pytitans.cli import model_config, model_folder
    from pytitans.genomics.models import build, classifier_config
    from pytitans.models import TitansConfig
    from pytitans.models.configuration_titans import VARIANTS

    labels: dict[str, Any] = {"id2label": dict(enumerate(sets.classes))}
    labels["label2id"] = {label: i for i, label in labels["id2label"].items()}
    if options.start:
        folder = model_folder(options.start)
        if AutoConfig.from_pretrained(folder).model_type != "titans":
            raise ValueError(f"{options.start!r} is no Titans model: --start takes these alone")
        return AutoModelForSequenceClassification.from_pretrained(
            folder, ignore_mismatched_sizes=True, **labels
        )
    name = options.model.variant
    options.model.variant = name if name in VARIANTS else "mac"
    like = model_config(options, tokenizer)
    options.model.variant = name
    assert isinstance(like, TitansConfig)
    longest = max(len(x) for x in sets.train.sequences)
    return build(classifier_config(name, like, sets.classes, longest))


def evaluate_command(argv: list[str]) -> int:
    """Prints how good a model is; writes JSON, and a picture of a genome."""
    from pytitans.data.dna_sets import SPLITS, DnaData
    from pytitans.genomics.counts import ORDERS

    parser = new_parser("dna evaluate", "MCC and accuracy, or bits per base over a genome.")
    add = parser.add_argument
    add("--model", type=str, required=True, help="folder of `titans dna train`")
    add_fields(parser, "data", DnaData)
    add("--split", type=Literal[SPLITS], default="test", help="of labelled sequences")  # type: ignore - a tuple
    add("--batch_size", type=int, default=128, help="sequences at a time")
    add("--orders", type=int, nargs="*", default=list(ORDERS),
        help="of tables of counts beside a genome's model, 1 to 12; none: no table")  # fmt: skip
    add("--window", type=int | None, help="bases that a model of full attention reads at once")
    add("--bf16", type=bool, default=False, help="bf16 autocast instead of the model's own type")
    add("--label", type=str | None, help="the model's name in reports")
    add("--output", type=str | None, help="JSON to write; of a genome also its picture, .png")
    parser.set_defaults({f"data.{field.name}": None for field in dataclasses.fields(DnaData)})
    options = parse(parser, "dna evaluate", argv)

    from pytitans.cli import model_folder, quiet, trained_with, write
    from pytitans.evals.results import command_line, describe_model, describe_software

    quiet()
    given = {key: value for key, value in options.data.as_dict().items() if value is not None}
    fields = {field.name for field in dataclasses.fields(DnaData)}
    known = {key: x for key, x in trained_with(options.model).items() if key in fields}
    data = DnaData(**(known | given))
    if not data.files:
        raise ValueError("nothing to evaluate on: give sequences or a FASTA file by --data")
    genome = is_genome(data.files)
    folder = model_folder(options.model)
    model = load(folder, "causal" if genome else "classifier")
    facts: dict[str, Any] = {
        "task": "dna genome" if genome else "dna",
        "label": options.label or Path(options.model).name,
        "model": describe_model(model, options.model),
        "data": dataclasses.asdict(data),
        "bf16": options.bf16,
        "software": describe_software(),
        "command": command_line("dna evaluate", argv),
    }
    began = time.perf_counter()
    if genome:
        from pytitans.genomics.genome import genome_bits, genome_table, plot_genome

        facts |= genome_bits(
            model, data.files, window=options.window, orders=options.orders,
            seen=resolved(data.files) == resolved(known.get("files", [])), bf16=options.bf16,
        )  # fmt: skip
        print(genome_table(facts))
        if options.output:
            Path(options.output).parent.mkdir(parents=True, exist_ok=True)
            plot_genome(facts, Path(options.output).with_suffix(".png"))
    else:
        facts |= score_split(model, data, options)
        strands = ", both strands averaged" if data.averages else ""
        print(f"{options.split}: {facts['sequences']:,} sequences ({facts['sets']}){strands}")
        print(f"MCC {facts['mcc']:.4f}, accuracy {facts['accuracy']:.4f}")
    facts |= {"seconds": round(time.perf_counter() - began, 1), "finished": True}
    if options.output:
        write(json.dumps(facts, indent=1) + "\n", Path(options.output))
        print(f"saved: {options.output}")
    return 0


def score_split(model, data: "DnaData", options) -> dict[str, Any]:
    from pytitans.data.dna_sets import load_sets
    from pytitans.genomics.predict import predict
    from pytitans.genomics.scores import scores

    sets = load_sets(data)
    wanted = [model.config.id2label[i] for i in range(model.config.num_labels)]
    if sets.classes != wanted:
        raise ValueError(
            f"the sequences have the classes {', '.join(sets.classes)}, the model knows "
            f"{', '.join(wanted)}: is it another data set's?"
        )
    rows: Labelled = getattr(sets, options.split)
    found = predict(
        model, rows, both=data.averages, batch_size=options.batch_size, bf16=options.bf16
    )
    what = {"split": options.split, "sets": sets.split, "sequences": len(rows.labels)}
    return what | scores(found, rows.labels)


def embed_command(argv: list[str]) -> int:
    """Writes a vector for each sequence or record."""
    parser = new_parser("dna embed", "Vectors of sequences, or of FASTA records of any length.")
    add = parser.add_argument
    add("--model", type=str, required=True, help="folder of `titans dna train`, or a hub name")
    add("--data.files", type=str, nargs="+", required=True, metavar="FILES",
        help="FASTA files, or tables with a column sequence; short: --data")  # fmt: skip
    add("--pooling", type=Literal["mean", "last"], default="mean", help="of the hidden states")
    add("--batch_size", type=int, default=64, help="sequences at a time")
    add("--output", type=str, required=True, help="NAME.npy or NAME.safetensors, with names inside")
    options = parse(parser, "dna embed", argv)

    import numpy as np

    from pytitans.cli import model_folder, quiet
    from pytitans.data.dna_sets import table_sequences
    from pytitans.genomics.predict import embed_fasta, embed_sequences

    path = Path(options.output)
    if path.suffix not in (".npy", ".safetensors"):
        raise ValueError(f"{options.output!r} is neither .npy nor .safetensors")
    quiet()
    genome = is_genome(options.data.files)
    model = load(model_folder(options.model), "body")
    names: list[str] = []
    parts = []
    for file in options.data.files:
        how = {"pooling": options.pooling, "batch_size": options.batch_size}
        if genome:
            found, vectors = embed_fasta(model, file, **how)
        else:
            sequences = table_sequences(Path(file))
            found = [f"{file}:{i + 1}" for i in range(len(sequences))]
            vectors = embed_sequences(model, sequences, **how)
        names, parts = names + found, [*parts, vectors]
    vectors = np.concatenate(parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, vectors)
    else:
        from safetensors.numpy import save_file

        save_file({"embeddings": vectors}, path, metadata={"names": json.dumps(names)})
    print(f"{len(names):,} vectors of {vectors.shape[1]} numbers, in the order of the file")
    print(f"saved: {path}")
    return 0


def load(folder: str, kind: str):
    """The model of a folder: "classifier", "causal", or for its "body" whichever it is."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification

    from pytitans.cli import load_model
    from pytitans.genomics import cnn  # noqa: F401 - makes the Auto classes know it

    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{folder!r} holds no model that can be loaded: {reason}") from error
    classifies = any("Classif" in x or "CNN" in x for x in config.architectures or [])
    if kind == "classifier" and not classifies:
        raise ValueError(f"{folder!r} holds no classifier: give it a FASTA file, or train one")
    if kind == "causal" and classifies:
        raise ValueError(f"{folder!r} holds a classifier, which predicts no next base")
    if not classifies:
        return load_model(folder)
    model: Any = AutoModelForSequenceClassification.from_pretrained(folder)
    return model.eval().to(torch.accelerator.current_accelerator() or "cpu")


def resolved(files) -> list[Path]:
    return [Path(name).expanduser().resolve() for name in files]


COMMANDS = {"train": train_command, "evaluate": evaluate_command, "embed": embed_command}
