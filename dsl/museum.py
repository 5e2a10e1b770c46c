"""The bug museum: classic errors of small language models, each a switch that is thrown from outside.

`with bug("gate weights unused"): ...` patches the shipped code for the block and puts it back. Nothing in dsl imports
this file. Each bug was found in a published implementation or is a common copying error; `CAUGHT_BY` names the check
of `reference_moe` that is meant to see it, and `practise` is the plain training that shows what it does to the loss.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from dsl import model, moe, ops, routing

BUGS: dict[str, tuple[object, str, Callable]] = {}  # what is patched: an owner, its attribute, the wrong code
CAUGHT_BY: dict[str, str] = {}


def _bug(name: str, owner: object, attribute: str, caught_by: str):
    """Enter wrong code, which is called with the shipped code first, and the check that is meant to see it."""

    def enter(wrong: Callable):
        BUGS[name], CAUGHT_BY[name] = (owner, attribute, wrong), caught_by
        return wrong

    return enter


@_bug("gate weights unused", moe.Experts, "forward", caught_by="router gets a gradient")
def _gate_weights_unused(shipped, self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
    """The k experts are averaged; what the router thinks of them is computed and thrown away."""
    return shipped(self, x, experts, torch.full_like(weights, 1 / weights.shape[-1]))


@_bug("rotary not called", ops, "rotary", caught_by="order matters")
def _rotary_not_called(shipped, x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotary positions are defined, and never applied: without another source of order, words are a bag."""
    return x


@_bug("padding counted", model.LanguageModel, "loss", caught_by="padding is free")
def _padding_counted(shipped, self, hidden: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
    """Padding is a label like any other; predicting it is easy, so the reported loss is far too low."""
    return shipped(self, hidden, labels.clamp(min=0), reduction)  # -100 becomes token 0, as in a padded batch


@_bug("capacity used as k", moe, "choose_experts", caught_by="output = weighted sum over k")
def _capacity_as_k(shipped, scores: Tensor, k: int, **rest):
    """topk(k=capacity): a token visits every expert, the load is perfectly even, the work E / k times too much."""
    return shipped(scores, scores.shape[-1], **rest)


@_bug("k-major drops", moe, "within_capacity", caught_by="no look ahead")
def _k_major_drops(shipped, experts: Tensor, num_experts: int, capacity: int, keep: Tensor | None = None) -> Tensor:
    """GShard's order: every first choice is served before any second, so later tokens push out earlier ones."""
    rank = routing.priority("k-major", experts)
    if keep is not None:
        rank = rank + ~keep[..., None].bool() * experts[0].numel()
    return routing.served(experts, num_experts, capacity, rank)


@_bug("drops in evaluation", moe.MoE, "forward", caught_by="prefix = whole")
def _drops_in_evaluation(shipped, self, x: Tensor, keep: Tensor | None = None):
    """Capacity binds outside training too: its size follows the length, so a prefix differs from the whole."""
    with patch.object(self, "training", True):
        return shipped(self, x, keep)


@_bug("bias inside the gate", moe, "choose_experts", caught_by="bias only chooses")
def _bias_inside_the_gate(shipped, scores: Tensor, k: int, *, bias: Tensor | None = None, **rest):
    """The balance bias is added to the scores once and for all: it also weighs, and bends what the experts learn."""
    return shipped(scores if bias is None else scores + bias, k, **rest)


def _patched(owner: object, attribute: str, wrong: Callable) -> AbstractContextManager:
    shipped = getattr(owner, attribute)
    return patch.object(owner, attribute, lambda *args, **options: wrong(shipped, *args, **options))


def bug(name: str | None) -> AbstractContextManager:
    """The shipped code with one of `BUGS` in it (None: as it is); put back at the end, whatever happens."""
    if name is None:
        return nullcontext()
    if name not in BUGS:
        raise ValueError(f"bug must be one of {', '.join(BUGS)}, got {name!r}")
    return _patched(*BUGS[name])


def favourites(strength: float) -> AbstractContextManager:
    """Collapse on purpose: in the block every router prefers experts 0 and 1 by `strength`; it weighs them honestly."""

    def choose(shipped, scores: Tensor, k: int, *, bias: Tensor | None = None, **rest):
        preference = torch.zeros_like(scores[0, 0])
        preference[:2] = strength
        return shipped(scores, k, bias=preference if bias is None else bias + preference, **rest)

    return _patched(moe, "choose_experts", choose)


def practise(
    lm: model.LanguageModel, batches: Iterable[tuple[Tensor, Tensor]], lr: float = 5e-3
) -> Iterator[tuple[float, float, Tensor]]:
    """Plain training with the balance bias and no other balancing: after each step the loss it reports, the loss of
    its real tokens, and the counts [L, E].

    A batch is tokens [B, T] and labels [B, T], already shifted, -100 where the row is padding.
    """
    optimizer = torch.optim.AdamW(lm.parameters(), lr=lr)
    lm.train()
    for tokens, labels in batches:
        real = labels >= 0
        hidden, _, stats = lm(tokens.masked_fill(~real, 0), keep=real)
        loss = lm.loss(hidden, labels)
        with torch.no_grad():
            honest = F.cross_entropy(lm.logits(hidden[real]), labels[real])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        counts = torch.stack([s.counts for s in stats])
        lm.update_router_biases(counts)
        yield loss.item(), honest.item(), counts
