"""Many sequences that a model reads together, a token each: they join after their prompts and leave when they end.

States of linear and delta layers are stacked as they are; those of softmax and latent layers are padded on the left to
the longest sequence, and the padding is masked. Knows nothing of sampling or requests.

Shape letters: B sequences, S time steps of the longest.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from dsl.attention import LatentState, LinearState, SoftmaxState, State
from dsl.generation import Reading
from dsl.model import LanguageModel

GROWS = {LinearState: (), SoftmaxState: ("keys", "values"), LatentState: ("latent", "rope_key")}  # with each time step


def _resized(state: State, length: int) -> State:
    """The state with time steps added (masked) or taken away on the left; only padding may be taken."""
    more, names = length - state.length, GROWS[type(state)]
    new = {name: F.pad(getattr(state, name), (0, 0, 0, 0, more, 0)) for name in names}
    if names and (more > 0 or state.keep is not None):
        first = getattr(state, names[0])
        keep = first.new_ones(len(first), state.length, dtype=torch.bool) if state.keep is None else state.keep
        keep = F.pad(keep, (more, 0))
        new["keep"] = None if keep.all() else keep
    return dataclasses.replace(state, length=length, **new)


def _stacked(one: State, other: State) -> State:
    """Rows of both, which are of equal length."""
    if GROWS[type(one)] and (one.keep is None) != (other.keep is None):
        first = getattr(one, GROWS[type(one)][0])
        one, other = (
            s if s.keep is not None else dataclasses.replace(s, keep=first.new_ones(rows, s.length, dtype=torch.bool))
            for s, rows in ((one, len(first)), (other, 1))
        )
    return dataclasses.replace(one, **{n: torch.cat([v, other.tensors()[n]]) for n, v in one.tensors().items()})


class Batch:
    """Rows of one state; `join` reads a prompt alone, `step` one token of every row."""

    def __init__(self, core: LanguageModel):
        self.core, self.state, self.lengths, self.base = core, [], [], []

    def takes_more(self) -> bool:
        """Whether another row may join: a registered mixer's own state is not known here, so it stays alone."""
        return not self.lengths or all(type(layer) in GROWS for layer in self.state)

    def join(self, tokens: Tensor) -> Reading:
        """Read a prompt [1, T]; its sequence becomes the last row."""
        hidden, state, stats = self.core(tokens)
        size, length = sum(layer.num_bytes for layer in state), state[0].length
        reading = Reading(self.core.logits(hidden[:, -1]), [layer.experts[0, -1] for layer in stats], size)
        if self.lengths:
            longest = max(length, *self.lengths)
            pairs = zip(self.state, state, strict=True)
            state = [_stacked(_resized(old, longest), _resized(new, longest)) for old, new in pairs]
        self.state, self.lengths, self.base = state, [*self.lengths, length], [*self.base, (length, size)]
        return reading

    def leave(self, stay: list[int]) -> None:
        """Keep these rows only, in this order."""
        if len(stay) == len(self.lengths):
            return
        self.lengths, self.base = [self.lengths[i] for i in stay], [self.base[i] for i in stay]
        if not stay:
            self.state = []
            return
        rows = torch.tensor(stay, device=next(self.core.parameters()).device)
        self.state = [layer.rows(rows) for layer in self.state]
        if all(type(layer) in GROWS for layer in self.state):
            self.state = [_resized(layer, max(self.lengths)) for layer in self.state]

    def step(self, tokens: Tensor) -> list[Reading]:
        """Read one token of each row, [B, 1]."""
        positions = torch.tensor(self.lengths, device=tokens.device)[:, None]
        hidden, self.state, stats = self.core(tokens, self.state, positions)
        logits, self.lengths = self.core.logits(hidden[:, -1]), [n + 1 for n in self.lengths]
        grown = (getattr(s, n)[0, 0] for s in self.state for n in GROWS.get(type(s), ()))
        growth = sum(part.numel() * part.element_size() for part in grown)
        return [
            Reading(logits[i : i + 1], [layer.experts[i, -1] for layer in stats], size + growth * (now - then))
            for i, (now, (then, size)) in enumerate(zip(self.lengths, self.base, strict=True))
        ]
