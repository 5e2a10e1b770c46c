"""What the test files share: the one comparison of tensors and seeds that are fresh but printed."""

import os
import random

import torch
from torch import Tensor

from dsl.reference import BOUNDS, relative_error


def seeded() -> torch.Generator:
    """Seed torch with a fresh number and print it; DSL_SEED=n repeats a failure. Returns a generator of that seed."""
    seed = int(os.environ.get("DSL_SEED") or random.SystemRandom().randrange(2**31))
    print(f"DSL_SEED={seed}")
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)


def assert_close(name: str, got: Tensor, want: Tensor, bound: float | None = None, floor: float = 1e-2) -> None:
    """Fail, naming the tensor, unless the `relative_error` is within the bound (default: that of got's dtype)."""
    assert got is not None, f"{name} is None"
    assert tuple(got.shape) == tuple(want.shape), f"{name} has shape {tuple(got.shape)}, not {tuple(want.shape)}"
    bound = BOUNDS[got.dtype] if bound is None else bound
    error = relative_error(got, want, floor)
    assert error <= bound, f"{name}: relative error {error:.1e} over the bound {bound:.0e} ({got.dtype})"


def gradients(loss: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradient of `loss` for each named input; zeros where it does not reach. The graph stays."""
    values = torch.autograd.grad(loss, list(inputs.values()), materialize_grads=True, retain_graph=True)
    return {f"d{name}": value for name, value in zip(inputs, values, strict=True)}
