"""Who runs the model for many requests: one thread, in which all running requests read a token together.

Each has a loop of its own, that of `generation`; only the model's calls are shared. A long answer does not hold up a
short one, and what they may cost is bounded: running and waiting requests, seconds. Knows nothing of HTTP.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsl.batching import Batch
from dsl.generation import Token, end_tokens, turns

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
        self.closed, self.ends = False, end_tokens(model, tokenizer)

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
        try:
            while True:
                with self.work:
                    self.work.wait_for(lambda: self.waiting or self.batches or self.closed)
                    if self.closed:
                        break
                    while self.waiting and len(self.running) < self.limits.running:
                        self.running.append(self.waiting.popleft())
                self._turn()
        finally:  # whatever ended it, nobody waits for a thread that is no more
            with self.work:
                self.closed = True
                for job in (*self.running, *self.waiting):
                    job.put(Full("the server is closing"))

    @torch.inference_mode()
    def _turn(self) -> None:
        """A token for every running request. This is the thread's door, so every error is reported."""
        asked = {}
        for job in self.running:
            try:
                asked[job] = self._asked(job)
            except StopIteration:
                job.put(None)
            except Exception as error:
                self._fail(error, job)
        going = []
        for batch in [*self.batches]:
            try:
                going += self._step(batch, asked)
            except Exception as error:
                self._fail(error, *(job for job in self.batches.pop(batch) if job in asked))
        with self.work:
            self.running = going

    def _asked(self, job: Job) -> Tensor:
        """The token that the model must read next for a request, whose prompt it has read. StopIteration at its end."""
        late = time.monotonic() > job.deadline
        if job.turns is None:
            if late or job.stop.is_set():
                raise Full("the server had no time for this request")
            job.turns = turns(self.model, self.tokenizer, stop=job.stop, **job.sampling)
            batch = next(filter(Batch.takes_more, self.batches), None) or Batch(self.model.model)
            reading = batch.join(next(job.turns))
            self.batches.setdefault(batch, []).append(job)
            job.turns.send(reading)
        elif late:
            job.stop.set()  # ends its loop
        return next(job.turns)

    def _step(self, batch: Batch, asked: dict[Job, Tensor]) -> list[Job]:
        """Who of a batch goes on after reading a token; the rows of those that asked for none are let go first."""
        stay = [i for i, job in enumerate(self.batches[batch]) if job in asked]
        batch.leave(stay)
        jobs = self.batches[batch] = [self.batches[batch][i] for i in stay]
        if not jobs:
            del self.batches[batch]
            return []
        going = []
        for job, reading in zip(jobs, batch.step(torch.cat([asked[job] for job in jobs])), strict=True):
            try:
                job.put(job.turns.send(reading))
                going.append(job)
            except Exception as error:
                self._fail(error, job)
        return going

    def _fail(self, error: Exception, *jobs: Job) -> None:
        for job in jobs:
            if job.turns is None and isinstance(error, (Full, ValueError)):  # of the request, whose loop never began
                job.put(error)
            else:
                logger.error("a request failed: %s", type(error).__name__)
                job.put(RuntimeError("the model failed on this request"))
