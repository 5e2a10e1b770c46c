"""Mutation tests: with each classic error patched in, the checks of the suite must see it; without, none may."""

import pytest
import torch
import torch.nn.functional as F
from helpers import seeded

from dsl import moe, museum, routing
from dsl.reference_moe import CHECKS, judge_drops, judge_gate, judge_update, layer, small_model


@pytest.fixture(autouse=True)
def _seed():
    seeded()


TRIPS = {
    None: set(),  # the shipped code
    "gate weights unused": {"output = weighted sum over k", "layer = one-token oracle", "router gets a gradient"},
    "rotary not called": {"order matters"},
    "padding counted": {"padding is free"},
    "capacity used as k": {"output = weighted sum over k", "layer = one-token oracle"},
    "k-major drops": {"no look ahead"},
    "drops in evaluation": {"prefix = whole"},
    "bias inside the gate": {"layer = one-token oracle", "bias only chooses"},
}


@pytest.mark.parametrize("name", [None, *museum.BUGS])
def test_every_bug_is_caught_and_does_what_it_says(name):
    """A switch that changes nothing would be caught by nobody; one that changes something else is the wrong exhibit."""
    with museum.bug(name):
        found = {check for check, run in CHECKS.items() if run()}
    assert found == TRIPS[name] and (name is None or museum.CAUGHT_BY[name] in found)


def test_every_check_goes_red_for_some_bug():
    assert set().union(*TRIPS.values()) == set(CHECKS)


def test_without_padding_k_major_differs_from_time_order_only_in_who_is_dropped():
    experts = moe.choose_experts(torch.rand(2, 16, 4), 2)[0]
    time = moe.within_capacity(experts, 4, 8)
    with museum.bug("k-major drops"):
        assert moe.within_capacity(experts, 4, 8).sum() == time.sum()
        assert moe.within_capacity(experts, 4, 16).all()


def test_a_bug_is_put_back_after_an_error():
    shipped = moe.choose_experts
    with pytest.raises(RuntimeError), museum.bug("bias inside the gate"):
        assert moe.choose_experts is not shipped
        raise RuntimeError
    assert moe.choose_experts is shipped
    with pytest.raises(ValueError, match=r"bug must be one of .*padding counted.*, got 'typo'"), museum.bug("typo"):
        pass
    with museum.bug(None):
        assert moe.choose_experts is shipped


def test_capacity_used_as_k_looks_perfectly_balanced():
    block, x = layer(), torch.randn(2, 9, 16)
    with museum.bug("capacity used as k"):
        counts = block(x)[1].counts
    assert counts.tolist() == [18.0] * 4


def test_practice_reports_what_it_trains_on_and_what_is_real():
    """Padding changes neither loss, unless the bug counts it; the weights and the bias of the model move."""
    labels = torch.randint(1, 61, (3, 13))
    labels[1:, 5:] = -100
    tokens = labels.roll(1, 1).clamp(min=0)
    model = small_model(bias_update_speed=0.1)
    with torch.no_grad():
        hidden = model(tokens.masked_fill(labels < 0, 0), keep=labels >= 0)[0]
        want = F.cross_entropy(model.logits(hidden)[labels >= 0], labels[labels >= 0]).item()
    (reported, real, counts), *_, (last, _, _) = museum.practise(model, [(tokens, labels)] * 8)
    assert reported == pytest.approx(want, rel=1e-5) and real == pytest.approx(want, rel=1e-5)
    assert counts.shape == (1, model.config.num_experts) and counts.sum() == 2 * (labels >= 0).sum()
    assert last < reported and model.moe_blocks[0].router.e_score_correction_bias.abs().max() > 0.05
    with museum.bug("padding counted"):
        reported, real, _ = next(museum.practise(model, [(tokens, labels)]))
    assert reported != pytest.approx(real, rel=1e-4)


def gate(scores, bias, k, chosen_by=1.0, weighed_by=0.0):
    experts = (scores + chosen_by * bias).topk(k, dim=-1).indices
    weights = (scores + weighed_by * bias).gather(-1, experts)
    return experts, weights / weights.sum(-1, keepdim=True)


def test_the_judge_of_gates():
    assert judge_gate(None) == "not answered yet"
    assert judge_gate(gate) == "right"
    assert "does not choose" in judge_gate(lambda s, b, k: gate(s, b, k, chosen_by=0))
    assert "bias weighs" in judge_gate(lambda s, b, k: gate(s, b, k, weighed_by=1))
    assert "over their sum" in judge_gate(lambda s, b, k: (gate(s, b, k)[0], torch.full((30, 2), 0.5)))


def in_order(order):
    def answer(experts, num_experts, capacity):
        ranks = routing.priority(order, torch.rand(experts.shape)[None])
        return routing.served(experts[None], num_experts, capacity, ranks)[0]

    return answer


def test_the_judge_of_drops():
    assert judge_drops(None) == "not answered yet"
    assert judge_drops(in_order("time order")) == "right"
    assert "last token decides" in judge_drops(in_order("k-major"))
    assert "more than its capacity" in judge_drops(lambda experts, E, capacity: experts >= 0)
    assert "turns a token away" in judge_drops(lambda experts, E, capacity: experts < 0)


def test_the_judge_of_updates():
    def judge(answer):
        return judge_update(answer, routing.balance_dynamics)

    assert judge(None) == "not answered yet"
    assert judge(moe.loss_free_update) == "right"
    assert "drifts" in judge(lambda b, c, u: b + u * torch.sign(c.mean() - c))
    assert "sign" in judge(lambda b, c, u: moe.loss_free_update(b, -c, u))
    assert "after 100 steps" in judge(lambda b, c, u: b)


def test_favourites_collapse_a_router_and_the_bias_wins_it_back():
    block, x = layer(num_experts=8, std=0.1, router_score="sigmoid", bias_update_speed=0.01), torch.randn(4, 64, 16)
    with museum.favourites(1.1):  # over any difference of two scores
        start = block(x)[1].counts
        assert start[:2].sum() == start.sum()
        for _ in range(150):  # to and fro by one step at the end: the smaller, the more even
            block.update_bias(block(x)[1].counts)
        counts = block(x)[1].counts
    assert counts.min() > 0.4 * counts.mean() and counts.max() < 1.6 * counts.mean()
