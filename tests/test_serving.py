"""The REST API on a real server: with OpenAI's own client, with what is wrong, with many clients, and with fuzz."""

import asyncio
import gc
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import pytest
import tiny
import torch
from helpers import seeded
from servers import serving
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from dsl.address import listen
from dsl.batching import Batch
from dsl.engine import Engine, Full, Job, Limits
from dsl.generation import Token, complete, generate
from dsl.schema import SettingsError
from dsl.serving import Server, name_of, serve

PROMPT = "a state é"
GREEDY = {"model": "tiny", "prompt": PROMPT, "max_tokens": 20, "temperature": 0}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return tiny.shell()


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.bytes_tokenizer(ends=False)


@pytest.fixture(scope="module")
def url(model, tokenizer):
    with serving(model, tokenizer) as url:
        yield url


@pytest.fixture(scope="module")
def http(url):
    with httpx.Client(base_url=url, timeout=300) as client:
        yield client


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_generate_is_prompt_and_continuation(http, model, tokenizer):
    length = len(tokenizer(PROMPT)["input_ids"])
    answer = http.post("/generate", json={"prompt": PROMPT, "max_length": length + 9, "temperature": 0})
    assert answer.status_code == 200, answer.text
    assert answer.json() == {
        "generated_text": PROMPT + complete(model, tokenizer, PROMPT, max_new_tokens=9, temperature=0)
    }
    sampled = {"prompt": PROMPT, "max_length": 40, "temperature": 0.9, "top_p": 0.9, "top_k": 20, "seed": 3}
    alone = complete(model, tokenizer, PROMPT, max_new_tokens=40 - length, temperature=0.9, top_p=0.9, top_k=20, seed=3)
    assert http.post("/generate", json=sampled).json()["generated_text"] == PROMPT + alone
    short = http.post("/generate", json={"prompt": PROMPT, "max_length": length})
    assert short.status_code == 422 and short.json()["error"]["param"] == "max_length"
    assert http.post("/generate", json={"prompt": ""}).status_code == 422  # this tokenizer has nothing to start from


def test_openai_client_whole_and_streamed(client, model, tokenizer):
    assert [m.id for m in client.models.list()] == ["tiny"]
    alone = complete(model, tokenizer, PROMPT, max_new_tokens=20, temperature=0)
    whole = client.completions.create(**GREEDY)
    assert whole.choices[0].text == alone and whole.choices[0].finish_reason == "length"
    length = len(tokenizer(PROMPT)["input_ids"])
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (length, 20)
    parts = list(client.completions.create(**GREEDY, stream=True, stream_options={"include_usage": True}))
    assert "".join(p.choices[0].text for p in parts[:-1]) == alone and len(parts) > 20
    assert parts[-1].usage == whole.usage and parts[-2].choices[0].finish_reason == "length"
    sampled = {**GREEDY, "temperature": 0.8, "seed": 5}
    assert client.completions.create(**sampled).choices == client.completions.create(**sampled).choices
    assert client.completions.create(**GREEDY, echo=True).choices[0].text == PROMPT + alone


def test_null_is_the_default(client):
    optional = ["stop", "temperature", "top_p", "seed", "stream", "stream_options", "logprobs", "echo", "user"]
    optional += ["n", "best_of", "max_tokens", "presence_penalty", "frequency_penalty"]
    given = dict.fromkeys(optional) | {"model": "tiny", "prompt": PROMPT, "extra_body": {"repetition_penalty": None}}
    answer = client.completions.create(**given)
    assert answer.usage.completion_tokens == 16
    assert (
        client.completions.create(**given | {"seed": 1}).choices
        == client.completions.create(model="tiny", prompt=PROMPT, seed=1).choices
    )


def test_logprobs_and_routing(client, model, tokenizer):
    tokens = list(generate(model, tokenizer, PROMPT, max_new_tokens=4, temperature=0))
    extra = {"routing": True, "repetition_penalty": 1.0, "top_k": 5}
    choice = client.completions.create(**GREEDY | {"max_tokens": 4}, logprobs=2, extra_body=extra).choices[0]
    assert choice.routing == [
        {"text": t.text, "probability": t.probability, "experts": t.experts.tolist(), "state_bytes": t.state_bytes}
        for t in tokens
    ]
    assert choice.logprobs.token_logprobs == pytest.approx([torch.tensor(t.probability).log().item() for t in tokens])
    assert all(
        len(row) <= 2 and max(row.values()) >= log - 1e-6
        for row, log in zip(choice.logprobs.top_logprobs, choice.logprobs.token_logprobs, strict=True)
    )
    parts = list(client.completions.create(**GREEDY | {"max_tokens": 4}, stream=True, logprobs=0, extra_body=extra))
    assert [e for p in parts for e in p.choices[0].routing] == choice.routing
    assert [o for p in parts for o in p.choices[0].logprobs.text_offset] == choice.logprobs.text_offset


def test_stop_texts(client, model, tokenizer):
    alone = complete(model, tokenizer, PROMPT, max_new_tokens=20, temperature=0)
    stop = alone[5:8]
    at = alone.index(stop)
    for stream in (False, True):
        answer = client.completions.create(**GREEDY, stop=["never comes", stop], stream=stream)
        choices = [part.choices[0] for part in (answer if stream else [answer])]
        assert "".join(c.text for c in choices) == alone[:at] and choices[-1].finish_reason == "stop"
    # what only began like a stop text is not lost
    kept = client.completions.create(**GREEDY, stop=alone[-1] + "and more", stream=True)
    assert "".join(part.choices[0].text for part in kept) == alone


def test_offsets_count_the_text_that_is_held_back(client, model, tokenizer):
    alone = complete(model, tokenizer, PROMPT, max_new_tokens=20, temperature=0)
    how = {**GREEDY, "stop": alone[2:6] + "and more", "logprobs": 0, "echo": True}
    whole = client.completions.create(**how).choices[0].logprobs.text_offset
    parts = [part.choices[0] for part in client.completions.create(**how, stream=True)]
    assert [offset for part in parts for offset in part.logprobs.text_offset] == whole
    assert "".join(part.text for part in parts) == PROMPT + alone


def test_an_end_that_only_the_model_knows_is_a_stop(tokenizer):
    seeded()
    ending = tiny.shell()
    token = next(iter(generate(ending, tokenizer, PROMPT, max_new_tokens=1, temperature=0)))
    for ends in (token.id, [255, token.id]):
        ending.generation_config.eos_token_id = ends
        with serving(ending, tokenizer) as url:
            answer = post(f"{url}/v1/completions", json=GREEDY).json()
        assert answer["usage"]["completion_tokens"] == 1 and answer["choices"][0]["finish_reason"] == "stop"


def test_eos_is_a_stop(model):
    ending = tiny.bytes_tokenizer()
    token = next(iter(generate(model, ending, PROMPT, max_new_tokens=1, temperature=0)))
    ending.eos_token = ending.convert_ids_to_tokens(token.id)
    with serving(model, ending) as url:
        choice = post(f"{url}/v1/completions", json=GREEDY).json()["choices"][0]
    assert choice["finish_reason"] == "stop"


def test_health(http):
    answer = http.get("/health")
    assert answer.status_code == 200 and answer.json() == {"live": True, "ready": True, "running": 0, "waiting": 0}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**9}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": "a" * 20_001}, "prompt"),
        ({"max_token": 5}, "max_token"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"n": 2}, "n"),
        ({"logprobs": 6}, "logprobs"),
        ({"model": "gpt-4"}, "model"),
    ],
)
def test_a_wrong_field_is_named(http, change, field):
    answer = http.post("/v1/completions", json={**GREEDY, **change})
    assert 400 <= answer.status_code < 500, answer.text
    error = answer.json()["error"]
    assert error["param"].startswith(field) and field in error["message"] and len(answer.content) < 2000


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b'{"\\ud800": 1, "prompt": "a"}',
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": Infinity}',
        b'{"prompt": "a", "temperature": 1e999}',
        b"[" * 100_000,
        b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
    ],
    ids=range(12),
)
def test_no_body_breaks_it(http, body):
    for path in ("/generate", "/v1/completions"):
        answer = http.post(path, content=body, headers={"Content-Type": "application/json"})
        assert 400 <= answer.status_code < 500, (path, answer.text)
        assert answer.json()["error"]["message"] and "/" not in answer.json()["error"]["message"]


def test_broken_json_is_the_fault_of_no_field(http):
    answer = http.post("/generate", content=b'{"prompt": "a", }', headers={"Content-Type": "application/json"})
    error = answer.json()["error"]
    assert error["param"] == "body" and error["message"].startswith("body: JSON")


def test_a_large_body_is_refused(http):
    def chunks():
        for _ in range(40):
            yield b" " * 50_000

    for content in (b" " * 2_000_000, chunks()):
        answer = http.post("/generate", content=content, headers={"Content-Type": "application/json"})
        assert answer.status_code == 413 and answer.json()["error"]["message"]


def test_unknown_places(http):
    for method, path, status in (("GET", "/", 404), ("GET", "/generate", 405), ("POST", "/v1/models", 405)):
        answer = http.request(method, path)
        assert answer.status_code == status and answer.json()["error"]["message"]


def test_a_prompt_beyond_the_window(tokenizer):
    long = {"prompt": "a" * 200, "max_length": 210, "temperature": 0}
    with serving(tiny.shell(layer_types=tiny.FULL), tokenizer) as url:
        answer = post(f"{url}/generate", json=long)
        assert answer.status_code == 422 and answer.json()["error"]["param"] == "prompt"
        assert "max_position_embeddings=96" in answer.json()["error"]["message"]
        streamed = post(f"{url}/v1/completions", json={"prompt": "a" * 200, "stream": True})
        assert streamed.status_code == 422
        near = post(f"{url}/v1/completions", json={"prompt": "a" * 90, "max_tokens": 50, "temperature": 0})
        assert near.json()["usage"]["completion_tokens"] == 6  # the window's end
    with serving(tiny.shell(), tokenizer) as url:
        assert len(post(f"{url}/generate", json=long).json()["generated_text"]) >= 200


def test_a_key(model, tokenizer, monkeypatch):
    with serving(model, tokenizer, key="s3cret") as url:
        for given in (None, "Bearer wrong", "s3cret", "Bearer é"):
            headers = {"Authorization": given.encode()} if given else {}
            answer = post(f"{url}/generate", json={"prompt": "a"}, headers=headers)
            assert answer.status_code == 401 and answer.headers["WWW-Authenticate"] == "Bearer"
            assert "s3cret" not in answer.text
        assert get(f"{url}/v1/models").status_code == 401 and get(f"{url}/health").status_code == 200
        with openai.OpenAI(base_url=f"{url}/v1", api_key="s3cret") as client:
            assert client.completions.create(**GREEDY).usage.completion_tokens == 20
        with openai.OpenAI(base_url=f"{url}/v1", api_key="no") as client, pytest.raises(openai.AuthenticationError):
            client.models.list()
    monkeypatch.delenv("DSL_API_KEY", raising=False)
    for host in ("0.0.0.0", "192.0.2.1", "::", "example.org"):
        with pytest.raises(SettingsError, match="set a key in DSL_API_KEY"):
            serve("nowhere", host, 0)


def test_a_port_in_use():
    with listen("127.0.0.1", 0) as door:
        port = door.getsockname()[1]
        with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1 port {port}: .*; try another --port"):
            serve("nowhere", "127.0.0.1", port)
    with pytest.raises(SettingsError, match="got 70000"):
        listen("127.0.0.1", 70000)


def test_a_failure_says_nothing_of_the_inside(tokenizer, caplog, capfd, monkeypatch):
    broken = tiny.shell()
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    with serving(broken, tokenizer) as url:
        for body in (GREEDY, {**GREEDY, "stream": True}):
            answer = post(f"{url}/v1/completions", json=body)
            assert answer.status_code == 500 and answer.json()["error"]["type"] == "server_error"
            assert set(answer.text.lower().split()).isdisjoint({"traceback", "file", "nan"})
        monkeypatch.setattr("dsl.answers.Answer", lambda *_: 1 / 0)
        assert post(f"{url}/v1/completions", json=GREEDY).status_code == 500
        assert get(f"{url}/health").json()["ready"]
    logged = caplog.text + "".join(capfd.readouterr())
    assert "a request failed: NotFiniteError" in logged and "a request failed: ZeroDivisionError" in logged
    assert "Traceback" not in logged and PROMPT not in logged and "dsl/" not in logged


class Slow:
    """Makes each reading of the model take its time, and counts them."""

    def __init__(self, monkeypatch, seconds: float):
        self.made, step = 0, Batch.step

        def slowly(batch, tokens):
            time.sleep(seconds)
            self.made += 1
            return step(batch, tokens)

        monkeypatch.setattr(Batch, "step", slowly)


def post(*given: Any, **options: Any) -> httpx.Response:
    return httpx.post(*given, **{"timeout": 300, **options})  # a guard against hanging: machines are slow


def get(url: str) -> httpx.Response:
    return httpx.get(url, timeout=300)


def eventually(ask: Callable[[], Any], holds: Callable[[Any], bool]) -> Any:
    """What `ask` gives once that `holds`."""
    for _ in range(600):
        if holds(answer := ask()):
            return answer
        time.sleep(0.05)
    raise AssertionError(answer)


def settled(url: str) -> dict:
    """The health of a server when nothing runs any more."""
    return eventually(lambda: get(f"{url}/health").json(), lambda it: not it["running"] + it["waiting"])


def test_a_prompt_that_the_tokenizer_fails_on_harms_no_other(model):
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1})))
    with serving(model, words) as url:
        for prompt, status in (("zzz", 500), ("a", 200)):  # it has no word for what it does not know
            answer = post(f"{url}/v1/completions", json={**GREEDY, "prompt": prompt})
            assert answer.status_code == status, answer.text


@pytest.mark.parametrize("method", ["leave", "step"])
def test_a_batch_that_breaks_is_told_to_its_requests(model, tokenizer, monkeypatch, method):
    slow, before = Slow(monkeypatch, 0.02), getattr(Batch, method)

    def full(batch, given):
        shorter_ended = method == "leave" and 0 < len(given) < len(batch.lengths)
        if shorter_ended or (method == "step" and slow.made > 3):
            raise torch.OutOfMemoryError("no room")
        return before(batch, given)

    monkeypatch.setattr(Batch, method, full)
    with serving(model, tokenizer) as url, ThreadPoolExecutor(1) as pool:
        ask = {"url": f"{url}/v1/completions", "timeout": 300}
        long = pool.submit(post, **ask, json={**GREEDY, "max_tokens": 4000})
        eventually(lambda: slow.made, lambda made: made > 2)
        short = post(**ask, json={**GREEDY, "max_tokens": 4})
        assert short.status_code == (200 if method == "leave" else 500)
        assert long.result().status_code == 500 and "model failed" in long.result().text
        monkeypatch.setattr(Batch, method, before)
        settled(url)
        answer = post(**ask, json=GREEDY).json()
    assert answer["choices"][0]["text"] == complete(model, tokenizer, PROMPT, max_new_tokens=20, temperature=0)


def test_a_failure_after_the_reading_ends_that_request_only(model, tokenizer, monkeypatch):
    engine = Engine(model, tokenizer, Limits())
    monkeypatch.setattr("dsl.generation.Token", lambda **t: 1 / 0 if t["position"] == 50 else Token(**t))

    async def texts(prompt: str) -> list:
        engine.submit(job := Job({"prompt": prompt, "max_new_tokens": 30, "temperature": 0}, 60))
        items = [await job.items.get()]
        while isinstance(items[-1], Token):
            items.append(await job.items.get())
        return items

    async def both() -> list[list]:
        engine.start()
        return await asyncio.gather(texts("a" * 48), texts("a"))

    broken, whole = asyncio.run(both())
    assert len(broken) == 3 and "the model failed" in str(broken[-1])
    assert len(whole) == 31 and whole[-1] is None
    eventually(lambda: (engine.batches, engine.running), lambda left: not any(left))  # its row is not kept
    engine.close()
    engine.join(20)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_nobody_waits_for_an_engine_that_has_ended(model, tokenizer, monkeypatch):
    monkeypatch.setattr(Engine, "_turn", lambda _: sys.exit())  # by whatever way
    with serving(model, tokenizer) as url:
        for _ in range(2):  # one that it took, one that it refuses
            assert post(f"{url}/v1/completions", json=GREEDY).status_code == 503
        health = get(f"{url}/health")
        assert health.status_code == 503 and not health.json()["ready"]


def test_overload_is_said_and_passes(model, tokenizer, monkeypatch):
    Slow(monkeypatch, 0.15)  # all six have come before the first is done
    with serving(model, tokenizer, limits=Limits(running=1, waiting=1)) as url, ThreadPoolExecutor(6) as pool:
        answers = [*pool.map(lambda _: post(f"{url}/v1/completions", json=GREEDY), range(6))]
        codes = sorted(a.status_code for a in answers)
        assert codes[:2] == [200, 200] and codes[-1] == 503 and set(codes) == {200, 503}, codes
        assert all(a.headers["Retry-After"] == "2" for a in answers if a.status_code == 503)
        assert post(f"{url}/v1/completions", json=GREEDY).status_code == 200
        settled(url)


def test_who_left_while_waiting_takes_no_room(model, tokenizer):
    async def ask():
        engine, left = Engine(model, tokenizer, Limits(running=0, waiting=1)), Job({}, 1)
        engine.submit(left)
        left.stop.set()
        engine.submit(Job({}, 1))
        assert await left.items.get() is None
        with pytest.raises(Full, match="no room"):
            engine.submit(Job({}, 1))
        engine.close()
        with pytest.raises(Full, match="closing"):
            engine.submit(Job({}, 1))

    asyncio.run(ask())


def test_a_server_that_ends_says_so_to_those_it_cuts_short(model, tokenizer, monkeypatch):
    slow = Slow(monkeypatch, 0.02)
    monkeypatch.setattr("dsl.serving.GRACE", 0.1)
    monkeypatch.setattr("servers.uvicorn.Server", Server)
    body = {**GREEDY, "max_tokens": 4000}
    with ThreadPoolExecutor(2) as pool:
        with serving(model, tokenizer) as url:
            ask = {"url": f"{url}/v1/completions", "timeout": 300}
            asked = [pool.submit(post, **ask, json={**body, "stream": stream}) for stream in (False, True)]

            def state() -> tuple:
                return slow.made, get(f"{url}/health").json(), [future.done() for future in asked]

            eventually(state, lambda it: it[0] >= 3 and it[1]["running"] == 2)
        whole, streamed = (future.result() for future in asked)
    assert whole.status_code == 503 and "closing" in whole.json()["error"]["message"]
    assert "closing" in streamed.text.split("data: ")[-2] and streamed.text.endswith("data: [DONE]\n\n")


def until(url: str, status: int) -> httpx.Response:
    """The answer of a server that comes to give this status."""
    return eventually(lambda: get(f"{url}/v1/models"), lambda answer: answer.status_code == status)


def test_more_requests_than_it_can_hold_are_refused_in_its_own_words(model, tokenizer):
    with serving(model, tokenizer, limits=Limits(inside=3)) as url, ExitStack() as stack:
        host, port = url.removeprefix("http://").split(":")
        head = f"POST /generate HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n"
        wires = [stack.enter_context(socket.create_connection((host, int(port)))) for _ in range(3)]
        for wire in wires:  # whose bodies do not come
            wire.sendall(head.encode())
        answer = until(url, 503)
        assert answer.headers["Retry-After"] == "2"
        assert answer.json()["error"]["type"] == "overloaded"
        assert get(f"{url}/health").json()["ready"]
        wires[0].close()
        until(url, 200)


def test_time_is_bounded(model, tokenizer, monkeypatch):
    slow = Slow(monkeypatch, 0)
    monkeypatch.setattr("dsl.engine.time", SimpleNamespace(monotonic=lambda: slow.made))  # a second a token
    body = {**GREEDY, "max_tokens": 1000}
    with serving(model, tokenizer, limits=Limits(seconds=5)) as url:
        answer = post(f"{url}/v1/completions", json=body).json()
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["completion_tokens"] == 6
    with serving(model, tokenizer, limits=Limits(seconds=-1)) as url:  # it waited for its whole time
        assert post(f"{url}/v1/completions", json=body).status_code == 503


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_stops_its_work(model, tokenizer, monkeypatch, stream):
    slow = Slow(monkeypatch, 0.02)
    with serving(model, tokenizer) as url:
        body = json.dumps({**GREEDY, "max_tokens": 2000, "stream": stream}).encode()
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as wire:
            head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            wire.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            eventually(lambda: slow.made, lambda made: made >= 3)
        settled(url)
        assert slow.made < 200


def test_an_openai_stream_that_is_closed_stops(client, url):
    with client.completions.create(**{**GREEDY, "max_tokens": 4000}, stream=True) as stream:
        next(iter(stream))
    settled(url)


def test_many_clients_get_what_each_gets_alone(url, client, model, tokenizer):
    jobs = [{"prompt": "x" * (1 + i % 7) + PROMPT, "max_tokens": 3 + 5 * (i % 6)} for i in range(16)]
    alone = [complete(model, tokenizer, j["prompt"], max_new_tokens=j["max_tokens"], temperature=0) for j in jobs]

    def ask(i: int) -> str:
        how = {"model": "tiny", "temperature": 0, **jobs[i]}
        if i % 3 == 0:
            return "".join(part.choices[0].text for part in client.completions.create(**how, stream=True))
        if i % 8 == 5:  # vanishes
            with client.completions.create(**how | {"max_tokens": 3000}, stream=True) as stream:
                next(iter(stream))
            return alone[i]
        return client.completions.create(**how).choices[0].text

    with ThreadPoolExecutor(16) as pool:
        assert [*pool.map(ask, range(len(jobs)))] == alone
    settled(url)


def test_nothing_is_left_behind(url, http):
    """States of finished and left requests are freed: the same tensors are alive after many requests as after few."""

    def alive() -> int:
        settled(url)
        gc.collect()
        return sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())

    http.post("/v1/completions", json=GREEDY)
    before, threads = alive(), threading.active_count()
    for _ in range(5):
        http.post("/v1/completions", json=GREEDY)
        with http.stream("POST", "/v1/completions", json={**GREEDY, "stream": True, "max_tokens": 300}) as answer:
            next(answer.iter_lines())
    assert alive() <= before + 2 and threading.active_count() <= threads


def test_names_are_no_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("DSL_HOME", str(tmp_path))
    (tmp_path / "checkpoints/mine/step-000002").mkdir(parents=True)
    assert name_of("mine") == name_of(str(tmp_path / "checkpoints/mine")) == "mine"
    assert name_of("checkpoints/mine/step-000002") == "mine/step-000002" and name_of("owner/name") == "owner/name"


@pytest.mark.slow
def test_fuzz_from_the_api_document(url, tmp_path):
    """schemathesis makes requests from the server's own OpenAPI document: no 500, and every answer is as it says."""
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{url}/openapi.json", "--no-color"]
    command += ["--phases", "examples,coverage,fuzzing", "--max-examples", "10", "--max-time", "10", "-w", "1"]
    command += ["--request-timeout", "60", "--suppress-health-check", "all", "--generation-database", "none"]
    command += ["--exclude-checks", "positive_data_acceptance"]  # what the window allows is in no document
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert settled(url)["ready"]
