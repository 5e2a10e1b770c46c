"""What attention costs on this machine: CPU-seconds and memory over length, in training and in decoding.

Knows the forms and the mixers, nothing of training. Times are CPU-seconds, the least of
several repetitions on one thread, so that a busy machine disturbs them least.
"""

import math
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dsl import attention, evaluation, ops
from dsl.config import ModelConfig


def _written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention as its formula stands, with the T x T matrix in memory."""
    k, v = (x.repeat_interleave(q.shape[2] // k.shape[2], 2).transpose(1, 2) for x in (k, v))
    scores = q.transpose(1, 2) @ k.mT * q.shape[-1] ** -0.5
    return scores.masked_fill(torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1), -torch.inf).softmax(-1) @ v


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True, enable_gqa=True)


def _elu(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ops.linear_attention(ops.elu_feature_map(q), ops.elu_feature_map(k), v)[0]


def _delta(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ops.delta_rule(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, torch.full_like(k[..., 0], 0.5))[0]


FORMS = {"written out": _written_out, "softmax": _sdpa, "elu": _elu, "delta": _delta}


def cpu_seconds(work: Callable[[], object]) -> float:
    """The least CPU time of one call on one thread, over at least three calls and 0.2 seconds."""
    times, threads = [], torch.get_num_threads()
    torch.set_num_threads(1)  # idle threads that wait for work count as CPU time, and slow a busy machine down
    try:
        work()
        while len(times) < 3 or sum(times) < 0.2:
            start = time.process_time()
            work()
            times.append(time.process_time() - start)
    finally:
        torch.set_num_threads(threads)
    return min(times)


def training(kind: str, length: int, *, heads: int = 6, width: int = 64):
    """(CPU-seconds of forward and backward, bytes kept from forward to backward) of one of FORMS, fp32, batch 1, two
    key-value heads.
    """
    q, k, v = (torch.randn(1, length, n, width, requires_grad=True) for n in (heads, 2, 2))
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = FORMS[kind](q, k, v)
    gradient = torch.randn_like(out)
    seconds = cpu_seconds(lambda: torch.autograd.grad(FORMS[kind](q, k, v), (q, k, v), gradient))
    return seconds, sum(kept.values())


def decoding(kind: str, context: int, config: ModelConfig) -> tuple[float, int]:
    """(CPU-seconds of one new token after `context` tokens, bytes of state) of one mixer, batch 1, fp32.

    Linear kinds read that many random tokens; softmax and latent attention, which would need T^2 work for it, are given
    random keys and values of as many. Their seconds include a copy of the cache, which grows by one token.
    """
    mixer, c = attention.MIXERS.resolve(kind)(config), config
    x, position = torch.randn(1, 1, c.hidden_size), torch.tensor([[context]])
    with torch.no_grad():
        if kind == "softmax":
            keys, values = torch.randn(2, 1, context, c.num_key_value_heads, c.head_dim)
            state = attention.SoftmaxState(context, keys, values, None)
        elif kind == "latent":
            latent, rope = torch.randn(1, context, 1, c.kv_lora_rank), torch.randn(1, context, 1, c.qk_rope_head_dim)
            state = attention.LatentState(context, latent, rope, None)
        else:
            state = None
            for some in torch.arange(context)[None].split(512, 1):  # in pieces that stay in the processor's cache
                _, state = mixer(torch.randn(*some.shape, c.hidden_size), state, some, None)
        return cpu_seconds(lambda: mixer(x, state, position, None)), state.num_bytes


def exponent(lengths: list[int], seconds: list[float]) -> float:
    """The power p of seconds ~ length^p, fitted over the longer half of the lengths."""
    half = len(lengths) // 2
    return float(np.polyfit(np.log(lengths[half:]), np.log(seconds[half:]), 1)[0])


def crossover(lengths: list[int], slow: list[float], fast: list[float]) -> float:
    """The length from which `fast` is cheaper for good, interpolated on log axes; inf where it never is."""
    gaps = [math.log(s / f) for s, f in zip(slow, fast, strict=True)]
    losing = [i for i, gap in enumerate(gaps) if gap <= 0]
    if not losing:
        return float(lengths[0])
    i = losing[-1]
    if i + 1 == len(gaps):
        return math.inf
    return lengths[i] * (lengths[i + 1] / lengths[i]) ** (-gaps[i] / (gaps[i + 1] - gaps[i]))


def cache_bytes(number_bytes: float = 2, layers: int = 1, **sizes) -> float:
    """Bytes that `layers` attention layers of these ModelConfig sizes keep for each token."""
    c = ModelConfig(layer_types=("full_attention",), num_hidden_layers=1, moe_layers=(), **sizes)
    return layers * evaluation.cost(c).state_bytes_per_token / 4 * number_bytes  # counted in fp32
