"""What a run sees of itself on its way: bits per byte of held-out text, texts for its prompts, a row of metrics.csv.

Knows the model, the log and the clock; nothing of how a step is made or of what a checkpoint holds.
"""

import logging
import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerBase

from dsl import evaluation, resume, runlog
from dsl.corpora import Corpus
from dsl.data import held_out_rows
from dsl.generation import complete
from dsl.hub import DslForCausalLM
from dsl.interval import Interval
from dsl.moe import NotFiniteError
from dsl.processes import Interrupt
from dsl.settings import Run

logger = logging.getLogger(__name__)
OnLog = Callable[[dict[str, Any]], None]  # is given a row


class Observer:
    """Looks at a model between its steps; `loss` and `bits_per_byte` are the last that it found, None before."""

    def __init__(
        self,
        run: Run,
        log: runlog.RunLog,
        model: DslForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        corpus: Corpus,
        start: resume.Start,
    ):
        self.run, self.log, self.model, self.tokenizer = run, log, model, tokenizer
        self.held_out = held_out_rows(corpus, tokenizer, run.model.max_position_embeddings)
        self.prompts = list(enumerate((*run.train.prompts, *corpus.prompts), run.train.seed))  # with their seeds
        self.loss, self.bits_per_byte = map(start.state.get, ("loss", "last_bits_per_byte"))
        self.measured_at, self.measured_on = None, [corpus.fingerprint, run.data.held_out_bytes]
        self.interval = Interval(run.model)
        if start.state:
            self.interval.load_state_dict(start.state["interval"], model.device)
        if start.due:
            self.interval.spend(**{name: value for name, value in start.due.items() if name != "norm"})
        self.written = deque([(start.step, time.perf_counter())], maxlen=6)  # when the last rows were

    def state_dict(self, step: int) -> dict[str, Any]:
        """What a checkpoint of this step keeps, as plain JSON values."""
        return {
            "loss": self.loss,
            "bits_per_byte": self.bits_per_byte if self.measured_at == step else None,  # ranks the steps
            "last_bits_per_byte": self.bits_per_byte,
            "measured_on": self.measured_on,
            "interval": self.interval.state_dict(),
        }

    def look(self, step: int, figures: Callable[[], dict[str, Any]], interrupt: Interrupt, on_log: OnLog) -> None:
        """Measures, samples and logs what is due after a step; `figures()` are the columns that the loop knows.

        Raises Interrupted, with nothing recorded: a figure over a part of the text would pass for the whole.
        """
        train, measured, texts = self.run.train, None, []
        last = step == train.max_steps
        with self.model.model.register_forward_pre_hook(interrupt.check):
            if last or step % train.eval_steps == 0:
                measured = self._measure()
            if last or step % train.sample_steps == 0:
                texts = self._sample()
        if measured is not None:
            self.bits_per_byte, self.measured_at = measured, step
        if last or measured is not None or step % train.logging_steps == 0:
            row = figures() | {"held_out_bits_per_byte": measured} | self.interval.close()
            row["seconds_left"] = self._seconds_left(step)
            self.loss = row["loss"]
            logger.info(runlog.progress(row, train.max_steps))
            self.log.row(row)
            on_log(row)
        for prompt, text in texts:
            self.log.generation(step, prompt, text)
        if texts:
            logger.info("step %d writes: %s", step, " ".join("".join(texts[-1]).split())[:160])

    def _measure(self) -> float | None:
        """Bits per byte, in fp32 whatever trains: comparable. None where the weights have grown beyond any figure."""
        try:
            bits = evaluation.bits_per_byte(self.model.model, *self.held_out)
            problem = "" if math.isfinite(bits) else f"its loss is {bits}"
        except NotFiniteError as error:
            problem = str(error)
        if problem:
            logger.warning("held-out text cannot be measured: %s", problem)
        return None if problem else bits

    def _seconds_left(self, step: int) -> float:
        (first, then), now = self.written[0], time.perf_counter()
        self.written.append((step, now))
        return (resume.end(self.run.train) - step) * (now - then) / max(1, step - first)

    def _sample(self) -> list[tuple[str, str]]:
        """The prompts, each with its continuation; seeded on its own, so that training does not notice."""
        texts, sampling = [], {"max_new_tokens": self.run.train.sample_tokens, "temperature": 0.8, "top_p": 0.9}
        self.model.eval()
        for seed, prompt in [*self.prompts]:
            try:
                text = complete(self.model, self.tokenizer, prompt, seed=seed % 2**63, **sampling)
                texts.append((prompt, text))
            except ValueError as problem:
                logger.warning("no text for %r: %s", prompt, problem)
                if not isinstance(problem, NotFiniteError):  # but longer than the window, as it will always be
                    self.prompts.remove((seed, prompt))
        self.model.train()
        return texts
