"""The measurements behind notebook 02: laws against Monte Carlo, who looks ahead, what experts do."""

import itertools

import pytest
import tiny
import torch
from helpers import seeded

from dsl import moe, routing


@pytest.fixture(autouse=True)
def generator():
    return seeded()


def random_experts(batch, tokens, num_experts, k, generator):
    return torch.rand(batch, tokens, num_experts, generator=generator).topk(k, dim=-1).indices


def small_model(**changes):
    return tiny.shell(num_hidden_layers=2, **changes).model


@pytest.mark.parametrize(("tokens", "num_experts", "k", "published"), [(4096, 8, 1, 0.063), (1024, 8, 1, 0.127)])
def test_sampling_floor_published(tokens, num_experts, k, published):
    assert routing.sampling_floor(tokens, num_experts, k) == pytest.approx(published, rel=0.02)


@pytest.mark.parametrize(("tokens", "num_experts", "k"), [(512, 8, 2), (512, 16, 4), (300, 4, 3)])
def test_sampling_floor_against_monte_carlo(tokens, num_experts, k, generator):
    experts = random_experts(1600, tokens, num_experts, k, generator).flatten(1)
    counts = torch.nn.functional.one_hot(experts, num_experts).sum(1).float()
    maxvio = (counts.amax(-1) / counts.mean(-1) - 1).mean()
    assert routing.sampling_floor(tokens, num_experts, k) == pytest.approx(float(maxvio), rel=0.08)


def test_floor_of_all_experts_is_zero():
    assert routing.sampling_floor(100, 4, 4) == routing.sampling_floor(100, 1, 1) == 0


def test_steps_to_balance_follow_the_law():
    """Needed bias over speed: ten times slower at a tenth of the speed; and the floor is reached."""
    fast, slow = (routing.balance_dynamics(u, steps=n, tokens=1024) for u, n in ((2e-2, 40), (2e-3, 300)))
    assert fast.maxvio[0] > 2
    a, b = fast.steps_to(0.25), slow.steps_to(0.25)
    assert 7 < b / a < 13, (a, b)
    assert slow.maxvio[-50:].mean() < 1.5 * routing.sampling_floor(1024, 8, 2)
    assert slow.maxvio_global(100) < 0.03
    assert slow.bias.mean(-1).abs().max() < 1e-6
    assert routing.balance_dynamics(1e-5, steps=20, tokens=256).steps_to(0.25) is None


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.1, 1.2])
@pytest.mark.parametrize(("tokens", "num_experts", "k"), [(512, 8, 1), (512, 8, 2), (256, 16, 4)])
def test_drop_law_against_monte_carlo(tokens, num_experts, k, factor, generator):
    experts = random_experts(300, tokens, num_experts, k, generator)
    kept = moe.within_capacity(experts, num_experts, moe.expert_capacity(tokens, num_experts, k, factor))
    law, spread = routing.drop_law(tokens, num_experts, k, factor)
    assert abs(float(1 - kept.double().mean()) - law) < 5 * spread / (300 * num_experts) ** 0.5


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.5])
def test_drop_law_by_counting(factor):
    """Six tokens that choose two of three experts: every one of 3^6 equally likely ways, for the first expert."""
    loads = [sum(way) for way in itertools.product((0, 1, 1), repeat=6)]  # two of the three pairs hold the expert
    over = torch.tensor([max(load - 4 * factor, 0) / 4 for load in loads], dtype=torch.float64)
    law, spread = routing.drop_law(6, 3, 2, factor)
    assert law == pytest.approx(float(over.mean())) and spread == pytest.approx(float(over.std(correction=0)))


def test_drop_law_published():
    """kN = 1,024 and 8,192 independent assignments to 8 experts at capacity factor 1; nothing to speak of at 1.25."""
    assert routing.drop_law(1024, 8, 1, 1.0)[0] == pytest.approx(0.0330, abs=5e-5)
    assert routing.drop_law(8192, 8, 1, 1.0)[0] == pytest.approx(0.0117, abs=5e-5)
    assert routing.drop_law(1024, 8, 1, 1.25)[0] < 1e-4
    assert routing.drop_law(512, 8, 8, 1.0)[0] == 0


@pytest.mark.parametrize("capacity", [1, 5, 9, 40])
def test_time_order_is_what_ships(capacity, generator):
    experts = random_experts(3, 17, 4, 2, generator)
    order = routing.priority("time order", experts.float())
    assert torch.equal(routing.served(experts, 4, capacity, order), moe.within_capacity(experts, 4, capacity))


def test_orders_by_hand():
    """Three tokens, two experts each, room for one: who is served first shows."""
    experts, weights = torch.tensor([[[0, 1], [0, 2], [1, 0]]]), torch.tensor([[[0.6, 0.4], [0.9, 0.1], [0.7, 0.3]]])
    kept = {
        order: routing.served(experts, 3, 1, routing.priority(order, weights))[0].tolist() for order in routing.ORDERS
    }
    assert kept["time order"] == [[True, True], [False, True], [False, False]]
    assert kept["k-major"] == [[True, False], [False, True], [True, False]]
    assert kept["largest weight first"] == [[False, False], [True, True], [True, False]]


def test_who_looks_ahead(generator):
    def share(route):
        return routing.look_ahead(route, 200, generator)

    assert share(lambda s: routing.token_choice(s, 2, None)) == 0
    assert share(lambda s: routing.token_choice(s, 2, "time order")) == 0
    assert 0.4 < share(lambda s: routing.token_choice(s, 2, "k-major")) < 0.75
    assert 0.5 < share(lambda s: routing.token_choice(s, 2, "largest weight first")) < 0.85
    assert share(lambda s: routing.choice_of_experts(s, 2)) > 0.8


def test_routes_are_those_of_the_model(generator):
    model, tokens = small_model(), torch.randint(60, (11, 9), generator=generator)
    experts = routing.routes(model, tokens)
    assert experts.shape == (2, 11, 9, 2)
    assert torch.equal(experts[1], model(tokens)[2][1].experts)


def test_saturation():
    a = torch.tensor([[[0, 1], [2, 3]], [[0, 1], [2, 3]]])
    b = torch.tensor([[[1, 0], [2, 3]], [[2, 1], [0, 1]]])
    assert routing.saturation(a, b).tolist() == [1.0, 0.25]


def test_specialities():
    tokens = torch.tensor([[5] * 4 + [7] * 4 + [9]])
    experts = torch.tensor([[[0, 1]] * 3 + [[1, 2]] + [[2, 1]] * 4 + [[0, 2]]])
    found = routing.specialities(tokens, experts, 3, least=4)
    assert found == [[(5, 0.75)], [(5, 1.0), (7, 1.0)], [(7, 1.0), (5, 0.25)]]  # token 9 came once only


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("\n    ", "line break"), ("  ", "space"), (" the", "word start"), ("ing", "inside a word"),
        (" The", "Capital"), ("128", "number"), ("():", "bracket"), (" ==", "mark"), ("é", "inside a word"),
    ],
)  # fmt: skip
def test_kind_of(text, kind):
    assert routing.kind_of(text) == kind


def test_kind_shares():
    tokens = torch.tensor([[0, 1, 1, 2]])
    experts = torch.tensor([[[0, 1], [1, 2], [1, 0], [2, 1]]])
    names, shares = routing.kind_shares(["a", "b", "b", "never"], tokens, experts, 3)
    assert names == ["a", "b"]
    assert shares.tolist() == [[0.5, 0.5, 0.0], [1 / 6, 0.5, 1 / 3]]


def test_cost_of_a_silent_expert(generator):
    model = small_model(num_shared_experts=1)
    rows = torch.randint(60, (4, 17), generator=generator)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        model.moe_blocks[0].experts.down_proj[3] = 0
    routed, shared = routing.drop_cost(model, rows)
    assert routed.shape == (2, 4) and shared.shape == (2,)
    assert routed[0, 3] == 0 and (routed[1] != 0).all() and (shared != 0).all()
    before["layers.0.mlp.experts.down_proj"][3] = 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert routing.drop_cost(small_model(), rows)[1] is None
