"""What the steps since the last row of metrics.csv add up to: loss, load of the experts and their health, speed.

Sums stay on the device and are read once a row, so that watching costs no speed. Knows no model and no files.

Shape letters: L MoE layers, E experts. A tally is a step's vector from `gradients`.
"""

import logging
import time
from contextlib import suppress
from typing import Any

import psutil
import torch
from torch import Tensor

from dsl import evaluation
from dsl.config import ModelConfig
from dsl.runlog import TIME_COLUMNS

logger = logging.getLogger(__name__)
STARVING = 0.1  # of an even share of the assignments


class Interval:
    """The sums, and whom they warned about."""

    def __init__(self, config: ModelConfig):
        self.layers, self.experts = sorted(config.moe_layers), config.num_experts
        self.even, self.most = 1 / config.num_experts, 1 / config.num_experts_per_tok
        self.unhealthy: set[tuple[str, int, int]] = set()
        self._begin()

    def _begin(self) -> None:
        self.sums, self.steps = 0.0, 0
        self.batches, self.tokens, self.busy = 0, 0, 0.0  # of this process: a row may begin in one that has ended
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def counts(self, tally: Tensor) -> Tensor:
        """The assignments [L, E] of a step's tally."""
        return tally[1 + 2 * len(self.layers) :].view(-1, self.experts)

    def add(self, tally: Tensor) -> None:
        """A step was taken."""
        self.sums, self.steps = self.sums + tally, self.steps + 1

    def spend(self, seconds: float, tokens: int, batches: int = 1) -> None:
        """A batch took so long, whether it made a step or not."""
        self.busy, self.tokens, self.batches = self.busy + seconds, self.tokens + tokens, self.batches + batches

    def spent(self) -> tuple[float, int, int]:
        """What `spend` would have to be told."""
        return self.busy, self.tokens, self.batches

    def close(self) -> dict[str, Any]:
        """The interval's columns of metrics.csv; warns of experts; the next interval begins."""
        L, sums = len(self.layers), self.sums.cpu()
        loss, entropy, dropped, _ = (sums / self.steps).split([1, L, L, L * self.experts])
        load = evaluation.load(self.counts(sums), entropy, dropped)
        self._watch(load.share)
        memory = psutil.Process().memory_info().rss / 1e6
        gpu = torch.cuda.max_memory_allocated() / 1e6 if torch.cuda.is_available() else None
        wall, cpu = time.perf_counter() - self.wall, time.process_time() - self.cpu
        pace, speed = self.busy / self.batches, self.tokens / self.busy
        times = (pace, speed, memory, 100 * cpu / wall, gpu, gpu_percent(self.sums.device))
        row = {"loss": loss.item(), **dict(zip(TIME_COLUMNS, times, strict=True))}
        for i, layer in enumerate(self.layers):
            row[f"load_{layer}"] = ";".join(f"{share:.5g}" for share in load.share[i].tolist())
            for name in ("maxvio", "entropy", "dropped", "dead"):
                row[f"{name}_{layer}"] = getattr(load, name)[i].item()
        self._begin()
        return row

    def _watch(self, share: Tensor) -> None:
        """Warns once when an expert starts to starve, or to hoard: more than half way from an even share to all."""
        found = {("starves", *place) for place in (share < STARVING * self.even).nonzero().tolist()}
        if self.most > self.even:
            found |= {("hoards", *place) for place in (share > (self.even + self.most) / 2).nonzero().tolist()}
        for what, i, expert in sorted(found - self.unhealthy):
            times = share[i, expert].item() / self.even
            logger.warning("layer %d: expert %d %s, with %.2f of an even share", self.layers[i], expert, what, times)
        self.unhealthy = found

    def state_dict(self) -> dict[str, Any]:
        """What the next row needs, but for time and hardware: plain JSON values."""
        return {"steps": self.steps, "sums": self.sums.tolist() if self.steps else []}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        self.steps = state["steps"]
        self.sums = torch.tensor(state["sums"], dtype=torch.float64).to(device) if state["steps"] else 0.0


def gpu_percent(device: torch.device) -> int | None:
    """The GPU's utilisation in the last second; None without one, and where NVML cannot be asked."""
    with suppress(Exception):  # NVML's errors have no common name where its library is missing; none is worth a run
        return torch.cuda.utilization(device) if device.type == "cuda" else None
