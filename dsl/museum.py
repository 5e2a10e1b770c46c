"""The bug museum: classic errors of small language models, each a switch that is thrown from outside.

`with bug("gate weights unused"): ...` patches the shipped code for the block and puts it back. Nothing in dsl imports
this file. Each bug was found in a published implementation or is a common copying error; `CAUGHT_BY` names the check
of `reference_moe` that is meant to see it, and `practise` is the plain training that shows what it does to the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from dsl import model, moe, ops, routing

BUGS: dict[str, Callable[[], AbstractContextManager]] = {}  # each gives a patch of the shipped code
CAUGHT_BY: dict[str, str] = {}


def _bug(name: str, caught_by: str):
    """Enter a bug under its name, with the check that is meant to see it."""

    def enter(patched: Callable[[], AbstractContextManager]):
        BUGS[name], CAUGHT_BY[name] = patched, caught_by
        return patched

    return enter


@_bug("gate weights unused", caught_by="router gets a gradient")
def _gate_weights_unused():
    """The k experts are averaged; what the router thinks of them is computed and thrown away."""
    shipped = moe.Experts.forward
    return patch.object(
        moe.Experts, "forward", lambda self, x, e, w: shipped(self, x, e, torch.full_like(w, 1 / w.shape[-1]))
    )


@_bug("rotary not called", caught_by="order matters")
def _rotary_not_called():
    """Rotary positions are defined, and never applied: without another source of order, words are a bag."""
    return patch.object(ops, "rotary", lambda x, positions, theta: x)


@_bug("padding counted", caught_by="padding is free")
def _padding_counted():
    """Padding is a label like any other; predicting it is easy, so the reported loss is far too low."""
    shipped = model.LanguageModel.loss

    def loss(self, hidden: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
        return shipped(self, hidden, labels.clamp(min=0), reduction)  # -100 becomes token 0, as in a padded batch

    return patch.object(model.LanguageModel, "loss", loss)


@_bug("capacity used as k", caught_by="output = weighted sum over k")
def _capacity_as_k():
    """topk(k=capacity): a token visits every expert, the load is perfectly even, the work E / k times too much."""
    shipped = moe.choose_experts
    return patch.object(moe, "choose_experts", lambda scores, k, **rest: shipped(scores, scores.shape[-1], **rest))


@_bug("k-major drops", caught_by="no look ahead")
def _k_major_drops():
    """GShard's order: every first choice is served before any second, so later tokens push out earlier ones."""

    def within(experts: Tensor, num_experts: int, capacity: int, keep: Tensor | None = None) -> Tensor:
        rank = routing.priority("k-major", experts)
        if keep is not None:
            rank = rank + ~keep[..., None].bool() * experts[0].numel()
        return routing.served(experts, num_experts, capacity, rank)

    return patch.object(moe, "within_capacity", within)


@_bug("drops at rest", caught_by="prefix = whole")
def _drops_at_rest():
    """Capacity binds outside training too: its size follows the length, so a prefix differs from the whole."""
    shipped = moe.MoE.forward

    def forward(self, x: Tensor, keep: Tensor | None = None):
        with patch.object(self, "training", True):
            return shipped(self, x, keep)

    return patch.object(moe.MoE, "forward", forward)


@_bug("bias inside the gate", caught_by="bias only chooses")
def _bias_inside_the_gate():
    """The balance bias is added to the scores once and for all: it also weighs, and bends what the experts learn."""
    shipped = moe.choose_experts

    def choose(scores: Tensor, k: int, *, bias: Tensor | None = None, **rest):
        return shipped(scores if bias is None else scores + bias, k, **rest)

    return patch.object(moe, "choose_experts", choose)


def bug(name: str | None) -> AbstractContextManager:
    """The shipped code with one of `BUGS` in it (None: as it is); put back at the end, whatever happens."""
    if name is None:
        return nullcontext()
    if name not in BUGS:
        raise ValueError(f"bug must be one of {', '.join(BUGS)}, got {name!r}")
    return BUGS[name]()


def favourites(strength: float) -> AbstractContextManager:
    """Collapse on purpose: in the block every router prefers experts 0 and 1 by `strength`; it weighs them honestly."""
    shipped = moe.choose_experts

    def choose(scores: Tensor, k: int, *, bias: Tensor | None = None, **rest):
        preference = torch.zeros_like(scores[0, 0])
        preference[:2] = strength
        return shipped(scores, k, bias=preference if bias is None else bias + preference, **rest)

    return patch.object(moe, "choose_experts", choose)


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
