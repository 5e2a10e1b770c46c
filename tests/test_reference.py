"""The judges must say yes to what is right and name what is wrong; the oracles stand on numbers from paper."""

import pytest
import torch
from helpers import assert_close, seeded

from dsl import attention, ops, reference


def absorbed(q_nope, q_rope, latent, rope_key, w_uk, w_uv):
    scores = torch.einsum("bhk,hkc->bhc", q_nope, w_uk) @ latent.mT + q_rope @ rope_key.mT
    weights = (scores * (q_nope.shape[-1] + q_rope.shape[-1]) ** -0.5).softmax(-1)
    return torch.einsum("bhc,hvc->bhv", weights @ latent, w_uv)


RIGHT = {  # a correct answer to each exercise, by the fast code or by algebra
    "chunked": lambda q, k, v: ops.linear_attention(q, k, v)[0],
    "delta": lambda q, k, v, beta: ops.delta_rule(q, k, v, beta)[0],
    "absorbed": absorbed,
}


@pytest.mark.parametrize("name", reference.EXERCISES)
def test_the_judge_accepts_a_right_answer(name, capsys):
    seeded()
    reference.judge(name, RIGHT[name])
    assert "length  65: forward and every gradient" in capsys.readouterr().out


def shifted(q, k, v):  # each step sees one fewer: wrong from the first step
    return ops.linear_attention(q, torch.nn.functional.pad(k, (0, 0, 0, 0, 1, 0))[:, :-1], v)[0]


def drops_the_rest(q, k, v):  # right only at multiples of the chunk
    T = q.shape[1] - q.shape[1] % 64 if q.shape[1] > 64 else q.shape[1]
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=v.dtype)
    return torch.cat([ops.linear_attention(q[:, :T], k[:, :T], v[:, :T])[0], out[:, T:]], 1)


def stops_gradients(q, k, v):
    return ops.linear_attention(q, k.detach(), v)[0]


def sees_the_future(q, k, v):  # right at the lengths that are compared, wrong where only causality is asked
    out = ops.linear_attention(q, k, v)[0]
    return out + v[:, -1:, :1, :1] if q.shape[1] == 256 else out


def quadratic(q, k, v):
    return ops.linear_attention(q, k, v, form="parallel")[0]


@pytest.mark.parametrize(
    ("mine", "message"),
    [
        (shifted, "forward at length 1"),
        (drops_the_rest, "forward at length 65"),
        (stops_gradients, "gradient of k at length"),
        (sees_the_future, "causality"),
        (quadratic, "memory at length 256"),
        (lambda q, k, v: None, "forward at length 1"),
        (lambda q, k, v: q[..., :5] * torch.nan, "relative error inf"),
    ],
)
def test_the_judge_names_the_first_fault(mine, message):
    seeded()
    with pytest.raises(AssertionError, match=message):
        reference.judge("chunked", mine)


def test_the_judge_knows_its_exercises():
    with pytest.raises(ValueError, match="exercise must be one of chunked, delta, absorbed, got 'softmax'"):
        reference.judge("softmax", quadratic)


class Broken(attention.LinearMixer):
    """A linear mixer with one fault."""

    fault = ""

    def forward(self, x, state, positions, keep):
        if self.fault == "padding":
            keep = None
        if self.fault == "state" and state is not None:
            state.memory = state.memory * 0
        if self.fault == "length" and state is not None:
            return super().forward(x, state, positions, keep)[0], state
        y, state = super().forward(x, state, positions, keep)
        if self.fault == "future":
            y = y + x.mean()
        if self.fault == "length":
            state.length = 1
        return y if self.fault != "shape" else y[..., :3], state


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("padding", "left padding of 5"),
        ("state", "two parts"),
        ("future", "causality"),
        ("length", "state.length must be 70, got 1"),
        ("shape", "y must have the shape of x"),
    ],
)
def test_check_mixer_names_the_first_fault(fault, message):
    seeded()
    cls = type("Broken", (Broken,), {"fault": fault})
    with pytest.raises(AssertionError, match=f"Broken.*{message}"):
        reference.check_mixer(cls)


def test_check_mixer_compares_with_a_slow_twin():
    seeded()
    with pytest.raises(AssertionError, match="slow twin: relative error"):
        reference.check_mixer(attention.LinearMixer, lambda mixer, x: mixer.o_proj(x) * 1.001)


def test_relative_error_has_a_floor_and_knows_no_mercy():
    zero, one = torch.zeros(3), torch.ones(3)
    assert reference.relative_error(zero + 1e-9, zero) == pytest.approx(1e-7, rel=1e-3)  # the floor is 1e-2
    assert reference.relative_error(2 * one, one) == 1.0
    assert reference.relative_error(one * torch.nan, one) == float("inf")
    assert reference.relative_error(torch.ones(2), one) == float("inf")
    assert reference.relative_error(torch.ones(0), torch.ones(0)) == 0.0
    with pytest.raises(AssertionError, match=r"weight: relative error 1\.0e"):
        assert_close("weight", 2 * one, one)


def test_oracles_give_the_numbers_of_paper():
    """Two steps of width one: weights 1 and 1/e, softmax of 0 and 1; a delta step that halves."""
    f64 = lambda *values: torch.tensor(values, dtype=torch.float64).view(1, -1, 1, 1)  # noqa: E731
    out = reference.linear_attention(f64(1.0, 2.0), f64(1.0, 0.5), f64(1.0, 4.0))
    assert_close("linear", out.flatten(), torch.tensor([1.0, 2.0], dtype=torch.float64), 1e-6)
    out = reference.softmax_attention(f64(0.0, 1.0), f64(0.0, 1.0), f64(0.0, 1.0), 1.0)
    assert_close("softmax", out.flatten(), torch.tensor([0.0, 0.7310585786300049], dtype=torch.float64))
    out = reference.delta_rule(f64(1.0, 1.0), f64(1.0, 1.0), f64(4.0, 2.0), f64(1.0, 0.5)[..., 0])
    assert_close("delta", out.flatten(), torch.tensor([4.0, 3.0], dtype=torch.float64))
