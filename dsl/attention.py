"""The mixers: how a token sees those before it. Linear, delta, softmax (GQA) and latent (MLA) attention.

Each is `Mixer(config)(x, state, positions, keep) -> (y, state)`: one call for training, prefill and decoding.
Knows nothing of experts, losses or the Hugging Face cache; the arithmetic of the recurrent forms is in `ops`.
`keep` [B, T] marks the real tokens, None all; padding may stand before them and after them, but a short convolution
cannot go on after it. A state or a mask that does not fit is a ValueError.

Shape letters: B batch, T new time steps, S all time steps so far, H query heads, G key-value heads,
K width of a head, V width of a value, C width of the key-value latent, D hidden size.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsl import ops
from dsl.config import ModelConfig, Registry


@dataclass
class State:
    """What a mixer remembers: tensors with the batch first, and how many time steps it has seen."""

    length: int

    def tensors(self) -> dict[str, Tensor]:
        return {name: v for name, v in vars(self).items() if isinstance(v, Tensor)}

    def rows(self, index: Tensor) -> State:
        """The state of the rows `index` (int64 [B']) of the batch: for beams and for dropping finished rows."""
        return dataclasses.replace(self, **{name: v[index] for name, v in self.tensors().items()})

    @property
    def num_bytes(self) -> int:
        return sum(v.numel() * v.element_size() for v in self.tensors().values())


@dataclass
class LinearState(State):
    memory: Tensor  # [B, G, K, V (+ 1)], fp32
    window: Tensor | None  # [B, W - 1, channels]: inputs that the short convolution still needs


@dataclass
class SoftmaxState(State):
    keys: Tensor  # [B, S, G, K], positions applied
    values: Tensor  # [B, S, G, V]
    keep: Tensor | None  # [B, S] real tokens; None: all


@dataclass
class LatentState(State):
    latent: Tensor  # [B, S, 1, C]
    rope_key: Tensor  # [B, S, 1, rotary width]: one rotary key for all heads
    keep: Tensor | None


class RMSNorm(nn.RMSNorm):
    """RMSNorm computed in fp32 or better and given back in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(dtype), self.normalized_shape, self.weight.to(dtype), self.eps).to(x.dtype)


class ShortConvolution(nn.Module):
    """Depthwise causal convolution over a few steps: the only source of order in a linear layer."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, 1, width))
        nn.init.uniform_(self.weight, -(width**-0.5), width**-0.5)

    def forward(self, x: Tensor, window: Tensor | None) -> tuple[Tensor, Tensor]:
        return ops.short_convolution(x, self.weight, window)


class LinearMixer(nn.Module):
    """Normalised linear attention with a feature map and a short convolution (2006.16236).

    `normalize=False` drops the denominator and normalises the output instead (2210.10340).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        c = config
        self.heads = [c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads]
        self.qkv_proj = nn.Linear(c.hidden_size, sum(self.heads) * c.head_dim, bias=False)
        width = c.linear_conv_kernel_dim
        self.conv = ShortConvolution(self.qkv_proj.out_features, width) if width else None
        self.feature_map = ops.FEATURE_MAPS[c.feature_map]
        self.norm = None if c.normalize else RMSNorm(c.head_dim, eps=c.rms_norm_eps)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)

    def forward(self, x: Tensor, state: LinearState | None, positions: Tensor, keep: Tensor | None):
        q, k, v, window = _convolved_heads(self, x, state, keep)
        dtype = torch.promote_types(x.dtype, torch.float32)
        q, k, v = self.feature_map(q.to(dtype)), self.feature_map(k.to(dtype)), v.to(dtype)
        if keep is not None:
            k = k * keep[..., None, None]  # a feature map of zero is not zero: padding must not be remembered
        y, memory = ops.linear_attention(q, k, v, normalize=self.norm is None, **_form(x, state))
        if self.norm is not None:
            y = self.norm(y)
        y = y.flatten(2).to(x.dtype)
        return self.o_proj(y), LinearState(_seen(state) + x.shape[1], memory, window)


class DeltaMixer(nn.Module):
    """Gated DeltaNet: short convolution, SiLU, unit queries and keys, decay, output norm and gate (2412.06464, fig. 1).

    One decay and one write strength (beta) per key-value head; queries share states in groups as in GQA.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        c = config
        G = c.num_key_value_heads
        self.heads = [c.num_attention_heads, G, G]
        self.qkv_proj = nn.Linear(c.hidden_size, sum(self.heads) * c.head_dim, bias=False)
        self.ba_proj = nn.Linear(c.hidden_size, 2 * G, bias=False)
        self.g_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=False)
        width = c.linear_conv_kernel_dim
        self.conv = ShortConvolution(self.qkv_proj.out_features, width) if width else None
        self.A_log = nn.Parameter(torch.empty(G).uniform_(1, 16).log())
        rate = torch.empty(G).uniform_(-6.9, -2.3).exp()  # steps of 0.001 to 0.1, the range of Mamba-2
        self.dt_bias = nn.Parameter(rate + torch.log(-torch.expm1(-rate)))  # inverse of softplus
        self.norm = RMSNorm(c.head_dim, eps=c.rms_norm_eps)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)

    def forward(self, x: Tensor, state: LinearState | None, positions: Tensor, keep: Tensor | None):
        q, k, v, window = _convolved_heads(self, x, state, keep)
        q, k, v = F.silu(q), F.silu(k), F.silu(v)
        dtype = torch.promote_types(x.dtype, torch.float32)
        q, k = F.normalize(q.to(dtype), dim=-1) * q.shape[-1] ** -0.5, F.normalize(k.to(dtype), dim=-1)
        beta, a = self.ba_proj(x).to(dtype).chunk(2, -1)
        log_decay = -self.A_log.to(dtype).exp() * F.softplus(a + self.dt_bias.to(dtype))
        if keep is not None:  # padded keys are zero already, but a padded step must not forget either
            log_decay = log_decay * keep[..., None]
        y, memory = ops.delta_rule(q, k, v.to(dtype), beta.sigmoid(), log_decay=log_decay, **_form(x, state))
        gate = self.g_proj(x).unflatten(-1, (-1, y.shape[-1])).sigmoid()
        y = (self.norm(y) * gate).flatten(2).to(x.dtype)
        return self.o_proj(y), LinearState(_seen(state) + x.shape[1], memory, window)


class SoftmaxMixer(nn.Module):
    """Causal softmax attention with grouped-query heads, rotary positions and QK-norm (2305.13245, 2104.09864)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        c = self.config = config
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=False)
        self.q_norm = RMSNorm(c.head_dim, eps=c.rms_norm_eps) if c.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(c.head_dim, eps=c.rms_norm_eps) if c.qk_norm else nn.Identity()
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=False)

    def forward(self, x: Tensor, state: SoftmaxState | None, positions: Tensor, keep: Tensor | None):
        c = self.config
        q, k, v = (p(x).unflatten(-1, (-1, c.head_dim)) for p in (self.q_proj, self.k_proj, self.v_proj))
        q = ops.rotary(self.q_norm(q), positions, c.rope_theta)
        k = ops.rotary(self.k_norm(k), positions, c.rope_theta)
        k, v, keep = _all_steps(x, state, SoftmaxState, keep, keys=k, values=v)
        y = _softmax(q, k, v, keep, c.head_dim**-0.5)
        return self.o_proj(y.flatten(2)), SoftmaxState(_seen(state) + x.shape[1], k, v, keep)


class LatentMixer(nn.Module):
    """DeepSeek's multi-head latent attention: keys and values are read from one small latent per token (2405.04434).

    The cache holds the latent and one rotary key: kv_lora_rank + qk_rope_head_dim numbers per token and layer.
    One new token is decoded without ever forming keys or values (absorption: W_UK goes into the query, W_UV into
    the output); longer inputs form them, which is cheaper there.
    """

    absorb_up_to = 1  # new tokens on top of a state

    def __init__(self, config: ModelConfig):
        super().__init__()
        c = self.config = config
        H, self.scale = c.num_attention_heads, (c.qk_nope_head_dim + c.qk_rope_head_dim) ** -0.5
        q_width = H * (c.qk_nope_head_dim + c.qk_rope_head_dim)
        if c.q_lora_rank:
            self.q_a_proj = nn.Linear(c.hidden_size, c.q_lora_rank, bias=False)
            self.q_a_layernorm = RMSNorm(c.q_lora_rank, eps=c.rms_norm_eps)
            self.q_b_proj = nn.Linear(c.q_lora_rank, q_width, bias=False)
        else:
            self.q_proj = nn.Linear(c.hidden_size, q_width, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(c.hidden_size, c.kv_lora_rank + c.qk_rope_head_dim, bias=False)
        self.kv_a_layernorm = RMSNorm(c.kv_lora_rank, eps=c.rms_norm_eps)
        self.kv_b_proj = nn.Linear(c.kv_lora_rank, H * (c.qk_nope_head_dim + c.v_head_dim), bias=False)
        self.o_proj = nn.Linear(H * c.v_head_dim, c.hidden_size, bias=False)

    def forward(self, x: Tensor, state: LatentState | None, positions: Tensor, keep: Tensor | None):
        c, T = self.config, x.shape[1]
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x))) if c.q_lora_rank else self.q_proj(x)
        q_nope, q_rope = q.unflatten(-1, (c.num_attention_heads, -1)).split(
            [c.qk_nope_head_dim, c.qk_rope_head_dim], -1
        )
        latent, rope_key = self.kv_a_proj_with_mqa(x)[:, :, None].split([c.kv_lora_rank, c.qk_rope_head_dim], -1)
        latent = self.kv_a_layernorm(latent)
        q_rope, rope_key = (ops.rotary(t, positions, c.rope_theta) for t in (q_rope, rope_key))
        latent, rope_key, keep = _all_steps(x, state, LatentState, keep, latent=latent, rope_key=rope_key)
        attend = self._absorbed if state and min(self.absorb_up_to, state.length) >= T else self._materialised
        y = attend(q_nope, q_rope, latent, rope_key, keep)
        return self.o_proj(y.flatten(2)), LatentState(_seen(state) + T, latent, rope_key, keep)

    def _materialised(self, q_nope, q_rope, latent, rope_key, keep):
        c, H = self.config, self.config.num_attention_heads
        k_nope, v = self.kv_b_proj(latent[:, :, 0]).unflatten(-1, (H, -1)).split([c.qk_nope_head_dim, c.v_head_dim], -1)
        k = torch.cat([k_nope, rope_key.expand(-1, -1, H, -1)], -1)
        return _softmax(torch.cat([q_nope, q_rope], -1), k, v, keep, self.scale)

    def _absorbed(self, q_nope, q_rope, latent, rope_key, keep):
        c = self.config
        up = self.kv_b_proj.weight.to(q_nope.dtype).unflatten(0, (c.num_attention_heads, -1))
        up_key, up_value = up.split([c.qk_nope_head_dim, c.v_head_dim], 1)  # [H, K, C], [H, V, C]
        # All heads read the same keys: one product for all of them, where torch would copy the keys for each.
        T, keys, rope_keys = q_nope.shape[1], latent[:, :, 0], rope_key[:, :, 0]
        down = torch.einsum("bthk,hkc->bthc", q_nope, up_key).flatten(1, 2)
        scores = (down @ keys.mT + q_rope.flatten(1, 2) @ rope_keys.mT).unflatten(1, (T, -1)) * self.scale
        mask = _mask(T, keys, keep)
        if mask is not None:
            scores = scores.masked_fill(~mask.transpose(1, 2), -torch.inf)
        weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(keys.dtype)
        y = (weights.flatten(1, 2) @ keys).unflatten(1, (T, -1))
        return torch.einsum("bthc,hvc->bthv", y, up_value)


MIXERS = Registry("mixer", {"elu": LinearMixer, "delta": DeltaMixer, "softmax": SoftmaxMixer, "latent": LatentMixer})
register_mixer = MIXERS.register


def _seen(state: State | None) -> int:
    return state.length if state else 0


def _check_call(x: Tensor, state: State | None, kind: type[State], keep: Tensor | None) -> None:
    """Raise ValueError unless the state is of this kind and `keep` [B, T] belongs to x [B, T, D]."""
    if state is not None and not isinstance(state, kind):
        raise ValueError(f"state must be a {kind.__name__}, got {type(state).__name__}")
    if keep is not None and (keep.shape != x.shape[:2] or keep.device != x.device):
        rule = f"keep must have shape [B, T] = {tuple(x.shape[:2])} on {x.device}"
        raise ValueError(f"{rule}, got {tuple(keep.shape)} on {keep.device}")


def check_unbroken(name: str, keep: Tensor) -> None:
    """Raise ValueError where padding stands between real tokens: a convolution would look into it, not across it."""
    begun = F.pad(keep.bool(), (1, 0)).int().diff() > 0
    if (gaps := begun.sum(1) > 1).any():
        rule = f"{name} must mark one unbroken stretch of each row: a short convolution cannot skip padding"
        raise ValueError(f"{rule}, got a gap in rows {gaps.nonzero().flatten().tolist()}")


def _convolved_heads(mixer: LinearMixer | DeltaMixer, x: Tensor, state: LinearState | None, keep: Tensor | None):
    """Queries [B, T, H, K], keys and values [B, T, G, K] after the short convolution, and its next window."""
    _check_call(x, state, LinearState, keep)
    qkv, window = mixer.qkv_proj(x), None
    if keep is not None:
        qkv = qkv * keep[..., None]
    if mixer.conv is not None:
        if keep is not None and x.shape[1] > 2:
            check_unbroken("keep", keep)
        qkv, window = mixer.conv(qkv, state.window if state else None)
        if keep is not None:
            qkv = qkv * keep[..., None]
    heads = qkv.unflatten(-1, (sum(mixer.heads), -1))
    return *heads.split(mixer.heads, 2), window


def _form(x: Tensor, state: LinearState | None) -> dict[str, Any]:
    """How a recurrent form reads x after a state; chunks of 32 are the fastest of 16 to 128 on a CPU."""
    form = "recurrent" if x.shape[1] == 1 else "chunked"
    return {"form": form, "state": state.memory if state else None, "chunk_size": 32}


def _all_steps(x: Tensor, state: SoftmaxState | LatentState | None, kind: type[State], keep: Tensor | None, **new):
    """Each of the new tensors [B, T, ...] after that of its name in the state, and which of all S steps are real."""
    _check_call(x, state, kind, keep)
    if state is None:
        return *new.values(), keep
    for name, t in new.items():
        shape = (len(t), state.length, *t.shape[2:])
        past = ops.check_state(f"state must have {name} of", getattr(state, name), "[B, S, heads, width]", shape, t)
        new[name] = torch.cat([past, t], 1)
    if state.keep is not None or keep is not None:
        like = state.keep if keep is None else keep
        past = like.new_ones(len(x), state.length) if state.keep is None else state.keep
        keep = torch.cat([past, like.new_ones(x.shape[:2]) if keep is None else keep], 1)
    return *new.values(), keep


def _mask(T: int, k: Tensor, keep: Tensor | None) -> Tensor | None:
    """Who of the last T steps sees which of all S in k [B, S, ...]: bool [B or 1, 1, T, S]; None: no mask."""
    S = k.shape[1]
    if keep is None and not 1 < T < S:  # is_causal aligns top left when T < S: one query would see only the first key
        return None
    mask = torch.ones(1, 1, T, S, dtype=torch.bool, device=k.device).tril(S - T)
    if keep is not None:
        mask = mask & keep[:, None, None, :].bool()
        mask = mask | ~mask.any(-1, keepdim=True)  # a padded query may look anywhere: nobody reads its output
    return mask


def _softmax(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, scale: float) -> Tensor:
    """Causal attention of the last T of S steps; [B, T, H, K], [B, S, G, K], [B, S, G, V] -> [B, T, H, V]."""
    T, mask = q.shape[1], _mask(q.shape[1], k, keep)
    y = F.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v)),
        attn_mask=mask,
        is_causal=mask is None and T > 1,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return y.transpose(1, 2)
