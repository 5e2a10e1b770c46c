"""How fast and how big, beside code that others wrote: ours and the peer in turn, at one thread, as ratios.

    python tests/bench.py                    everything; writes figures/bench.json and figures/bench.png
    python tests/bench.py linear-512 ...     some of it; the rest keeps its stored numbers
    python tests/bench.py context            prefill and decoding against the length of the context
    python tests/bench.py profile            where the time goes, of the pairs that missed a goal

CPU-seconds, so that a busy machine disturbs little; each round runs ours, then the peer, and the ratio is that of the
least of both. The pairs stand in bench_parts.py and bench_models.py.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import bench_models
import bench_profile
import torch
import transformers
from bench_parts import PAIRS

FIGURES = Path(__file__).resolve().parents[1] / "figures"


def once(work) -> float:
    """CPU-seconds of a call, or what it measured itself: bytes, or the seconds of another process."""
    start = time.process_time()
    own = work()
    return own if isinstance(own, float) else time.process_time() - start


def measure(name: str, rounds: int, ceiling: float) -> dict:
    """The least of the rounds of both, and their ratio."""
    pair = PAIRS[name]
    ours, peer, *more = pair.build()
    facts = more[0] if more else {}
    both, values = (ours, peer), ([], [])
    if pair.rounds is None:
        for work in both:
            work()  # allocates and warms up
        slow = sum(once(work) for work in both) > 5
        rounds = min(rounds, 3) if slow else rounds
    for _ in range(pair.rounds or rounds):
        for work, measured in zip(both, values, strict=True):
            measured.append(once(work))
    least = dict(zip(("ours", "theirs"), map(min, values), strict=True))
    row = {"peer": pair.peer, "unit": pair.unit, **least, "goal": pair.goal}
    row["ratio"] = round(least["theirs"] / least["ours"], 2)
    if "tokens" in facts:
        row |= {f"{who}_tokens_per_second": round(facts["tokens"] / least[who]) for who in least}
    if "flops" in facts:
        row["share_of_ceiling"] = round(facts["flops"] / least["ours"] / ceiling, 2)
    return row


def gemm_ceiling(size: int = 1024) -> float:
    """FLOPs a second of the best of many products of two square fp32 matrices."""
    a, b = torch.randn(2, size, size)
    return 2 * size**3 / min(once(lambda: torch.mm(a, b)) for _ in range(40))


def line(name: str, row: dict) -> str:
    """A row of the table."""
    amount = f"{row['ours'] / 1e9:.2f} GB" if row["unit"] == "bytes" else f"{row['ours'] * 1e3:.1f} ms CPU"
    text = f"{name:<18} {row['ratio']:6.2f} x {row['peer']} ({amount}"
    if "ours_tokens_per_second" in row:
        text += f"; {row['ours_tokens_per_second']:,} tokens/s, the peer {row['theirs_tokens_per_second']:,}"
    if "share_of_ceiling" in row:
        text += f"; {row['share_of_ceiling']:.0%} of the ceiling"
    return text + (")" if row["ratio"] >= row["goal"] else f")  below the goal of {row['goal']:.2g}")


def table(context: dict[str, dict]) -> str:
    """What a context costs, a line for a kind and a length."""
    lines = ["kind      context  ms to decode a token  ms to read one  MB of state"]
    for kind, points in context.items():
        for length, point in points.items():
            times = f"{point['decode_seconds'] * 1e3:21.1f} {point['prefill_seconds'] * 1e3:16.2f}"
            lines.append(f"{kind:<8} {int(length):8,} {times} {point['state_bytes'] / 1e6:12.1f}")
    return "\n".join(lines)


def draw(results: dict[str, dict], context: dict[str, dict]) -> None:
    """Ratios as bars, with a mark where the goal is; beside them what a decoded token costs, and the state's bytes."""
    from dsl import plots

    size = (13, 1.2 + 0.33 * max(len(results), 12))
    figure, axes = plots.plt.subplots(1, 3, figsize=size, layout="constrained", width_ratios=(2, 1, 1))
    axis, names = axes[0], list(results)[::-1]
    ratios, goals = ([results[n][key] for n in names] for key in ("ratio", "goal"))
    axis.barh(names, [r - 1 for r in ratios], left=1, height=0.55, color=plots.COLORS["other"], label="measured")
    axis.plot(goals, names, "|", color="black", ms=12, mew=2, label="goal")
    for i, pair in enumerate(zip(ratios, goals, strict=True)):
        text = f"{pair[0]:.{2 * (pair[0] < 10)}f}"
        axis.annotate(text, (max(1, *pair), i), xytext=(6, 0), textcoords="offset points", va="center", fontsize=9)
    axis.set(xlabel="times faster (or smaller) than the peer, one thread", xscale="log")
    low, high = min(0.9, *ratios, *goals) * 0.95, max(*ratios, *goals) * 1.6
    ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if low <= t <= high]
    axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axis.minorticks_off()
    axis.set_xlim(low, high)
    axis.legend(fontsize=8, loc="lower right")
    sizes = "12 layers of the linear_moe sizes"
    for axis, what, label, unit, title in (
        (axes[1], "decode_seconds", "CPU-milliseconds for a decoded token", 1e3, sizes + "\nnoise: up to 1.4 times"),
        (axes[2], "state_bytes", "megabytes of state", 1e-6, sizes),
    ):
        for i, (kind, points) in enumerate(context.items()):  # the later, the thinner: what lies under it shows
            x, y = zip(*((int(length), point[what] * unit) for length, point in points.items()), strict=True)
            look = {"color": plots.COLORS.get(kind, "#777777"), "label": plots.NAMES.get(kind, kind.title())}
            axis.loglog(x, y, plots.LINES.get(kind, "o:"), lw=4 - i / 2, ms=9 - i, **look)
        axis.set(xlabel="tokens of context", ylabel=label, title=title)
        axis.set_xscale("log", base=2)
    if context:
        axes[1].legend(fontsize=8)
    figure.savefig(FIGURES / "bench.png")


def main(arguments: list[str] | None = None) -> int:
    known = [*PAIRS, "context", "profile"]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}; default: all")
    parser.add_argument("--rounds", type=int, default=11)
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - set(known):
        parser.error(f"no such pair: {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()  # it would advise faster packages for GPUs
    transformers.utils.logging.disable_progress_bar()
    path = FIGURES / "bench.json"
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    results, context, profiles = (stored.get(part, {}) for part in ("pairs", "context", "profile"))
    ceiling = gemm_ceiling()
    print(f"products of 1,024 x 1,024 matrices: {ceiling / 1e9:.0f} GFLOP/s", flush=True)
    for name in options.names or known:
        torch.manual_seed(0)
        if name == "context":
            context = bench_models.context(once)
            print(table(context), flush=True)
        elif name == "profile":
            profiles = {"gemm_flops": round(gemm_ceiling()), **bench_profile.profiles()}
            print(bench_profile.table(profiles), flush=True)
        else:
            results[name] = measure(name, options.rounds, ceiling)
            print(line(name, results[name]), flush=True)
    words = {name: {"peer": pair.peer, "goal": pair.goal} for name, pair in PAIRS.items()}
    results = {name: results[name] | words[name] for name in PAIRS if name in results}
    facts = {"torch": torch.__version__, "threads": 1, "gemm_flops": round(ceiling)}
    parts = {"pairs": results, "context": context, "profile": profiles}
    path.write_text(json.dumps({**facts, **parts}, indent=1) + "\n", encoding="utf-8")
    draw(results, context)
    return 0


if __name__ == "__main__":
    sys.exit(main())
