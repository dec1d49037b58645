"""OpenAI's endpoints, through OpenAI's client."""

import json
import time
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch
from local_server import MODEL, greedy

from pytitans.serve.generation import Sampling, choose
from pytitans.serve.text import PIECE, Pieces, Writer, plain_chat


def test_models(server):
    client = server.openai()
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "pytitans"
    with pytest.raises(openai.NotFoundError, match="the only model here is 'tiny'"):
        client.models.retrieve("gpt")


def test_completion_equals_generate(server, model, tokenizer):
    prompt = "a prompt that is longer than a segment"
    ids = tokenizer(prompt).input_ids
    expected = greedy(model, tokenizer, prompt, 20)
    client = server.openai()
    for given in (prompt, ids):
        done = client.completions.create(model=MODEL, prompt=given, max_tokens=20, temperature=0)
        assert done.choices[0].text == expected
        assert done.choices[0].finish_reason == "length"
        assert done.usage is not None
        assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (len(ids), 20)


def test_streams_say_what_whole_answers_say(server):
    client = server.openai()
    options = {"model": MODEL, "prompt": ["one", "two"], "n": 2, "seed": 5, "max_tokens": 24}
    whole = client.completions.create(**options)
    texts, reasons, usage = [""] * 4, [None] * 4, None
    for chunk in client.completions.create(
        **options, stream=True, stream_options={"include_usage": True}
    ):
        usage = chunk.usage
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason
    assert texts == [choice.text for choice in whole.choices]
    assert len(set(texts)) == 4  # each choice is drawn anew
    assert reasons == ["length"] * 4
    assert usage == whole.usage


def test_chat_is_its_template(server, model, tokenizer):
    messages = [{"role": "system", "content": "Be."}, {"role": "user", "content": "Hi"}]
    prompt = "System: Be.\nUser: Hi\nAssistant:"
    assert plain_chat(messages, first=True) == prompt
    expected = greedy(model, tokenizer, prompt, 12)
    client = server.openai()
    options = {"model": MODEL, "messages": messages, "temperature": 0}
    done = client.chat.completions.create(**options, max_completion_tokens=12)
    assert done.choices[0].message.content == expected
    said = client.chat.completions.create(**options, max_tokens=12, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in said) == expected


def test_a_chat_template_is_used(serve, model, tokenizer):
    tokenizer = type(tokenizer)(tokenizer_object=tokenizer._tokenizer, eos_token="<|eos|>")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no systems') }}"
        "{% endif %}[{{ m.content }}]{% endfor %}>"
    )
    expected = greedy(model, tokenizer, "[Hi]>", 8)
    client = serve()
    client.service.tokenizer = tokenizer
    client = client.openai()
    options = {"model": MODEL, "max_tokens": 8, "temperature": 0}
    done = client.chat.completions.create(messages=[{"role": "user", "content": "Hi"}], **options)
    assert done.choices[0].message.content == expected
    with pytest.raises(openai.BadRequestError, match="refuses the messages: no systems"):
        client.chat.completions.create(messages=[{"role": "system", "content": "x"}], **options)


def test_stop_strings_end_an_answer_before_them(server, model, tokenizer):
    expected = greedy(model, tokenizer, "Hello", 40)
    stop = expected[10:13]
    cut = expected[: expected.index(stop)]
    options = {"model": MODEL, "prompt": "Hello", "max_tokens": 40, "temperature": 0}
    client = server.openai()
    done = client.completions.create(**options, stop=["never this", stop])
    assert (done.choices[0].text, done.choices[0].finish_reason) == (cut, "stop")
    assert done.usage is not None and done.usage.completion_tokens < 40
    stream = client.completions.create(**options, stop=stop, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == cut


def test_the_end_token_ends_an_answer(serve, model, tokenizer, monkeypatch):
    expected = greedy(model, tokenizer, "Hello", 10)
    ends = tokenizer(expected).input_ids[4]
    monkeypatch.setattr(model.generation_config, "eos_token_id", [ends])
    done = (
        serve()
        .openai()
        .completions.create(model=MODEL, prompt="Hello", max_tokens=10, temperature=0)
    )
    assert done.choices[0].finish_reason == "stop"
    assert done.choices[0].text == expected[: expected.index(expected[4]) + 1]


def test_a_seed_repeats_an_answer(server):
    client = server.openai()

    def draw(seed: int | None) -> str:
        done = client.completions.create(model=MODEL, prompt="Hello", max_tokens=30, seed=seed)
        return done.choices[0].text

    assert draw(3) == draw(3) != draw(4)
    assert draw(None) != draw(None)


def test_top_p_and_temperature_by_hand():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()

    def drawn(**options) -> set[int]:
        rng = torch.Generator().manual_seed(0)
        sampling = Sampling(max_tokens=1, **options)
        return {choose(logits, sampling, rng) for _ in range(400)}

    assert drawn() == {0, 1, 2, 3}
    assert drawn(top_p=0.5) == drawn(top_p=0.0) == drawn(temperature=5e-324) == {0}
    assert drawn(top_p=0.51) == {0, 1}
    assert drawn(top_p=0.95) == {0, 1, 2}


def test_writer_sends_whole_characters_and_holds_back_stop_strings(tokenizer):
    writer = Writer(tokenizer, ["stop"])
    text = iter("é s€sto\nstop it".encode())
    sent = []
    while not writer.stopped:
        sent.append(writer.add(next(text)))
    assert "".join(sent) == "é s€sto\n"
    assert sent[:2] == ["", "é"]
    assert bytes(writer.ids).endswith(b"stop")
    assert bytes(writer.ids[: writer.kept]).decode() == "é s€sto\n"
    assert writer.finish() == ""


def test_writer_ends_with_what_it_held(tokenizer):
    writer = Writer(tokenizer, ["stop"])
    sent = "".join(writer.add(byte) for byte in b"abc sto\xe2\x82")
    assert sent + writer.finish() == "abc sto\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("size", [1, 7, 5000, 100_000])
def test_pieces_do_not_depend_on_how_a_document_arrives(size):
    text = "Zeile für Zeile\n" * 1500 + "wört " * 9000 + "€" * 40_000
    data, pieces, found = text.encode(), Pieces(), []
    for start in range(0, len(data), size):
        found += pieces.add(data[start : start + size])
    found += pieces.add(b"", last=True)
    whole = list(Pieces().add(data, last=True))
    assert found == whole
    assert "".join(found) == text
    assert max(map(len, found)) <= PIECE
    assert found[0].endswith("\n")


def test_concurrent_clients_do_not_mix(server, model, tokenizer):
    prompts = [chr(ord("A") + number) * (number + 1) for number in range(12)]
    expected = [greedy(model, tokenizer, p, 16) for p in prompts]
    assert len(set(expected)) > 6
    client = server.openai()

    def ask(prompt: str) -> str:
        options = {"model": MODEL, "prompt": prompt, "max_tokens": 16, "temperature": 0}
        stream = client.completions.create(**options, stream=True)
        return "".join(chunk.choices[0].text for chunk in stream)

    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(ask, prompts)) == expected


def test_a_client_that_goes_ends_its_work(server):
    options = {"model": MODEL, "prompt": "x", "max_tokens": 4000, "temperature": 0}
    stream = server.openai().completions.create(**options, stream=True)
    next(iter(stream))
    stream.close()
    with pytest.raises(openai.APITimeoutError):
        server.openai().with_options(timeout=0.3).completions.create(**options)
    began = time.monotonic()
    while server.service.engine.active or server.service.admitted:
        assert time.monotonic() - began < 20
        time.sleep(0.01)
    written = server.service.metrics.written._value.get()
    time.sleep(0.05)
    assert server.service.metrics.written._value.get() == written


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [300]}, "a token of the prompt is not below 258"),
        ({"prompt": "\ud800"}, "surrogate"),
        ({"n": 9}, "n: Input should be less than or equal to 8"),
        ({"prompt": ["a", "b"], "n": 5}, "at most 8 answers"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 4097}, "max_tokens is at most 4096"),
        ({"max_tokens": True}, "max_tokens: Input should be a number"),
        ({"max_tokens": "1"}, "max_tokens: Input should be a number"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"logprobs": 3}, "logprobs is not supported"),
        ({"tempreature": 1}, "tempreature: Extra inputs are not permitted"),
        ({"advance": True}, "advance goes with a session"),
    ],
)
def test_what_is_wrong_is_said(server, fields, message):
    body = json.dumps({"model": MODEL, "prompt": "x"} | fields)
    answer = server.http().post(
        "/v1/completions", content=body, headers={"content-type": "application/json"}
    )
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert message in error["message"]


def test_fields_without_effect_are_taken(server):
    body = {"model": MODEL, "prompt": "x", "max_tokens": 1.0, "user": "me", "presence_penalty": 0}
    assert server.http().post("/v1/completions", json=body).status_code == 200
