"""Mixture of Experts: which experts a token visits, how many fit, what they compute, how the load is kept even.

Knows nothing of attention, of optimizers or of how often it is called: a balance bias chooses experts and is
updated from counts that the caller gives; everything measured is returned in `RoutingStats`.

Shape letters: B batch, T time, N = B T tokens, E experts, k experts per token, D hidden size, I inner width.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dsl.config import ModelConfig, Registry

# Assignments per call from which expert inputs are recomputed in backward: costs 4 % of the block's time, saves its
# widest tensors.
REMADE_FROM = 8192


class NotFiniteError(ValueError):
    """Scores or logits are NaN or infinite: the weights or the input are broken."""


@dataclass
class Routing:
    """What a router decides."""

    experts: Tensor  # [B, T, k] int64, distinct for a token
    weights: Tensor  # [B, T, k] gate weights, fp32
    scores: Tensor  # [B, T, E] positive scores without the bias, fp32
    logits: Tensor  # [B, T, E] fp32


@dataclass
class RoutingStats:
    """What one MoE layer reports of one call; losses carry gradients and their coefficients, the rest does not."""

    counts: Tensor  # [E] fp32, assignments of real tokens before any drop
    dropped: Tensor  # share of those assignments that found no room
    entropy: Tensor  # of the mean score distribution, in nats; ln E when experts are liked equally
    aux_loss: Tensor
    z_loss: Tensor
    experts: Tensor  # [B, T, k] int64
    weights: Tensor  # [B, T, k] fp32


def choose_experts(
    scores: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    n_group: int = 1,
    topk_group: int = 1,
    normalize: bool = True,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The k best experts of each token by scores + bias, and gate weights from the scores alone.

    scores [..., E]; with groups, only the topk_group groups with the largest sum of their two best may serve.
    One expert keeps its score as its weight: renormalised it would be 1, and the router could not learn.
    Returns (experts [..., k] int64, weights [..., k]). Source: DeepSeek-V3 (2412.19437), eqs. 12-16.
    """
    choice = scores if bias is None else scores + bias
    if n_group > 1:
        grouped = choice.unflatten(-1, (n_group, -1))
        best = grouped.topk(2, dim=-1).values.sum(-1).topk(topk_group, dim=-1).indices
        allowed = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter(-1, best, True)
        choice = grouped.masked_fill(~allowed[..., None], -torch.inf).flatten(-2)
    experts = choice.topk(k, dim=-1).indices
    weights = scores.gather(-1, experts)
    if normalize and k > 1:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return experts, weights * scale


def expert_choice(scores: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Each expert takes its `capacity` best tokens: scores [N, E] -> (tokens [E, C] int64, weights [E, C]).

    Perfectly balanced, but a token's place depends on later ones: for study only, no model here can use it.
    Source: Zhou et al. 2022 (2202.09368).
    """
    weights, tokens = scores.mT.topk(min(capacity, scores.shape[0]), dim=-1)
    return tokens, weights


def expert_capacity(tokens: int, num_experts: int, k: int, factor: float) -> int:
    """Assignments an expert takes from a sequence: ceil(factor * k * tokens / E) (Switch, 2101.03961, eq. 3)."""
    return math.ceil(factor * k * tokens / num_experts * (1 - 1e-12))  # 1.1 * 2 * 200 / 8 is over 55


def within_capacity(experts: Tensor, num_experts: int, capacity: int, keep: Tensor | None = None) -> Tensor:
    """Which assignments find room when each sequence is served in time order: [B, T, k] -> bool [B, T, k].

    A token cannot be pushed out by a later one nor by another sequence; padding (keep False) takes no room.
    """
    chosen = torch.zeros(*experts.shape[:2], num_experts, dtype=torch.int32, device=experts.device)
    chosen.scatter_(-1, experts, 1)
    if keep is not None:
        chosen = chosen * keep[..., None].to(chosen.dtype)
    place = chosen.cumsum(1) - chosen
    return place.gather(-1, experts) < capacity


def load_balancing_loss(scores: Tensor, experts: Tensor, scope: str = "batch", keep: Tensor | None = None) -> Tensor:
    """E * sum_i f_i P_i: 1 when the load is even, E / k when k experts take all (Switch and DeepSeek-V3 convention).

    f_i is the share of assignments of expert i, P_i its mean normalised score, over the whole batch or within each
    sequence that has a real token, then averaged. (transformers' Mixtral form counts f_i per token: k times this.)
    scores [B, T, E], experts [B, T, k]. Sources: 2101.03961, eq. 4; 2412.19437, eqs. 17-20.
    """
    chosen = torch.zeros_like(scores).scatter(-1, experts, 1.0)
    share = scores / (scores.sum(-1, keepdim=True) + 1e-20)
    real = scores.new_ones(scores.shape[:2]) if keep is None else keep.to(scores.dtype)
    over = (0, 1) if scope == "batch" else (1,)
    tokens = real.sum(over)[..., None]
    f = (chosen * real[..., None]).sum(over) / (tokens.clamp_min(1) * experts.shape[-1])
    p = (share * real[..., None]).sum(over) / tokens.clamp_min(1)
    return scores.shape[-1] * ((f * p).sum(-1).sum() / (tokens > 0).sum().clamp_min(1))


def router_z_loss(logits: Tensor, keep: Tensor | None = None) -> Tensor:
    """Mean of logsumexp(logits)^2 over real tokens, [B, T, E] -> scalar (ST-MoE, 2202.08906, eq. 5)."""
    z = logits.logsumexp(-1).square()
    return z.mean() if keep is None else (z * keep).sum() / keep.sum().clamp_min(1)


def loss_free_update(bias: Tensor, counts: Tensor, speed: float) -> Tensor:
    """The next bias: + speed for experts under the mean load, - speed over it, re-centred to mean zero.

    bias and counts [..., E]. Source: Wang et al. 2024 (2408.15664), algorithm 1; re-centred, as torchtitan does: a
    constant added to all biases changes no choice.
    """
    counts = counts.to(bias.dtype)
    bias = bias + speed * torch.sign(counts.mean(-1, keepdim=True) - counts)
    return bias - bias.mean(-1, keepdim=True)


class TopKRouter(nn.Module):
    """Token choice in fp32: scores of every expert, the k best by score + bias, gate weights without the bias."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        bias = torch.zeros(config.num_experts, dtype=torch.float32) if config.balance == "loss_free" else None
        self.register_buffer("e_score_correction_bias", bias)

    def forward(self, x: Tensor) -> Routing:
        c = self.config
        with torch.autocast(x.device.type, enabled=False):
            dtype = torch.promote_types(x.dtype, torch.float32)
            logits = F.linear(x.to(dtype), self.weight.to(dtype))
            scores = logits.softmax(-1) if c.router_score == "softmax" else logits.sigmoid()
        # In training a non-finite step is skipped by whoever optimises, without a look at every layer here.
        if not self.training and not scores.isfinite().all():
            rule = "router scores must be finite, got NaN or infinity"
            raise NotFiniteError(f"{rule}: the weights or the input are broken")
        experts, weights = choose_experts(
            scores,
            c.num_experts_per_tok,
            bias=self.e_score_correction_bias,
            n_group=c.n_group,
            topk_group=c.topk_group,
            normalize=c.norm_topk_prob,
            scale=c.routed_scaling_factor,
        )
        return Routing(experts, weights, scores, logits)


class Experts(nn.Module):
    """E SwiGLU networks as two stacks of matrices; each token is computed by its own k experts and by no other."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        E, D, inner = config.num_experts, config.hidden_size, config.moe_intermediate_size
        self.num_experts = E  # of this process: transformers' expert parallelism leaves each its share
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * inner, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, inner))

    def forward(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """x [N, D], experts [N, k] int64, weights [N, k] (zero: dropped) -> [N, D]."""
        k, flat = experts.shape[1], experts.flatten()
        order = flat.argsort(stable=True)  # assignments sorted by expert
        counts = torch.bincount(flat, minlength=self.num_experts)
        remake = torch.is_grad_enabled() and len(order) >= REMADE_FROM
        gate_up = _expert_product(lambda x: x[order // k], x, self.gate_up_proj, counts, remake)
        y = _expert_product(_swiglu, gate_up, self.down_proj, counts, remake)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        # Sum over k by shape, not index_add: the same order of additions on every device and run.
        return (y[place].unflatten(0, (-1, k)) * weights[..., None].to(y.dtype)).sum(1)


def _expert_product(make, source: Tensor, weight: Tensor, counts: Tensor, remake: bool) -> Tensor:
    """make(source) [M, in], rows sorted by expert, times the matrix of their expert.

    With `remake` these rows, the widest of a model, are not kept for the backward pass but made again from their
    source, bit by bit; the product is not made again: recomputation ends where it has its inputs.
    """

    def product(source: Tensor, weight: Tensor) -> Tensor:
        return _grouped_linear(make(source), weight, counts)

    if not remake:
        return product(source, weight)
    return checkpoint(product, source, weight, use_reentrant=False, preserve_rng_state=False)


def _grouped_linear(rows: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """rows [M, in] sorted by expert, weight [E, out, in], counts [E]: row i times the matrix of its expert."""
    if torch.is_autocast_enabled(rows.device.type):  # grouped_mm does not know autocast
        dtype = torch.get_autocast_dtype(rows.device.type)
        rows, weight = rows.to(dtype), weight.to(dtype)
    cuda = rows.device.type == "cuda"
    aligned = all(width * rows.element_size() % 16 == 0 for width in weight.shape[1:])  # grouped_mm insists
    if aligned and rows.dtype != torch.float64 and (not cuda or rows.dtype == torch.bfloat16):
        return F.grouped_mm(rows, weight.mT, offs=counts.cumsum(0).to(torch.int32))
    parts = zip(rows.split(counts.tolist()), weight.unbind(0), strict=True)
    return torch.cat([part @ matrix.mT for part, matrix in parts])


def _swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (2002.05202); gate and up are one matrix [2 I, D]."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_up_proj = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(_swiglu(self.gate_up_proj(x)))


class MoE(nn.Module):
    """Router, capacity, routed experts and shared experts: x [B, T, D] -> (y [B, T, D], RoutingStats).

    Capacity binds in training only: its size depends on the length of the sequence, so in generation a prefix would
    differ from the whole. A dropped assignment adds nothing; the token keeps its residual stream.
    """

    def __init__(self, config: ModelConfig, layer_index: int):
        super().__init__()
        self.config, self.layer_index = config, layer_index
        self.router = ROUTERS.resolve(config.router)(config)
        self.experts = Experts(config)
        shared = config.num_shared_experts * config.moe_intermediate_size
        self.shared_experts = SwiGLU(config.hidden_size, shared) if shared else None

    def forward(self, x: Tensor, keep: Tensor | None = None) -> tuple[Tensor, RoutingStats]:
        c = self.config
        routing = self.router(x)
        weights = routing.weights
        kept = None
        if c.capacity_factor is not None and self.training:
            room = expert_capacity(x.shape[1], c.num_experts, c.num_experts_per_tok, c.capacity_factor)
            kept = within_capacity(routing.experts, c.num_experts, room, keep)
            weights = weights * kept
        y = self.experts(x.flatten(0, 1), routing.experts.flatten(0, 1), weights.flatten(0, 1)).view_as(x)
        if self.shared_experts is not None:
            y = y + self.shared_experts(x)
        return y, self._stats(routing, weights, kept, keep)

    def _stats(self, routing: Routing, weights: Tensor, kept: Tensor | None, keep: Tensor | None) -> RoutingStats:
        c, zero = self.config, routing.scores.new_zeros(())
        on = c.balance == "aux_loss" and c.aux_loss_coef > 0
        aux = load_balancing_loss(routing.scores, routing.experts, c.aux_loss_scope, keep) if on else zero
        z = router_z_loss(routing.logits, keep) if c.router_z_loss_coef > 0 else zero
        aux, z = c.aux_loss_coef * aux, c.router_z_loss_coef * z
        with torch.no_grad():
            real = (torch.ones_like(routing.scores[..., 0]) if keep is None else keep).to(torch.float32)[..., None]
            each = real.expand_as(routing.experts)
            counts = torch.bincount(routing.experts.flatten(), each.flatten(), c.num_experts).to(torch.float32)
            lost = zero if kept is None else (each * ~kept).sum() / each.sum().clamp_min(1)
            liked = (routing.scores * real).sum((0, 1))
            liked = liked / liked.sum().clamp_min(1e-20)
            entropy = -torch.xlogy(liked, liked).sum()
        return RoutingStats(counts, lost, entropy, aux, z, routing.experts, weights.detach())

    @torch.no_grad()
    def update_bias(self, counts: Tensor) -> None:
        """One loss-free step from the counts [E] of a whole optimizer step; nothing where the router has no bias."""
        bias = getattr(self.router, "e_score_correction_bias", None)
        if bias is not None:
            bias.copy_(loss_free_update(bias, counts.to(bias.device), self.config.bias_update_speed))


ROUTERS = Registry("router", {"top_k": TopKRouter})
register_router = ROUTERS.register
