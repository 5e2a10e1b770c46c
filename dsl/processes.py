"""This process among others and under signals: the ranks that torchrun started, and a polite answer to Ctrl-C.

Knows nothing of models or runs.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _get_default_store
from torch.nn.parallel import DistributedDataParallel


class Processes:
    """This process among the `world` that torchrun started, or alone without torchrun. The `first` one writes.

    A process group that is there already is used, and left to its owner. Of an error that ends the processes, the first
    to fail tells, whichever it is; the others, which it leaves alone in some exchange, end in silence with code 1.
    """

    def __init__(self) -> None:
        self.world, self.rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        self.first, self.device = self.rank == 0, None
        if self.world > 1 and torch.cuda.is_available():
            self.device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(self.device)

    def __enter__(self) -> Processes:
        self.owner = self.world > 1 and not dist.is_initialized()
        if self.owner:
            dist.init_process_group()
        return self

    def __exit__(self, kind, error, trace) -> None:
        failed = self.world > 1 and isinstance(error, Exception)
        turn = _get_default_store().add("dsl/failed", 1) if failed else 0
        if self.owner:
            dist.destroy_process_group()
        if turn == 1:
            error.add_note(f"process {self.rank} of {self.world} failed first")
        elif turn:
            raise SystemExit(1) from error

    def wrap(self, module: nn.Module) -> nn.Module:
        """The module, its gradients averaged over processes."""
        return DistributedDataParallel(module, forward_sync_buffers=False) if self.world > 1 else module

    def mine(self, rows: Tensor) -> Tensor:
        """The rows of a batch [R, ...] that this process computes."""
        return rows[self.rank :: self.world]

    def sum(self, values: Tensor) -> Tensor:
        """The sum over processes, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether it holds on any process."""
        return flag if self.world == 1 else self.sum(torch.tensor(int(flag), device=self.device)).item() > 0

    def agree(self, value: Any) -> Any:
        """The first process's value, on every process."""
        box = [value]
        if self.world > 1:
            dist.broadcast_object_list(box)
        return box[0]


PATIENCE = 1.0  # seconds that a step may go on after a signal: papermill ends its kernel five seconds after Ctrl-C


class Interrupted(Exception):
    """What was under way is given up, because of a signal."""


class Interrupt:
    """While open, a first SIGINT or SIGTERM only sets `asked`; the same one again does what it would have done before.

    One after the other is no second thought: papermill's Ctrl-C sends its kernel SIGINT, and SIGTERM 2.5 s later.
    Signals reach the main thread alone: in another one this does nothing.
    """

    def __init__(self) -> None:
        self.seen, self.before = set(), {}

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self.before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    @property
    def asked(self) -> bool:
        return bool(self.seen)

    def check(self, *_: Any) -> None:
        """Raises Interrupted once a signal has asked; a hook of a module, with its arguments."""
        if self.asked:
            raise Interrupted

    def lose_patience(self, *_: Any) -> None:
        """Like `check`, when the signal is PATIENCE old."""
        if self.asked and time.monotonic() - self.since > PATIENCE:
            raise Interrupted

    def wait(self, seconds: float) -> None:
        """Sleeps; raises Interrupted once a signal has asked, before it or meanwhile."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self.check()
            time.sleep(min(left, 0.1))  # a handler that sets an Event which its own thread waits for may lock up
        self.check()

    def _ask(self, number: int, frame) -> None:
        if number in self.seen:
            self.__exit__()
            signal.raise_signal(number)
        if not self.seen:  # straight to the descriptor: print and logging may be what was interrupted
            with suppress(OSError):  # a terminal that has gone
                os.write(2, b"interrupted: finishing the step, then saving (once more quits at once)\n")
            self.since = time.monotonic()
        self.seen.add(number)
