"""Where a run goes on and ends: the checkpoint to start from, what may have changed since, and the random numbers.

Knows folders and settings; nothing of the loop.
"""

import base64
import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsl import checkpoint, optim
from dsl.checkpoint import CheckpointError
from dsl.config import HINTS
from dsl.settings import Run, TrainConfig

logger = logging.getLogger(__name__)
# Settings of a model that may change on the way: they are of its training, not of its function.
TRAINING_ONLY = {"capacity_factor", "bias_update_speed", "aux_loss_coef", "aux_loss_scope", "router_z_loss_coef"}
FIXED = {"tokenizer", *HINTS} - TRAINING_ONLY


@dataclass(frozen=True)
class Start:
    """The checkpoint that a run goes on from and its trainer.json; a new run has neither.

    `back`: it is older than the newest step was, so rows that the tables lose will not come again as they were.
    """

    path: Path | None = None
    state: dict[str, Any] = field(default_factory=dict)
    back: bool = False

    @property
    def step(self) -> int:
        return self.state.get("step", 0)

    @property
    def due(self) -> dict[str, float] | None:
        """What its row needs, where an interrupt put off all that is due after the step."""
        due = self.state.get("due")  # once a list
        return dict(zip(("norm", "seconds", "tokens", "batches"), due, strict=True)) if isinstance(due, list) else due


def find_start(run: Run) -> Start:
    """The newest good checkpoint of the run; the log names what it skipped and what has changed since.

    Raises CheckpointError where the checkpoint is of another model or tokenizer, naming the fields.
    """
    path, skipped = checkpoint.newest(run.run_dir)
    for folder, problem in skipped:
        logger.warning("skipped %s: %s", folder, problem)
    if path is None:
        return Start()
    start = Start(path, checkpoint.read_trainer(path))
    before = Run.from_dict(start.state["settings"])
    old, new = (each.model.to_dict() | each.data.model_dump() | each.train.model_dump() for each in (before, run))
    changed = {name: f"{old[name]!r} -> {new[name]!r}" for name in new if old[name] != new[name]}
    if fixed := [name for name in changed if name in FIXED]:
        what = ", ".join(f"{name} {changed[name]}" for name in fixed)
        raise CheckpointError(f"{path} is of another model ({what}): take another run_name, or the old settings")
    if changed:
        logger.info("changed since the checkpoint: %s", ", ".join(f"{n} {v}" for n, v in changed.items()))
    if before.train.max_steps < run.train.max_steps:
        start = _lengthened(run, before, start)
    logger.info("loading %s", Path(*start.path.parts[-3:]))
    return start


def _lengthened(run: Run, before: Run, start: Start) -> Start:
    """wsd goes back to before its decay, where the weights can still learn; the others go on on the new curve."""
    kind, decay = run.train.lr_scheduler_type, optim.decay_start(before.train)
    back = kind == "wsd" and decay is not None and start.step > decay
    path = checkpoint.newest(run.run_dir, decay)[0] if back else None
    if path is None:
        rate = optim.learning_rate(run.train, start.step)
        logger.info("max_steps is longer: on from step %d on the new %s curve, at lr %.2e", start.step, kind, rate)
        return start
    early = Start(path, checkpoint.read_trainer(path), back=True)
    logger.info("max_steps is longer: back to step %d, the last before the learning rate fell", early.step)
    return early


def set_aside_after(run: Run, start: Start) -> None:
    """Steps after the start, which a longer schedule will make again; newest first, so that a crash between two leaves
    what the next attempt needs to come to the same end.
    """
    for step in reversed(checkpoint.steps(run.run_dir)):
        if step > start.step:
            logger.info("set aside as %s", checkpoint.set_aside(run.run_dir, step))


def end(train: TrainConfig) -> int:
    """The step at which a call of `train` ends."""
    return min(train.max_steps, train.stop_at_step or train.max_steps)


def ended(run: Run, start: Start) -> str | None:
    """The status of a run that has nothing to do, of which the log says how it would go on; else None."""
    if start.step < end(run.train) or start.due:
        return None
    last, stop = run.train.max_steps, run.train.stop_at_step
    done = start.step >= last
    what = f"is complete: step {start.step} of {last}" if done else f"stands at step {start.step} of {last}"
    how = f"max_steps={2 * start.step}" if done else f"a later stop_at_step than {stop}, or none"
    logger.info("%s %s. Nothing to train; to go on, set %s; to begin anew, another run_name.", run.name, what, how)
    return "complete" if done else "stopped"


@contextmanager
def threads(start: Start, device: torch.device, world: int) -> Iterator[None]:
    """As many threads as the run began with, since sums on a CPU depend on it; unless the number of processes changed,
    of which each has its share of the threads.
    """
    before, same = torch.get_num_threads(), start.state.get("world", world) == world
    count = start.state.get("threads", before) if device.type == "cpu" and same else before
    if count != before:
        logger.info("computing with %d threads, as this run began, instead of %d", count, before)
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def random_state(device: torch.device) -> dict[str, Any]:
    """The random numbers to come, of Python and torch, as plain JSON values."""
    cuda = torch.cuda.get_rng_state_all() if device.type == "cuda" else []
    return {"python": random.getstate(), "torch": _text(torch.get_rng_state()), "cuda": [*map(_text, cuda)]}


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Goes back to saved random numbers; those of GPUs only where as many are here, else the log says so."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    torch.set_rng_state(_tensor(state["torch"]))
    saved, here = len(state["cuda"]), torch.cuda.device_count() if device.type == "cuda" else 0
    if saved != here:
        logger.info("random numbers of GPUs do not go on: the checkpoint holds those of %d, here are %d", saved, here)
    elif here:
        torch.cuda.set_rng_state_all([*map(_tensor, state["cuda"])])


def _text(state: Tensor) -> str:
    return base64.b64encode(bytes(state.tolist())).decode()


def _tensor(text: str) -> Tensor:
    return torch.tensor(list(base64.b64decode(text)), dtype=torch.uint8)
