"""Scores do not depend on how a text was cut, and are what greedy decoding would come to."""

import math

import pytest
import torch
from tiny import tiny_model
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from pytitans.data.text import Document
from pytitans.data.tokenizer import byte_tokenizer
from pytitans.evals import Example, load_task
from pytitans.evals.positions import score_document
from pytitans.evals.results import Results
from pytitans.evals.run import by_position, run_positions
from pytitans.evals.streaming import context_limit, position_limit, score_examples
from pytitans.evaluate import evaluate

SHAPE = {
    "vocab_size": 258,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "bos_token_id": 256,
    "eos_token_id": 256,
    "initializer_range": 0.5,
}
MODELS = {
    "titans": lambda: tiny_model("mal", vocab_size=258, bos_token_id=256, eos_token_id=256).float(),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "window": lambda: MistralForCausalLM(
        MistralConfig(**SHAPE, num_key_value_heads=2, sliding_window=7)
    ),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=258,
            n_embd=16,
            n_layer=1,
            n_head=2,
            n_positions=512,
            bos_token_id=256,
            eos_token_id=256,
        )
    ),
}
BYTES = byte_tokenizer()


def build(name):
    torch.manual_seed(0)
    return MODELS[name]().eval()


@pytest.mark.parametrize("name", MODELS)
@torch.inference_mode()
def test_pieces_do_not_matter(name):
    """Three kinds of questions: at the end, here and there, everywhere."""
    model = build(name)
    for kind in ("passkey", "recall", "s5"):
        task = load_task(kind, BYTES, vocab_size=256)
        examples = list(task.examples(3, length=96))
        ids = torch.stack([torch.from_numpy(example.ids.astype("int64")) for example in examples])
        logits = model(input_ids=ids).logits
        for piece in (10_000, 99, 20):
            scores = score_examples(model, examples, piece=piece)
            for row, (example, score) in enumerate(zip(examples, scores, strict=True)):
                at, expected = (
                    torch.tensor(example.at),
                    torch.tensor(example.expected.astype("int64")),
                )
                nll = torch.nn.functional.cross_entropy(logits[row, at], expected)
                assert score.nll == pytest.approx(nll.item(), rel=1e-4)


@torch.inference_mode()
def test_score_is_greedy_decoding():
    """Answers made by `generate` are right to the last token; a changed token is wrong, and with it
    its answer alone."""
    model = build("titans")
    prompt = torch.randint(256, (1, 40), generator=torch.Generator().manual_seed(2))
    written = model.generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=None)[
        0
    ].numpy()
    pieces = [written[:40], written[40:43], written[43:46]]
    good = Example.of_pieces(pieces, [1, 2])
    assert score_examples(model, [good], piece=7)[0][:3] == (1, 1, 1)
    pieces[2] = (pieces[2] + 1) % 256
    assert score_examples(model, [Example.of_pieces(pieces, [1, 2])])[0][:3] == (0.5, 0, 0)


@torch.inference_mode()
def test_rows_of_other_lengths_do_not_matter():
    model, task = build("titans"), load_task("passkey", BYTES)
    short, long = task.example(0, length=120), task.example(0, length=200)
    together = score_examples(model, [short, long], piece=64)
    alone = [score_examples(model, [example])[0] for example in (short, long)]
    assert [score.nll for score in together] == pytest.approx([s.nll for s in alone], rel=1e-5)


@torch.inference_mode()
def test_window_is_the_last_tokens():
    model, task = build("gpt2"), load_task("passkey", BYTES)
    example = task.example(0, length=700)
    assert position_limit(model) == 512
    last = Example(example.ids[-500:], example.at - 200, example.expected, example.answer)
    seen, cut = score_examples(model, [example], window=500)[0], score_examples(model, [last])[0]
    assert seen == pytest.approx(cut, rel=1e-5)
    with pytest.raises(ValueError, match="leaves out questions"):
        score_examples(model, [example], window=3)


def test_limits_of_models():
    assert {name: context_limit(build(name)) for name in MODELS} == {
        "titans": None,
        "llama": 2048,
        "window": None,
        "gpt2": 512,
    }
    assert position_limit(build("llama")) is None
    shape = {"hidden_size": 16, "num_heads": 2, "head_dim": 16, "state_size": 8, "n_groups": 1}
    mamba = Mamba2ForCausalLM(Mamba2Config(vocab_size=258, num_hidden_layers=1, **shape))
    assert context_limit(mamba) is None


TEXT = "It was the best of times, it was the wörst of times, ☃. " * 60


@pytest.mark.parametrize("name", ["titans", "window"])
def test_loss_by_position_adds_up_to_the_loss(name):
    """Of one stream, and of one window that holds all: evaluate() says the same."""
    model = build(name)
    whole = evaluate(model, BYTES, [Document("a", TEXT)], length=4000, progress=False)
    for options in ({"piece": 50}, {"window": 4000}):
        results = Results(None, {})
        run_positions(model, BYTES, [Document("a", TEXT)], results, progress=False, **options)
        bins = by_position(results.cells)
        assert [part["first"] for part in bins] == [0, 1024, 2048]
        assert sum(part["bytes"] for part in bins) == len(TEXT.encode())
        nats = sum(part["nats"] for part in bins)
        assert nats / math.log(2) / whole["bytes"] == pytest.approx(
            whole["bits_per_byte"], rel=1e-4
        )


@torch.inference_mode()
def test_windows_score_each_token_once_with_half_a_window_before_it():
    model, ids = build("llama"), torch.tensor([256, *b"abcdefghijklmnopqrstuvwxyz"])
    nats = 0.0
    for first, new, stop in (
        (0, 1, 8),
        (4, 8, 12),
        (8, 12, 16),
        (12, 16, 20),
        (16, 20, 24),
        (19, 24, 27),
    ):
        logits = model(input_ids=ids[None, first:stop]).logits[0].log_softmax(-1)
        nats -= sum(float(logits[i - 1 - first, ids[i]]) for i in range(new, stop))
    found = score_document(model, BYTES, "abcdefghijklmnopqrstuvwxyz", window=8)
    assert found[0]["tokens"] == 26 and found[0]["nats"] == pytest.approx(nats, rel=1e-5)
