"""Who may talk to the server, and how much."""

import subprocess
import sys
import threading
import time

import httpx
import openai
import pytest
from local_server import MODEL
from transformers import LlamaConfig, LlamaForCausalLM

from pytitans.cli import main
from pytitans.serve.settings import ServeSettings, is_loopback, read_clients

ANNA, BERT = "anna-and-her-token", "bert-and-his-token"


def test_clients_see_their_own_sessions_only(serve):
    server = serve(tokens={ANNA: "anna", BERT: "bert"})
    anna, bert = server.http(ANNA), server.http(BERT)
    session = anna.post("/v1/sessions", json={}).json()["id"]
    anna.post(f"/v1/sessions/{session}/read", json={"text": "the secret is 42"})
    anna.post(f"/v1/sessions/{session}/save", json={"name": "mine"})
    unknown = bert.get("/v1/sessions/session-0")
    ask = {"model": MODEL, "prompt": "x", "session": session}
    for method, path, body in (
        ("GET", "", None),
        ("DELETE", "", None),
        ("POST", "/read", {"text": "x"}),
        ("POST", "/ask", {"prompt": "x"}),
        ("POST", "/fork", None),
        ("POST", "/save", {"name": "his"}),
    ):
        answer = bert.request(method, f"/v1/sessions/{session}{path}", json=body)
        assert (answer.status_code, answer.json()) == (404, unknown.json())
    assert bert.post("/v1/completions", json=ask).status_code == 404
    assert bert.post("/v1/sessions", json={"snapshot": "mine"}).status_code == 404
    assert bert.delete("/v1/snapshots/mine").status_code == 404
    assert bert.get("/v1/sessions").json()["data"] == []
    assert bert.get("/v1/snapshots").json()["data"] == []
    assert anna.get(f"/v1/sessions/{session}").json()["tokens"] == 16


def test_no_token_no_answer(serve):
    server = serve(tokens={ANNA: "anna"})
    for token in (None, "x", ANNA[:-1], ANNA + "x", "ä"):
        headers = {} if token is None else {"authorization": f"Bearer {token}".encode()}
        for path in ("/v1/models", "/v1/sessions", "/metrics", "/nowhere"):
            answer = httpx.get(server.url + path, headers=headers)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.json()["error"]["type"] == "authentication_error"
    assert httpx.get(server.url + "/health").json() == {"status": "ok"}
    assert httpx.get(server.url + "/docs").status_code == 200
    with pytest.raises(openai.AuthenticationError):
        server.openai("wrong-token-of-anna").models.list()
    assert server.openai(ANNA).models.list().data[0].id == MODEL


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "evil.example"}, 403),
        ({"host": "127.0.0.1.evil.example"}, 403),
        ({"host": "localhost:1"}, 200),
        ({"host": "[::1]:8000"}, 200),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"content-encoding": "gzip"}, 415),
    ],
)
def test_web_pages_of_others_get_nothing(server, headers, status):
    answer = server.http().get("/v1/models", headers=headers)
    assert answer.status_code == status
    assert "access-control-allow-origin" not in answer.headers


def test_own_page_may_ask(server):
    assert server.http().get("/v1/models", headers={"origin": server.url}).status_code == 200


def test_a_body_beyond_the_limit_is_refused(serve):
    server = serve(max_body_mb=0.001, max_document_mb=0.002)
    http = server.http()
    session = http.post("/v1/sessions").json()["id"]
    big = {"model": MODEL, "prompt": "x" * 2000}
    read = f"/v1/sessions/{session}/read"
    plain = {"content-type": "text/plain"}
    parts = (b"x" * 100 for _ in range(30))  # without a content-length
    for answer in (
        http.post("/v1/completions", json=big),
        http.post(read, json={"text": "x" * 2000}),
        http.post(read, content=b"x" * 3000, headers=plain),
        http.post(read, content=parts, headers=plain),
        http.post("/v1/sessions", content=(b" " * 100 for _ in range(30))),
    ):
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "body_too_large"
    assert http.post(read, content=b"x" * 1500, headers=plain).status_code == 200
    assert http.get(f"/v1/sessions/{session}").json()["tokens"] == 1500


def test_limits_of_prompt_and_answer(serve):
    client = serve(max_prompt_tokens=8, max_new_tokens=4).openai()
    options = {"model": MODEL, "temperature": 0}
    with pytest.raises(openai.BadRequestError, match="9 tokens, the limit is 8") as caught:
        client.completions.create(prompt="123456789", **options)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="limit is 8"):
        client.completions.create(prompt="123456789", stream=True, **options)
    with pytest.raises(openai.BadRequestError, match="max_tokens is at most 4"):
        client.completions.create(prompt="x", max_tokens=5, **options)
    done = client.completions.create(prompt="12345678", **options)
    assert done.usage is not None and done.usage.completion_tokens == 4


def test_a_full_queue_sends_away(serve):
    server = serve(concurrency=1, queue=1)
    body = {"model": MODEL, "prompt": "x", "max_tokens": 4096, "stream": True, "temperature": 0}
    http = server.http()
    with http.stream("POST", "/v1/completions", json=body) as first:
        assert first.status_code == 200
        waiting = threading.Thread(
            target=lambda: server.http().post(
                "/v1/completions", json={"model": MODEL, "prompt": "x", "max_tokens": 1}
            )
        )
        waiting.start()
        while server.service.admitted < 2:
            time.sleep(0.005)
        answer = server.http().post("/v1/completions", json=body)
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1
        assert server.http().get("/health").status_code == 200
    waiting.join()
    assert server.http().post("/v1/completions", json=body | {"max_tokens": 1}).status_code == 200


def test_the_time_limit_changes_no_session(serve):
    server = serve(time_limit=0.5)
    http = server.http()
    session = http.post("/v1/sessions").json()["id"]
    read = http.post(
        f"/v1/sessions/{session}/read",
        content=b"x" * 200_000,
        headers={"content-type": "text/plain"},
    )
    body = {"prompt": "x", "max_tokens": 4096, "temperature": 0, "advance": True}
    asked = http.post(f"/v1/sessions/{session}/ask", json=body)
    for answer in (read, asked):
        assert (answer.status_code, answer.json()["error"]["code"]) == (408, "time_limit")
    assert http.get(f"/v1/sessions/{session}").json()["tokens"] == 0
    stream = server.openai().completions.create(
        model=MODEL, prompt="x", max_tokens=4096, stream=True, temperature=0
    )
    with pytest.raises(openai.APIError, match=r"more than 0\.5 seconds"):
        list(stream)


def test_metrics(serve):
    server = serve()
    http = server.http()
    body = {"model": MODEL, "prompt": "1234", "max_tokens": 3, "temperature": 0}
    http.post("/v1/completions", json=body)
    http.post("/v1/sessions")
    http.get("/nowhere/else")
    text = http.get("/metrics").text
    for line in (
        "titans_tokens_read_total 4.0",
        "titans_tokens_written_total 3.0",
        'titans_requests_total{route="/v1/completions",status="200"} 1.0',
        'titans_requests_total{route="other",status="404"} 1.0',
        "titans_sessions 1.0",
        "titans_jobs_queued 0.0",
    ):
        assert line in text.splitlines()
    assert "process_resident_memory_bytes" in text
    assert "else" not in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"host": "0.0.0.0"}, "give a token"),
        ({"token": "short"}, "16 characters"),
        ({"concurrency": 0}, "concurrency=0"),
        ({"time_limit": float("nan")}, "time_limit=nan"),
        ({"port": 70_000}, "port=70000"),
    ],
)
def test_settings_are_checked(options, message, monkeypatch):
    monkeypatch.delenv("TITANS_TOKEN", raising=False)
    with pytest.raises(ValueError, match=message):
        read_clients(ServeSettings(**options))


def test_a_file_of_tokens(tmp_path, monkeypatch):
    monkeypatch.delenv("TITANS_TOKEN", raising=False)
    path = tmp_path / "tokens"
    path.write_text(f"# who may\nanna {ANNA}\n\n{BERT} # nameless\n")
    clients = read_clients(ServeSettings(tokens=str(path), host="0.0.0.0"))
    assert clients.named(ANNA) == "anna"
    assert str(clients.named(BERT)).startswith("token-")
    assert clients.named("x" * 16) is None
    assert BERT not in str(vars(clients))
    path.write_text(f"anna {ANNA}\nbert {ANNA}\n")
    with pytest.raises(ValueError, match="another client's already"):
        read_clients(ServeSettings(tokens=str(path)))
    monkeypatch.setenv("TITANS_TOKEN", BERT)
    assert read_clients(ServeSettings(host="0.0.0.0")).named(BERT) == "local"


def test_the_page_says_what_this_server_takes(serve):
    http = serve(max_new_tokens=7).http()
    schema = http.get("/openapi.json").json()
    fields = schema["components"]["schemas"]["CompletionRequest"]["properties"]
    assert fields["model"]["enum"] == [MODEL]
    assert fields["max_tokens"]["anyOf"][0]["maximum"] == 7
    responses = schema["paths"]["/v1/completions"]["post"]["responses"]
    assert {"200", "400", "401", "404", "408", "413", "429"} < set(responses)
    assert "422" not in responses
    wrong = http.put("/v1/sessions")
    assert (wrong.status_code, wrong.headers["allow"]) == (405, "GET, POST")


def test_other_models_are_refused(tmp_path, capsys, tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=258, num_attention_heads=1, **shape)
    LlamaForCausalLM(config).save_pretrained("llama")
    tokenizer.save_pretrained("llama")
    capsys.readouterr()
    assert main(["serve", "--model", "llama", "--port", "0"]) == 2
    assert "'llama' is a llama model, without a memory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True),
     ("0.0.0.0", False), ("10.0.0.1", False), ("::", False), ("localhost.evil.example", False)],
)  # fmt: skip
def test_loopback(host, local):
    assert is_loopback(host) == local


def test_help_needs_no_server(capsys):
    code = (
        "import sys; from pytitans.cli import main\n"
        "try: main(['serve', '--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'fastapi', 'uvicorn', 'prometheus_client'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "titans serve --model runs/mal" in done.stdout


def test_an_open_host_without_a_token_is_one_line(capsys, monkeypatch):
    monkeypatch.delenv("TITANS_TOKEN", raising=False)
    assert main(["serve", "--model", "nowhere", "--host", "0.0.0.0"]) == 2
    assert "give a token by TITANS_TOKEN" in capsys.readouterr().err
