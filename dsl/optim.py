"""What moves the weights: learning-rate schedules, AdamW and Muon behind one object, and the choice of precision.

Knows nothing of data, losses or files. Schedules are pure functions of the step, so a run can be lengthened; the
optimizer's state is keyed by parameter name, so it outlives a change in the order of parameters.

Shape letters: E experts, N matrices of one shape, a rows and b columns of a matrix.
"""

import math
import warnings
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Newton-Schulz works on chunks of this many numbers: on a CPU they stay in the cache, which is a fifth faster.
CHUNK = {"cpu": 2**19, "cuda": 2**26}


def learning_rate(train, step: int) -> float:
    """AdamW's rate at optimizer step `step` (from 0); past the end, the last rate.

    `warmup_steps` rise linearly, but in one_cycle, where they are the length of its cosine rise (0: three tenths);
    one_cycle starts at 1/25 and ends at 1/250,000 of the highest rate, as torch's OneCycleLR (1708.07120).
    cosine and wsd (warm-up, stable, linear decay: 2404.06395) end at `min_lr_ratio`.
    """
    top, end, warmup = train.learning_rate, train.max_steps, train.warmup_steps
    if train.lr_scheduler_type == "one_cycle":
        if end == 1:  # the last step, whose rate is next to nothing, would be all there is
            return top
        step, rise = min(step, end - 1), (warmup or 0.3 * end) - 1
        if step < rise:
            return _cosine(top / 25, top, step / rise)
        return _cosine(top, top / 25 / 1e4, (step - rise) / (end - 1 - rise) if end - 1 > rise else 0.0)
    step = min(step, end)
    if step < warmup:
        return top * (step + 1) / warmup
    low = top * train.min_lr_ratio
    if train.lr_scheduler_type == "cosine":
        return _cosine(top, low, (step - warmup) / (end - warmup))
    start = decay_start(train)
    if start is None or step <= start:
        return top
    return top + (low - top) * (step - start) / (end - start)


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * share))


def decay_start(train) -> int | None:
    """How many steps wsd takes before it decays: a checkpoint of at most so many can be lengthened; None elsewhere."""
    if train.lr_scheduler_type != "wsd":
        return None
    return train.max_steps - round(train.decay_share * train.max_steps)


@torch.no_grad()
def orthogonalize(x: Tensor, steps: int = 5) -> Tensor:
    """x [N, a, b] -> [N, a, b], each matrix with singular values near 1 (Newton-Schulz, Keller Jordan 2024, Muon).

    In bf16 on a GPU, else in fp32 or better: bf16 is the slower one on a CPU. A step is y <- p(y y^T) y. Where y is
    long, the polynomials are multiplied with each other first, on the shorter side: 0.7 of the time at 192 x 512.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    dtype = torch.bfloat16 if x.is_cuda else torch.promote_types(x.dtype, torch.float32)
    tall = x.shape[-2] > x.shape[-1]
    y = (x.mT if tall else x).to(dtype)
    y = y / y.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    if x.is_cuda or y.shape[-1] < 1.5 * y.shape[-2]:  # the other way loses digits that bf16 does not have
        for _ in range(steps):
            gram = y @ y.mT
            y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    else:
        gram, factor, product = y @ y.mT, None, None
        for _ in range(steps):
            if factor is not None:
                gram = factor @ gram @ factor
            factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            factor.diagonal(dim1=-2, dim2=-1).add_(a)
            product = factor if product is None else factor @ product
        y = product @ y
    return y.mT if tall else y


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized: torch.optim.Muon for many matrices at once, and for stacks of them [E, a, b].

    `rows[i]` are the row counts of the matrices that parameter i holds one below the other; each is a matrix of its
    own, and moves by sqrt(max(1, a / b)) times the rate.
    """

    def __init__(self, params, rows, lr: float, weight_decay: float, momentum: float):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.rows = dict(zip(self.param_groups[0]["params"], rows, strict=True))

    @torch.no_grad()
    def step(self) -> None:
        group = self.param_groups[0]
        rate, momentum = group["lr"], group["momentum"]
        matrices = defaultdict(list)  # (a, b) -> pairs of a move and the weights it is for, both [a, b]
        for weight in group["params"]:
            if weight.grad is None:
                continue
            state = self.state[weight]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(weight)
            buffer = state["momentum_buffer"].lerp_(weight.grad, 1 - momentum)
            moves = weight.grad.lerp(buffer, momentum)  # Nesterov
            weight.mul_(1 - rate * group["weight_decay"])
            rows = self.rows[weight]
            for move, part in zip(moves.split(rows, -2), weight.split(rows, -2), strict=True):
                a, b = part.shape[-2:]
                matrices[a, b] += zip(move.reshape(-1, a, b), part.reshape(-1, a, b), strict=True)
        for (a, b), pairs in matrices.items():
            count = max(1, CHUNK.get(pairs[0][0].device.type, CHUNK["cpu"]) // (a * b))
            for first in range(0, len(pairs), count):
                moves, weights = zip(*pairs[first : first + count], strict=True)
                moves = orthogonalize(torch.stack(moves)).to(weights[0].dtype)
                torch._foreach_add_(weights, moves.unbind(), alpha=-rate * max(1, a / b) ** 0.5)


def matrix_rows(model: nn.Module, name: str, weight: Tensor) -> list[int]:
    """Rows of the matrices that lie one below the other in `weight`.

    gate and up, and q, k and v, share a parameter only so that one product computes them. Orthogonalized together,
    their moves would depend on how they are stored, and rows of one would be kept orthogonal to rows of another.
    """
    parent, _, last = name.removesuffix(".weight").rpartition(".")
    shares = {"gate_up_proj": [1, 1], "qkv_proj": getattr(model.get_submodule(parent), "heads", [1])}.get(last, [1])
    return [weight.shape[-2] * share // sum(shares) for share in shares]


def is_matrix(name: str, weight: Tensor) -> bool:
    """Whether Muon may move it: a hidden matrix or a stack of experts; not embeddings, head, router, convolution."""
    names = set(name.split("."))
    stack = weight.ndim == 3 and "experts" in names
    return (weight.ndim == 2 or stack) and not names & {"embed_tokens", "lm_head", "router", "conv"}


class Optimizer:
    """AdamW for everything, or Muon for matrices and AdamW for the rest; GradScaler takes it as an optimizer."""

    def __init__(self, model: nn.Module, train):
        matrices, decayed, plain = [], [], []
        for name, weight in model.named_parameters():
            if train.optimizer == "muon" and is_matrix(name, weight):
                matrices.append((name, weight))
            elif weight.ndim < 2 or "conv" in name.split("."):  # norms, A_log, dt_bias: scales, nothing to decay
                plain.append((name, weight))
            else:
                decayed.append((name, weight))
        groups = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
        adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=train.learning_rate,
            betas=(train.adam_beta1, train.adam_beta2),
            eps=train.adam_epsilon,
            weight_decay=train.weight_decay,
            fused=True,  # on a CPU 4 to 7 times as fast as the other two, and as reproducible
        )
        self.kinds = {"adamw": adamw}
        if matrices:
            rows = [matrix_rows(model, name, weight) for name, weight in matrices]
            rate, momentum = train.muon_learning_rate, train.momentum
            self.kinds["muon"] = Muon(matrices, rows, rate, train.weight_decay, momentum)

    @property
    def param_groups(self) -> list[dict]:
        return [group for one in self.kinds.values() for group in one.param_groups]

    def set_lr(self, rate: float) -> None:
        """AdamW's rate, as `learning_rate` gives it; Muon's follows in proportion."""
        top = self.kinds["adamw"].defaults["lr"]  # top * (rate / top) is not always rate, to the last bit
        for one in self.kinds.values():
            for group in one.param_groups:
                group["lr"] = rate if one.defaults["lr"] == top else one.defaults["lr"] * (rate / top)

    def step(self) -> None:
        for one in self.kinds.values():
            one.step()

    def zero_grad(self) -> None:
        for one in self.kinds.values():
            one.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, dict[str, dict[str, Tensor]]]:
        """The moments by kind, name of the parameter and name of the tensor; no copies."""
        states = {kind: (one.state_dict()["state"], [*self._weights(kind)]) for kind, one in self.kinds.items()}
        return {kind: {names[i]: one for i, one in state.items()} for kind, (state, names) in states.items()}

    def load_state_dict(self, state: dict) -> None:
        """Takes copies; raises ValueError where the state is of other parameters or of another optimizer."""
        for kind, saved in state.items():
            weights = self._weights(kind)
            for name, moments in sorted(saved.items()):
                if name not in weights:
                    raise ValueError(f"the saved optimizer moves {name} by {kind}, this one does not")
                shape = weights[name].shape
                for moment in moments.values():
                    if moment.ndim and moment.shape != shape:  # AdamW's count of steps is a scalar
                        raise ValueError(f"moments of {name} must have shape {[*shape]}, got {[*moment.shape]}")
        for kind, one in self.kinds.items():
            saved = {i: state[kind][name] for i, name in enumerate(self._weights(kind)) if name in state.get(kind, {})}
            moments = {i: {key: value.clone() for key, value in saved[i].items()} for i in saved}
            one.load_state_dict({"state": moments, "param_groups": one.state_dict()["param_groups"]})

    def _weights(self, kind: str) -> dict[str, Tensor]:
        groups = self.kinds[kind].param_groups if kind in self.kinds else []
        return {name: w for group in groups for name, w in zip(group["param_names"], group["params"], strict=True)}


@dataclass(frozen=True)
class Precision:
    """How a run computes: `name` fp32, bf16 or fp16, its dtype, the device, fp16's gradient scaler, and why."""

    name: str
    dtype: torch.dtype
    device: torch.device
    scaler: torch.amp.GradScaler
    reason: str

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.name != "fp32")

    def load_scaler(self, state: dict) -> str | None:
        """Restores a saved scale; where there is none, or no use for it, says so and goes on."""
        if bool(state) == self.scaler.is_enabled():
            self.scaler.load_state_dict(state)
            return None
        if state:
            return f"the saved loss scale {state['scale']:g} is not used in {self.name}"
        return f"no loss scale was saved: fp16 starts at {self.scaler.get_scale():g}"


def precision(name: str = "auto", device: str | torch.device | None = None, init_scale: float = 65536.0) -> Precision:
    """The one place that chooses device (None: CUDA, else MPS, else CPU) and precision; fp16 scales its loss.

    "auto" takes what the device does well; what was asked for by name and cannot be had raises ValueError.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an old driver warns where a plain "no" is enough
        here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    device = torch.device(device or next(kind for kind, found in here.items() if found))
    kind = device.type
    if not here.get(kind):
        raise ValueError(f"device must be one that torch finds here, got {str(device)!r}")
    bf16 = kind == "cpu" or (kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False))
    if name not in ("auto", "fp32", *["bf16"] * bf16, *["fp16"] * (kind != "mps")):
        raise ValueError(f"precision must be one that {device} computes in, got {name!r}: take auto or fp32")
    why = "as asked"
    if name == "auto" and kind == "cuda":
        name, why = ("bf16", "it needs no loss scaling") if bf16 else ("fp16", "there is no bf16")
    elif name == "auto":
        name, why = "fp32", "16 bits are not faster there"
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    scaler = torch.amp.GradScaler(kind if name == "fp16" else "cpu", init_scale, enabled=name == "fp16")
    return Precision(name, dtype, device, scaler, f"{name} on {device}: {why}")
