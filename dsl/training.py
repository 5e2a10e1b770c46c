"""The loop: what happens at each step of a run, so that one stopped anywhere goes on as if it had not been.

A step is an optimizer step. A batch whose loss or gradient is not finite makes no step: it is counted and left
behind, and neither weights nor moments, schedule nor router bias move. This file knows the order of things; what they
are is elsewhere.

Shape letters: R rows of a step, T time.
"""

import logging
import random
import time
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer

from dsl import checkpoint, evaluation, optim, resume, runlog
from dsl.card import model_card
from dsl.data import StreamError, TokenStream, open_corpus, open_tokenizer
from dsl.gradients import Objective, accumulate, out_of_memory
from dsl.hub import DslConfig, DslForCausalLM
from dsl.observer import Observer, OnLog
from dsl.processes import Interrupt, Interrupted, Processes
from dsl.settings import Run

logger = logging.getLogger(__name__)
LEAST_SCALE = 1.0  # of fp16 gradients: where these still overflow, no scale will help


class TrainingError(RuntimeError):
    """A run cannot go on; the message says why and what to do."""


@dataclass(frozen=True)
class Summary:
    """How a call of `train` ended.

    `status`: finished (max_steps reached), stopped (stop_at_step), interrupted (a signal), complete (nothing to do).
    `loss` is in nats, the mean over the last logged interval; it and `bits_per_byte` are None if never measured.
    """

    status: str
    step: int
    loss: float | None
    bits_per_byte: float | None
    tokens: int
    skipped_steps: int
    run_dir: Path
    log_dir: Path


class Trainer:
    """One run in memory: model, optimizer, data, and where it stands; `start` is the checkpoint it goes on from."""

    def __init__(self, run: Run, log: runlog.RunLog, precision, processes: Processes, start: resume.Start):
        self.run, self.log, self.precision, self.processes = run, log, precision, processes
        self.corpus, window, new = open_corpus(run.data), run.model.max_position_embeddings, start.path is None
        self.tokenizer = open_tokenizer(run.data, self.corpus) if new else AutoTokenizer.from_pretrained(start.path)
        if len(self.tokenizer) > run.model.vocab_size:
            rule = f"vocab_size must be at least {len(self.tokenizer)}, the entries of the tokenizer"
            raise ValueError(f"{rule}, got {run.model.vocab_size}")
        self.stream = TokenStream(self.corpus, self.tokenizer, data=run.data, seed=run.train.seed, length=window)
        torch.manual_seed(run.train.seed)
        random.seed(run.train.seed)
        ids = {name: getattr(self.tokenizer, name) for name in ("eos_token_id", "pad_token_id")}
        config = DslConfig(**run.model.to_dict(), **ids)
        self.shell = DslForCausalLM(config) if new else DslForCausalLM.from_pretrained(start.path, config=config)
        self.model = self.shell.to(precision.device).train().model
        self.optimizer = optim.Optimizer(self.model, run.train)
        self.objective = processes.wrap(Objective(self.model))
        self.step = self.tokens = self.skipped = self.bad = 0
        self.due = False  # what is due after the step, which an interrupt may put off
        self.begun = None  # where data and random numbers stood before a step that an interrupt left undone
        if not new:
            self._restore(start)
        self.interrupt, self.observer = Interrupt(), Observer(run, log, self.shell, self.tokenizer, self.corpus, start)
        self.saved = None if self.due else self.step
        self.began, self.saving = time.perf_counter(), 0.0

    def _restore(self, start: resume.Start) -> None:
        state, device = start.state, self.precision.device
        self.step, self.tokens, self.skipped = state["step"], state["tokens"], state["skipped_steps"]
        self.bad = state["bad_steps"]
        self.optimizer.load_state_dict(checkpoint.read_optimizer(start.path))
        if problem := self.precision.load_scaler(state["scaler"]):
            logger.warning(problem)
        self.stream.load_state_dict(state["data"])
        resume.set_random_state(state["rng"], device)
        if start.due:
            self.due, self.norm = True, torch.tensor(start.due["norm"])

    def save(self) -> None:
        """A checkpoint of this step, unless it has one."""
        if self.step == self.saved or not self.processes.first:
            return
        broken = [name for name, weight in self.model.named_parameters() if not weight.isfinite().all()]
        if broken:
            raise TrainingError(f"not saved: {broken[0]} is not finite at step {self.step}. {self._last_good()}")
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "epoch": self.stream.epoch,
            "skipped_steps": self.skipped,
            "bad_steps": self.bad,
            "due": {"norm": self.norm.item(), **self.observer.interval.spent()} if self.due else None,
            **self.observer.state_dict(self.step),
            **(self.begun or self._places()),
            "scaler": self.precision.scaler.state_dict(),
            "threads": torch.get_num_threads(),
            "world": self.processes.world,
            "settings": self.run.to_dict(),
        }
        began = time.perf_counter()
        self.log.sync()
        path = checkpoint.save(
            self.run.run_dir,
            self.step,
            model=self.shell,
            tokenizer=self.tokenizer,
            trainer=state,
            optimizer=self.optimizer.state_dict(),
            card=model_card(self.run, state, sum(p.numel() for p in self.model.parameters())),
            keep=self.run.train.save_total_limit,
            until=optim.decay_start(self.run.train),
        )
        self.saved, self.saving = self.step, self.saving + time.perf_counter() - began
        logger.info("saved %s", Path(*path.parts[-3:]))

    def _places(self) -> dict[str, Any]:
        return {"data": self.stream.state_dict(), "rng": resume.random_state(self.precision.device)}

    def take_step(self) -> bool:
        """One batch; whether it made a step."""
        train, began, places = self.run.train, time.perf_counter(), self._places()
        rows, turns = train.per_device_train_batch_size, train.gradient_accumulation_steps
        self.optimizer.set_lr(optim.learning_rate(train, self.step))
        try:
            batch = self.stream.next(rows * turns)
        except StreamError:
            self.save()
            raise
        try:
            total, good = self._learn(batch)
        except Interrupted:
            logger.info("interrupted: the step after %d takes long; it is taken when the run goes on", self.step)
            self.begun = places
            return False
        except RuntimeError as error:
            if problem := out_of_memory(error, self.precision.device, rows, turns):
                raise TrainingError(problem) from None
            raise
        self.step, self.bad, self.skipped = self.step + good, 0 if good else self.bad + 1, self.skipped + (not good)
        self.tokens += batch[:, 1:].numel()
        self.observer.interval.spend(time.perf_counter() - began, batch[:, 1:].numel())
        if not good:
            self._left_behind(total[0].item())
        return good

    def _learn(self, batch: Tensor) -> tuple[Tensor, bool]:
        """The tally of a batch [R, T+1], and whether it was finite and moved the weights."""
        rows, scaler = self.run.train.per_device_train_batch_size, self.precision.scaler
        total = accumulate(self.objective, batch[:, :-1], batch[:, 1:], rows, self.precision, self.processes)
        scaler.unscale_(self.optimizer)
        self.norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.run.train.max_grad_norm)
        good = bool((self.norm + total[0]).isfinite())
        if good:
            scaler.step(self.optimizer)
            self.model.update_router_biases(self.observer.interval.counts(total))
            self.observer.interval.add(total)
        if scaler.is_enabled():
            scaler.update()
            if scaler.get_scale() < LEAST_SCALE:
                scaler.update(LEAST_SCALE)
        self.optimizer.zero_grad()
        return total, good

    def _look_up(self, block: nn.Module, given: tuple) -> None:
        """Before a block's forward pass, and after its backward pass: a step may take minutes."""
        self.interrupt.lose_patience()
        if given[0].requires_grad:
            given[0].register_hook(self.interrupt.lose_patience)

    def _left_behind(self, loss: float) -> None:
        rate, scale = optim.learning_rate(self.run.train, self.step), self.precision.scaler.get_scale()
        what = f"loss {loss:.4g}, gradient norm {self.norm.item():.4g}, lr {rate:.3g}, scale {scale:g}"
        logger.warning("a batch after step %d is left out, not finite: %s", self.step, what)
        if self.bad >= self.run.train.max_bad_steps:
            raise TrainingError(
                f"{self.bad} batches in a row are not finite after step {self.step}: {what}. {self._last_good()} "
                "Try a lower learning_rate, a longer warm-up, or precision=fp32."
            )

    def _last_good(self) -> str:
        path = checkpoint.newest(self.run.run_dir)[0]
        return f"The last good checkpoint is {path}." if path else "There is no checkpoint yet."

    def after_step(self, on_log: OnLog) -> None:
        """What is due: a look at the model, then the checkpoint, so that it has its rows. Raises Interrupted."""
        train, self.due = self.run.train, self.processes.first
        if not self.due:
            return
        self.observer.look(self.step, self._figures, self.interrupt, on_log)
        self.due = False
        if self.step == train.max_steps or self.step % train.save_steps == 0 or self.step == optim.decay_start(train):
            self.save()

    def _figures(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "tokens": self.tokens,
            "epoch": self.stream.epoch,
            "lr": optim.learning_rate(self.run.train, self.step - 1),
            "grad_norm": self.norm.item(),
            "scale": self.precision.scaler.get_scale(),
            "skipped_steps": self.skipped,
        }

    def loop(self, on_log: OnLog) -> str:
        """Steps until the end, stop_at_step or a signal; saves; the status for the summary."""
        end = resume.end(self.run.train)
        with self.interrupt:
            if self.processes.world == 1:  # one that left a step alone would keep the others waiting in it
                self.corpus.wait_by(self.interrupt.wait)
                for block in self.model.layers:
                    block.register_forward_pre_hook(self._look_up)
            while not self.processes.any(self.interrupt.asked) and (self.due or self.step < end):
                with suppress(Interrupted):  # the model may be left in eval mode: no step follows
                    if self.due or self.take_step():
                        self.after_step(on_log)
            self.save()
        if self.due:
            logger.info("interrupted: what is due after step %d comes first when the run goes on", self.step)
        share = self.saving / (time.perf_counter() - self.began)
        logger.info("checkpoints took %.1f s, %.1f%% of the time", self.saving, 100 * share)
        done = "finished" if self.step == self.run.train.max_steps else "stopped"
        return "interrupted" if self.due or self.step < end else done


def train(run: Run, *, on_log: OnLog | None = None, progress: bool = True) -> Summary:
    """Train a run from its newest good checkpoint, or from the beginning, to max_steps or stop_at_step.

    `on_log` is given each row of metrics.csv, with seconds_left; without it, a notebook shows the progress lines that
    the terminal shows.
    Raises ValueError (settings), CheckpointError, TrainingError, DiskFullError or the corpus's errors, each with one
    message that says what to do; the last good checkpoint stays.
    """
    with Processes() as processes:
        if run.train.per_device_train_batch_size < processes.world:
            rule = f"be at least the number of processes, {processes.world}, which share its rows"
            raise ValueError(f"per_device_train_batch_size must {rule}, got {run.train.per_device_train_batch_size}")
        watch = progress and processes.first
        live = (runlog.in_notebook() and on_log is None) if watch else None
        lock = checkpoint.Lock(run.run_dir) if processes.first else nullcontext()
        with lock, runlog.RunLog(run.log_dir if processes.first else None, live) as log:
            precision = optim.precision(run.train.precision, processes.device, run.train.init_scale)
            logger.info("precision: %s", precision.reason)
            start = processes.agree(resume.find_start(run) if processes.first else None)
            if status := resume.ended(run, start):
                known = map(start.state.get, ("step", "loss", "last_bits_per_byte", "tokens", "skipped_steps"))
                return Summary(status, *known, run.run_dir, run.log_dir)
            with resume.threads(start, precision.device, processes.world):
                trainer = Trainer(run, log, precision, processes, start)
                log.open_tables(sorted(run.model.moe_layers), start.step - bool(start.due), archive=start.back)
                if start.back and processes.first:
                    resume.set_aside_after(run, start)
                record = {"corpus": trainer.corpus.fingerprint, "precision": precision.reason}
                log.hparams(run.to_dict(), runlog.environment() | record | {"threads": torch.get_num_threads()})
                _describe(run)
                with closing(trainer.stream):
                    status = trainer.loop(on_log or (lambda row: None))
            seen = trainer.observer
            figures = (trainer.step, seen.loss, seen.bits_per_byte, trainer.tokens, trainer.skipped)
            return Summary(status, *figures, run.run_dir, run.log_dir)


def _describe(run: Run) -> None:
    rows, turns = run.train.per_device_train_batch_size, run.train.gradient_accumulation_steps
    cost = evaluation.cost(run.model, rows=rows, optimizer=run.train.optimizer)
    tokens = rows * turns * run.model.max_position_embeddings
    logger.info("%s: %s; %s tokens a step, %d steps", run.name, cost, f"{tokens:,}", run.train.max_steps)
