"""`generate` with the cache: the same tokens as without, whatever the way of choosing them."""

import subprocess
import sys
import warnings
from threading import Thread

import pytest
import torch
from tiny import VARIANTS, tiny_config, tiny_model
from transformers import TextIteratorStreamer, pipeline, set_seed
from transformers.generation.streamers import BaseStreamer

from pytitans.data.tokenizer import byte_tokenizer
from pytitans.models import TitansForCausalLM

GREEDY = {"max_new_tokens": 12, "do_sample": False}
WAYS = {
    "greedy": GREEDY,
    "sampling": {"max_new_tokens": 12, "do_sample": True, "top_k": 5, "temperature": 1.5},
    "beams": {"max_new_tokens": 8, "do_sample": False, "num_beams": 3},
    "sampled beams": {"max_new_tokens": 6, "do_sample": True, "num_beams": 3},
    "several": {"max_new_tokens": 6, "do_sample": True, "num_return_sequences": 2},
    "penalised": {**GREEDY, "repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
    "prefilled in pieces": {**GREEDY, "prefill_chunk_size": 4},
}


def generate(model, ids, **options) -> torch.Tensor:
    set_seed(0)
    return model.generate(ids, **options)


@pytest.mark.parametrize("prompt", [1, 5, 8, 9, 30])
def test_generate_with_cache_equals_recomputing(model, ids, prompt):
    """Prompts below, at and beyond segment (8), window (6) and chunk (4)."""
    cached = generate(model, ids[:, :prompt], **GREEDY)
    assert torch.equal(cached, generate(model, ids[:, :prompt], use_cache=False, **GREEDY))


@pytest.mark.parametrize("way", WAYS)
def test_every_way_of_choosing_equals_recomputing(model, ids, way):
    options = WAYS[way]
    plain = {k: v for k, v in options.items() if k != "prefill_chunk_size"}
    want = generate(model, ids[:, :9], use_cache=False, **plain)
    assert torch.equal(generate(model, ids[:, :9], **options), want)


@pytest.mark.parametrize("way", ["greedy", "sampling", "beams"])
def test_a_prompt_of_vectors_is_answered_like_its_tokens(model, ids, way):
    vectors = model.get_input_embeddings()(ids[:, :9])
    set_seed(0)
    got = model.generate(inputs_embeds=vectors, **WAYS[way])
    assert torch.equal(got, generate(model, ids[:, :9], **WAYS[way])[:, 9:])


@pytest.mark.parametrize("way", ["greedy", "sampling", "beams"])
def test_left_padded_batch_generates_what_each_row_would(model, ids, way):
    lengths, options = [20, 13, 3], {**WAYS[way], "pad_token_id": 0}
    mask = torch.stack([(torch.arange(20) >= 20 - n).long() for n in lengths])
    padded = torch.zeros(3, 20, dtype=torch.long)
    for row, n in enumerate(lengths):
        padded[row, 20 - n :] = ids[row, :n]
    got = generate(model, padded, attention_mask=mask, **options)
    if way == "sampling":  # rows draw from one generator: compare with recomputing
        want = generate(model, padded, attention_mask=mask, use_cache=False, **options)
        assert torch.equal(got, want)
        return
    for row, n in enumerate(lengths):
        real = torch.ones(1, n, dtype=torch.long)  # without it generate takes the 0s for padding
        alone = generate(model, ids[row : row + 1, :n], attention_mask=real, **options)
        assert torch.equal(got[row, 20:], alone[0, n:])


# From a memory that has read


@pytest.mark.parametrize("way", ["greedy", "sampling", "beams", "several"])
def test_from_a_memory_as_from_the_whole_text(model, ids, way):
    """The text is not given again, and the memory serves every beam and stays what it was."""
    with torch.no_grad():
        memory = model(ids[:, :23], use_cache=True).cache
    want = generate(model, ids, **WAYS[way])[:, 37:]
    for _ in range(2):
        got = generate(model, ids[:, 23:], cache=memory.as_start(), **WAYS[way])
        assert torch.equal(got[:, 14:], want)


def test_one_memory_answers_a_batch_of_questions(model, ids):
    with torch.no_grad():
        memory = model(ids[:1, :23], use_cache=True).cache
    questions = ids[:, 23:30]
    got = generate(model, questions, cache=memory.as_start(), **GREEDY)
    for row in range(3):
        whole = torch.cat([ids[:1, :23], questions[row : row + 1]], dim=1)
        assert torch.equal(got[row, 7:], generate(model, whole, **GREEDY)[0, 30:])


def test_padded_questions_to_a_memory(model, ids):
    with torch.no_grad():
        memory = model(ids[:1, :23], use_cache=True).cache
    padded, mask = ids[:2, 20:30].clone(), torch.ones(2, 10, dtype=torch.long)
    padded[1, :6], mask[1, :6] = 0, 0
    options = {**GREEDY, "pad_token_id": 0, "cache": memory.as_start()}
    got = generate(model, padded, attention_mask=mask, **options)
    whole = torch.cat([ids[:1, :23], ids[1:2, 26:30]], dim=1)
    assert torch.equal(got[1, 10:], generate(model, whole, **GREEDY)[0, 27:])


def test_a_conversation_gives_the_whole_text_with_the_cache(model, ids):
    """transformers' own way: all ids so far beside the cache, of which the new ones are read."""
    with torch.no_grad():
        cache = model(ids[:, :23], use_cache=True).cache
    got = generate(model, ids, cache=cache, **GREEDY)
    assert torch.equal(got, generate(model, ids, **GREEDY))
    assert cache.get_seq_length() == got.shape[1] - 1


def test_a_cache_has_an_older_name(model, ids):
    """As transformers before 5.24 called it, and much code goes on to."""
    with torch.no_grad():
        out = model(ids[:, :23], use_cache=True)
        assert out.past_key_values is out.cache
        memory = out.cache
        want = model(ids[:, 23:], cache=memory.fork()).logits
        assert torch.equal(model(ids[:, 23:], past_key_values=memory.fork()).logits, want)
        with pytest.raises(ValueError, match="two names"):
            model(ids, cache=memory, past_key_values=memory)
    want = generate(model, ids[:, 23:], cache=memory.as_start(), **GREEDY)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers says that the name is old
        got = generate(model, ids[:, 23:], past_key_values=memory.as_start(), **GREEDY)
    assert torch.equal(got, want)


def test_new_ids_beside_a_cache_are_not_taken_for_old_ones(model, ids):
    with torch.no_grad():
        cache = model(ids[:, :23], use_cache=True).cache
    with pytest.raises(ValueError, match=r"has read 23 tokens.*as_start\(\)"):
        model.generate(ids[:, 23:], cache=cache, **GREEDY)


CONTINUE = """
import sys, torch
from transformers import AutoModelForCausalLM
import pytitans
for variant in {variants!r}:
    model = AutoModelForCausalLM.from_pretrained(variant, dtype=torch.float64)
    cache = pytitans.TitansCache.load(variant + ".safetensors", model).as_start()
    new = model.generate(torch.tensor({ids!r}), cache=cache, **{options!r})
    print(new[:, 14:].flatten().tolist())
"""


def test_a_saved_memory_goes_on_in_a_new_process(ids, tmp_path):
    want = []
    for variant in VARIANTS:
        model = tiny_model(variant)
        model.save_pretrained(tmp_path / variant)
        with torch.no_grad():
            memory = model(ids[:, :23], use_cache=True).cache
        memory.save(tmp_path / f"{variant}.safetensors", model)
        want.append(str(generate(model, ids, **GREEDY)[:, 37:].flatten().tolist()))
    script = CONTINUE.format(variants=VARIANTS, ids=ids[:, 23:].tolist(), options=GREEDY)
    command = [sys.executable, "-c", script]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == want


# With text


@pytest.fixture(scope="module")
def writer() -> TitansForCausalLM:
    torch.manual_seed(0)
    return TitansForCausalLM(tiny_config("mag", vocab_size=258)).eval()


def test_pipeline(writer):
    """Batches of prompts of different length, padded by the pipeline, as each alone."""
    write = pipeline("text-generation", model=writer, tokenizer=byte_tokenizer())
    prompts = ["Once", "In the beginning there was", "na\u00efve"]
    options = {**GREEDY, "max_length": None}
    alone = [write(prompt, **options)[0]["generated_text"] for prompt in prompts]
    assert [text[: len(p)] for text, p in zip(alone, prompts, strict=True)] == prompts
    assert [x[0]["generated_text"] for x in write(prompts, batch_size=3, **options)] == alone


class Collected(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


def test_streamers_get_every_token(writer):
    ids = torch.tensor([list(b"Once upon")])
    want = writer.generate(ids, **GREEDY)
    streamer = Collected()
    writer.generate(ids, streamer=streamer, **GREEDY)
    assert streamer.tokens == want[0].tolist()
    assert streamer.ended
    tokenizer = byte_tokenizer()
    text = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = Thread(target=writer.generate, args=(ids,), kwargs={"streamer": text, **GREEDY})
    thread.start()
    assert "".join(text) == tokenizer.decode(want[0, 9:])
    thread.join()
