"""The gradients of one step: micro-batches and processes add up to what one big batch would give.

Knows nothing of optimizers, of data or of what is done with the gradients.

Shape letters: R rows of a step, T time, L MoE layers, E experts. A step's tally is one vector:
[loss, L entropies, L dropped shares, L x E assignment counts].
"""

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from dsl.evaluation import IGNORE
from dsl.moe import RoutingStats
from dsl.optim import Precision
from dsl.processes import Processes

CPU_MEMORY = "DefaultCPUAllocator"  # out of memory on a CPU is a RuntimeError like any other, but for its text


class Objective(nn.Module):
    """What a step makes small: tokens and labels [R, T] -> (loss, the routers' own losses, routing statistics)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, labels: Tensor):
        hidden, _, stats = self.model(tokens)
        return self.model.loss(hidden, labels), sum(s.aux_loss + s.z_loss for s in stats), stats


def accumulate(
    objective: nn.Module, tokens: Tensor, labels: Tensor, rows: int, precision: Precision, processes: Processes
) -> Tensor:
    """Add a step's gradients to the weights, `rows` rows at a time; each of labels [R, T] but -100 counts once.

    Micro-batches and processes weigh by the labels that they score; the routers' own losses weigh likewise, so an
    auxiliary loss over the "batch" is one over the micro-batch. Returns the tally, summed over processes.
    """
    device, scored = precision.device, (labels != IGNORE).sum().item()
    total, parts = 0.0, list(zip(tokens.split(rows), labels.split(rows), strict=True))
    for i, part in enumerate(parts):
        inputs, targets = (processes.mine(t) for t in part)
        share = (targets != IGNORE).sum().item() / scored
        quiet = processes.world > 1 and i < len(parts) - 1  # gradients travel once a step
        with objective.no_sync() if quiet else nullcontext():
            # This process may score nothing, and the mean over no label is NaN: any finite loss, times a share of zero,
            # keeps DDP's backward pass in step.
            targets = targets if share else inputs
            with precision.autocast():
                loss, extra, stats = objective(inputs.to(device), targets.to(device))
            precision.scaler.scale((loss + extra) * (share * processes.world)).backward()
        total = total + _tally(loss.detach(), stats, share)
    return processes.sum(total)


def _tally(loss: Tensor, stats: list[RoutingStats], share: float) -> Tensor:
    wide = torch.float32 if loss.device.type == "mps" else torch.float64
    means = [t.to(wide) * share for t in (loss, *(s.entropy for s in stats), *(s.dropped for s in stats))]
    return torch.cat([torch.stack(means), *(s.counts.to(wide) for s in stats)])


def out_of_memory(error: RuntimeError, device: torch.device, rows: int, turns: int) -> str | None:
    """Where an error is a lack of memory: what it says, and the next smaller micro-batch that keeps a step's rows."""
    if not isinstance(error, torch.OutOfMemoryError) and CPU_MEMORY not in str(error):
        return None
    advice, whole = "a shorter max_position_embeddings or a smaller model", rows * turns
    for smaller in (n for n in range(1, rows) if whole % n == 0):
        advice = f"per_device_train_batch_size={smaller} gradient_accumulation_steps={whole // smaller}"
        advice += f", the same {whole} rows a step"
    reason = str(error).partition("\n")[0]
    return f"{device} is out of memory with {rows} rows at a time: try {advice}. {reason}"
