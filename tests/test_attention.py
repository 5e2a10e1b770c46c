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
def test_softmax_equals_scaled_dot_product_attention(T):
    seeded()
    q, k, v = (torch.randn(2, T, n, 12, dtype=torch.float64, requires_grad=True) for n in (4, 2, 2))
    inputs, weight = dict(zip("qkv", (q, k, v), strict=True)), torch.randn(2, T, 4, 12)
    sdpa = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True, enable_gqa=True)
    slow = reference.softmax_attention(q, k, v, 12**-0.5)
    assert_close("out", sdpa.transpose(1, 2), slow, 1e-11)
    want = gradients((slow * weight).sum(), inputs)
    for name, got in gradients((sdpa.transpose(1, 2) * weight).sum(), inputs).items():
        assert_close(name, got, want[name], 1e-11)


@pytest.mark.parametrize("q_rank", [None, 20])
def test_absorbed_latent_attention_equals_materialised(q_rank):
    """Forward, every gradient and with padding, in one and in several new tokens."""
    seeded()
    c = dataclasses.replace(SMALL, kv_lora_rank=16, q_lora_rank=q_rank)
    mixer = attention.LatentMixer(c).double()
    past, new = torch.randn(2, 70, 48).double(), torch.randn(2, 3, 48).double()
    keep, steps = torch.arange(70) >= torch.tensor([[0], [9]]), torch.arange(73).expand(2, -1)
    outs, slopes = [], []
    for up_to in (0, 3):
        mixer.absorb_up_to = up_to
        _, state = mixer(past, None, steps[:, :70], keep)
        outs.append(mixer(new, state, steps[:, 70:], None)[0])
        slopes.append(gradients(outs[-1].square().sum(), dict(mixer.named_parameters())))
    assert_close("y", *outs)
    for name in slopes[0]:
        assert_close(name, slopes[0][name], slopes[1][name], 1e-11)


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


@pytest.mark.parametrize("name", ["elu", "delta"])
def test_a_state_of_other_sizes_is_refused(name):
    cls, _ = MIXERS[name]
    mixer, other = cls(SMALL), cls(dataclasses.replace(SMALL, num_key_value_heads=1))
    steps = torch.arange(4).expand(2, -1)
    _, state = other(torch.randn(2, 4, 48), None, steps, None)
    state.window = None
    with pytest.raises(ValueError, match="state must have shape"):
        mixer(torch.randn(2, 1, 48), state, steps[:, :1] + 4, None)


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


def test_rotary_of_a_shift_keeps_the_scores():
    """What matters is the distance: shifting queries and keys together changes no score."""
    seeded()
    q, k = torch.randn(1, 6, 2, 8, dtype=torch.float64), torch.randn(1, 6, 2, 8, dtype=torch.float64)
    steps = torch.arange(6)[None]
    scores = [torch.einsum("bthd,bshd->bhts", *(ops.rotary(t, steps + by, 1e4) for t in (q, k))) for by in (0, 1000)]
    assert_close("scores", scores[1], scores[0], 1e-10)
