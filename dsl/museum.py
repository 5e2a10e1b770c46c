"""The bug museum: classic errors of small language models, each a switch that is thrown from outside.

`with bug("gate weights unused"): ...` patches the shipped code for the block and puts it back. Nothing in dsl imports
this file. Each bug was found in a published implementation or is a common copying error; `CAUGHT_BY` names the check
of `reference_moe` that is meant to see it, and `practise` is the plain training that shows what it does to the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from dsl import model, moe, ops, routing


def _gate_weights_unused():
    """The k experts are averaged; what the router thinks of them is computed and thrown away."""
    shipped = moe.Experts.forward
    return moe.Experts, "forward", lambda self, x, e, w: shipped(self, x, e, torch.full_like(w, 1 / w.shape[-1]))


def _rotary_not_called():
    """Rotary positions are defined, and never applied: without another source of order, words are a bag."""
    return ops, "rotary", lambda x, positions, theta: x


def _padding_counted():
    """Padding is a label like any other; predicting it is easy, so the reported loss is far too low."""
    shipped = model.LanguageModel.loss

    def loss(self, hidden: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
        return shipped(self, hidden, labels.clamp(min=0), reduction)  # -100 becomes token 0, as in a padded batch

    return model.LanguageModel, "loss", loss


def _capacity_as_k():
    """topk(k=capacity): a token visits every expert, the load is perfectly even, the work E / k times too much."""
    shipped = moe.choose_experts
    return moe, "choose_experts", lambda scores, k, **rest: shipped(scores, scores.shape[-1], **rest)


def _k_major_drops():
    """GShard's order: every first choice is served before any second, so later tokens push out earlier ones."""

    def within(experts: Tensor, num_experts: int, capacity: int, keep: Tensor | None = None) -> Tensor:
        rank = routing.priority("k-major", experts)
        if keep is not None:
            rank = rank + ~keep[..., None].bool() * experts[0].numel()
        return routing.served(experts, num_experts, capacity, rank)

    return moe, "within_capacity", within


def _drops_at_rest():
    """Capacity binds outside training too: its size follows the length, so a prefix differs from the whole."""
    shipped = moe.MoE.forward

    def forward(self, x: Tensor, keep: Tensor | None = None):
        before, self.training = self.training, True
        try:
            return shipped(self, x, keep)
        finally:
            self.training = before

    return moe.MoE, "forward", forward


def _bias_inside_the_gate():
    """The balance bias is added to the scores once and for all: it also weighs, and bends what the experts learn."""
    shipped = moe.choose_experts

    def choose(scores: Tensor, k: int, *, bias: Tensor | None = None, **rest):
        return shipped(scores if bias is None else scores + bias, k, **rest)

    return moe, "choose_experts", choose


BUGS: dict[str, Callable[[], tuple]] = {
    "gate weights unused": _gate_weights_unused,
    "rotary not called": _rotary_not_called,
    "padding counted": _padding_counted,
    "capacity used as k": _capacity_as_k,
    "k-major drops": _k_major_drops,
    "drops at rest": _drops_at_rest,
    "bias inside the gate": _bias_inside_the_gate,
}
CAUGHT_BY = {
    "gate weights unused": "router gets a gradient",
    "rotary not called": "order matters",
    "padding counted": "padding is free",
    "capacity used as k": "output = weighted sum over k",
    "k-major drops": "no look ahead",
    "drops at rest": "prefix = whole",
    "bias inside the gate": "bias only chooses",
}


@contextmanager
def bug(name: str | None) -> Iterator[None]:
    """The shipped code with one of `BUGS` in it (None: as it is); put back at the end, whatever happens."""
    if name is None:
        yield
        return
    if name not in BUGS:
        raise ValueError(f"bug must be one of {', '.join(BUGS)}, got {name!r}")
    owner, attribute, broken = BUGS[name]()
    shipped = getattr(owner, attribute)
    setattr(owner, attribute, broken)
    try:
        yield
    finally:
        setattr(owner, attribute, shipped)


@contextmanager
def favourites(strength: float, experts: tuple[int, ...] = (0, 1)) -> Iterator[None]:
    """Collapse on purpose: in the block every router prefers these experts by `strength`; it weighs them honestly."""
    shipped = moe.choose_experts

    def choose(scores: Tensor, k: int, *, bias: Tensor | None = None, **rest):
        preference = torch.zeros_like(scores[0, 0])
        preference[list(experts)] = strength
        return shipped(scores, k, bias=preference if bias is None else bias + preference, **rest)

    moe.choose_experts = choose
    try:
        yield
    finally:
        moe.choose_experts = shipped


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
