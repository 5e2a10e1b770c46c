"""Mixture of Experts, slowly: the layer one token at a time, and the checks that a router or a layer must pass.

Read this file beside `moe`; nothing in dsl imports it. The oracles share no helper with the shipped code. The checks
take the shipped code as it is at that moment, so that a bug patched into it shows; each returns what is wrong, or None.
Also here: the judges of notebook 02's exercises.

Shape letters: B batch, T time, E experts, k experts per token, D hidden size.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsl.config import ModelConfig
from dsl.model import LanguageModel
from dsl.moe import MoE
from dsl.reference import relative_error


def choose_by_token(scores: Tensor, k: int, bias=None, n_group=1, topk_group=1) -> list[int]:
    """The experts of one token, best first, from its scores [E]: groups, then bias, then the k best."""
    choice = scores.tolist() if bias is None else (scores + bias).tolist()
    size = len(choice) // n_group
    two_best = [sum(sorted(choice[g * size : (g + 1) * size])[-2:]) for g in range(n_group)]
    groups = sorted(range(n_group), key=lambda g: -two_best[g])[:topk_group]
    reach = [e for e in range(len(choice)) if e // size in groups]
    return sorted(reach, key=lambda e: -choice[e])[:k]


def swiglu_by_token(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """One token [D] through one expert: down (silu(gate x) * up x)."""
    gate, up = (gate_up @ x).split(gate_up.shape[0] // 2)
    return down @ (gate * torch.sigmoid(gate) * up)


def moe_by_token(block: MoE, x: Tensor, capacity: int | None = None, keep: Tensor | None = None) -> Tensor:
    """The whole layer for x [B, T, D], one token and one expert at a time, serving each sequence in time order."""
    c, experts = block.config, block.experts
    bias = getattr(block.router, "e_score_correction_bias", None)
    rows = []
    for b in range(x.shape[0]):
        taken = [0] * c.num_experts
        for t in range(x.shape[1]):
            logits = block.router.weight @ x[b, t]
            score = logits.exp() / logits.exp().sum() if c.router_score == "softmax" else 1 / (1 + (-logits).exp())
            chosen = choose_by_token(score, c.num_experts_per_tok, bias, c.n_group, c.topk_group)
            total = sum(score[e] for e in chosen) if c.norm_topk_prob and len(chosen) > 1 else 1.0
            y = torch.zeros_like(x[b, t])
            for e in chosen:
                real = keep is None or bool(keep[b, t])
                if capacity is None or taken[e] < capacity:
                    gate = c.routed_scaling_factor * score[e] / total
                    y = y + gate * swiglu_by_token(x[b, t], experts.gate_up_proj[e], experts.down_proj[e])
                taken[e] += real
            if block.shared_experts is not None:
                shared = block.shared_experts
                y = y + swiglu_by_token(x[b, t], shared.gate_up_proj.weight, shared.down_proj.weight)
            rows.append(y)
    return torch.stack(rows).view_as(x)


def layer(std: float = 0.5, **changes) -> MoE:
    """A small fresh MoE layer with matrices wide enough that every part matters, and a bias if it has one."""
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 24}
    block = MoE(ModelConfig(**{**sizes, "num_experts": 4, **changes}), 0)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=std)
    for buffer in block.buffers():
        nn.init.normal_(buffer, std=0.1)
    return block


def weighted_sum(router: str = "top_k") -> str | None:
    """The output is the sum over exactly k experts, each times its gate weight."""
    block = layer(router=router, norm_topk_prob=False)
    x = torch.randn(2, 7, 16)
    y, stats = block(x)
    if (k := stats.experts.shape[-1]) != block.config.num_experts_per_tok:
        return f"a token visits {k} experts, not k = {block.config.num_experts_per_tok}"
    matrices = list(zip(block.experts.gate_up_proj, block.experts.down_proj, strict=True))
    rows = zip(*(each.flatten(0, 1) for each in (x, stats.weights, stats.experts)), strict=True)
    want = [sum(w * swiglu_by_token(row, *matrices[e]) for w, e in zip(*chosen, strict=True)) for row, *chosen in rows]
    error = relative_error(y.flatten(0, 1), torch.stack(want))
    return None if error < 1e-5 else f"the output is not the weighted sum over the k experts (error {error:.1e})"


def oracle() -> str | None:
    """The layer equals `moe_by_token`, bias and all."""
    block = layer(router_score="sigmoid", num_shared_experts=1)
    x = torch.randn(2, 7, 16)
    error = relative_error(block(x)[0], moe_by_token(block, x))
    return None if error < 1e-5 else f"the layer differs from the oracle (error {error:.1e})"


def router_learns(router: str = "top_k") -> str | None:
    """The loss reaches every parameter of the router."""
    block = layer(router=router)
    block(torch.randn(2, 7, 16))[0].square().sum().backward()
    for name, parameter in block.router.named_parameters():
        if parameter.grad is None or not parameter.grad.abs().max() > 0:
            return f"no gradient reaches router.{name}: the router cannot learn"
    return None


def no_look_ahead(router: str = "top_k", trials: int = 24, **changes) -> str | None:
    """With capacity factor 1.0 in training, changing the last token changes no earlier output."""
    leaks = 0
    for _ in range(trials):
        block = layer(router=router, capacity_factor=1.0, **changes).train()
        x = torch.randn(1, 32, 16)
        y = block(x)[0][:, :-1]
        x[:, -1] = torch.randn(16)
        leaks += relative_error(block(x)[0][:, :-1], y) > 1e-5
    return f"an earlier output changes with the last token in {leaks} of {trials} trials" if leaks else None


def prefix(router: str = "top_k", **changes) -> str | None:
    """Outside training, a prefix alone gives what it gives inside the whole, whoever else is in the batch."""
    block = layer(router=router, capacity_factor=1.0, **changes).eval()
    x = torch.randn(3, 32, 16)
    whole = block(x)[0]
    for t in (1, 2, 17, 31):
        if (error := relative_error(block(x[:1, :t])[0], whole[:1, :t])) > 1e-5:
            return f"the first {t} tokens alone give another output than inside the batch (error {error:.1e})"
    return None


def bias_only_chooses() -> str | None:
    """A bias that is equal for all experts changes nothing."""
    block, x = layer(router_score="sigmoid"), torch.randn(2, 7, 16)
    y = block(x)[0]
    block.router.e_score_correction_bias += 0.5
    error = relative_error(block(x)[0], y)
    return None if error < 1e-5 else f"a bias equal for all experts changes the output (error {error:.1e})"


def small_model(**changes) -> LanguageModel:
    """Softmax attention in one layer, so that only rotary positions tell order; wide matrices."""
    sizes = {"vocab_size": 61, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    pattern = {"num_key_value_heads": 1, "intermediate_size": 24, "layer_types": ("full_attention",)}
    model = LanguageModel(ModelConfig(**{**sizes, **pattern, **changes}))
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.5)
    return model


def order_matters() -> str | None:
    """Two earlier tokens exchanged: the last output must notice."""
    model, tokens = small_model().eval(), torch.randperm(61)[None, :12]
    swapped = tokens[:, [1, 0, *range(2, 12)]]
    error = relative_error(model(swapped)[0][:, -1], model(tokens)[0][:, -1])
    return None if error > 1e-3 else f"exchanging two earlier tokens changes nothing (difference {error:.0e})"


def padding_is_free() -> str | None:
    """The loss of a padded batch is the mean over its real tokens."""
    model, tokens = small_model().eval(), torch.randint(61, (2, 13))
    labels = tokens[:, 1:].clone()
    labels[1, 5:] = -100
    hidden = model(tokens[:, :-1])[0]
    real = torch.cat([hidden[0], hidden[1, :5]])
    want = F.cross_entropy(real @ model.lm_head.weight.T, torch.cat([labels[0], labels[1, :5]]))
    error = relative_error(model.loss(hidden, labels), want)
    return None if error < 1e-5 else f"padding changes the loss (error {error:.1e})"


CHECKS: dict[str, Callable[[], str | None]] = {
    "output = weighted sum over k": weighted_sum,
    "layer = one-token oracle": oracle,
    "router gets a gradient": router_learns,
    "no look ahead": no_look_ahead,
    "prefix = whole": prefix,
    "bias only chooses": bias_only_chooses,
    "order matters": order_matters,
    "padding is free": padding_is_free,
}


def router_problems(router: str) -> list[str]:
    """What is wrong with a router (a registered name or "module:Class"): the checks that every router must pass."""
    block, x = layer(router=router), torch.randn(2, 7, 16)
    experts, k = block(x)[1].experts, block.config.num_experts_per_tok
    problems = []
    if tuple(experts.shape) != (2, 7, k) or not 0 <= int(experts.min()) <= int(experts.max()) < 4:
        problems.append(f"experts must be [B, T, k = {k}] of 0 to 3, got shape {tuple(experts.shape)}")
    elif (experts.sort(-1).values.diff(dim=-1) == 0).any():
        problems.append("the k experts of a token must be distinct")
    found = [check(router) for check in (weighted_sum, router_learns, no_look_ahead, prefix)]
    return problems + [problem for problem in found if problem]


def judge_gate(answer: Callable | None) -> str:
    """Exercise 1: `answer(scores [T, E], bias [E], k) -> (experts, weights)`, the bias choosing and not weighing."""
    if answer is None:
        return "not answered yet"
    scores, bias = torch.rand(30, 8) + 0.1, 0.5 * torch.randn(8)
    experts, weights = answer(scores, bias, 2)
    want = torch.tensor([sorted(choose_by_token(row, 2, bias)) for row in scores])
    if not torch.equal(experts.sort(-1).values, want):
        unbiased = torch.tensor([sorted(choose_by_token(row, 2)) for row in scores])
        hint = ": the bias does not choose yet" if torch.equal(experts.sort(-1).values, unbiased) else ""
        return f"not yet: other experts are chosen{hint}"
    gates = scores.gather(-1, experts)
    if relative_error(weights, gates / gates.sum(-1, keepdim=True)) < 1e-5:
        return "right"
    both = (scores + bias).gather(-1, experts)
    bent = relative_error(weights, both / both.sum(-1, keepdim=True)) < 1e-5
    return "not yet: the bias weighs, too" if bent else "not yet: the weights are not the scores over their sum"


def judge_drops(answer: Callable | None) -> str:
    """Exercise 2: `answer(experts [T, k], num_experts, capacity) -> bool [T, k]`, no look ahead."""
    if answer is None:
        return "not answered yet"
    cases = [torch.rand(24, 4).topk(2).indices for _ in range(50)]
    for experts in cases:
        kept, other = answer(experts, 4, 12), experts.clone()
        other[-1] = (experts[-1] + 1) % 4
        if torch.bincount(experts[kept], minlength=4).max() > 12:
            return "not yet: an expert serves more than its capacity"
        if not torch.equal(answer(other, 4, 12)[:-1], kept[:-1]):
            return "not yet: the last token decides whether an earlier one is served"
    for experts in cases:
        taken = [0] * 4
        for expert, place in zip(experts.flatten().tolist(), answer(experts, 4, 12).flatten().tolist(), strict=True):
            if place != (taken[expert] < 12):
                return "not yet: an expert with room left turns a token away"
            taken[expert] += 1
    return "right"


def judge_update(answer: Callable | None, history: Callable) -> str:
    """Exercise 3: `answer(bias [E], counts [E], speed) -> bias` that evens the load out in 100 steps at speed 0.01.

    `history` is `routing.balance_dynamics`: what happens to the load when the answer updates the bias.
    """
    if answer is None:
        return "not answered yet"
    found = history(0.01, steps=100, tokens=1024, update=answer)
    if found.bias[-1].mean().abs() > 1e-4:
        return f"not yet: the mean of the bias drifts (to {found.bias[-1].mean():.2f} in 100 steps)"
    if found.maxvio[-10:].mean() > found.maxvio[0]:
        return "not yet: the load grows more uneven; is the sign the right way round?"
    even = found.maxvio_global(20) < 0.1
    return "right" if even else f"not yet: after 100 steps MaxVio is {found.maxvio[-10:].mean():.2f}"
