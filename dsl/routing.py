"""How experts are shared out, measured: balance and its floor, drops and their law, looking ahead, what experts do.

Plain functions of tensors or of a trained model for notebook 02 and its sliders; no model or trainer uses them.

Shape letters: N tokens, B sequences, T time, E experts, k experts per token, L MoE layers.
"""

import math
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dsl.evaluation import bits_per_byte
from dsl.model import LanguageModel
from dsl.moe import choose_experts, expert_capacity, expert_choice, loss_free_update


def skewed_scores(n: int, num_experts: int, skew: float, generator: torch.Generator) -> Tensor:
    """[N, E] sigmoid scores of a router with favourites: noise of size one plus an offset per expert of size `skew`.

    The offsets are fixed for a number of experts, so that every call has the same favourites.
    """
    favourites = torch.randn(num_experts, generator=torch.Generator().manual_seed(0))
    logits = torch.randn(n, num_experts, generator=generator) + skew * (favourites - favourites.mean())
    return logits.sigmoid()


@dataclass(frozen=True)
class Dynamics:
    """One history of loss-free balancing: MaxVio of each batch [S], bias after each step [S, E], counts [S, E]."""

    maxvio: Tensor
    bias: Tensor
    counts: Tensor

    def steps_to(self, level: float) -> int | None:
        """The first step whose MaxVio is under `level`; None if there is none."""
        below = (self.maxvio < level).nonzero()
        return int(below[0]) if len(below) else None

    def maxvio_global(self, last: int) -> float:
        """MaxVio of the last steps' assignments together: what is left when sampling noise averages out."""
        counts = self.counts[-last:].sum(0)
        return float(counts.max() / counts.mean() - 1)


def balance_dynamics(
    speed: float,
    *,
    steps: int = 300,
    num_experts: int = 8,
    tokens: int = 2048,
    skew: float = 1.5,
    seed: int = 0,
    update: Callable[[Tensor, Tensor, float], Tensor] = loss_free_update,
) -> Dynamics:
    """Loss-free balancing of a top-2 router that does not learn: fresh skewed scores and one bias update a step."""
    generator, bias = torch.Generator().manual_seed(seed), torch.zeros(num_experts)
    biases, counts = [], []
    for _ in range(steps):
        scores = skewed_scores(tokens, num_experts, skew, generator)
        experts, _ = choose_experts(scores, 2, bias=bias)
        counts.append(torch.bincount(experts.flatten(), minlength=num_experts).float())
        bias = update(bias, counts[-1], speed)
        biases.append(bias)
    counts = torch.stack(counts)
    return Dynamics(counts.amax(-1) / counts.mean(-1) - 1, torch.stack(biases), counts)


def sampling_floor(tokens: int, num_experts: int, k: int) -> float:
    """Expected MaxVio of `tokens` tokens that each choose k different experts quite evenly: it is never zero.

    The largest of E normal counts of variance c (1 - k/E) around c = k N / E, which together cannot move.
    """
    mean = k * tokens / num_experts
    spread = math.sqrt((1 - k / num_experts) / mean * num_experts / max(num_experts - 1, 1))
    x = torch.linspace(-9, 9, 20_001, dtype=torch.float64)
    largest = (x[1:] * torch.special.ndtr(x).pow(num_experts).diff()).sum()
    return spread * float(largest)


def drop_law(tokens: int, num_experts: int, k: int, factor: float) -> tuple[float, float]:
    """Share of assignments that an even, random router loses in a sequence: E max(c - capacity, 0) / mean, exactly.

    An expert's load c is Binomial(N, k / E): each token takes the expert or not. Also returned: the standard deviation
    of one expert's share. Where one expert is full the others are emptier, so the mean over S sequences and all their
    experts has a standard error of at most that / sqrt(S E).
    """
    share = torch.tensor(k / num_experts, dtype=torch.float64)
    load = torch.arange(tokens + 1, dtype=torch.float64)
    chance = torch.distributions.Binomial(tokens, share).log_prob(load).exp()
    over = (load - expert_capacity(tokens, num_experts, k, factor)).clamp(min=0) / (tokens * share)
    mean = (chance * over).sum()
    return float(mean), float((chance * (over - mean).square()).sum().sqrt())


def served(experts: Tensor, num_experts: int, capacity: int, priority: Tensor) -> Tensor:
    """Which assignments find room when they are served by rising priority: [B, T, k] twice -> bool [B, T, k]."""
    order = priority.flatten(1).argsort(dim=-1, stable=True)
    chosen = torch.nn.functional.one_hot(experts.flatten(1).gather(1, order), num_experts)
    place = ((chosen.cumsum(1) - chosen) * chosen).sum(-1)
    return torch.zeros_like(place).scatter(1, order, place).view_as(experts) < capacity


ORDERS = ("time order", "k-major", "largest weight first")


def priority(order: str, weights: Tensor) -> Tensor:
    """Who is served first (lowest number) among gate weights [B, T, k], in one of `ORDERS`.

    Time order is what ships: no later token pushes out an earlier one. GShard's k-major order serves all first
    choices before any second choice, the last one the largest weights: both let the future's tokens come before.
    """
    T, k = weights.shape[1:]
    number = torch.arange(T * k, device=weights.device)
    orders = (number.view(T, k).expand_as(weights), number.view(k, T).T.expand_as(weights), -weights)
    return dict(zip(ORDERS, orders, strict=True))[order]


def token_choice(scores: Tensor, k: int, order: str | None) -> Tensor:
    """Gate weights [T, E] from scores [T, E] after drops in an order at capacity factor 1 (None: dropless)."""
    experts, weights = choose_experts(scores[None], k)
    if order is not None:
        room = expert_capacity(len(scores), scores.shape[-1], k, 1.0)
        weights = weights * served(experts, scores.shape[-1], room, priority(order, weights))
    return torch.zeros_like(scores).scatter(-1, experts[0], weights[0])


def choice_of_experts(scores: Tensor, k: int) -> Tensor:
    """Gate weight of every token and expert under expert choice at the same number of assignments, [T, E] -> [T, E]."""
    tokens, weights = expert_choice(scores, k * scores.shape[0] // scores.shape[1])
    return torch.zeros_like(scores).T.scatter(-1, tokens, weights).T


def look_ahead(route: Callable[[Tensor], Tensor], trials: int, generator, *, tokens: int = 32, num_experts: int = 4):
    """Share of trials in which new scores of the last token alone change the gate weights of an earlier one."""
    changed = 0
    for _ in range(trials):
        logits = torch.randn(tokens, num_experts, generator=generator)
        before = route(logits.softmax(-1))[:-1]
        logits[-1] = torch.randn(num_experts, generator=generator)
        changed += not torch.equal(before, route(logits.softmax(-1))[:-1])
    return changed / trials


@torch.no_grad()
def routes(model: LanguageModel, tokens: Tensor) -> Tensor:
    """The experts of every token: token ids [B, T] -> int64 [L, B, T, k], best first; in eval mode."""
    model = model.eval()
    parts = [torch.stack([s.experts for s in model(some)[2]]) for some in tokens.split(8)]
    return torch.cat(parts, 1)


def saturation(before: Tensor, after: Tensor) -> Tensor:
    """Share of each layer's choices that two checkpoints share: [L, ..., k] twice -> [L] (OLMoE, 2409.02060)."""
    same = (before[..., :, None] == after[..., None, :]).any(-1)
    return same.flatten(1).double().mean(-1)


def specialities(tokens: Tensor, experts: Tensor, num_experts: int, least: int = 20) -> list[list[tuple[int, float]]]:
    """For each expert of one layer the token ids that it serves most: (id, share of the id's visits), best first.

    tokens [B, T], experts [B, T, k]; ids seen fewer than `least` times say nothing and are left out.
    """
    size, k = int(tokens.max()) + 1, experts.shape[-1]
    pairs = experts.flatten(0, 1) * size + tokens.flatten()[:, None]
    visits = torch.bincount(pairs.flatten(), minlength=size * num_experts).view(num_experts, size)
    seen = visits.sum(0) // k
    share = torch.where(seen >= least, visits / seen.clamp(min=1), 0)
    best = share.sort(dim=-1, descending=True, stable=True)
    return [
        [(int(i), float(s)) for s, i in zip(values[:50], ids[:50], strict=True) if s > 0]
        for values, ids in zip(best.values, best.indices, strict=True)
    ]


def kind_of(text: str) -> str:
    """The kind of a piece of text: line break, space, word start, inside a word, Capital, number, bracket, mark."""
    core = text.strip()
    if not core:
        return "line break" if "\n" in text else "space"
    categories = {unicodedata.category(character)[0] for character in core}
    if "N" in categories:
        return "number"
    if "L" in categories:
        return "Capital" if core[0].isupper() else "word start" if text[0].isspace() else "inside a word"
    return "bracket" if set(core) & set("()[]{}<>") else "mark"


def kind_shares(kinds: list[str], tokens: Tensor, experts: Tensor, num_experts: int) -> tuple[list[str], Tensor]:
    """How each kind of token is spread over the experts of one layer: (names, shares [kinds, E], rows sum to one).

    `kinds` names the kind of every token id; tokens [B, T], experts [B, T, k].
    """
    names = sorted(set(kinds[i] for i in tokens.unique().tolist()))
    number = torch.tensor([names.index(kind) if kind in names else 0 for kind in kinds])[tokens]
    pairs = number[..., None] * num_experts + experts
    counts = torch.bincount(pairs.flatten(), minlength=len(names) * num_experts).view(len(names), -1).double()
    return names, counts / counts.sum(-1, keepdim=True)


@torch.no_grad()
def drop_cost(model: LanguageModel, rows: Tensor) -> tuple[Tensor, Tensor | None]:
    """Rise of the loss (nats per token) when one expert falls silent: routed [L, E], shared [L] or None."""

    def loss() -> float:
        return bits_per_byte(model, rows, rows[:, 1:].numel()) * math.log(2)

    def rise(down: Tensor) -> float:
        saved = down.clone()
        try:
            down.zero_()
            return loss() - base
        finally:
            down.copy_(saved)

    base = loss()
    routed = [[rise(down) for down in block.experts.down_proj] for block in model.moe_blocks]
    shared = [rise(block.shared_experts.down_proj.weight) for block in model.moe_blocks if block.shared_experts]
    return torch.tensor(routed), torch.tensor(shared) if shared else None
