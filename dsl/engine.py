"""Who runs the model for many requests: one thread, in which all running requests read a token together.

Each has a loop of its own, that of `generation`; only the model's calls are shared. A long answer does not hold up a
short one, and what they may cost is bounded: running and waiting requests, seconds. Knows nothing of HTTP.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from dsl.batching import Batch
from dsl.generation import Token, turns

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """What one server takes on."""

    running: int = 8  # requests that read together
    waiting: int = 24  # requests beyond those
    seconds: float = 120.0  # from asking to the last token
    body: int = 1_000_000  # bytes of a request
    inside: int = 256  # requests that are being read, run, waiting or answered


class Full(Exception):
    """There is no room or no time for a request now."""


class Job:
    """A request on its way: its tokens, then None or an error, reach the event loop that made it through `items`."""

    def __init__(self, sampling: dict[str, Any], seconds: float):
        self.sampling, self.deadline = sampling, time.monotonic() + seconds
        self.loop, self.items, self.stop = asyncio.get_running_loop(), asyncio.Queue(), threading.Event()
        self.turns = None  # of its own loop, once it runs

    def put(self, item: Token | Exception | None) -> None:
        with suppress(RuntimeError):  # the event loop has closed: nobody is waiting
            self.loop.call_soon_threadsafe(self.items.put_nowait, item)


class Engine(threading.Thread):
    """The thread that owns model and tokenizer; `submit` and `close` may be called from others."""

    def __init__(self, model, tokenizer, limits: Limits):
        super().__init__(name="engine", daemon=True)
        self.model, self.tokenizer, self.limits = model, tokenizer, limits
        self.waiting, self.running, self.work = deque(), [], threading.Condition()
        self.batches: dict[Batch, list[Job]] = {}
        self.closed = False

    def submit(self, job: Job) -> None:
        """Queue a request; raises Full."""
        with self.work:
            if self.closed:
                raise Full("the server is closing")
            for left in [waiting for waiting in self.waiting if waiting.stop.is_set()]:
                self.waiting.remove(left)
                left.put(None)
            if len(self.waiting) + len(self.running) >= self.limits.running + self.limits.waiting:
                raise Full("the server has no room for more requests")
            self.waiting.append(job)
            self.work.notify()

    def close(self) -> None:
        """End after the token that is being made; what runs or waits is cut short."""
        with self.work:
            self.closed = True
            self.work.notify()

    def run(self) -> None:
        while True:
            with self.work:
                self.work.wait_for(lambda: self.waiting or self.running or self.closed)
                if self.closed:
                    break
                while self.waiting and len(self.running) < self.limits.running:
                    self.running.append(self.waiting.popleft())
            self._turn()
        for job in (*self.running, *self.waiting):
            job.put(Full("the server is closing"))

    @torch.inference_mode()
    def _turn(self) -> None:
        """A token for every running request. This is the thread's door, so every error is reported."""
        begun = [job for job in self.running if self._begun(job)]
        asked = {job: self._try(job, next, job.turns) for job in begun}
        self._keep({job for job, tokens in asked.items() if tokens is not None})
        going = set()
        for batch, jobs in self.batches.items():
            try:
                answers = batch.step(torch.cat([asked[job] for job in jobs]))
            except Exception as error:
                for job in jobs:
                    self._report(job, error)
                continue
            for job, answer in zip(jobs, answers, strict=True):
                if (token := self._try(job, job.turns.send, answer)) is not None:
                    job.put(token)
                    going.add(job)
        self._keep(going)
        with self.work:
            self.running = [job for job in self.running if job in going]

    def _keep(self, going: set[Job]) -> None:
        """Let the others' rows go."""
        for batch, jobs in [*self.batches.items()]:
            stay = [i for i, job in enumerate(jobs) if job in going]
            batch.leave(stay)
            self.batches[batch] = [jobs[i] for i in stay]
            if not stay:
                del self.batches[batch]

    def _begun(self, job: Job) -> bool:
        """Whether a request goes on; the prompt of a new one is read."""
        if job.stop.is_set() or time.monotonic() > job.deadline:
            done = job.stop.is_set() or job.turns is not None
            job.put(None if done else Full("the server had no time for this request"))
            return False
        if job.turns is not None:
            return True
        try:
            job.turns = turns(self.model, self.tokenizer, stop=job.stop, **job.sampling)
        except ValueError as problem:
            job.put(problem)
            return False
        return self._try(job, self._joined, job) is not None

    def _joined(self, job: Job) -> Batch:
        prompt = next(job.turns)
        batch = next((batch for batch in self.batches if batch.takes_more()), None) or Batch(self.model.model)
        answer = batch.join(prompt)
        self.batches[batch] = [*self.batches.get(batch, ()), job]
        job.turns.send(answer)
        return batch

    def _try(self, job: Job, do: Callable[..., Any], *given: Any) -> Any:
        """What it gives; None where the request has ended or failed, which is told."""
        try:
            return do(*given)
        except StopIteration:
            job.put(None)
        except Exception as error:
            self._report(job, error)
        return None

    def _report(self, job: Job, error: Exception) -> None:
        logger.error("a request failed: %s", type(error).__name__)
        job.put(RuntimeError("the model failed on this request"))
