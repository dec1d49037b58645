"""Does `titans serve` stand many clients, kill -9 and requests that make no sense?

    python benchmarks/serving.py                      # all three, about ten minutes on two cores
    python benchmarks/serving.py clients --seconds 60 --clients 32
    python benchmarks/serving.py kills --times 50
    python benchmarks/serving.py schema --examples 50

clients: 32 clients of 4 tokens, each over and over with a session of its own: read, ask, advance,
    stream, chat, fork, save, load, delete. Every answer must be, to the letter, what the model says
    by itself; a session of another token must not be found. Memory for 8 sessions only.
kills: four writers advance four sessions; when a file is being written the server is killed. The
    next server must have each session as after the last answered call or the one under way, told by
    what it answers.
schema: schemathesis against /openapi.json; any 5xx fails.

The model is tiny, random and in float64, so that "to the letter" is exact. Exit code 1 on failure.
"""

import sys

if __name__ == "__main__":
    sys.path.pop(0)  # this folder: operator.py would hide the standard library's `operator`

import argparse
import os
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import openai
import torch
import transformers

from pytitans.cache import TitansCache
from pytitans.data.tokenizer import byte_tokenizer
from pytitans.models import TitansConfig, TitansForCausalLM

NAME = "tiny"
TOKENS = {f"client-{n}": f"token-of-client-{n}-{'x' * 16}" for n in range(4)}
TOKENIZER = byte_tokenizer()
ANSWER = 8  # tokens


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", nargs="?", choices=("clients", "kills", "schema"))
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--examples", type=int, default=50)
    options = parser.parse_args()
    parts = {
        "clients": lambda work: run_clients(work, options.clients, options.seconds),
        "kills": lambda work: run_kills(work, options.times),
        "schema": lambda work: run_schema(work, options.examples),
    }
    transformers.logging.disable_progress_bar()
    failed = False
    for name in [options.part] if options.part else parts:
        with tempfile.TemporaryDirectory() as folder:
            failed |= not parts[name](Path(folder))
    return int(failed)


# The model and the server


def random_model(hidden_size: int) -> TitansForCausalLM:
    torch.manual_seed(0)
    config = TitansConfig(
        variant="mac",
        hidden_size=hidden_size,
        num_attention_heads=2,
        num_hidden_layers=2,
        intermediate_size=hidden_size,
        chunk_size=16,
        segment_len=32,
    )
    model = TitansForCausalLM(config)
    with torch.no_grad():  # answers that depend on all that was read
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
        # only ASCII is written: bytes that are no text would come back as other bytes
        model.model.embed_tokens.weight[128:].mul_(0.01)
    return model.double().eval()


def saved(model: TitansForCausalLM, work: Path) -> Path:
    model.save_pretrained(work / NAME)
    TOKENIZER.save_pretrained(work / NAME)
    return work / NAME


@contextmanager
def server(work: Path, *options: str):
    """A server's process and address; killed at the end if it still runs."""
    command = [sys.executable, "-m", "pytitans.cli", "serve", "--model", str(work / NAME)]
    command += ["--port", "0", "--folder", str(work / "sessions"), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+", line)
        if not found:
            raise RuntimeError(f"the server did not start: {line!r}")
        yield process, found[0]
    finally:
        process.kill()
        process.wait()


def after(model: TitansForCausalLM, text: str, count: int = ANSWER) -> str:
    """What the model says by itself."""
    ids = torch.tensor([TOKENIZER(text).input_ids])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
    )
    return str(TOKENIZER.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


# 32 clients


@dataclass
class Script:
    """What a client does, and what it must be told."""

    document: str
    question: str
    answer: str = ""
    second: str = ""
    forked: str = ""
    plain: str = ""
    sampled: str | None = None  # of a seed: the first run sets it

    def learn(self, model: TitansForCausalLM) -> None:
        text = self.document + self.question
        self.answer = after(model, text)
        self.second = after(model, text + self.answer + "And then?")
        self.forked = after(model, text + self.answer + "Elsewhere.")
        self.plain = after(model, self.question)


class Mixed(Exception):
    """An answer that is not the client's."""


def run_clients(work: Path, clients: int, seconds: float) -> bool:
    model = random_model(32)
    saved(model, work)
    scripts = [
        Script(f"Client {n} has read this. " * (n % 5 + 2), f"Q{n}?") for n in range(clients)
    ]
    for script in scripts:
        script.learn(model)
    tokens = work / "tokens"
    tokens.write_text("".join(f"{name} {token}\n" for name, token in TOKENS.items()))
    counts: Counter[str] = Counter()
    errors: list[str] = []
    latencies: list[float] = []
    limits = ("--tokens", str(tokens), "--memory_mb", "0.5")
    with server(work, *limits) as (_, url):
        end = time.monotonic() + seconds
        public: dict[str, str] = {}  # token -> a session of that client

        def client(number: int) -> None:
            token = list(TOKENS.values())[number % len(TOKENS)]
            headers = {"authorization": f"Bearer {token}"}
            with httpx.Client(base_url=url, headers=headers, timeout=120) as http:
                asks = openai.OpenAI(
                    base_url=f"{url}/v1", api_key=token, max_retries=0, timeout=120
                )
                while time.monotonic() < end and not errors:
                    try:
                        began = time.monotonic()
                        play(scripts[number], number, token, http, asks, public, counts)
                        latencies.append(time.monotonic() - began)
                    except Exception as error:  # whatever a client sees counts as a failure
                        errors.append(f"client {number}: {type(error).__name__}: {error}")
                asks.close()

        began = time.monotonic()
        with ThreadPoolExecutor(clients) as pool:
            list(pool.map(client, range(clients)))
        took = time.monotonic() - began
        metrics = httpx.get(
            f"{url}/metrics", headers={"authorization": f"Bearer {TOKENS['client-0']}"}
        ).text
    five_hundreds = re.findall(r'status="5\d\d"\} [1-9].*', metrics)
    print(
        f"clients: {clients} for {took:.0f} s, {counts.total():,} requests "
        f"({counts.total() / took:.0f}/s), {len(latencies)} whole scripts "
        f"(median {sorted(latencies)[len(latencies) // 2]:.1f} s), {len(errors)} errors or mixed "
        f"answers, {len(five_hundreds)} kinds of 5xx"
        if latencies
        else f"clients: no script was finished, {len(errors)} errors"
    )
    for error in errors:
        print(f"  {error}")
    return not errors and not five_hundreds and len(latencies) >= clients


def play(script: Script, number: int, token: str, http, asks, public, counts) -> None:
    """One session's life."""

    def post(path: str, status: int = 200, **body):
        counts[path.rsplit("/", 1)[-1]] += 1
        answer = http.post(path, json=body)
        if answer.status_code != status:
            raise RuntimeError(f"{path}: {answer.status_code} {answer.text}")
        return answer.json()

    def expect(got: str, wanted: str, what: str) -> None:
        if got != wanted:
            raise Mixed(f"{what}: {got!r} instead of {wanted!r}")

    def asked(session: str, prompt: str, **fields) -> str:
        fields |= {"prompt": prompt, "max_tokens": ANSWER, "temperature": 0}
        return post(f"/v1/sessions/{session}/ask", **fields)["text"]

    session = post("/v1/sessions", 201, title=str(number))["id"]
    public[token] = session
    base = f"/v1/sessions/{session}"
    post(f"{base}/read", text=script.document)
    expect(asked(session, script.question), script.answer, "untouched")
    expect(asked(session, script.question, advance=True), script.answer, "advanced")
    options = {"model": NAME, "max_tokens": ANSWER, "temperature": 0}
    chunks = asks.completions.create(
        **options, prompt="And then?", stream=True, extra_body={"session": session}
    )
    expect("".join(chunk.choices[0].text for chunk in chunks), script.second, "streamed")
    done = asks.completions.create(**options, prompt=script.question)
    expect(done.choices[0].text, script.plain, "without a session")
    fork = post(f"{base}/fork", 201)["id"]
    expect(asked(fork, "Elsewhere.", advance=True), script.forked, "forked")
    expect(asked(session, "And then?"), script.second, "beside the fork")
    snapshot = f"snapshot-{number}"
    post(f"{base}/save", name=snapshot, overwrite=True)
    loaded = post("/v1/sessions", 201, snapshot=snapshot)["id"]
    expect(asked(loaded, "And then?"), script.second, "loaded")
    drawn = asks.chat.completions.create(
        model=NAME,
        messages=[{"role": "user", "content": script.question}],
        max_tokens=ANSWER,
        seed=number,
    )
    script.sampled = script.sampled or drawn.choices[0].message.content
    expect(drawn.choices[0].message.content or "", script.sampled or "", "seeded")
    counts["openai"] += 3
    for other in [s for owner, s in list(public.items()) if owner != token]:
        counts["others"] += 1
        if http.get(f"/v1/sessions/{other}").status_code != 404:
            raise Mixed("another client's session was found")
    for name in (session, fork, loaded):
        counts["delete"] += 1
        http.delete(f"/v1/sessions/{name}").raise_for_status()


# Kills


@dataclass
class Told:
    """A session's document as the client knows it: parts answered for, and the one under way."""

    number: int
    id: str = ""
    done: int = 0
    cache: TitansCache | None = None  # of our own, after `done` parts
    under_way: bool = False
    history: list[int] = field(default_factory=list)

    def part(self, count: int) -> str:
        return f"Session {self.number}, part {count}. "


def run_kills(work: Path, times: int) -> bool:
    """Sessions of a megabyte, so that a save takes a while."""
    model = random_model(64)
    saved(model, work)
    sessions = [Told(number) for number in range(4)]
    during_save = advanced_though_unanswered = lost = 0
    with server(work) as (_, url), httpx.Client(base_url=url, timeout=60) as http:
        for told in sessions:
            told.id = http.post("/v1/sessions", json={}).json()["id"]
    for _ in range(times):
        with server(work) as (process, url):
            with httpx.Client(base_url=url, timeout=60) as http:
                for told in sessions:
                    moved = settle(model, told, http)
                    lost += moved is None
                    advanced_though_unanswered += moved is True
            writers = [threading.Thread(target=write, args=(told, url)) for told in sessions]
            for writer in writers:
                writer.start()
            time.sleep(0.3)
            folder = work / "sessions" / "local" / "sessions"
            deadline = time.monotonic() + 5
            while not any(folder.glob(".*.tmp")) and time.monotonic() < deadline:
                pass
            process.kill()
            process.wait()
            during_save += any(folder.glob(".*.tmp"))
            for writer in writers:
                writer.join()
    with server(work) as (_, url), httpx.Client(base_url=url, timeout=60) as http:
        lost += sum(settle(model, told, http) is None for told in sessions)
    parts = sum(told.done for told in sessions)
    size = sum(path.stat().st_size for path in (work / "sessions").rglob("*.safetensors"))
    print(
        f"kills: {times}, of these {during_save} while a file was half written; "
        f"{parts:,} parts read into {len(sessions)} sessions of {size / len(sessions) / 2**20:.1f} "
        f"MiB; {advanced_though_unanswered} calls had been saved but not answered; "
        f"{lost} sessions lost, corrupt or other than expected"
    )
    return lost == 0 and during_save >= times // 2


def write(told: Told, url: str) -> None:
    """Reads parts until the server is gone."""
    with httpx.Client(base_url=url, timeout=60) as http:
        while True:
            told.under_way = True
            try:
                answer = http.post(
                    f"/v1/sessions/{told.id}/read", json={"text": told.part(told.done)}
                )
                answer.raise_for_status()
            except httpx.HTTPError:
                return
            told.under_way = False
            told.done += 1


def settle(model: TitansForCausalLM, told: Told, http: httpx.Client) -> bool | None:
    """Whether the part under way was read; None if the session is neither before nor after it."""
    found = http.get(f"/v1/sessions/{told.id}")
    if found.status_code != 200:
        return None
    tokens = found.json()["tokens"]
    candidates = [told.done, told.done + 1] if told.under_way else [told.done]
    lengths = {sum(len(told.part(n)) for n in range(count)): count for count in candidates}
    if tokens not in lengths:
        return None
    moved = lengths[tokens] != told.done
    told.done, told.under_way = lengths[tokens], False
    catch_up(model, told)
    body = {"prompt": "?", "max_tokens": ANSWER, "temperature": 0}
    answer = http.post(f"/v1/sessions/{told.id}/ask", json=body)
    if answer.status_code != 200 or answer.json()["text"] != expected(model, told):
        return None
    return moved


@torch.inference_mode()
def catch_up(model: TitansForCausalLM, told: Told) -> None:
    """Our own cache, up to the same part."""
    if told.cache is None:
        told.cache = TitansCache(model.config.num_hidden_layers)
    for count in range(len(told.history), told.done):
        ids = torch.tensor([TOKENIZER(told.part(count)).input_ids])
        model(input_ids=ids, cache=told.cache)
        told.history.append(count)


@torch.inference_mode()
def expected(model: TitansForCausalLM, told: Told) -> str:
    assert told.cache is not None
    cache, ids = told.cache.fork(), TOKENIZER("?").input_ids
    written: list[int] = []
    while len(written) < ANSWER:
        logits = model(input_ids=torch.tensor([ids]), cache=cache).logits
        ids = [int(logits[0, -1].argmax())]
        written += ids
        if ids == [TOKENIZER.eos_token_id]:
            break
    return str(TOKENIZER.decode(written, skip_special_tokens=True))


# Requests that make no sense


def run_schema(work: Path, examples: int) -> bool:
    """schemathesis's own summary; the count of 5xx is the server's."""
    program = shutil.which("schemathesis", path=str(Path(sys.executable).parent))
    if program is None:
        print("schema: schemathesis is not installed (pip install 'pytitans[dev]')")
        return False
    saved(random_model(16), work)
    limits = ("--max_new_tokens", "32", "--disk_mb", "100000")
    with server(work, *limits) as (_, url):
        command = [program, "run", f"{url}/openapi.json", "--max-examples", str(examples)]
        command += ["--checks", "not_a_server_error,content_type_conformance"]
        command += ["--checks", "response_schema_conformance,status_code_conformance"]
        done = subprocess.run(command, cwd=work, capture_output=True, text=True)
        metrics = httpx.get(f"{url}/metrics").text
    statuses: Counter[str] = Counter()
    for status, count in re.findall(r'requests_total\{.*status="(\d+)"\} (\S+)', metrics):
        statuses[status] += int(float(count))
    wrong = sum(count for status, count in statuses.items() if status.startswith("5"))
    listed = ", ".join(f"{status}: {count:,}" for status, count in sorted(statuses.items()))
    print(f"schema: {statuses.total():,} requests; {listed}; 5xx: {wrong}")
    if done.returncode:
        print(done.stdout[-4000:])
    return wrong == 0 and done.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
