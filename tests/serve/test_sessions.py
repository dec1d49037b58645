"""Memory sessions: what they read, where they live, what they outlive."""

import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch
from local_server import MODEL, greedy

from pytitans.cache import TitansCache

BOOK = "It was the best of times, it was the worst of times. "


def new(http, **fields) -> str:
    answer = http.post("/v1/sessions", json=fields)
    assert answer.status_code == 201, answer.text
    return answer.json()["id"]


def read(http, session: str, text: str) -> int:
    answer = http.post(
        f"/v1/sessions/{session}/read",
        content=text.encode(),
        headers={"content-type": "text/plain"},
    )
    assert answer.status_code == 200, answer.text
    return answer.json()["read"]


def ask(http, session: str, prompt: str, *, tokens: int = 12, **fields) -> str:
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, **fields}
    answer = http.post(f"/v1/sessions/{session}/ask", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["text"]


def tokens_of(http, session: str) -> int:
    return http.get(f"/v1/sessions/{session}").json()["tokens"]


@pytest.fixture
def direct(model, tokenizer):
    """What the model itself writes after a text."""

    def after(text: str, count: int = 12) -> str:
        return greedy(model, tokenizer, text, count)

    return after


def test_asking_leaves_a_session_as_it_was(server, direct):
    http = server.http()
    session = new(http)
    assert read(http, session, BOOK) == len(BOOK)
    for _ in range(2):
        assert ask(http, session, "Times") == direct(BOOK + "Times")
    assert tokens_of(http, session) == len(BOOK)


def test_advancing_reads_prompt_and_answer(server, direct):
    http = server.http()
    session, told = new(http), BOOK
    read(http, session, BOOK)
    for question in ("Times", "And then?", "Worse?"):
        answer = ask(http, session, question, advance=True)
        assert answer == direct(told + question)
        told += question + answer
        assert tokens_of(http, session) == len(told.encode())


def test_a_cut_answer_is_read_up_to_the_cut(server, direct):
    http = server.http()
    session = new(http)
    whole = direct("Hello", 30)
    stop = whole[9:12]
    cut = ask(http, session, "Hello", tokens=30, stop=stop, advance=True)
    assert cut == whole[: whole.index(stop)]
    assert tokens_of(http, session) == len("Hello" + cut)
    assert ask(http, session, "more") == direct("Hello" + cut + "more")


def test_a_document_may_come_as_json_or_in_parts(server):
    http, text = server.http(), BOOK * 20
    answers = set()
    sessions = [new(http) for _ in range(3)]
    http.post(f"/v1/sessions/{sessions[0]}/read", json={"text": text})
    read(http, sessions[1], text)
    for start in range(0, len(text), 400):
        read(http, sessions[2], text[start : start + 400])
    for session in sessions:
        assert tokens_of(http, session) == len(text)
        answers.add(ask(http, session, "So"))
    assert len(answers) == 1


def test_openai_client_names_a_session(server, direct):
    http, client = server.http(), server.openai()
    session = new(http)
    read(http, session, BOOK)
    options = {"model": MODEL, "max_tokens": 12, "temperature": 0}
    expected = direct(BOOK + "Times")
    for advance in (False, True):
        extra = {"session": session, "advance": advance}
        stream = client.completions.create(prompt="Times", **options, stream=True, extra_body=extra)
        assert "".join(chunk.choices[0].text for chunk in stream) == expected
    told = BOOK + "Times" + expected
    assert tokens_of(http, session) == len(told.encode())
    done = client.chat.completions.create(
        messages=[{"role": "user", "content": "Hi"}], **options, extra_body={"session": session}
    )
    assert done.choices[0].message.content == direct(told + "\nUser: Hi\nAssistant:")


def test_forks_go_on_alone(server, direct):
    http = server.http()
    session = new(http, title="book")
    read(http, session, BOOK)
    answer = http.post(f"/v1/sessions/{session}/fork")
    assert answer.status_code == 201
    fork = answer.json()
    assert (fork["tokens"], fork["title"]) == (len(BOOK), "book")
    read(http, fork["id"], "It was the age of wisdom. ")
    assert ask(http, session, "It") == direct(BOOK + "It")
    assert ask(http, fork["id"], "It") == direct(BOOK + "It was the age of wisdom. It")


def test_snapshots_keep_a_state(server, direct, model, tokenizer):
    http = server.http()
    session = new(http)
    read(http, session, BOOK)
    saved = http.post(f"/v1/sessions/{session}/save", json={"name": "book-1"})
    assert saved.json()["tokens"] == len(BOOK)
    read(http, session, "And on.")
    again = http.post(f"/v1/sessions/{session}/save", json={"name": "book-1"})
    assert (again.status_code, again.json()["error"]["code"]) == (409, "snapshot_exists")
    loaded = new(http, snapshot="book-1")
    assert ask(http, loaded, "It") == direct(BOOK + "It")
    assert [s["id"] for s in http.get("/v1/snapshots").json()["data"]] == ["book-1"]
    cache = TitansCache.load(server.store.disk.folder / "local/snapshots/book-1.safetensors", model)
    out = model(torch.tensor([tokenizer("It").input_ids]), cache=cache)
    assert tokenizer.decode(out.logits[0, -1].argmax()) == direct(BOOK + "It")[0]
    assert http.delete("/v1/snapshots/book-1").json() == {"id": "book-1", "deleted": True}
    assert http.post("/v1/sessions", json={"snapshot": "book-1"}).status_code == 404


def test_what_titans_read_has_saved_can_be_loaded(serve, direct, model, tokenizer, tmp_path):
    """It leaves the last token to be read by whoever goes on."""
    ids = tokenizer(BOOK).input_ids
    cache = model(torch.tensor([ids[:-1]]), use_cache=True).cache
    path = tmp_path / "sessions/local/snapshots/book.safetensors"
    path.parent.mkdir(parents=True)
    cache.save(path, model, metadata={"reading": {"next_token": ids[-1]}})
    http = serve().http()
    session = new(http, snapshot="book")
    assert tokens_of(http, session) == len(BOOK)
    assert ask(http, session, "It") == direct(BOOK + "It")


@pytest.mark.parametrize("name", ["", "..", "../x", "a/b", ".hidden", "a\x00b", "x" * 65, "a\n"])
def test_snapshot_names_are_no_paths(server, name):
    http = server.http()
    session = new(http)
    for answer in (
        http.post(f"/v1/sessions/{session}/save", json={"name": name}),
        http.post("/v1/sessions", json={"snapshot": name}),
    ):
        assert answer.status_code == 400


def test_list_delete_and_unknown(server):
    http = server.http()
    before = {s["id"] for s in http.get("/v1/sessions?limit=1000").json()["data"]}
    mine = [new(http, title=str(number)) for number in range(3)]
    page = http.get("/v1/sessions", params={"limit": 2, "after": mine[0]}).json()
    assert [s["id"] for s in page["data"]] == mine[1:]
    assert not page["has_more"]
    assert http.delete(f"/v1/sessions/{mine[0]}").json()["deleted"]
    for answer in (
        http.get(f"/v1/sessions/{mine[0]}"),
        http.delete(f"/v1/sessions/{mine[0]}"),
        http.post(f"/v1/sessions/{mine[0]}/fork"),
        http.post(f"/v1/sessions/{mine[0]}/ask", json={"prompt": "x"}),
        http.post(f"/v1/sessions/{mine[0]}/read", json={"text": "x"}),
    ):
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "session_not_found"
    now = {s["id"] for s in http.get("/v1/sessions?limit=1000").json()["data"]}
    assert now - before == set(mine[1:])


def test_concurrent_readers_of_one_session_come_one_after_another(server, direct):
    """Any order is right; mixed tokens would be neither's continuation."""
    http = server.http()
    session = new(http)
    parts = [f"part {number} " * 8 for number in range(6)]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda part: read(server.http(), session, part), parts))
        assert tokens_of(http, session) == sum(map(len, parts))
        asked = [
            pool.submit(ask, server.http(), session, f" ask{number}", tokens=6, advance=True)
            for number in range(4)
        ]
        answers = [future.result() for future in asked]
    total = sum(map(len, parts)) + sum(5 + len(answer.encode()) for answer in answers)
    assert tokens_of(http, session) == total


def test_a_document_that_fails_changes_nothing(server):
    http = server.http()
    session = new(http)
    read(http, session, BOOK)
    wrong = http.post(
        f"/v1/sessions/{session}/read",
        content=BOOK.encode() * 500 + b"\xff",
        headers={"content-type": "text/plain"},
    )
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (400, "invalid_document")
    assert tokens_of(http, session) == len(BOOK)


def test_eviction_to_disk_and_back_changes_nothing(serve, direct):
    server = serve(memory_mb=0)
    http = server.http()
    sessions = [new(http) for _ in range(3)]
    for number, session in enumerate(sessions):
        read(http, session, BOOK + str(number))
        assert not http.get(f"/v1/sessions/{session}").json()["in_memory"]
    for number, session in enumerate(sessions):
        told = BOOK + str(number)
        answer = ask(http, session, "It", advance=True)
        assert answer == direct(told + "It")
        assert ask(http, session, "?") == direct(told + "It" + answer + "?")


def test_the_least_recently_used_leaves_memory(serve):
    server = serve(memory_mb=0.11)  # room for two states
    http = server.http()
    first, second, third = (new(http) for _ in range(3))
    for session in (first, second):
        read(http, session, BOOK)
    ask(http, first, "x")
    read(http, third, BOOK)
    resident = {s["id"] for s in http.get("/v1/sessions").json()["data"] if s["in_memory"]}
    assert resident == {first, third}


def test_a_full_disk_refuses_and_loses_nothing(serve, direct):
    server = serve(disk_mb=0.15)
    http = server.http()
    session = new(http)
    read(http, session, BOOK)
    answers = [http.post(f"/v1/sessions/{session}/fork") for _ in range(8)]
    forks = [answer.json()["id"] for answer in answers if answer.status_code == 201]
    answer = answers[-1]
    assert (answer.status_code, answer.json()["error"]["code"]) == (507, "storage_full")
    assert forks
    snapshot = http.post(f"/v1/sessions/{session}/save", json={"name": "one"})
    assert snapshot.status_code == 507
    assert ask(http, session, "It") == direct(BOOK + "It")
    http.delete(f"/v1/sessions/{forks[0]}")
    assert http.post(f"/v1/sessions/{session}/fork").status_code == 201
    held = sum(path.stat().st_size for path in server.store.disk.folder.rglob("*.safetensors"))
    assert held <= 0.15 * 2**20


def test_evict_deletes_the_least_recently_used_of_the_same_client(serve):
    tokens = {"a" * 16: "anna", "b" * 16: "bert"}
    server = serve(disk_mb=0.15, evict=True, tokens=tokens)
    anna, bert = (server.http(token) for token in tokens)
    berts = new(bert)
    read(bert, berts, BOOK)
    first = new(anna)
    read(anna, first, BOOK)
    kept = [anna.post(f"/v1/sessions/{first}/fork").json()["id"] for _ in range(4)]
    assert anna.get(f"/v1/sessions/{kept[-1]}").status_code == 200
    assert anna.get(f"/v1/sessions/{kept[0]}").status_code == 404
    assert tokens_of(bert, berts) == len(BOOK)


@pytest.mark.parametrize("save_seconds", [0, 100])
def test_a_stopped_server_goes_on_where_it_was(serve, direct, save_seconds):
    server = serve(save_seconds=save_seconds)
    http = server.http()
    session = new(http, title="book")
    read(http, session, BOOK)
    server.stop()
    http = serve(save_seconds=save_seconds).http()
    found = http.get(f"/v1/sessions/{session}").json()
    assert (found["tokens"], found["title"]) == (len(BOOK), "book")
    assert ask(http, session, "It") == direct(BOOK + "It")


def test_damaged_files_and_other_models_are_left_aside(serve, model, monkeypatch):
    server = serve()
    http = server.http()
    sessions = [new(http) for _ in range(3)]
    for session in sessions:
        read(http, session, BOOK)
    server.stop()
    paths = [server.store.sessions[session].path for session in sessions]
    flipped = bytearray(paths[0].read_bytes())
    flipped[-5] ^= 1
    paths[0].write_bytes(flipped)
    paths[1].write_bytes(paths[1].read_bytes()[:-50])
    (paths[2].parent / f".{paths[2].name}.0.tmp").write_bytes(b"half")
    server = serve()
    http = server.http()
    answer = http.post(f"/v1/sessions/{sessions[0]}/ask", json={"prompt": "x"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "state_unusable")
    assert str(paths[0]) not in answer.text
    assert http.get(f"/v1/sessions/{sessions[1]}").status_code == 404
    assert tokens_of(http, sessions[2]) == len(BOOK)
    assert paths[1].exists()
    assert not list(paths[2].parent.glob(".*.tmp"))
    server.stop()
    with monkeypatch.context() as patch:
        patch.setattr("pytitans.serve.storage.model_fingerprint", lambda model: "another")
        assert serve().http().get("/v1/sessions").json()["data"] == []
    assert all(path.exists() for path in paths)


def test_one_server_a_folder(serve):
    serve()
    with pytest.raises(ValueError, match="in use by another server"):
        serve()


def test_killed_servers_lose_no_session(tmp_path, model, tokenizer, direct):
    """kill -9 while sessions are being advanced: each is as before the call or after it."""
    model.save_pretrained(tmp_path / MODEL)
    tokenizer.save_pretrained(tmp_path / MODEL)
    command = [sys.executable, "-m", "pytitans.cli", "serve", "--model", MODEL, "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start():
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
        )
        line = process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+", line)
        assert found, line
        return process, openai.DefaultHttpxClient(base_url=found[0], timeout=60)

    process, http = start()
    sessions = [new(http) for _ in range(4)]
    for session in sessions:
        read(http, session, BOOK)
    answer = ask(http, sessions[0], "It", advance=True)
    killer = ThreadPoolExecutor(4)
    calls = [killer.submit(read, http, session, BOOK * 3) for session in sessions]
    calls[0].result()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    done = [call.exception() is None for call in calls]
    killer.shutdown()
    http.close()

    process, http = start()
    told = [BOOK + "It" + answer, BOOK, BOOK, BOOK]
    for session, before, was_answered in zip(sessions, told, done, strict=True):
        count, after = tokens_of(http, session), before + BOOK * 3
        assert count in ({len(after)} if was_answered else {len(before), len(after)})
        text = after if count == len(after) else before
        assert ask(http, session, "So") == direct(text + "So")
    http.close()
    process.send_signal(signal.SIGTERM)
    process.wait()
    process.stdout.close()
