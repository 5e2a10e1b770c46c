"""The mixers against the slow oracles and transformers' layers, weight for weight; states, caches, bad input."""

import dataclasses

import pytest
import torch
from helpers import assert_close, gradients, seeded
from torch.nn import functional as F
from transformers import DeepseekV3Config, MixtralConfig
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek
from transformers.models.mixtral import modeling_mixtral as mixtral

from dsl import attention, ops, reference
from dsl.config import ModelConfig
from dsl.model import LanguageModel

SMALL = ModelConfig(hidden_size=48, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1, moe_layers=())
MIXERS = {
    "elu": (attention.LinearMixer, {}),
    "unnormalised": (attention.LinearMixer, {"normalize": False}),
    "dpfp": (attention.LinearMixer, {"feature_map": "dpfp"}),
    "taylor, no convolution": (attention.LinearMixer, {"feature_map": "taylor", "linear_conv_kernel_dim": 0}),
    "delta": (attention.DeltaMixer, {}),
    "softmax": (attention.SoftmaxMixer, {}),
    "softmax, one kv head, no norm": (attention.SoftmaxMixer, {"num_key_value_heads": 1, "qk_norm": False}),
    "softmax, full heads": (attention.SoftmaxMixer, {"num_key_value_heads": 4}),
    "latent": (attention.LatentMixer, {"kv_lora_rank": 20}),
    "latent, query rank": (attention.LatentMixer, {"q_lora_rank": 20, "v_head_dim": 10, "qk_nope_head_dim": 6}),
}


@pytest.mark.parametrize("name", MIXERS)
def test_every_mixer_keeps_the_contract(name):
    """Causal, cached in one and in two parts, left-padded, its rows selected, every parameter learning."""
    seeded()
    cls, sizes = MIXERS[name]
    assert max(reference.check_mixer(cls, **sizes).values()) < 1e-11


def oracle(mixer, c, x):
    """A mixer from the formulas: everything between the projections is done by dsl.reference."""
    H, G, T = c.num_attention_heads, c.num_key_value_heads, x.shape[1]
    if isinstance(mixer, attention.SoftmaxMixer):
        q, k, v = (p(x).unflatten(-1, (-1, c.head_dim)) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
        positions = torch.arange(T).expand(len(x), -1)
        q, k = (reference.rotary(t, positions, c.rope_theta) for t in (mixer.q_norm(q), mixer.k_norm(k)))
        return mixer.o_proj(reference.softmax_attention(q, k, v, c.head_dim**-0.5).flatten(2))
    qkv, wide = mixer.qkv_proj(x), F.pad(mixer.qkv_proj(x), (0, 0, 3, 0))
    qkv = sum(wide[:, i : i + T] * mixer.conv.weight[:, 0, i] for i in range(4))
    q, k, v = qkv.unflatten(-1, (H + 2 * G, -1)).split([H, G, G], 2)
    if isinstance(mixer, attention.LinearMixer):
        y = reference.linear_attention(reference.elu_feature_map(q), reference.elu_feature_map(k), v)
    else:
        q, k, v = (t * t.sigmoid() for t in (q, k, v))
        q, k = (t / t.norm(dim=-1, keepdim=True) for t in (q, k))
        beta, a = mixer.ba_proj(x).chunk(2, -1)
        decay = -mixer.A_log.exp() * (1 + (a + mixer.dt_bias).exp()).log()
        y = reference.delta_rule(q / c.head_dim**0.5, k, v, beta.sigmoid(), decay)
        y = y * (y.square().mean(-1, keepdim=True) + c.rms_norm_eps).rsqrt() * mixer.norm.weight
        y = y * mixer.g_proj(x).unflatten(-1, (H, -1)).sigmoid()
    return mixer.o_proj(y.flatten(2))


@pytest.mark.parametrize("T", [1, 65])
@pytest.mark.parametrize("cls", [attention.LinearMixer, attention.DeltaMixer, attention.SoftmaxMixer])
def test_mixers_equal_the_formulas(cls, T):
    seeded()
    mixer = cls(SMALL).double()
    x = torch.randn(2, T, 48, dtype=torch.float64, requires_grad=True)
    inputs = {"x": x} | dict(mixer.named_parameters())
    got, want = mixer(x, None, torch.arange(T).expand(2, -1), None)[0], oracle(mixer, SMALL, x)
    weight = torch.randn_like(got)
    assert_close("y", got, want, 1e-11)
    slow = gradients((want * weight).sum(), inputs)
    for name, value in gradients((got * weight).sum(), inputs).items():
        assert_close(name, value, slow[name], 1e-9, floor=1e-3)


@pytest.mark.parametrize("T", [1, 63, 64, 65, 200])
def test_softmax_equals_the_formula_and_torch(T):
    """What the softmax and the latent mixer call, as a whole and for its last steps, and torch's own call."""
    seeded()
    inputs = {n: torch.randn(2, T, heads, 12).double().requires_grad_() for n, heads in (("q", 4), ("k", 2), ("v", 2))}
    q, k, v = inputs.values()
    slow, weight = reference.softmax_attention(q, k, v, 12**-0.5), torch.randn(2, T, 4, 12)
    torchs = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True, enable_gqa=True)
    want, last = gradients((slow * weight).sum(), inputs), -(-T // 3)
    real = torch.ones(2, T, dtype=torch.bool)
    for label, got in {
        "torch": torchs.transpose(1, 2),
        "ours": attention._softmax(q, k, v, None, 12**-0.5),
        "ours, masked": attention._softmax(q, k, v, real, 12**-0.5),
    }.items():
        assert_close(label, got, slow, 1e-11)
        for name, slope in gradients((got * weight).sum(), inputs).items():
            assert_close(f"{label}, {name}", slope, want[name], 1e-11)
    assert_close("the last steps", attention._softmax(q[:, -last:], k, v, None, 12**-0.5), slow[:, -last:], 1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("S", [1, 63, 64, 65, 200])
@pytest.mark.parametrize("q_rank", [None, 20])
def test_absorbed_latent_attention_equals_materialised(q_rank, S, dtype):
    """Forward, every gradient and with padding, in three new tokens on top of S."""
    seeded()
    c = dataclasses.replace(SMALL, kv_lora_rank=16, q_lora_rank=q_rank)
    mixer = attention.LatentMixer(c).to(dtype)
    past, new = torch.randn(2, S, 48, dtype=dtype), torch.randn(2, 3, 48, dtype=dtype)
    keep, steps = torch.arange(S) >= torch.tensor([[0], [S // 7]]), torch.arange(S + 3).expand(2, -1)
    outs, slopes = [], []
    for up_to in (3, 0):
        mixer.absorb_up_to = up_to
        _, state = mixer(past, None, steps[:, :S], keep)
        outs.append(mixer(new, state, steps[:, S:], None)[0])
        slopes.append(gradients(outs[-1].square().sum(), dict(mixer.named_parameters())))
    bound = 1e-11 if dtype == torch.float64 else 1e-5
    assert_close("y", *outs, bound)
    for name in slopes[0]:
        assert_close(name, slopes[0][name], slopes[1][name], bound)


def half_split(rows):
    """Rotary pairs (x0, x1), (x2, x3) of DeepSeek's weights in the order of ours: first all even, then all odd."""
    return torch.cat([rows[..., 0::2, :], rows[..., 1::2, :]], -2)


@pytest.mark.parametrize("q_rank", [None, 24])
def test_latent_equals_transformers_deepseek_v3(q_rank):
    seeded()
    sizes = {"hidden_size": 48, "num_attention_heads": 4, "kv_lora_rank": 16, "q_lora_rank": q_rank, "v_head_dim": 10}
    sizes |= {"qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "rms_norm_eps": 1e-6}
    theirs_config = DeepseekV3Config(**sizes, num_key_value_heads=4, rope_interleave=True, num_hidden_layers=1)
    theirs_config._attn_implementation = "sdpa"
    theirs = deepseek.DeepseekV3Attention(theirs_config, 0)
    weights = {name: torch.randn_like(w) * 0.2 for name, w in theirs.state_dict().items()}
    theirs.load_state_dict(weights)
    ours = attention.LatentMixer(dataclasses.replace(SMALL, **sizes, rope_theta=1e4))
    ours.load_state_dict(weights)
    with torch.no_grad():
        q = (ours.q_b_proj if q_rank else ours.q_proj).weight
        heads = q.view(4, 20, -1)
        q.copy_(torch.cat([heads[:, :12], half_split(heads[:, 12:])], 1).flatten(0, 1))
        down = ours.kv_a_proj_with_mqa.weight
        down.copy_(torch.cat([down[:16], half_split(down[16:])]))
        x, steps = torch.randn(2, 70, 48), torch.arange(70).expand(2, -1)
        angles = deepseek.DeepseekV3RotaryEmbedding(theirs_config)(x, steps)
        want, _ = theirs(x, position_embeddings=angles, attention_mask=None)
        got, _ = ours(x, None, steps, None)
        _, state = ours(x[:, :69], None, steps[:, :69], None)
        decoded, _ = ours(x[:, 69:], state, steps[:, 69:], None)
    assert_close("materialised", got, want)
    assert_close("absorbed", decoded, want[:, 69:])


def test_softmax_equals_transformers_mixtral():
    seeded()
    sizes = {"hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 12}
    theirs_config = MixtralConfig(**sizes, num_hidden_layers=1, sliding_window=None, rope_theta=1e4)
    theirs_config._attn_implementation = "sdpa"
    theirs = mixtral.MixtralAttention(theirs_config, 0)
    ours = attention.SoftmaxMixer(dataclasses.replace(SMALL, qk_norm=False, rope_theta=1e4))
    ours.load_state_dict(theirs.state_dict())
    x, steps = torch.randn(2, 70, 48), torch.arange(70).expand(2, -1)
    with torch.no_grad():
        angles = mixtral.MixtralRotaryEmbedding(theirs_config)(x, steps)
        want, _ = theirs(x, position_embeddings=angles, attention_mask=None)
        got, _ = ours(x, None, steps, None)
    assert_close("y", got, want)


def test_a_hybrid_of_delta_and_latent_decodes_what_it_trained():
    """Three delta layers to one latent layer, as Kimi Linear: one call for training, prefill and decoding."""
    seeded()
    hybrid = dataclasses.replace(
        SMALL,
        vocab_size=61,
        num_hidden_layers=4,
        layer_types=("linear_attention",) * 3 + ("full_attention",),
        linear_attention_kind="delta",
        full_attention_kind="latent",
    )
    model, tokens = LanguageModel(hybrid).double(), torch.randint(61, (2, 40))
    whole, _, _ = model(tokens)
    hidden, state, _ = model(tokens[:, :30])
    parts = [hidden]
    for t in range(30, 40):
        hidden, state, _ = model(tokens[:, t : t + 1], state)
        parts.append(hidden)
    assert_close("hidden", torch.cat(parts, 1), whole, 1e-9)
    sizes = [s.num_bytes for s in state]
    _, state, _ = model(tokens[:, :1], state)
    assert [s.num_bytes - before for s, before in zip(state, sizes, strict=True)] == [0, 0, 0, 2 * 8 * (64 + 6)]


def test_states_grow_as_the_papers_say():
    """Numbers per token: grouped softmax 2 G K, latent C + R; linear and delta nothing at all."""
    seeded()
    x, steps = torch.randn(1, 9, 48), torch.arange(9)[None]
    grown = {}
    for name, (cls, sizes) in MIXERS.items():
        mixer = cls(dataclasses.replace(SMALL, **sizes))
        with torch.no_grad():
            grown[name] = (
                mixer(x, None, steps, None)[1].num_bytes - mixer(x[:, :8], None, steps[:, :8], None)[1].num_bytes
            ) / 4
    flat = {name: 0 for name in MIXERS if "softmax" not in name and "latent" not in name}
    softmax = {"softmax": 48, "softmax, one kv head, no norm": 24, "softmax, full heads": 96}
    assert grown == flat | softmax | {"latent": 20 + 6, "latent, query rank": 64 + 6}


def test_a_query_on_top_of_a_state_sees_every_key():
    """`is_causal` aligns top left: one query over five keys would read the first value only."""
    q, k, v = torch.zeros(1, 1, 1, 2), torch.zeros(1, 5, 1, 2), torch.arange(5.0).view(1, 5, 1, 1)
    assert attention._softmax(q, k, v, None, 1.0).item() == 2.0
    two = attention._softmax(q.expand(1, 2, 1, 2), k, v, None, 1.0).flatten()
    assert two.tolist() == [1.5, 2.0]


SMALL_MIXERS = ["elu", "delta", "softmax", "latent"]
FAULTS = {  # of one tensor of a state, and the words that must name it
    "batch": (lambda t: t[:1], r"shape \[B, .*\] = \(2, .*\), got \(1, .*\)"),
    "width": (lambda t: t[..., 1:], r"shape \[B, .*\] = \(2, .*\), got \(2, .*\)"),
    "dtype": (lambda t: t.double(), "dtype torch.float32 on cpu, got torch.float64 on cpu"),
    "device": (lambda t: t.to("meta"), "dtype torch.float32 on cpu, got torch.float32 on meta"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", SMALL_MIXERS)
def test_a_state_that_does_not_fit_is_refused(name, fault):
    (cls, sizes), (spoil, message) = MIXERS[name], FAULTS[fault]
    mixer, steps = cls(dataclasses.replace(SMALL, **sizes)), torch.arange(5).expand(2, -1)
    _, state = mixer(torch.randn(2, 4, 48), None, steps[:, :4], None)
    for part, value in state.tensors().items():
        with pytest.raises(ValueError, match=f"^state must have .*{message}$"):
            mixer(torch.randn(2, 1, 48), dataclasses.replace(state, **{part: spoil(value)}), steps[:, 4:], None)


@pytest.mark.parametrize("name", SMALL_MIXERS)
def test_a_state_of_another_kind_is_refused(name):
    cls, sizes = MIXERS[name]
    with pytest.raises(ValueError, match=r"state must be a \w+State, got State"):
        cls(dataclasses.replace(SMALL, **sizes))(torch.randn(2, 1, 48), attention.State(4), torch.ones(2, 1), None)


@pytest.mark.parametrize("shape", [(2, 3), (1, 4), (4,), (2, 4, 1)])
@pytest.mark.parametrize("name", SMALL_MIXERS)
def test_a_mask_of_another_shape_is_refused(name, shape):
    cls, sizes = MIXERS[name]
    mixer, keep = cls(dataclasses.replace(SMALL, **sizes)), torch.ones(shape, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"keep must have shape \[B, T\] = \(2, 4\) on cpu, got \("):
        mixer(torch.randn(2, 4, 48), None, torch.arange(4).expand(2, -1), keep)


@pytest.mark.parametrize("name", MIXERS)
def test_padding_changes_nothing_and_a_gap_nothing_or_is_refused(name):
    """Padding before and after the real tokens, then also between them, which a short convolution cannot skip."""
    seeded()
    cls, sizes = MIXERS[name]
    mixer, x = cls(dataclasses.replace(SMALL, **sizes)).double(), torch.randn(2, 40, 48).double()
    keep = torch.tensor([[t >= 0 for t in range(40)], [5 <= t < 31 for t in range(40)]])
    for gap in (False, True):
        keep[1, 12:20] &= not gap
        positions, real = (keep.cumsum(1) - 1).clamp(min=0), keep[1]
        if gap and getattr(mixer, "conv", None) is not None:
            with pytest.raises(ValueError, match=r"keep must mark one unbroken stretch .* got a gap in rows \[1\]"):
                mixer(x, None, positions, keep)
            return
        alone = mixer(x[1:, real], None, positions[1:, real], None)[0]
        assert_close(f"gap: {gap}", mixer(x, None, positions, keep)[0][1:, real], alone, 1e-11)


def test_no_time_steps_give_an_empty_result():
    for cls, sizes in MIXERS.values():
        mixer = cls(dataclasses.replace(SMALL, **sizes))
        y, state = mixer(torch.empty(2, 0, 48), None, torch.empty(2, 0, dtype=torch.int64), None)
        assert y.shape == (2, 0, 48) and state.length == 0


def test_strongly_negative_activations_stay_finite():
    for cls, sizes in MIXERS.values():
        mixer = cls(dataclasses.replace(SMALL, **sizes))
        y, _ = mixer(torch.full((1, 70, 48), -1e4), None, torch.arange(70)[None], None)
        assert y.isfinite().all(), cls


@pytest.mark.parametrize("name", [name for name, (cls, _) in MIXERS.items() if cls is attention.LinearMixer])
def test_features_and_sums_of_16_bit_activations_stay_finite(name):
    mixer = attention.LinearMixer(dataclasses.replace(SMALL, **MIXERS[name][1]))
    with torch.autocast("cpu", torch.float16):
        y, _ = mixer(torch.full((1, 70, 48), -1e3), None, torch.arange(70)[None], None)
    assert y.dtype == torch.float16 and y.isfinite().all()


def test_any_even_width_of_a_head_has_its_rotary_part():
    sizes = [ModelConfig(hidden_size=4 * n, num_attention_heads=4, num_key_value_heads=2) for n in (2, 6, 8, 50)]
    assert [config.qk_rope_head_dim for config in sizes] == [2, 2, 4, 24]


def test_rotary_of_a_shift_keeps_the_scores():
    """What matters is the distance: shifting queries and keys together changes no score."""
    seeded()
    q, k = torch.randn(1, 6, 2, 8, dtype=torch.float64), torch.randn(1, 6, 2, 8, dtype=torch.float64)
    steps = torch.arange(6)[None]
    scores = [torch.einsum("bthd,bshd->bhts", *(ops.rotary(t, steps + by, 1e4) for t in (q, k))) for by in (0, 1000)]
    assert_close("scores", scores[1], scores[0], 1e-10)
