"""The recall experiments: their shortcuts equal the plain code, the law holds, small runs learn, tables survive."""

import math

import pytest
import torch
from helpers import assert_close, seeded

from dsl import ops, recall


@pytest.fixture(autouse=True)
def _seed():
    seeded()


def test_reading_once_equals_the_last_row_of_the_plain_forms():
    """A query at the end, with a key of zero so that it writes nothing."""
    q, k, v = torch.rand(3, 1, 8).double(), torch.rand(3, 11, 8).double(), torch.randn(3, 11, 5).double()
    beta = torch.rand(3, 11, 1).double()
    end = lambda x: torch.cat([x, torch.zeros_like(x[:, :1])], 1)[:, :, None]  # noqa: E731
    asked = torch.cat([torch.zeros_like(k), q], 1)[:, :, None]
    sums, _ = ops.linear_attention(asked, end(k), end(v))
    assert_close("sum rule", recall.read(q, k, v), sums[:, -1:, 0], 1e-9)
    unit = k / (k.sum(-1, keepdim=True) + ops.EPS)
    asked = asked / (q.sum(-1)[..., None, None] + ops.EPS)
    delta, _ = ops.delta_rule(asked, end(unit), end(v), end(beta)[..., 0])
    assert_close("delta rule", recall.read(q, k, v, beta), delta[:, -1:, 0], 1e-9)


@pytest.mark.parametrize(("memory", "rule"), [("softmax", "sum"), ("elu", "sum"), ("dpfp2", "delta")])
def test_the_lookup_equals_a_layer_on_one_hot_and_embedding(memory, rule):
    model = recall.Memory(6, memory, rule).double()
    k, v = torch.randint(6, (2, 9)), torch.randint(6, (2, 9))
    plain = torch.cat([torch.nn.functional.one_hot(v, 6).double(), model.embed(k)], -1)
    for layer in (model.key, model.beta):
        assert_close("layer", model._of_pair(layer, k, v), layer(plain), 1e-12)
    assert model(k, v, k[:, :4]).shape == (2, 4, 6)


def test_the_interference_law_holds_and_the_delta_rule_does_better():
    for keys in (32, 64, 128):
        law = (keys - 1) / 64
        measured = recall.interference(keys, 64, seed=torch.randint(2**31, ()).item())
        assert abs(measured / law - 1) < recall.LAW_TOLERANCE
        assert recall.interference(keys, 64, rule="delta") < 0.7 * measured
    assert recall.interference(32, 64, phi=ops.elu_feature_map) > 10 * 31 / 64  # positive features: keys look alike


@pytest.mark.parametrize("rule", ["sum", "delta"])
def test_interference_equals_its_rule_step_by_step(rule):
    generator = torch.Generator().manual_seed(3)
    k, v = (torch.nn.functional.normalize(torch.randn(4, 9, 6, generator=generator), dim=-1) for _ in range(2))
    state = torch.zeros(4, 6, 6)
    for key, value in zip(k.unbind(1), v.unbind(1), strict=True):
        old = (key[:, None] @ state)[:, 0] if rule == "delta" else 0
        state = state + key[:, :, None] * (value - old)[:, None]
    want = (k @ state - v).square().sum(-1).mean()
    assert recall.interference(9, 6, rule=rule, draws=4, seed=3) == pytest.approx(want.item(), rel=1e-4)


@pytest.mark.parametrize("rule", ["sum", "delta"])
def test_no_memory_reads_below_the_law_of_rank(rule):
    """The identity cut off at the width reaches it; random memories of either rule stay above."""
    for keys, width in ((12, 5), (9, 6)):
        law = recall.rank_law(keys, width)
        best = torch.diag((torch.arange(keys) < width).double())
        assert recall._loss(best[None], torch.arange(keys)[None]).item() == pytest.approx(law)
        q, k = torch.rand(2, 4, keys, width).double()
        beta = torch.rand(4, keys, 1).double() if rule == "delta" else None
        values = torch.stack([torch.randperm(keys) for _ in range(4)])
        read = recall.read(q, k, torch.nn.functional.one_hot(values, keys).double(), beta)
        assert all(recall._loss(*pair).item() >= law for pair in zip(read, values, strict=True))
    assert recall.rank_law(6, 6) == recall.rank_law(6, math.inf) == 0


def test_capacity_is_the_width_of_the_features():
    assert [recall.capacity(m) for m in ("elu", "dpfp1", "dpfp3", "softmax")] == [64, 128, 384, math.inf]
    for bad in ("relu", "dpfp", "dpfp0", "dpfpx"):
        with pytest.raises(ValueError, match=f"memory must be softmax, elu, dpfp1, dpfp2, ..., got '{bad}'"):
            recall.feature_map(bad)


@pytest.mark.slow
def test_a_small_memory_learns_its_keys_and_a_sum_cannot_overwrite():
    assert recall.retrieval(8, "elu", seed=5)["loss"] < 2e-3
    overwritten = {
        rule: recall.retrieval(8, "dpfp1", rule, setting=2, seed=5, max_steps=1000) for rule in ("sum", "delta")
    }
    assert overwritten["delta"]["loss"] < 0.01 < 0.05 < overwritten["sum"]["loss"]


def test_training_leaves_the_callers_random_numbers_alone():
    torch.manual_seed(1)
    want = torch.rand(3)
    torch.manual_seed(1)
    recall.retrieval(8, "elu", max_steps=2)
    recall.mqar_curve("elu", 4, lr=1e-3, steps=8, hidden_size=16)
    assert torch.equal(torch.rand(3), want)


@pytest.mark.parametrize("kind", recall.MQAR)
def test_every_kind_trains_on_mqar(kind):
    curve = recall.mqar_curve(kind, 4, lr=3e-3, steps=8, length=32)
    assert list(curve) == [f"step {n}" for n in range(1, 9)]
    assert all(0 <= accuracy <= 1 for accuracy in curve.values())


def test_accuracy_is_measured_at_every_eighth_of_the_steps_and_at_the_last():
    for steps, at in ((3, [1, 2, 3]), (17, [*range(2, 17, 2), 17])):
        curve = recall.mqar_curve("elu", 2, lr=1e-3, steps=steps, length=16, hidden_size=16)
        assert list(curve) == [f"step {n}" for n in at]


def test_a_sweep_goes_on_where_it_stopped(tmp_path):
    calls = []

    def measure(keys, memory):
        calls.append(keys)
        return {"loss": keys / 3}

    runs = [{"keys": n, "memory": "elu"} for n in (3, 5, 7)]
    path = tmp_path / "new" / "table.csv"
    recall.sweep(path, runs[:2], measure)
    rows = recall.sweep(path, runs, measure)
    assert calls == [3, 5, 7]
    assert [row["keys"] for row in rows] == [3, 5, 7] and rows[0]["loss"] == 1.0
    assert recall.sweep(path, runs[1:2], measure) == [{"keys": 5, "memory": "elu", "loss": pytest.approx(5 / 3)}]


def test_break_points_hold_for_every_seed_and_distances_come_from_their_means():
    base = {"setting": 1, "memory": "elu", "rule": "sum"}
    losses = ((40, 0.0), (60, 0.01), (60, 0.03), (70, 0.0), (80, 0.03), (80, 0.05))
    rows = [base | {"keys": n, "loss": x} for n, x in losses]
    assert recall.break_point(rows, "elu") == (40, 80), "70, which one seed held, lies between"
    assert all(map(math.isnan, recall.break_point(rows, "dpfp1")))
    published = [base | {"keys": 60, "loss": 0.05}, base | {"keys": 200, "loss": 0.9}]
    assert recall.distances(rows, published) == {(1, "elu", "sum", 60): pytest.approx(0.03)}
