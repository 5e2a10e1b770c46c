"""Every form of linear attention and the delta rule against the slow oracles, a hand-computed anchor and transformers.

Shape letters as in dsl.ops. Inputs are fresh and random; DSL_SEED repeats a failure.
"""

import pytest
import torch
from helpers import assert_close, gradients, seeded
from torch.nn import functional as F
from transformers.models.qwen3_next import modeling_qwen3_next as qwen

from dsl import ops, reference

LENGTHS = [1, 63, 64, 65, 150]
LINEAR_FORMS, DELTA_FORMS = ("parallel", "chunked", "recurrent"), ("chunked", "recurrent")


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


def draw(T, dtype=torch.float64, B=2, H=4, G=2, K=6, V=5):
    """Feature-mapped q and k, values, unit keys, write strengths and log decays, all leaves with gradients."""
    seeded()
    q, k, v, unit = (torch.randn(B, T, n, d) for n, d in ((H, K), (G, K), (G, V), (G, K)))
    beta, decay = torch.rand(B, T, G), -torch.rand(B, T, G) * 2
    tensors = {"q": F.elu(q) + 1, "k": F.elu(k) + 1, "v": v, "unit": F.normalize(unit, dim=-1)}
    return {n: x.to(dtype).requires_grad_() for n, x in (tensors | {"beta": beta, "log_decay": decay}).items()}


def compare(fast, slow, inputs, label, bound=None):
    weight = torch.randn_like(slow)
    assert_close(f"{label}: out", fast, slow, bound)
    want = gradients((slow * weight).sum(), inputs)
    for name, got in gradients((fast * weight).sum(), inputs).items():
        assert_close(f"{label}: {name}", got, want[name], bound)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("T", LENGTHS)
def test_every_form_of_linear_attention_equals_the_oracle(T, normalize):
    x = draw(T)
    inputs = {name: x[name] for name in "qkv"}
    slow = reference.linear_attention(**inputs, normalize=normalize)
    for form in LINEAR_FORMS:
        fast, _ = ops.linear_attention(**inputs, normalize=normalize, form=form, chunk_size=16)
        compare(fast, slow, inputs, form)
    compare(ops.linear_attention(**inputs, normalize=normalize)[0], slow, inputs, "as shipped")


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("T", LENGTHS)
def test_every_form_of_the_delta_rule_equals_the_oracle(T, gated):
    x = draw(T)
    inputs = {"q": x["q"], "k": x["unit"], "v": x["v"], "beta": x["beta"]}
    inputs |= {"log_decay": x["log_decay"]} if gated else {}
    slow = reference.delta_rule(**inputs)
    for form, chunk in (("chunked", 64), ("chunked", 16), ("recurrent", 64)):
        fast, _ = ops.delta_rule(**inputs, form=form, chunk_size=chunk)
        compare(fast, slow, inputs, f"{form} {chunk}", 1e-11)  # a solve: one digit more


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_stays_within_its_bound(dtype):
    """The slow oracle runs in fp64 on the same, already rounded, inputs; two chunks of 64 and a rest."""
    x = draw(150, dtype, B=1, H=4, G=2, K=64, V=64)
    wide = {name: value.detach().double().requires_grad_() for name, value in x.items()}
    linear = {"q": "q", "k": "k", "v": "v"}
    delta = {"q": "q", "k": "unit", "v": "v", "beta": "beta", "log_decay": "log_decay"}
    for op, oracle, names, forms, hows in (
        (ops.linear_attention, reference.linear_attention, linear, LINEAR_FORMS, ({}, {"normalize": False})),
        (ops.delta_rule, reference.delta_rule, delta, DELTA_FORMS, ({},)),
    ):
        inputs, slow_inputs = ({name: t[of] for name, of in names.items()} for t in (x, wide))
        for how in hows:
            slow = oracle(**slow_inputs, **how)
            weight = torch.randn_like(slow)
            want = gradients((slow * weight).sum(), slow_inputs)
            for form in forms:
                fast, state = op(**inputs, **how, form=form)
                assert fast.dtype == dtype and state.dtype == torch.float32
                assert_close(f"{op.__name__} {form} {how}", fast, slow)
                for name, got in gradients((fast * weight).sum(), inputs).items():
                    assert_close(f"{op.__name__} {form} {how}: {name}", got, want[name])


@pytest.mark.parametrize("cut", [0, 1, 63, 64, 65, 129, 130])
def test_a_split_that_carries_the_state_changes_nothing(cut):
    x = draw(130)
    linear = {name: x[name] for name in "qkv"}
    delta = {"q": x["q"], "k": x["unit"], "v": x["v"], "beta": x["beta"], "log_decay": x["log_decay"]}
    for op, inputs, forms in (
        (ops.linear_attention, linear, LINEAR_FORMS),
        (ops.delta_rule, delta, ("chunked", "recurrent")),
    ):
        whole, end = op(**inputs, form="recurrent")
        for form in forms:
            first, state = op(**{n: t[:, :cut] for n, t in inputs.items()}, form=form)
            second, state = op(**{n: t[:, cut:] for n, t in inputs.items()}, form=form, state=state)
            compare(torch.cat([first, second], 1), whole, inputs, f"{op.__name__} {form} split", 1e-11)
            assert_close(f"{op.__name__} {form} state", state, end, 1e-11)


def test_anchor_computed_by_hand():
    """All forms share their feature map: numbers from paper guard it. phi(0), phi(1), phi(-1) = 1, 2, 1/e."""
    q, k, v = (f64(x)[None, :, None, None] for x in ([0.0, 1.0], [0.0, -1.0], [1.0, 3.0]))
    want = f64([1.0, (1 + 3 / torch.e) / (1 + 1 / torch.e)])
    for form in LINEAR_FORMS:
        out, state = ops.linear_attention(ops.elu_feature_map(q), ops.elu_feature_map(k), v, form=form)
        assert_close(form, out.flatten(), want, 1e-6)  # the normaliser's eps
        assert_close(f"{form} state", state.flatten(), f64([1 + 3 / torch.e, 1 + 1 / torch.e]), 1e-7)
    q, k = (f64(x)[None, :, None] for x in ([[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [0.6, 0.8]]))
    v, beta = f64([2.0, 5.0])[None, :, None, None], f64([1.0, 0.5])[None, :, None]
    decay = f64([0.0, -0.6931471805599453])[None, :, None]
    for form in DELTA_FORMS:  # read 2 * 0.6 = 1.2; write 0.5 * (5 - 1.2) * k = (1.14, 1.52)
        out = ops.delta_rule(q, k, v, beta, form=form)[0]
        assert_close(form, out.flatten(), f64([2.0, 3.14]), 1e-12)
        out = ops.delta_rule(q, k, v, beta, log_decay=decay, form=form)[0]  # halved: read 0.6, 1 + 0.5 * 4.4 * 0.6
        assert_close(f"gated {form}", out.flatten(), f64([2.0, 2.32]), 1e-12)


def test_feature_maps_and_rotary_equal_their_formulas():
    seeded()
    x, y = torch.randn(2, 7, 3, 8, dtype=torch.float64), torch.randn(2, 7, 3, 8, dtype=torch.float64)
    assert_close("elu", ops.elu_feature_map(x), reference.elu_feature_map(x))
    for nu in (1, 2, 3):
        got, want = ops.dpfp_feature_map(x, nu), reference.dpfp_feature_map(x, nu)
        assert got.shape[-1] == 2 * 8 * nu
        # a roll to the other side is the same set of products: compare sums over keys, which is what attention sees
        assert_close(
            f"dpfp {nu}",
            (got * ops.dpfp_feature_map(y, nu)).sum(-1),
            (want * reference.dpfp_feature_map(y, nu)).sum(-1),
        )
    features = (ops.taylor_feature_map(x) * ops.taylor_feature_map(y)).sum(-1)
    assert_close("taylor", features, reference.taylor_kernel(x, y))
    assert features.min() >= 0.5
    positions = torch.randint(5000, (2, 7))
    assert_close("rotary", ops.rotary(x, positions, 1e4), reference.rotary(x, positions, 1e4), 1e-10)


def test_the_short_convolution_is_causal_and_carries_its_window():
    seeded()
    x, weight = torch.randn(2, 9, 3, dtype=torch.float64), torch.randn(3, 1, 4, dtype=torch.float64)
    want = torch.zeros_like(x)
    for t in range(9):
        for back in range(min(t, 3) + 1):
            want[:, t] += weight[:, 0, 3 - back] * x[:, t - back]
    whole, _ = ops.short_convolution(x, weight)
    assert_close("whole", whole, want)
    window, parts = None, []
    for part in x.split([1, 2, 5, 1], 1):
        y, window = ops.short_convolution(part, weight, window)
        parts.append(y)
    assert_close("in parts", torch.cat(parts, 1), want)


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("T", [1, 65, 200])
def test_gated_delta_rule_equals_transformers(T, started):
    """Code that nobody here wrote: Qwen3-Next's functions take queries unscaled and scale them by K^-0.5."""
    x = {name: value.detach() for name, value in draw(T, torch.float32, H=2, K=16, V=12).items()}
    inputs = {"q": F.normalize(x["q"] - 1, dim=-1), "k": x["unit"], "v": x["v"], "beta": x["beta"]}
    inputs |= {"log_decay": x["log_decay"]} | ({"state": torch.randn(2, 2, 16, 12)} if started else {})
    inputs = {name: value.requires_grad_() for name, value in inputs.items()}
    q, k, v, beta, decay = (inputs[name] for name in ("q", "k", "v", "beta", "log_decay"))
    more = {"g": decay, "beta": beta, "initial_state": inputs.get("state"), "output_final_state": True}
    weights = torch.randn(2, T, 2, 12), torch.randn(2, 2, 16, 12)
    slopes = lambda got: gradients(sum((a * w).sum() for a, w in zip(got, weights, strict=True)), inputs)  # noqa: E731
    mine = {form: ops.delta_rule(**inputs | {"q": q * 16**-0.5}, form=form) for form in DELTA_FORMS}
    mine = {form: (*got, slopes(got)) for form, got in mine.items()}
    for theirs in (qwen.torch_recurrent_gated_delta_rule, qwen.torch_chunk_gated_delta_rule):
        out, state = theirs(q, k, v, **more)
        want = slopes((out, state))
        for form, (y, S, got) in mine.items():
            label = f"{form}, {theirs.__name__}"
            assert_close(label, y, out)
            assert_close(f"{label}, state", S, state)
            for name, slope in got.items():
                assert_close(f"{label}, {name}", slope, want[name], 5e-5)  # theirs sum decays up to -200 in fp32


def test_extreme_inputs_stay_finite():
    low = torch.full((1, 70, 2, 8), -20.0)
    phi = ops.elu_feature_map(low)
    for form in LINEAR_FORMS:  # elu(-20) + 1 is 0 in fp32: a plain division would be 0 / 0
        assert ops.linear_attention(phi, phi, low, form=form)[0].isfinite().all()
    x = {name: value.detach() for name, value in draw(4096, torch.float16, B=1, K=64, V=64).items()}
    for form in ("parallel", "chunked"):  # q.z reaches 4e5, over fp16's 65504
        out, _ = ops.linear_attention(x["q"] + 1, x["k"] + 1, x["v"], form=form)
        assert out.dtype == torch.float16 and out.isfinite().all()
    out, _ = ops.delta_rule(x["q"], x["unit"], x["v"], x["beta"], log_decay=x["log_decay"] * 50)
    assert out.isfinite().all()


def test_sums_run_in_fp32_under_autocast():
    x = draw(64, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        out, state = ops.linear_attention(x["q"], x["k"], x["v"])
    assert out.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert_close("state", state, ops.linear_attention(x["q"], x["k"], x["v"])[1], 1e-6)


def test_no_time_steps_give_an_empty_result_and_keep_the_state():
    x = draw(3)
    none = {name: value[:, :0] for name, value in x.items()}
    for form in LINEAR_FORMS:
        _, state = ops.linear_attention(x["q"], x["k"], x["v"], form=form)
        out, after = ops.linear_attention(none["q"], none["k"], none["v"], form=form, state=state)
        assert out.shape == (2, 0, 4, 5) and torch.equal(after, state)
    out, after = ops.delta_rule(none["q"], none["unit"], none["v"], none["beta"], log_decay=none["log_decay"])
    assert out.shape == (2, 0, 4, 5) and not after.any()
    assert ops.linear_attention(x["q"][:0], x["k"][:0], x["v"][:0])[0].shape == (0, 3, 4, 5)


FORGETS = {
    "all, every eighth step": ([-torch.inf, *[-0.5] * 7], 70),
    "much, then little: the difference of their sums would lose the little": ([-60.0] * 40 + [-0.02] * 24, 64),
    "more than fp32 can sum": ([-0.02, -1e4, -0.5, -1e30, -0.1, -torch.inf, -3e38, -3e38, -0.3], 150),
}


@pytest.mark.parametrize(("decays", "T"), FORGETS.values(), ids=FORGETS)
def test_steps_may_forget_anything_and_strengths_have_any_dtype(decays, T):
    x = {name: value.detach() for name, value in draw(T, torch.float32).items()}
    x["log_decay"][:] = torch.tensor(decays * T)[:T, None]
    inputs = {"q": F.normalize(x["q"], dim=-1), "k": x["unit"], "v": x["v"]}
    inputs = {n: t.requires_grad_() for n, t in (inputs | {"beta": x["beta"], "log_decay": x["log_decay"]}).items()}
    wide = {name: value.detach().double().requires_grad_() for name, value in inputs.items()}
    slow = reference.delta_rule(**wide)
    weight = torch.randn_like(slow)
    want = gradients((slow * weight).sum(), wide)
    for form in DELTA_FORMS:
        fast, state = ops.delta_rule(**inputs | {"beta": inputs["beta"].double()}, form=form)
        assert fast.dtype == torch.float32 and state.isfinite().all()
        assert_close(form, fast, slow, 1e-6)
        for name, got in gradients((fast * weight).sum(), inputs).items():
            assert_close(f"{form}: {name}", got, want[name], 2e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"form": "fast"}, "form must be one of parallel, chunked, recurrent, got 'fast'"),
        ({"chunk_size": 0}, "chunk_size must be positive, got 0"),
        ({"q": torch.ones(2, 3, 3, 6).double()}, "heads of k must divide the 3 heads of q, got 2"),
        ({"k": torch.ones(2, 3, 2, 7).double()}, r"k must share batch, time and width with q \(2, 3, 4, 6\)"),
        ({"v": torch.ones(2, 4, 2, 5).double()}, "v must share batch, time and heads with k"),
        ({"v": torch.ones(2, 3, 10).double()}, r"v must have shape \[batch, time, heads, width\], got \(2, 3, 10\)"),
        ({"v": torch.ones(2, 3, 2, 5)}, "v must be floating and like q"),
        ({"q": torch.ones(2, 3, 4, 6).long()}, "q must be floating"),
        ({"state": torch.ones(2, 2, 6, 5).double()}, r"state must have shape .* = \(2, 2, 6, 6\), got \(2, 2, 6, 5\)"),
        ({"state": torch.ones(2, 2, 6, 6)}, "state must have dtype torch.float64 on cpu, got torch.float32 on cpu"),
        ({"state": torch.ones(2, 2, 6, 6, device="meta").double()}, "state must have dtype .* on cpu, got .* on meta"),
    ],
)
def test_bad_input_names_field_rule_and_value(change, message):
    x = draw(3)
    with pytest.raises(ValueError, match=message):
        ops.linear_attention(**({name: x[name] for name in "qkv"} | change))


@pytest.mark.parametrize("name", ["beta", "log_decay"])
def test_bad_strengths_name_field_rule_and_value(name):
    x = draw(3)
    inputs = {"q": x["q"], "k": x["unit"], "v": x["v"], "beta": x["beta"]} | {name: torch.ones(2, 3, 4).double()}
    with pytest.raises(ValueError, match=rf"{name} must have shape \[B, T, G\] = \(2, 3, 2\), got \(2, 3, 4\)"):
        ops.delta_rule(**inputs)
