"""Servers for tests: an application in a thread of this process, or a command in a process of its own."""

import random
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import uvicorn

from dsl.address import listen
from dsl.serving import create_app


@contextmanager
def serving(model, tokenizer, **options) -> Iterator[str]:
    """The URL of a real server for a model called `tiny`, in a thread."""
    app = create_app(model, tokenizer, "tiny", **options)
    with listen("127.0.0.1", 0) as door:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, ws="none"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [door]}, daemon=True)
        thread.start()
        try:
            wait_for(f"http://127.0.0.1:{door.getsockname()[1]}/health", lambda: thread.is_alive())
            yield f"http://127.0.0.1:{door.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(300)
            app.state.engine.join(300)
        assert not thread.is_alive() and not app.state.engine.is_alive()


def free_port() -> int:
    """One below those that a system lends to connections: none has it when a server comes for it, seconds later."""
    while True:
        port = random.SystemRandom().randrange(20_000, 27_000)
        with suppress(OSError), listen("127.0.0.1", port):
            return port


def wait_for(url: str, alive, seconds: float = 300) -> bytes:
    """What the URL answers, once it does."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert alive(), f"nothing will answer at {url}"
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:
                return answer.read()
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"{url} did not answer in {seconds} s")


@contextmanager
def process(command: list[str], url: str, **options) -> Iterator[subprocess.Popen]:
    """A command that answers at the URL; ended as an engine ends a container, by SIGTERM."""
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    try:
        try:
            wait_for(url, lambda: child.poll() is None)
        except AssertionError as error:
            child.kill()
            raise AssertionError(f"{error}: {child.communicate()[0][-2000:]}") from None
        yield child
    finally:
        child.terminate()
        try:
            child.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            child.kill()
            child.communicate()
