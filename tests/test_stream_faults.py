"""A bad line loses no document and doubles none; a dead one ends in a plain message; the end leaves nothing behind."""

import json
import logging
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch
from helpers import seeded
from hub_emulator import FAULTS, Hub, write_dataset
from runs import assert_same, cache, home, make, train  # noqa: F401

from dsl.data import StreamError, TokenStream, open_corpus, open_tokenizer
from dsl.settings import DataConfig
from dsl.tables import retrying

ROOT = Path(__file__).parents[1]
DATA = DataConfig(
    corpus="cosmopedia",
    tokenizer="bpe:300",
    held_out=0.1,
    block_size=16,
    shuffle_rows=1,
    retry_attempts=6,
    retry_first_wait=0.0005,
    retry_longest_wait=0.002,
)
SHARDS = [[f"<{shard}.{i}> " + "a few words " * ((i * 7) % 5) for i in range(60)] for shard in range(3)]
ALL = {text for shard in SHARDS for text in shard}
IMPATIENT = 0.2  # seconds that a request waits for a body that stops coming; a busy machine may retry others, too


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setenv("DSL_CACHE", str(tmp_path / "cache"))
    write_dataset(tmp_path / "hub", "HuggingFaceTB/cosmopedia", {"web_samples_v2": SHARDS}, rows_per_group=25)
    with Hub(tmp_path / "hub") as served:
        served.use(monkeypatch)
        served.stall = 0.5
        yield served


def open_stream(state: dict | None = None, data: DataConfig = DATA) -> TokenStream:
    corpus = open_corpus(data)
    stream = TokenStream(corpus, open_tokenizer(data, corpus), data=data, seed=1, length=64)
    if state is not None:
        stream.load_state_dict(json.loads(json.dumps(state)))
    return stream


def data_requests(hub: Hub) -> int:
    return sum(span is not None for _, span in hub.requests)


def documents(rows: list[torch.Tensor], tokenizer) -> list[str]:
    text = tokenizer.decode(torch.stack(rows)[:, :-1].flatten())
    return text.split(tokenizer.eos_token)[:-1]


@pytest.mark.parametrize("fault", FAULTS)
def test_every_request_of_an_epoch_may_fail(hub, fault, caplog, monkeypatch):
    """Each request in turn fails once, and every third one twice in a row."""
    if fault == "stalled":
        hub.use(monkeypatch, timeout=IMPATIENT)
    clean, expected = open_stream(), []
    while clean.epoch < 1 or len(expected) % 10:
        expected += clean.next(1)
    stream, seen = open_stream(), set()

    def fail(path: str, span: str | None) -> int | str | None:
        tries = sum(request == (path, span) for request in hub.requests[start:])
        wanted = span is not None and tries <= 1 + (len(seen) % 3 == 0) and (len(seen) < 5 or fault != "stalled")
        seen.update({(path, span)} if wanted else ())
        return fault if wanted else None

    start, hub.fault = len(hub.requests), fail
    with caplog.at_level(logging.WARNING, "dsl"):
        got = torch.cat([stream.next(10) for _ in range(len(expected) // 10)])
    assert torch.equal(got, torch.stack(expected))
    assert len(hub.injected) >= (5 if fault == "stalled" else 12)
    lines = [r.getMessage() for r in caplog.records if "attempt" in r.getMessage()]
    assert len(lines) == len(hub.injected) or (len(lines) > len(hub.injected) and fault == "stalled")  # one a retry
    assert all(
        re.match(r"corpus cosmopedia, shard \d \(data/.*parquet\), row \d+: .*attempt \d of 6", x) for x in lines
    )


def crooked_run(hub: Hub, faults: int, share: float, kinds: tuple) -> None:
    """Epochs under random faults, with a resume in a new object now and then, against the unbroken stream."""
    generator = seeded()
    clean, stream, rows = open_stream(), open_stream(), []

    def fail(path: str, span: str | None) -> int | str | None:
        pick, which = torch.rand(2, generator=generator).tolist()
        again = sum(request == (path, span) for request in hub.requests[-4:]) > 3
        return kinds[int(which * len(kinds))] if span and pick < share and not again else None

    while len(hub.injected) < faults:
        hub.fault = fail
        rows += stream.next(int(torch.randint(1, 9, (), generator=generator)))
        hub.fault = lambda path, span: None
        if torch.rand((), generator=generator) < 0.1:
            stream.close()
            stream = open_stream(stream.state_dict())
    assert torch.equal(torch.stack(rows), clean.next(len(rows)))
    texts, held_out = documents(rows, clean_tokenizer()), set(open_corpus(DATA).held_out_documents())
    size = len(ALL - held_out)
    epochs = [texts[i : i + size] for i in range(0, len(texts) - size, size)]
    assert len(epochs) > 1 and all(sorted(epoch) == sorted(ALL - held_out) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
    print(f"{len(hub.injected)} faults, {len(epochs)} epochs")


def clean_tokenizer():
    return open_tokenizer(DATA, open_corpus(DATA))


@pytest.mark.timeout(300)
@pytest.mark.parametrize("seconds", [0, 0.3], ids=["before the wait", "in the wait"])
def test_an_interrupt_ends_the_wait_for_a_dead_line_and_saves(hub, home, seconds):  # noqa: F811
    settings = {**DATA.model_dump(), "retry_first_wait": 3000, "retry_longest_wait": 3000, "logging_steps": 1}
    settings["per_device_train_batch_size"] = 8  # so that 12 steps read more than is read ahead
    train("whole", **settings)

    class Ask(logging.Handler):
        def emit(self, record):
            if "attempt 2 of 6 in" in record.getMessage():
                timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT))
                timer.start()
                if not seconds:
                    timer.join()

    def cut(row):
        hub.fault = lambda path, span: 503

    asker = Ask()
    logging.getLogger("dsl").addHandler(asker)
    try:
        summary = train("parts", on_log=cut, **settings)
    finally:
        logging.getLogger("dsl").removeHandler(asker)
    assert (summary.status, hub.injected) == ("interrupted", [503]) and 0 < summary.step < 12
    hub.fault = lambda path, span: None
    assert train("parts", **settings).status == "finished"
    assert_same(make("whole", **settings), make("parts", **settings), 12)


@pytest.mark.soak
def test_no_document_is_lost_or_doubled_over_two_hundred_faults(hub):
    crooked_run(hub, 200, 0.4, (*FAULTS[:-1],))


@pytest.mark.slow
@pytest.mark.soak
def test_no_document_is_lost_or_doubled_with_bodies_that_stop_coming(hub, monkeypatch):
    hub.use(monkeypatch, timeout=IMPATIENT)
    crooked_run(hub, 2000 if os.environ.get("DSL_SOAK") else 60, 0.4, FAULTS)


def test_the_list_of_files_is_retried_too(hub, monkeypatch):
    hub.use(monkeypatch, timeout=IMPATIENT)
    left = list(FAULTS)

    def fail(path, span):
        return left.pop() if left and path.startswith("/api/datasets") else None

    hub.fault = fail
    assert open_corpus(DATA.model_copy(update={"retry_attempts": 20})).shards == 3 and not left


def test_past_the_limit_the_message_says_what_to_do_and_the_state_is_where_it_was(hub):
    expected = open_stream().next(40)
    stream = open_stream()
    first = stream.next(5)
    state = stream.state_dict()
    hub.fault = lambda path, span: 504
    before = data_requests(hub)
    with pytest.raises(
        StreamError, match=r"shard \d .*504.*attempts made: 6.*same command goes on from the last"
    ) as failed:
        stream.next(40)
    assert data_requests(hub) - before == 6  # and none by the libraries below
    assert "\n" not in str(failed.value) and stream.state_dict() == state
    hub.fault = lambda path, span: None
    assert torch.equal(torch.cat([first, stream.next(35)]), expected)
    assert torch.equal(open_stream(state).next(35), expected[5:])


def test_a_data_set_that_is_taken_away_meanwhile_is_a_fault_like_others(hub, monkeypatch):
    stream = open_stream()
    with monkeypatch.context() as patch:
        taken = lambda self, *_: self._reply(b"", 404, {"X-Error-Code": "RepoNotFound"})  # noqa: E731
        patch.setattr("hub_emulator._Handler._send_file", taken)
        with pytest.raises(StreamError, match=r"RepositoryNotFoundError.*attempts made: 6"):
            stream.next(40)
    assert torch.equal(stream.next(40), open_stream().next(40))


def test_a_data_set_that_wants_a_login_is_asked_once(hub, monkeypatch):
    stream = open_stream()
    gated = lambda self, *_: self._reply(b"", 403, {"X-Error-Code": "GatedRepo"})  # noqa: E731
    monkeypatch.setattr("hub_emulator._Handler._send_file", gated)
    before = data_requests(hub)
    with pytest.raises(StreamError, match="GatedRepoError"):
        stream.next(40)
    assert data_requests(hub) - before == 1


def test_a_thousand_attempts_wait_no_longer_than_the_longest():
    calls, data = [], DATA.model_copy(update={"retry_attempts": 1100, "retry_longest_wait": 0.0})

    def fail():
        calls.append(1)
        raise OSError("gone")

    with pytest.raises(StreamError, match="attempts made: 1100"):
        retrying(data, "it")(fail)
    assert len(calls) == 1100


def test_waits_grow_with_jitter_up_to_the_longest(hub, monkeypatch):
    waits = []
    monkeypatch.setattr("tenacity.nap.time.sleep", waits.append)
    data = DATA.model_copy(update={"retry_attempts": 8, "retry_first_wait": 1.0, "retry_longest_wait": 20.0})
    stream = open_stream(data=data)
    stream.next(1)
    hub.fault = lambda path, span: 500
    with pytest.raises(StreamError):
        stream.next(200)
    assert len(waits) == 7 and all(2**i <= wait <= 2 ** (i + 1) for i, wait in enumerate(waits[:4]))
    assert waits[5:] == [20.0, 20.0]


def test_a_resume_asks_only_for_the_row_groups_that_it_needs(hub, tmp_path):
    rows = [f"Row {i} " + "of many words " * 5 for i in range(20_000)]
    write_dataset(hub.folder, "some/long", {"default": [rows]}, rows_per_group=500)
    data = DATA.model_copy(
        update={"corpus": "hf:some/long", "held_out": 0.001, "held_out_bytes": 300, "block_size": 100}
    )
    stream = open_stream(data=data)
    while stream.state_dict()["place"][2] < 19_000:
        stream.next(400)
    state, before = stream.state_dict(), data_requests(hub)
    resumed = open_stream(state, data)
    following = resumed.next(4)
    assert data_requests(hub) - before <= 3  # the footer and a row group, of forty
    assert torch.equal(following, stream.next(4))


def test_a_finished_stream_leaves_nothing_behind(hub, tmp_path):
    code = """
        import logging, os, psutil, sys, tempfile, threading
        from dsl.data import TokenStream, held_out_rows, open_corpus, open_tokenizer
        from dsl.settings import DataConfig
        before = {t.name for t in threading.enumerate()}
        data = DataConfig(**SETTINGS)
        corpus = open_corpus(data)
        tokenizer = open_tokenizer(data, corpus)
        rows, _ = held_out_rows(corpus, tokenizer, 64)
        stream = TokenStream(corpus, tokenizer, data=data, seed=1, length=64)
        for _ in range(30):
            stream.next(4)
        stream.close()
        me = psutil.Process()
        print(stream.epoch > 1, [f.path for f in me.open_files()], me.net_connections(), me.children(),
              {t.name for t in threading.enumerate()} - before, os.listdir(tempfile.gettempdir()))
    """
    code = textwrap.dedent(code).replace("SETTINGS", repr(DATA.model_dump()))
    (tmp_path / "temporary").mkdir()
    environment = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "hf"),
        "DSL_CACHE": str(tmp_path / "fresh"),
        "TMPDIR": str(tmp_path / "temporary"),
    }
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout == "True [] [] [] set() []\n"
    assert not list((tmp_path / "fresh").glob("*.tmp")) and not (tmp_path / "hf" / "datasets").exists()
