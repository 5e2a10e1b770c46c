"""Attention as pure functions of tensors: feature maps, linear attention, the delta rule, rotary positions.

Knows no modules, no configuration and no training. Sums, states and solves run in at least fp32: 16-bit
inputs are promoted and the output is cast back; fp64 stays fp64.

Shape letters: B batch, T time, H query heads, G key-value heads (G divides H), R = H / G queries that share a
head, K key width, V value width, N chunks, C chunk size. Between functions tensors are [B, T, heads, width].
"""

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-6  # of the normaliser: elu(x) + 1 is exactly 0 in fp32 from x = -18 on


def elu_feature_map(x: Tensor) -> Tensor:
    """elu(x) + 1, any shape (Katharopoulos et al. 2020, arXiv 2006.16236, eq. 7)."""
    return F.elu(x).add_(1)


def dpfp_feature_map(x: Tensor, nu: int = 1) -> Tensor:
    """Deterministic parameter-free projection, [..., d] -> [..., 2 d nu] (Schlag et al. 2021, 2102.11174, eq. 37)."""
    r = torch.cat([F.relu(x), F.relu(-x)], -1)
    return torch.cat([r * r.roll(shift, -1) for shift in range(1, nu + 1)], -1)


def taylor_feature_map(x: Tensor) -> Tensor:
    """[..., d] -> [..., 1 + d + d^2] with phi(q).phi(k) = 1 + z + z^2 / 2, z = q.k / sqrt(d) (Based, 2402.18668)."""
    d = x.shape[-1]
    square = (x[..., :, None] * x[..., None, :]).flatten(-2) / (2 * d) ** 0.5
    return torch.cat([torch.ones_like(x[..., :1]), x / d**0.25, square], -1)


FEATURE_MAPS = {"elu": elu_feature_map, "dpfp": dpfp_feature_map, "taylor": taylor_feature_map}


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    form: str = "chunked",
    normalize: bool = True,
    state: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Causal linear attention o_t = q_t S_t / (q_t z_t), S_t = S_{t-1} + k_t v_t^T, z_t = z_{t-1} + k_t.

    q [B, T, H, K] and k [B, T, G, K] are feature-mapped already; v [B, T, G, V]. The forms "parallel" (T x T),
    "chunked" (T x C) and "recurrent" (a loop over time) give the same numbers. `state` continues an earlier call:
    [B, G, K, V + 1] with z as its last column, [B, G, K, V] when not normalised; fp32 or fp64.
    Returns (out [B, T, H, V] in the dtype of v, state). Raises ValueError on shapes, dtypes or a form that do not fit.
    Source: Katharopoulos et al. 2020 (2006.16236), eqs. 10-12; grouped heads as in 2305.13245.
    """
    forms = {"parallel": _linear_parallel, "chunked": _linear_chunked, "recurrent": _linear_recurrent}
    _check_heads(q, k, v, form, tuple(forms), chunk_size)
    out_dtype, (B, T, H, K), (G, V) = v.dtype, q.shape, v.shape[2:]
    with torch.autocast(q.device.type, enabled=False):
        q, k, v = _at_least_fp32(q, k, v)
        if normalize:
            v = torch.cat([v, torch.ones_like(v[..., :1])], -1)
        state = _start(state, (B, G, K, v.shape[-1]), v)
        if T:
            args = (_group(q, G), k.transpose(1, 2), v.transpose(1, 2), state)
            out, state = forms[form](*args, *([chunk_size] if form == "chunked" else []))
            out = out.permute(0, 3, 1, 2, 4).reshape(B, T, H, v.shape[-1])
        else:
            out = v.new_zeros(B, 0, H, v.shape[-1])
        if normalize:
            out, weight = out.split([V, 1], -1)
            out = out * (weight + EPS).reciprocal()  # a division's backward costs three passes more
    return out.to(out_dtype), state


def _linear_parallel(q, k, v, state):  # q [B, G, R, T, K], k [B, G, T, K], v [B, G, T, V]
    scores = (q @ k[:, :, None].mT).tril()
    return scores @ v[:, :, None] + q @ state[:, :, None], state + k.mT @ v


def _linear_recurrent(q, k, v, state):
    out = []
    for t in range(q.shape[3]):
        state = state + k[:, :, t, :, None] * v[:, :, t, None, :]
        out.append(q[:, :, :, t] @ state)
    return torch.stack(out, 3), state


def _linear_chunked(q, k, v, state, chunk_size):
    R, T = q.shape[2:4]
    C, q, k, v = _chunks(chunk_size, q, k, v)
    q = q.transpose(2, 3).flatten(3, 4)  # [B, G, N, R C, K]: the queries of a group are rows of one product
    written = k.mT @ v
    after = written.cumsum(2) + state[:, :, None]
    before = torch.cat([state[:, :, None], after[:, :, :-1]], 2)
    causal, chunks = q.new_ones(C, C).tril().repeat(R, 1), q.shape[:3]
    q, k, v, before = (x.flatten(0, 2) for x in (q, k, v, before))
    out = ((q @ k.mT).mul_(causal) @ v).baddbmm_(q, before)
    return _unchunk(out.unflatten(0, chunks), R, C, T), after[:, :, -1]


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    log_decay: Tensor | None = None,
    form: str = "chunked",
    state: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """The delta rule S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T, o_t = q_t S_t, a_t = exp(log_decay_t).

    q [B, T, H, K], k [B, T, G, K] (L2-normalised by the caller: stable for b |k|^2 in [0, 2]), v [B, T, G, V],
    beta and log_decay (<= 0) [B, T, G]; no scale on q. `state` [B, G, K, V], fp32 or fp64.
    Returns (out [B, T, H, V] in the dtype of v, state). Raises ValueError on shapes, dtypes or a form that do not fit.
    Source: Yang et al. 2024 (2406.06484, WY form per chunk), gated: 2412.06464, eq. 10.
    """
    forms = {"chunked": _delta_chunked, "recurrent": _delta_recurrent}
    _check_heads(q, k, v, form, tuple(forms), chunk_size)
    out_dtype, (B, T, H, K), (G, V) = v.dtype, q.shape, v.shape[2:]
    for name, x in (("beta", beta), ("log_decay", log_decay)):
        if x is not None and tuple(x.shape) != (B, T, G):
            raise ValueError(f"{name} must have shape [B, T, G] = {(B, T, G)}, got {tuple(x.shape)}")
    with torch.autocast(q.device.type, enabled=False):
        q, k, v = _at_least_fp32(q, k, v)
        beta, decay = beta.to(v.dtype).transpose(1, 2), None
        if log_decay is not None:
            decay = log_decay.to(v.dtype).transpose(1, 2)
        state = _start(state, (B, G, K, V), v)
        if T == 0:
            return v.new_zeros(B, 0, H, V).to(out_dtype), state
        args = (_group(q, G), k.transpose(1, 2), v.transpose(1, 2), beta, decay, state)
        out, state = forms[form](*args, *([chunk_size] if form == "chunked" else []))
    return out.permute(0, 3, 1, 2, 4).reshape(B, T, H, V).to(out_dtype), state


def _delta_recurrent(q, k, v, beta, decay, state):  # beta, decay [B, G, T]
    out = []
    for t in range(q.shape[3]):
        k_t, v_t = k[:, :, t, :, None], v[:, :, t, None, :]
        if decay is not None:
            state = state * decay[:, :, t, None, None].exp()
        state = state + k_t * (beta[:, :, t, None, None] * (v_t - k_t.mT @ state))
        out.append(q[:, :, :, t] @ state)
    return torch.stack(out, 3), state


def _delta_chunked(q, k, v, beta, decay, state, chunk_size):
    R, T = q.shape[2:4]
    C, q, k, v, beta = _chunks(chunk_size, q, k, v, beta[..., None])
    causal = torch.ones(C, C, dtype=torch.bool, device=q.device).tril()
    if decay is None:
        pairwise, seen, kept = causal.to(q.dtype), 1.0, [1.0] * k.shape[2]
        writing = k
    else:
        steps = _chunks(chunk_size, decay[..., None])[1]  # [B, G, N, C, 1]
        # (t, s): log decay after s, up to t; summed anew for each s, as a difference of sums loses what is small.
        between = steps.expand(-1, -1, -1, -1, C).tril(-1).cumsum(3)
        pairwise, seen = between.masked_fill_(~causal, -torch.inf).exp(), steps.cumsum(3).exp()
        writing, kept = k * pairwise[..., -1, :, None], seen[..., -1:, :].unbind(2)
    # Within a chunk every new value depends on those before it: one unit-triangular system, shared by all V columns.
    system = (k * beta) @ k.mT * pairwise
    solved = torch.linalg.solve_triangular(system, torch.diag_embed(beta[..., 0]), upper=False, unitriangular=True)
    values, reads = solved @ v, solved @ (k * seen)
    befores, news = [], []
    for value, read, write, keep in zip(values.unbind(2), reads.unbind(2), writing.unbind(2), kept, strict=True):
        befores.append(state)
        news.append(value - read @ state)
        state = state * keep + write.mT @ news[-1]
    before, new = torch.stack(befores, 2), torch.stack(news, 2)
    rows = q.transpose(2, 3)  # [B, G, N, R, C, K]
    scores = (rows.flatten(3, 4) @ k.mT).unflatten(3, (R, C)) * pairwise.unsqueeze(-3)
    inner = scores.flatten(3, 4) @ new
    outer = (rows * seen[:, :, :, None] if decay is not None else rows).flatten(3, 4) @ before
    return _unchunk(inner + outer, R, C, T), state


def rotary(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotary positions: turn the pairs (x_i, x_{i + D/2}) of x [B, T, heads, D] by positions [B, T] * theta^(-2i/D).

    Angles in fp32 or better; the output has the dtype of x. Source: Su et al. 2021 (2104.09864), in the half-split
    order of Llama and transformers.
    """
    half = x.shape[-1] // 2
    dtype = torch.promote_types(x.dtype, torch.float32)
    frequency = theta ** (-torch.arange(half, device=x.device, dtype=dtype) / half)
    angle = (positions[..., None].to(dtype) * frequency)[:, :, None]
    a, b = x.to(dtype).chunk(2, -1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def short_convolution(x: Tensor, weight: Tensor, window: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution of x [B, T, C] with weight [C, 1, W]; `window` [B, W - 1, C] is the past inputs.

    Returns (y [B, T, C], the window for the next call). Raises ValueError where the window does not fit.
    """
    shape = (x.shape[0], weight.shape[-1] - 1, x.shape[2])
    if window is None:
        window = x.new_zeros(shape)
    wide = torch.cat([check_state("state must have a window of", window, "[B, W - 1, C]", shape, x), x], 1)
    if x.shape[1] == 1:  # one step of a decoder: a call of the library's convolution takes milliseconds on a CPU
        return (wide * weight[:, 0].mT).sum(1, keepdim=True), wide[:, 1:]
    y = F.conv1d(wide.mT, weight, groups=weight.shape[0]).mT if x.shape[1] else x
    return y, wide[:, x.shape[1] :]


def _group(q: Tensor, G: int) -> Tensor:
    return q.unflatten(2, (G, -1)).permute(0, 2, 3, 1, 4)  # [B, T, H, K] -> [B, G, R, T, K]; head h reads group h // R


def _chunks(chunk_size: int, *tensors: Tensor) -> tuple:
    """Pad time (the last axis but one) with zeros to chunks of C and split it: [..., T, D] -> [..., N, C, D]."""
    T = tensors[0].shape[-2]
    C = min(chunk_size, T)
    return C, *(F.pad(x, (0, 0, 0, -T % C)).unflatten(-2, (-1, C)) for x in tensors)


def _unchunk(rows: Tensor, R: int, C: int, T: int) -> Tensor:
    return rows.unflatten(3, (R, C)).transpose(2, 3).flatten(3, 4)[:, :, :, :T]  # [B, G, N, R C, V] -> [B, G, R, T, V]


def _at_least_fp32(*tensors: Tensor) -> list[Tensor]:
    return [x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors]


def _start(state: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Tensor:
    state = like.new_zeros(shape) if state is None else state
    return check_state("state must have", state, "[B, G, K, V]", shape, like)


def check_state(rule: str, past: Tensor, letters: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """`past` as it is; ValueError, beginning with `rule`, unless of this shape and of like's dtype and device."""
    if tuple(past.shape) != shape:
        raise ValueError(f"{rule} shape {letters} = {shape}, got {tuple(past.shape)}")
    if past.dtype != like.dtype or past.device != like.device:
        raise ValueError(f"{rule} dtype {like.dtype} on {like.device}, got {past.dtype} on {past.device}")
    return past


def _check_heads(q: Tensor, k: Tensor, v: Tensor, form: str, forms: tuple[str, ...], chunk_size: int) -> None:
    if form not in forms:
        raise ValueError(f"form must be one of {', '.join(forms)}, got {form!r}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be positive, got {chunk_size}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} must have shape [batch, time, heads, width], got {tuple(x.shape)}")
        if not x.is_floating_point() or x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name} must be floating and like q ({q.dtype} on {q.device}), got {x.dtype} on {x.device}"
            )
    if k.shape[:2] != q.shape[:2] or k.shape[3] != q.shape[3]:
        raise ValueError(f"k must share batch, time and width with q {tuple(q.shape)}, got {tuple(k.shape)}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"v must share batch, time and heads with k {tuple(k.shape)}, got {tuple(v.shape)}")
    if k.shape[2] < 1 or q.shape[2] % k.shape[2]:
        raise ValueError(f"heads of k must divide the {q.shape[2]} heads of q, got {k.shape[2]}")
