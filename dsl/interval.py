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

logger = logging.getLogger(__name__)
STARVING = 0.1  # of an even share of the assignments


class Interval:
    """The sums, and whom they warned about."""

    def __init__(self, config: ModelConfig):
        self.layers, self.experts = sorted(config.moe_layers), config.num_experts
        self.even_share, self.largest_share = 1 / config.num_experts, 1 / config.num_experts_per_tok
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

    def spent(self) -> dict[str, Any]:
        """What `spend` would have to be told."""
        return {"seconds": self.busy, "tokens": self.tokens, "batches": self.batches}

    def close(self) -> dict[str, Any]:
        """The interval's columns of metrics.csv; warns of experts; the next interval begins."""
        L, sums = len(self.layers), self.sums.cpu()
        loss, entropy, dropped, _ = (sums / self.steps).split([1, L, L, L * self.experts])
        load = evaluation.load(self.counts(sums), entropy, dropped)
        self._watch(load.share)
        wall, cpu = time.perf_counter() - self.wall, time.process_time() - self.cpu
        row = {
            "loss": loss.item(),
            "step_seconds": self.busy / self.batches,
            "tokens_per_second": self.tokens / self.busy,
            "memory_mb": psutil.Process().memory_info().rss / 1e6,
            "cpu_percent": 100 * cpu / wall,
            "gpu_memory_mb": torch.cuda.max_memory_allocated() / 1e6 if torch.cuda.is_available() else None,
            "gpu_percent": gpu_percent(self.sums.device),
        }
        for i, layer in enumerate(self.layers):
            row[f"load_{layer}"] = ";".join(f"{share:.5g}" for share in load.share[i].tolist())
            for name in ("maxvio", "entropy", "dropped", "dead"):
                row[f"{name}_{layer}"] = getattr(load, name)[i].item()
        self._begin()
        return row

    def _watch(self, share: Tensor) -> None:
        """Warns once when an expert starts to starve, or to hoard: more than half way from an even share to all."""
        even, largest = self.even_share, self.largest_share
        found = {("starves", *place) for place in (share < STARVING * even).nonzero().tolist()}
        if largest > even:
            found |= {("hoards", *place) for place in (share > (even + largest) / 2).nonzero().tolist()}
        for what, i, expert in sorted(found - self.unhealthy):
            times = share[i, expert].item() / even
            logger.warning("layer %d: expert %d %s, with %.2f of an even share", self.layers[i], expert, what, times)
        self.unhealthy = found

    def state_dict(self) -> dict[str, Any]:
        """What the next row needs, but for time and hardware: plain JSON values."""
        return {"steps": self.steps, "sums": self.sums.tolist() if self.steps else []}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        self.steps = state["steps"]
        dtype = torch.float32 if device.type == "mps" else torch.float64  # as tallies have it
        self.sums = torch.tensor(state["sums"], dtype=dtype).to(device) if state["steps"] else 0.0


def gpu_percent(device: torch.device) -> int | None:
    """The GPU's utilisation in the last second; None without one, and where NVML cannot be asked."""
    with suppress(Exception):  # NVML's errors have no common name where its library is missing; none is worth a run
        return torch.cuda.utilization(device) if device.type == "cuda" else None
