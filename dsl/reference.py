"""The slow oracles, written from the formulas, and the judges that use them.

Read this file beside `ops`: it shares no helper with it and nothing in dsl imports it. One Python step per head and
time step, no chunks, no batched tricks. Also here: `relative_error`, the one comparison of tensors in tests and
notebooks; `judge` for the exercises of notebook 01; `check_mixer` for a mixer that somebody else wrote.

Shape letters: B batch, T time, S past time, H query heads, G key-value heads (head h reads group h // (H / G)),
K key width, V value width, C latent width, R rotary width.
"""

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

BOUNDS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}
LENGTHS = (1, 63, 64, 65, 200)


def relative_error(got: Tensor, want: Tensor, floor: float = 1e-2) -> float:
    """max |got - want| / max(max |want|, floor), in fp64; inf where shapes differ or a value is not finite.

    The floor is needed: at one time step the true gradients of q and k in normalised attention are zero.
    """
    if got is None or tuple(got.shape) != tuple(want.shape):
        return float("inf")
    got, want = got.detach().double().cpu(), want.detach().double().cpu()
    if not want.numel():
        return 0.0
    error = float((got - want).abs().max() / want.abs().max().clamp(min=floor))
    return error if error == error else float("inf")


def elu_feature_map(x: Tensor) -> Tensor:
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


def dpfp_feature_map(x: Tensor, nu: int = 1) -> Tensor:
    d = x.shape[-1]
    r = [x[..., i].clamp(min=0) for i in range(d)] + [(-x[..., i]).clamp(min=0) for i in range(d)]
    return torch.stack([r[i] * r[(i + j) % (2 * d)] for j in range(1, nu + 1) for i in range(2 * d)], -1)


def taylor_kernel(q: Tensor, k: Tensor) -> Tensor:
    """What the products of Based's features must be: 1 + z + z^2 / 2, z = q.k / sqrt(d)."""
    z = (q * k).sum(-1) / math.sqrt(q.shape[-1])
    return 1 + z + z**2 / 2


def rotary(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Each pair (x_i, x_{i + D/2}) is a complex number, turned by position * theta^(-2i/D)."""
    half = x.shape[-1] // 2
    angle = positions.double()[:, :, None, None] * theta ** (-torch.arange(half).double() / half)  # [B, T, 1, D / 2]
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag], -1)


def _heads(q: Tensor, G: int, one_head: Callable[[int, int, int], Tensor]) -> Tensor:
    B, _, H, _ = q.shape
    rows = [torch.stack([one_head(b, h, h // (H // G)) for h in range(H)], 1) for b in range(B)]
    return torch.stack(rows)


def linear_attention(q: Tensor, k: Tensor, v: Tensor, normalize: bool = True) -> Tensor:
    """o_t = sum_{s <= t} (q_t.k_s) v_s, over sum_{s <= t} q_t.k_s + 1e-6 if normalised; [B, T, heads, width]."""

    def one_head(b, h, g):
        out = []
        for t in range(q.shape[1]):
            weights = k[b, : t + 1, g] @ q[b, t, h]
            total = weights @ v[b, : t + 1, g]
            out.append(total / (weights.sum() + 1e-6) if normalize else total)
        return torch.stack(out)

    return _heads(q, k.shape[2], one_head)


def delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None = None) -> Tensor:
    """S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T, o_t = S_t^T q_t, a_t = exp(log_decay_t)."""

    def one_head(b, h, g):
        S, out, identity = torch.zeros_like(torch.outer(k[b, 0, g], v[b, 0, g])), [], torch.eye(k.shape[-1]).to(k)
        for t in range(q.shape[1]):
            a = 1.0 if log_decay is None else log_decay[b, t, g].exp()
            key, strength = k[b, t, g], beta[b, t, g]
            S = a * (identity - strength * torch.outer(key, key)) @ S + strength * torch.outer(key, v[b, t, g])
            out.append(S.mT @ q[b, t, h])
        return torch.stack(out)

    return _heads(q, k.shape[2], one_head)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """o_t = sum_{s <= t} softmax_s(scale q_t.k_s) v_s."""

    def one_head(b, h, g):
        rows = [(scale * k[b, : t + 1, g] @ q[b, t, h]).softmax(0) @ v[b, : t + 1, g] for t in range(q.shape[1])]
        return torch.stack(rows)

    return _heads(q, k.shape[2], one_head)


def latent_decode(q_nope, q_rope, latent, rope_key, w_uk, w_uv) -> Tensor:
    """One query per head over S cached latents, keys and values formed: [B, H, K], [B, H, R], [B, S, C], [B, S, R],
    w_uk [H, K, C], w_uv [H, V, C] -> [B, H, V]; scores are scaled by (K + R)^-0.5.
    """
    keys, values = torch.einsum("bsc,hkc->bshk", latent, w_uk), torch.einsum("bsc,hvc->bshv", latent, w_uv)
    scores = torch.einsum("bhk,bshk->bhs", q_nope, keys) + torch.einsum("bhr,bsr->bhs", q_rope, rope_key)
    return torch.einsum("bhs,bshv->bhv", (scores / math.sqrt(w_uk.shape[1] + q_rope.shape[-1])).softmax(-1), values)


def _linear_inputs(T: int) -> dict[str, Tensor]:
    q, k, v = torch.randn(2, T, 4, 6), torch.randn(2, T, 2, 6), torch.randn(2, T, 2, 5)
    return {"q": elu_feature_map(q), "k": elu_feature_map(k), "v": v}


def _delta_inputs(T: int) -> dict[str, Tensor]:
    inputs = _linear_inputs(T) | {"beta": torch.rand(2, T, 2)}
    return inputs | {"k": torch.nn.functional.normalize(torch.randn(2, T, 2, 6), dim=-1)}


def _latent_inputs(S: int) -> dict[str, Tensor]:
    shapes = {"q_nope": (2, 4, 8), "q_rope": (2, 4, 4), "latent": (2, S, 12), "rope_key": (2, S, 4)}
    return {name: torch.randn(shape) for name, shape in (shapes | {"w_uk": (4, 8, 12), "w_uv": (4, 8, 12)}).items()}


# name: inputs by length, oracle, numbers that no single tensor may reach at length 256, causal
EXERCISES = {
    "chunked": (_linear_inputs, linear_attention, 2 * 4 * 256 * 256, True),
    "delta": (_delta_inputs, delta_rule, None, True),
    "absorbed": (_latent_inputs, latent_decode, 2 * 256 * 4 * 8, False),
}


class _Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that is made."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(x.numel() for x in tree_leaves(out) if torch.is_tensor(x))])
        return out


def judge(exercise: str, mine: Callable[..., Tensor]) -> None:
    """Check a reader's `mine(**inputs) -> out` (fp64) and print a line for each check that holds.

    "chunked": mine(q, k, v), normalised linear attention, no T x T matrix. "delta": mine(q, k, v, beta).
    "absorbed": mine(q_nope, q_rope, latent, rope_key, w_uk, w_uv), one token of latent attention, no keys formed.
    Raises AssertionError naming the first check that fails, ValueError for an unknown exercise.
    """
    if exercise not in EXERCISES:
        raise ValueError(f"exercise must be one of {', '.join(EXERCISES)}, got {exercise!r}")
    make, oracle, limit, causal = EXERCISES[exercise]

    def check(what: str, got: Tensor, want: Tensor) -> None:
        error = relative_error(got, want)
        assert error <= 1e-9, f"{what}: relative error {error:.1e}, shape {tuple(getattr(got, 'shape', ()))}"

    for n in LENGTHS[:4]:
        inputs = {name: x.double().requires_grad_() for name, x in make(n).items()}
        got, want = mine(**inputs), oracle(**inputs)
        check(f"forward at length {n}", got, want)
        weight, given = torch.randn_like(want), list(inputs.values())
        gradients = (torch.autograd.grad((y * weight).sum(), given, allow_unused=True) for y in (got, want))
        for name, g, w in zip(inputs, *gradients, strict=True):
            check(f"gradient of {name} at length {n}", g, w)
        print(f"length {n:>3}: forward and every gradient within 1e-09")
    inputs = {name: x.double() for name, x in make(256).items()}
    with _Largest() as largest:
        before = mine(**inputs)
    if causal:
        after = mine(**{name: torch.cat([x[:, :-1], x[:, -1:] + 1], 1) for name, x in inputs.items()})
        moved = relative_error(after[:, :-1], before[:, :-1])
        assert moved == 0, "causality: a change of the last step moved an earlier one"
        print("causality: the last step moves no earlier one")
    if limit:
        size = largest.numel
        assert size < limit, f"memory at length 256: a tensor of {size} numbers, must stay below {limit}"
        print("memory: no tensor as large as the one to be avoided")


def check_mixer(cls: type, oracle: Callable | None = None, **sizes) -> dict[str, float]:
    """Check that a mixer class keeps the contract of `dsl.attention`, in fp64, and return the errors by check.

    Causality; every parameter learns; decoding step by step and in two parts equals one call; left-padded rows equal
    the same rows alone; `rows` selects; a reader's own slow twin `oracle(mixer, x) -> y`, forward and gradients.
    Raises AssertionError naming the first check that fails. `sizes` are fields of ModelConfig.
    """
    from dsl.config import ModelConfig  # here, so that the oracles above stand on torch alone

    small = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1}
    config = ModelConfig(**(small | sizes))
    mixer, T, D, errors = cls(config).double(), 70, config.hidden_size, {}
    for parameter in mixer.parameters():  # a fresh weight may be zero or one; the checks want none special
        parameter.data += 0.02 * torch.randn_like(parameter)
    x, steps = torch.randn(3, T, D, dtype=torch.float64), torch.arange(T).expand(3, -1)

    def check(name: str, got: Tensor, want: Tensor):
        errors[name] = relative_error(got, want)
        assert errors[name] <= 1e-9, f"{cls.__name__}, {name}: relative error {errors[name]:.1e} over 1e-09"

    y, state = mixer(x, None, steps, None)
    assert y.shape == x.shape, f"{cls.__name__}: y must have the shape of x {tuple(x.shape)}, got {tuple(y.shape)}"
    assert state.length == T, f"{cls.__name__}: state.length must be {T}, got {state.length}"
    weight = torch.randn_like(y)
    gradients = torch.autograd.grad((y * weight).sum(), list(mixer.parameters()), allow_unused=True)
    for (name, _), g in zip(mixer.named_parameters(), gradients, strict=True):
        assert g is not None and bool((g != 0).any()), f"{cls.__name__}: parameter {name} gets no gradient"
    if oracle is not None:
        slow = oracle(mixer, x)
        check("slow twin", y, slow)
        slow = torch.autograd.grad((slow * weight).sum(), list(mixer.parameters()))
        for (name, _), g, w in zip(mixer.named_parameters(), gradients, slow, strict=True):
            check(f"slow twin, gradient of {name}", g, w)
    with torch.no_grad():
        other = torch.cat([x[:, :-1], x[:, -1:] + 1], 1)
        check("causality", mixer(other, None, steps, None)[0][:, :-1], y[:, :-1])
        for name, cuts in {"two parts": (0, 37, T), "prefill and decoding": (0, 60, *range(61, T + 1))}.items():
            parts, past = [], None
            for a, b in itertools.pairwise(cuts):
                part, past = mixer(x[:, a:b], past, steps[:, a:b], None)
                parts.append(part)
            check(name, torch.cat(parts, 1), y)
        pad = torch.tensor([0, 5, 69])[:, None]
        keep, shifted = steps >= pad, (steps - pad).clamp(min=0)
        left, padded = mixer(x, None, shifted, keep)
        for row, skip in enumerate(pad[:, 0].tolist()):
            alone, _ = mixer(x[row : row + 1, skip:], None, steps[row : row + 1, : T - skip], None)
            check(f"left padding of {skip}", left[row : row + 1, skip:], alone)
        index, new = torch.tensor([2, 0]), torch.randn(3, 1, D, dtype=torch.float64)
        after, _ = mixer(new, padded, steps[:, -1:] + 1 - pad, None)
        chosen, _ = mixer(new[index], padded.rows(index), steps[index, -1:] + 1 - pad[index], None)
        check("rows", chosen, after[index])
    return errors
