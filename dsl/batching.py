"""Many sequences that a model reads together, a token each: they join after their prompts and leave when they end.

States of linear and delta layers are stacked as they are; those of softmax and latent layers are padded on the left to
the longest sequence, and the padding is masked. Knows nothing of sampling or requests.

Shape letters: B sequences, S time steps of the longest.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from dsl.attention import LatentState, LinearState, SoftmaxState, State
from dsl.generation import Reading, read
from dsl.model import LanguageModel

GROWS = {LinearState: (), SoftmaxState: ("keys", "values"), LatentState: ("latent", "rope_key")}  # with each time step


def _stacked(states: tuple[State, ...], length: int) -> State:
    """Their rows in one state, time steps added (masked) or taken away on the left; only padding may be taken."""
    names, parts = GROWS[type(states[0])], [state.tensors() for state in states]
    for state, part in zip(states, parts, strict=True):
        if names:
            real = part[names[0]].new_ones(part[names[0]].shape[:2], dtype=torch.bool)
            part["keep"] = F.pad(part.get("keep", real), (length - state.length, 0))
        part.update({name: F.pad(part[name], (0, 0, 0, 0, length - state.length, 0)) for name in names})
    new = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    if names and new["keep"].all():
        new["keep"] = None
    return dataclasses.replace(states[0], length=length, **new)


class Batch:
    """Rows of one state; `join` reads a prompt alone, `step` one token of every row."""

    def __init__(self, core: LanguageModel):
        self.core, self.state, self.lengths, self.sizes = core, [], [], []  # sizes: of each row's state alone, bytes

    def takes_more(self) -> bool:
        """Whether another row may join: a registered mixer's own state is not known here, so it stays alone."""
        return not self.lengths or all(type(layer) in GROWS for layer in self.state)

    def join(self, tokens: Tensor) -> Reading:
        """Read a prompt [1, T]; its sequence becomes the last row."""
        reading, state = read(self.core, tokens)
        lengths = [*self.lengths, state[0].length]
        if self.state:
            state = [_stacked(pair, max(lengths)) for pair in zip(self.state, state, strict=True)]
        self.state, self.lengths, self.sizes = state, lengths, [*self.sizes, reading.state_bytes]
        return reading

    def leave(self, stay: list[int]) -> None:
        """Keep these rows only, in this order."""
        if stay == [*range(len(self.lengths))]:
            return
        self.lengths, self.sizes = [self.lengths[i] for i in stay], [self.sizes[i] for i in stay]
        rows = torch.tensor(stay, device=next(self.core.parameters()).device)
        self.state = [_stacked((layer.rows(rows),), max(self.lengths)) for layer in self.state] if stay else []

    def step(self, tokens: Tensor) -> list[Reading]:
        """Read one token of each row, [B, 1]."""
        positions = torch.tensor(self.lengths, device=tokens.device)[:, None]
        hidden, self.state, stats = self.core(tokens, self.state, positions)
        logits, self.lengths = self.core.logits(hidden[:, -1]), [n + 1 for n in self.lengths]
        growth = sum(getattr(s, name)[0, 0].nbytes for s in self.state for name in GROWS.get(type(s), ()))
        self.sizes = [size + growth for size in self.sizes]
        return [
            Reading(logits[i : i + 1], [layer.experts[i, -1] for layer in stats], size)
            for i, size in enumerate(self.sizes)
        ]
