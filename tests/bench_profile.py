"""Where the time of a pair of the bench goes, by torch's profiler: by kind of work, ours and the peer's."""

import math
import re
from collections.abc import Callable

from bench_parts import PAIRS
from torch.profiler import profile

PROFILED = ["train-mixtral", "moe-mixtral", "moe-dense", "linear-512"]
KINDS = {  # the first that fits
    "matrix products": r"aten::(mm|addmm_?|bmm|baddbmm_?|_grouped_mm)$",
    "attention kernel": r"aten::_scaled_dot_product",
    "optimizer": r"aten::(_fused_adamw|_foreach|linalg_vector_norm)",
    "sorting and copying": r"aten::(sort|topk|bincount|index|_index_put|gather|scatter|cat|stack|copy|fill|zero)",
    "point by point": r"aten::",
    "Python and autograd": r"",
}


def product_flops(name: str, shapes: list[list[int]]) -> int:
    """2 m k n of one call, and times the batch, from the shapes of its arguments; an `addmm` adds to its first."""
    left, right = shapes[1:3] if "add" in name else shapes[:2]
    return 2 * math.prod(left) * right[-1]


def spent(work: Callable[[], object]) -> dict[str, float]:
    """Seconds by kind of one call, and `product_flops`: FLOPs a second of its matrix products."""
    with profile(record_shapes=True) as seen:
        work()
    seconds, flops = dict.fromkeys(KINDS, 0.0), 0
    for event in seen.key_averages(group_by_input_shape=True):
        kind = next(kind for kind, pattern in KINDS.items() if re.match(pattern, event.key))
        seconds[kind] += event.self_cpu_time_total / 1e6
        if kind == "matrix products" and "grouped" not in event.key:  # a grouped one is made of others
            flops += event.count * product_flops(event.key, event.input_shapes)
    return {**seconds, "product_flops": flops / seconds["matrix products"] if flops else 0.0}


def profiles(rounds: int = 3) -> dict[str, dict[str, dict[str, float]]]:
    """By pair and side, of the quickest of some rounds."""
    found = {}
    for name in PROFILED:
        ours, theirs = PAIRS[name].build()[:2]
        works = {"ours": ours, "theirs": theirs}
        runs = [{whose: spent(work) for whose, work in works.items()} for _ in range(rounds + 1)][1:]  # one to warm up
        found[name] = {
            whose: min((run[whose] for run in runs), key=lambda s: sum(s[k] for k in KINDS)) for whose in works
        }
    return found


def table(found: dict) -> str:
    """A line for a pair and a side."""
    lines = [f"{'':<14} {'':<6} " + " ".join(f"{kind:>20}" for kind in KINDS) + "  GFLOP/s of the products"]
    for name in PROFILED:
        for whose, seconds in found[name].items():
            cells = " ".join(f"{seconds[kind] * 1e3:17.1f} ms" for kind in KINDS)
            lines.append(f"{name:<14} {whose:<6} {cells}  {seconds['product_flops'] / 1e9:.0f}")
    return "\n".join(lines)
