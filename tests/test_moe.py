"""Routing, capacity, experts and balance against oracles, constants and transformers."""

import math

import pytest
import torch
from helpers import assert_close, gradients, seeded
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dsl import moe
from dsl.config import ModelConfig
from dsl.moe import MoE, TopKRouter, choose_experts, expert_capacity, load_balancing_loss, within_capacity
from dsl.reference_moe import CHECKS, choose_by_token, layer, moe_by_token, router_problems, swiglu_by_token

ROUTINGS = {
    "softmax": {},
    "sigmoid": {"router_score": "sigmoid"},
    "not renormalised, scaled": {"norm_topk_prob": False, "routed_scaling_factor": 2.5},
    "k = 1": {"num_experts_per_tok": 1},
    "k = E": {"num_experts_per_tok": 8},
    "groups": {"router_score": "sigmoid", "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3},
    "fine-grained and shared": {"num_experts": 16, "moe_intermediate_size": 6, "num_shared_experts": 2},
    "auxiliary loss": {"balance": "aux_loss"},
}


def build(**changes) -> MoE:
    return layer(**{"num_experts": 8, **changes})


@pytest.fixture(autouse=True)
def _seed():
    seeded()


@pytest.mark.parametrize("name", CHECKS)
def test_check_holds(name):
    assert CHECKS[name]() is None


@pytest.mark.parametrize("k", [1, 2])
def test_router_learns_with_any_k(k):
    """A renormalised weight of a single expert would be 1 whatever the router thinks."""
    block = build(num_experts_per_tok=k)
    block(torch.randn(2, 7, 16))[0].square().sum().backward()
    assert block.router.weight.grad.abs().max() > 1e-2


def test_changing_a_gate_weight_changes_the_output():
    block, x = build(), torch.randn(2, 5, 16)
    experts, weights = (t.flatten(0, 1) for t in (block.router(x).experts, block.router(x).weights))
    before = block.experts(x.flatten(0, 1), experts, weights)
    weights = weights.clone()
    weights[3, 1] += 1  # half as much again of a weight near zero would not show
    changed = (block.experts(x.flatten(0, 1), experts, weights) != before).any(-1)
    assert changed.nonzero().flatten().tolist() == [3]


@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_layer_equals_one_token_at_a_time(routing, dtype):
    block = build(std=0.3, **routing).to(dtype)
    x = torch.randn(2, 9, 16, dtype=dtype, requires_grad=True)
    inputs = {"x": x, **dict(block.named_parameters())}
    upstream = torch.randn(2, 9, 16, dtype=dtype)
    y, oracle = block(x)[0], moe_by_token(block, x)
    assert_close("y", y, oracle)
    slow = gradients((oracle * upstream).sum(), inputs)
    for name, value in gradients((y * upstream).sum(), inputs).items():
        assert_close(name, value, slow[name], bound=1e-10 if dtype == torch.float64 else 3e-5)


@pytest.mark.parametrize("chosen", [[3], [0], [7], [1, 6]], ids=str)
def test_empty_experts_and_one_that_takes_all(chosen):
    """Gradients reach the experts that work, and are exactly zero for the idle ones."""
    block, x = build(), torch.randn(11, 16, requires_grad=True)
    experts = torch.tensor(chosen).expand(11, -1)
    weights = torch.rand(11, len(chosen), requires_grad=True)
    y = block.experts(x, experts, weights)
    matrices = list(zip(block.experts.gate_up_proj, block.experts.down_proj, strict=True))
    rows = [sum(weights[n, j] * swiglu_by_token(x[n], *matrices[e]) for j, e in enumerate(chosen)) for n in range(11)]
    slow = torch.stack(rows)
    assert_close("y", y, slow)
    inputs = {"x": x, "weights": weights, **dict(block.experts.named_parameters())}
    want = gradients(slow.square().sum(), inputs)
    got = gradients(y.square().sum(), inputs)
    for name in got:
        assert_close(name, got[name], want[name], bound=3e-5)
    idle = [e for e in range(8) if e not in chosen]
    assert not got["dgate_up_proj"][idle].any() and not got["ddown_proj"][idle].any()


@pytest.mark.parametrize("shape", [(1, 1), (1, 63), (3, 65)], ids=str)
def test_gradient_of_a_plain_sum(shape):
    """An expanded gradient has strides of zero, which grouped_mm refuses unless somebody makes it contiguous."""
    block, x = build(), torch.randn(*shape, 16, requires_grad=True)
    block(x)[0].sum().backward()
    slow = x.detach().requires_grad_()
    moe_by_token(block, slow).sum().backward()
    assert_close("dx", x.grad, slow.grad, bound=3e-5)


@pytest.mark.parametrize("remade", [False, True])
def test_for_the_backward_pass_rows_are_made_again_and_no_product_is(remade, monkeypatch):
    """Six grouped products in any case: two forward, two for the rows, two for the matrices. And the same gradients."""
    block, x, calls = build().experts, torch.randn(40, 16, requires_grad=True), []
    args = torch.randint(8, (40, 2)), torch.rand(40, 2)
    kept = gradients(block(x, *args).square().sum(), {"x": x, **dict(block.named_parameters())})

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            calls.append(function.__name__.split(".")[0])
            return function(*args, **(kwargs or {}))

    monkeypatch.setattr(moe, "REMADE_FROM", 80 if remade else 81)
    with Calls():
        got = gradients(block(x, *args).square().sum(), {"x": x, **dict(block.named_parameters())})
    assert calls.count("_grouped_mm") == 6 and calls.count("silu") == 1 + remade
    assert all(torch.equal(got[name], kept[name]) for name in kept)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast_computes_in_16_bit_and_routes_in_fp32(dtype):
    block, x = build(), torch.randn(2, 33, 16)
    y, stats = block(x)
    with torch.autocast("cpu", dtype=dtype):
        half, routed = block(x)
    assert torch.equal(stats.experts, routed.experts) and routed.weights.dtype == torch.float32
    assert half.dtype == dtype
    assert_close("y", half, y.to(dtype))
    assert not torch.equal(half.float(), y)


@pytest.mark.parametrize("groups", [(1, 1), (4, 2), (2, 1)], ids=str)
@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
def test_choice_of_experts_against_the_loop(groups, biased):
    scores = torch.rand(40, 8)
    bias = torch.randn(8) * 0.3 if biased else None
    chosen, weights = choose_experts(scores, 3, bias=bias, n_group=groups[0], topk_group=groups[1], scale=2.0)
    for n in range(40):
        want = choose_by_token(scores[n], 3, bias, *groups)
        assert chosen[n].tolist() == want
        assert_close("weights", weights[n], 2 * scores[n][want] / scores[n][want].sum())


def copy(ours: MoE, theirs: nn.Module) -> None:
    """Our weights into a transformers block of the same sizes."""
    pairs = [(theirs.gate.weight, ours.router.weight)]
    pairs += [
        (theirs.experts.gate_up_proj, ours.experts.gate_up_proj),
        (theirs.experts.down_proj, ours.experts.down_proj),
    ]
    if ours.shared_experts is not None:
        gate, up = ours.shared_experts.gate_up_proj.weight.chunk(2)
        pairs += [(theirs.shared_experts.gate_proj.weight, gate), (theirs.shared_experts.up_proj.weight, up)]
        pairs += [(theirs.shared_experts.down_proj.weight, ours.shared_experts.down_proj.weight)]
        theirs.gate.e_score_correction_bias.copy_(ours.router.e_score_correction_bias)
    with torch.no_grad():
        for to, value in pairs:
            to.copy_(value)


def compare_with(theirs: nn.Module, ours: MoE) -> None:
    copy(ours, theirs)
    x, upstream = torch.randn(2, 17, 16, requires_grad=True), torch.randn(2, 17, 16)
    y, want = ours(x)[0], theirs(x)
    assert_close("y", y, want)
    got, dx = (
        {"x": x, "router": b.weight, "down": m.experts.down_proj}
        for b, m in ((ours.router, ours), (theirs.gate, theirs))
    )
    slow = gradients((want * upstream).sum(), dx)
    for name, value in gradients((y * upstream).sum(), got).items():
        assert_close(name, value, slow[name], bound=3e-5)


@pytest.mark.parametrize("groups", [(1, 1), (2, 1), (4, 2)], ids=str)
@pytest.mark.parametrize("scaling", [1.0, 2.5])
def test_equal_to_deepseek_v3_of_transformers(groups, scaling):
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Config, DeepseekV3MoE

    n_group, topk_group = groups
    shared = {"num_experts_per_tok": 2, "n_group": n_group, "topk_group": topk_group, "routed_scaling_factor": scaling}
    ours = build(router_score="sigmoid", num_shared_experts=2, **shared)
    sizes = {"hidden_size": 16, "moe_intermediate_size": 24, "n_routed_experts": 8, "n_shared_experts": 2}
    compare_with(DeepseekV3MoE(DeepseekV3Config(**sizes, **shared, norm_topk_prob=True)), ours)


@pytest.mark.parametrize("k", [2, 3])
def test_equal_to_mixtral_of_transformers(k):
    from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralSparseMoeBlock

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_local_experts": 8, "num_experts_per_tok": k}
    compare_with(MixtralSparseMoeBlock(MixtralConfig(**sizes)), build(balance="none", num_experts_per_tok=k))


@pytest.mark.parametrize("factor", [0.25, 1.0, 1.25])
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_drops_equal_serving_one_by_one(factor, padded):
    """In training the layer with a capacity is the oracle that turns late comers away; forward and gradient."""
    block = build(capacity_factor=factor).train()
    x = torch.randn(2, 13, 16, requires_grad=True)
    keep = torch.rand(2, 13) > 0.3 if padded else None
    room = math.ceil(factor * 2 * 13 / 8)
    y, stats = block(x, keep)
    slow = moe_by_token(block, x, room, keep)
    real = torch.ones(2, 13, dtype=torch.bool) if keep is None else keep
    assert_close("y", y[real], slow[real])
    got, want = (gradients(t[real].square().sum(), {"x": x})["dx"] for t in (y, slow))
    assert_close("dx", got, want, bound=3e-5)
    lost = (stats.weights == 0) & real[..., None]
    assert float(stats.dropped) == pytest.approx(float(lost.sum() / (2 * real.sum())))


@pytest.mark.parametrize("factor", [4.0, 5.0, 100.0])
def test_room_for_all_equals_dropless(factor):
    """Capacity factor E / k: even one expert that is everybody's choice has room. Bit for bit."""
    block = build(capacity_factor=factor).train()
    with torch.no_grad():
        block.router.weight[[2, 5]] = torch.full((16,), 3.0)
    x = torch.rand(2, 21, 16)
    y, stats = block(x)
    assert stats.counts.max() == 42 and stats.dropped == 0
    assert torch.equal(y, block.eval()(x)[0])


def test_forced_overflow_is_counted_and_leaves_the_residual():
    block = build(capacity_factor=1.0, num_experts_per_tok=1).train()
    with torch.no_grad():
        block.router.weight.zero_()[6] = 1.0
    y, stats = block(torch.rand(3, 16, 16) + 0.1)
    assert stats.counts.tolist() == [0, 0, 0, 0, 0, 0, 48, 0]  # before the drop
    assert float(stats.dropped) == pytest.approx(42 / 48)  # two of sixteen find room in each sequence
    assert y[:, :2].abs().amax(-1).gt(0).all() and not y[:, 2:].any()
    assert block.eval()(torch.rand(3, 16, 16))[1].dropped == 0


def test_capacity_formula():
    assert expert_capacity(512, 8, 2, 1.25) == 160
    assert expert_capacity(10, 8, 1, 1.0) == 2  # rounded up
    assert expert_capacity(200, 8, 2, 1.1) == 55  # though 1.1 * 2 * 200 / 8 is 55.00000000000001
    experts = torch.tensor([[[0, 1], [0, 2], [0, 1]]])
    assert within_capacity(experts, 3, 2).tolist() == [[[True, True], [True, True], [False, True]]]
    keep = torch.tensor([[False, True, True]])
    assert within_capacity(experts, 3, 2, keep)[0, 1:].all()


class Halves(nn.Module):
    """A router of the reader's own: first expert from the lower half, second from the upper."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.inner = TopKRouter(config)

    @property
    def weight(self):
        return self.inner.weight

    def forward(self, x):
        scores = self.inner(x).scores
        half = scores.shape[-1] // 2
        experts = torch.stack([scores[..., :half].argmax(-1), half + scores[..., half:].argmax(-1)], -1)
        weights = scores.gather(-1, experts)
        return moe.Routing(experts, weights / weights.sum(-1, keepdim=True), scores, scores.log())


class Looks(TopKRouter):
    """A router that sees the future: it centres its logits over the whole sequence."""

    def forward(self, x):
        return super().forward(x - x.mean(1, keepdim=True))


class Twice(TopKRouter):
    """A router that picks one expert twice."""

    def forward(self, x):
        routing = super().forward(x)
        routing.experts = routing.experts[..., :1].expand_as(routing.experts)
        return routing


@pytest.fixture(scope="module")
def own_routers():
    for name, cls in (("halves", Halves), ("looks", Looks), ("twice", Twice)):
        moe.register_router(name, cls)
    yield
    for name in ("halves", "looks", "twice"):
        del moe.ROUTERS[name]


def test_every_router_passes_and_a_looking_one_is_caught(own_routers):
    for name in moe.ROUTERS:
        if name not in ("looks", "twice"):
            assert router_problems(name) == [], name
    assert any("earlier output" in problem for problem in router_problems("looks"))
    assert any("distinct" in problem for problem in router_problems("twice"))


@pytest.mark.parametrize("routing", ROUTINGS.values(), ids=ROUTINGS)
def test_no_form_of_routing_looks_ahead(routing):
    from dsl.reference_moe import no_look_ahead, prefix

    changes = {"num_experts": 8, **routing}
    assert no_look_ahead(trials=8, **changes) is None
    assert prefix(**changes) is None


def test_a_registered_router_serves_a_model(own_routers):
    from dsl.model import LanguageModel

    model = LanguageModel(ModelConfig(vocab_size=50, hidden_size=24, num_hidden_layers=2, router="halves"))
    _, _, stats = model(torch.randint(50, (2, 9)))
    assert all((s.experts[..., 0] < 4).all() and (s.experts[..., 1] >= 4).all() for s in stats)
    model.update_router_biases(torch.stack([s.counts for s in stats]))  # it has no bias: nothing to do


def even(E=8, k=2):
    """Scores [2, E, E] that send k assignments to every expert in each sequence, near 1 / E each."""
    base = torch.full((E, E), 1 / E)
    for t in range(E):
        base[t, [(t + j) % E for j in range(k)]] += 1e-4
    return (base / base.sum(-1, keepdim=True)).expand(2, -1, -1)


def test_balancing_loss_constants():
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    for scope in ("batch", "sequence"):
        experts = choose_experts(even(), 2)[0]
        assert float(load_balancing_loss(even(), experts, scope)) == pytest.approx(1.0, abs=1e-6)
        for k in (1, 2, 4):  # all on k experts: E / k
            scores = torch.zeros(2, 5, 8)
            scores[..., :k] = 1 / k
            experts = torch.arange(k).expand(2, 5, k)
            assert float(load_balancing_loss(scores, experts, scope)) == pytest.approx(8 / k)
    logits = torch.randn(3, 40, 8)
    scores = logits.softmax(-1)
    ours = load_balancing_loss(scores, choose_experts(scores, 2)[0])
    theirs = load_balancing_loss_func((logits.flatten(0, 1),), num_experts=8, top_k=2)
    assert_close("k times ours", 2 * ours, theirs)


def test_scores_that_are_all_zero_leave_losses_and_weights_finite():
    scores = torch.full((1, 3, 8), -200.0).sigmoid()
    experts, weights = choose_experts(scores, 2)
    assert not scores.any() and not weights.any() and load_balancing_loss(scores, experts) == 0


def test_scope_of_the_balancing_loss():
    """Two sequences that use two experts each: uneven within a sequence, even over the batch."""
    scores = torch.zeros(2, 6, 4)
    scores[0, :, :2] = scores[1, :, 2:] = 0.5
    experts = choose_experts(scores, 2)[0]
    assert float(load_balancing_loss(scores, experts, "batch")) == pytest.approx(1.0)
    assert float(load_balancing_loss(scores, experts, "sequence")) == pytest.approx(2.0)


def test_a_row_of_padding_is_no_sequence():
    """Two experts of four take all: 2; every expert an equal share: 1; the third row has no real token."""
    scores = torch.full((3, 4, 4), 0.25)
    scores[0] = torch.tensor([0.5, 0.5, 0.0, 0.0])
    experts = torch.tensor([[[0, 1]] * 4, [[0, 1], [2, 3]] * 2, [[0, 1]] * 4])
    keep = torch.tensor([[True] * 4, [True, True, False, False], [False] * 4])
    assert float(load_balancing_loss(scores, experts, "sequence", keep)) == 1.5
    assert load_balancing_loss(scores, experts, "sequence", keep & False) == 0
    logits = torch.zeros(3, 4, 8).masked_fill(~keep[..., None], 5.0)
    assert float(moe.router_z_loss(logits, keep)) == pytest.approx(math.log(8) ** 2)
    assert moe.router_z_loss(logits, keep & False) == 0


def test_z_loss_of_zero_logits():
    assert float(moe.router_z_loss(torch.zeros(2, 3, 8))) == pytest.approx(math.log(8) ** 2, abs=1e-6)
    assert math.log(8) ** 2 == pytest.approx(4.3241, abs=5e-5)


@pytest.mark.parametrize("scope", ["batch", "sequence"])
def test_padding_counts_nowhere(scope):
    settings = {"balance": "aux_loss", "aux_loss_scope": scope, "router_z_loss_coef": 0.1}
    block, x = build(**settings), torch.randn(2, 9, 16)
    keep = torch.arange(9) < torch.tensor([[6], [6]])
    padded, cut = block(x, keep)[1], block(x[:, :6])[1]
    for name in ("counts", "entropy", "aux_loss", "z_loss"):
        assert_close(name, getattr(padded, name), getattr(cut, name))
    assert cut.aux_loss > 0 and cut.z_loss > 0 and cut.aux_loss.requires_grad and cut.z_loss.requires_grad


def test_losses_carry_their_coefficients_and_are_off_by_default():
    x = torch.randn(2, 9, 16)
    block = build(balance="aux_loss", aux_loss_coef=0.25, router_z_loss_coef=0.5)
    stats, routing = block(x)[1], block.router(x)
    assert_close("aux", stats.aux_loss, 0.25 * load_balancing_loss(routing.scores, routing.experts))
    assert_close("z", stats.z_loss, 0.5 * routing.logits.logsumexp(-1).square().mean())
    stats = build()(x)[1]
    assert stats.aux_loss == 0 and stats.z_loss == 0


def test_loss_free_update_by_hand():
    bias = moe.loss_free_update(torch.zeros(4), torch.tensor([10.0, 2.0, 2.0, 2.0]), 0.5)
    assert bias.tolist() == pytest.approx([-0.75, 0.25, 0.25, 0.25])  # signs -1 1 1 1, less their mean
    assert moe.loss_free_update(torch.zeros(2, 4), torch.full((2, 4), 3.0), 0.5).abs().max() == 0
    block = build(bias_update_speed=0.1)
    before = block.router.e_score_correction_bias.clone()
    block.update_bias(torch.tensor([9.0, 1, 1, 1, 1, 1, 1, 1]))
    assert block.router.e_score_correction_bias[0] < before[0] - before.mean()
    assert "router.e_score_correction_bias" in block.state_dict()
    assert "router.e_score_correction_bias" not in dict(block.named_parameters())
    none = build(balance="none")
    none.update_bias(torch.ones(8))
    assert "router.e_score_correction_bias" not in none.state_dict()


def test_counting_changes_no_bias():
    """Forward passes, of training or not, leave the bias alone: recomputation must not count twice."""
    block = build().train()
    before = block.router.e_score_correction_bias.clone()
    block(torch.randn(2, 9, 16))[0].square().sum().backward()
    assert torch.equal(block.router.e_score_correction_bias, before)


def test_stats_say_what_happened():
    block, x = build(), torch.randn(2, 9, 16)
    stats, scores = block(x)[1], block.router(x).scores
    assert stats.counts.tolist() == [int((stats.experts == e).sum()) for e in range(8)] and stats.counts.sum() == 36
    mean = scores.mean((0, 1))
    assert_close("entropy", stats.entropy, -(mean * mean.log()).sum())
    assert_close("weights", stats.weights.sum(-1), torch.ones(2, 9))
    with torch.no_grad():
        block.router.weight.zero_()
    assert float(block(x)[1].entropy) == pytest.approx(math.log(8))


def test_expert_choice_is_perfectly_balanced():
    tokens, weights = moe.expert_choice(torch.rand(32, 4), 16)
    assert tokens.shape == weights.shape == (4, 16)
    assert all(len(set(row.tolist())) == 16 for row in tokens)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_experts_per_tok": 9}, ["num_experts_per_tok", "at most 8", "9"]),
        ({"n_group": 3}, ["n_group", "divide num_experts=8", "3"]),
        ({"n_group": 2, "topk_group": 3}, ["topk_group", "n_group=2", "3"]),
        ({"n_group": 8}, ["n_group", "two experts", "8"]),
        ({"n_group": 4, "num_experts_per_tok": 3}, ["num_experts_per_tok", "at most 2", "3"]),
        ({"capacity_factor": 0.0}, ["capacity_factor", "positive", "0.0"]),
        ({"capacity_factor": -1.0}, ["capacity_factor", "positive", "-1.0"]),
        ({"balance": "lossless"}, ["balance", "loss_free", "lossless"]),
        ({"router_score": "tanh"}, ["router_score", "sigmoid", "tanh"]),
        ({"router": "nobody"}, ["router", "top_k", "nobody"]),
        ({"router": ":Nobody"}, ["router", "top_k", ":Nobody"]),
        ({"router": "dsl.moe:Nobody"}, ["router", "Nobody"]),
    ],
    ids=str,
)
def test_bad_settings_are_refused_by_name(changes, words):
    with pytest.raises(ValueError) as error:
        MoE(ModelConfig(**changes), 0)
    assert all(word in str(error.value) for word in words)


def test_broken_scores_are_refused_where_text_is_made():
    block = build().eval()
    x = torch.randn(1, 3, 16)
    x[0, 1, 2] = torch.nan
    with pytest.raises(ValueError, match="router scores must be finite, got NaN"):
        block(x)
    block.train()(x)  # in training a broken step is skipped by the loop, which sees it in the loss
