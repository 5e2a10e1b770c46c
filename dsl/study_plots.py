"""Figures of the study, and of any runs beside each other: quality against cost, past, recall, experts, differences.

Takes the tables of `findings` (columns config, seed, ...); never touches a model or a trainer. Bands span the seeds,
whiskers are 95 % intervals.
"""

from collections.abc import Iterable, Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from dsl import compare
from dsl.plots import COLORS, NAMES, legend

HYBRID = "#882255"  # delta and softmax in one model, three to one
STYLES = {  # colour by mixer, line by what else is changed; the label
    "quickstart": (COLORS["other"], "-", "quickstart (ELU+1 : softmax 1:1)"),
    **{kind: (COLORS[kind], "-", NAMES[kind]) for kind in ("softmax", "elu", "delta")},
    "hybrid": (HYBRID, "-", "hybrid (delta : softmax 3:1)"),
    "softmax-dense": (COLORS["softmax"], "--", "softmax, dense"),
    "hybrid-dense": (HYBRID, "--", "hybrid, dense"),
    **{f"{kind}-no-conv": (COLORS[kind], ":", f"{NAMES[kind]}, no convolution") for kind in ("elu", "delta")},
    "hybrid-aux": (HYBRID, ":", "hybrid, auxiliary loss"),
    "hybrid-adamw": (HYBRID, "-.", "hybrid, AdamW"),
}
MARKERS = {"-": "o", "--": "s", ":": "v", "-.": "^"}
MIXERS = ("softmax", "quickstart", "hybrid", "delta", "elu")
FAR = 0.15  # bits per byte: an effect beyond is written at the edge, for it would hide the others
OTHERS = ("#332288", "#E69F00", "#009E73", "#0072B2", "#CC79A7", "#D55E00", "#8C6D31", "#777777")


def style(config: str, place: int = 0) -> dict[str, str]:
    """Colour, line and label of a configuration; a run of somebody's own takes the colour of its place."""
    color, line, label = STYLES.get(config, (OTHERS[place % len(OTHERS)], "-", config))
    return {"color": color, "ls": line, "label": label}


def _known(configs: Iterable[str], order: Iterable[str] = STYLES) -> list[str]:
    there = list(dict.fromkeys(configs))
    return [*(c for c in order if c in there), *(c for c in there if c not in STYLES)]


def _band(axis: plt.Axes, x, seeds, **look) -> None:
    """A line through the means of `seeds`, grouped or in columns, in a pale band from the least to the most."""
    axis.plot(x, seeds.mean(), **look)
    axis.fill_between(x, seeds.min(), seeds.max(), color=look["color"], alpha=0.15, lw=0)


def _whiskers(axis: plt.Axes, x, groups: Iterable, **look) -> None:
    """The mean of each group of seeds with its 95 % interval, where it has one."""
    means, halves = np.transpose([compare.interval(values) for values in groups])
    axis.errorbar(x, means, np.nan_to_num(halves), capsize=2, **look)


def quality(curves: pd.DataFrame, runs: pd.DataFrame) -> plt.Figure:
    """Held-out bits per byte against tokens, training FLOPs and CPU-time; below, less those of softmax (or of the first
    run) at the same cost, seed by seed, over the last part of what that spent.
    """
    flops = runs.reindex(columns=["config", "training_flops", "optimizer_flops"]).groupby("config").first()
    table = curves.assign(flops=curves.tokens * curves.config.map(flops.sum(axis=1, skipna=False)))
    across = {"tokens": (1e6, "tokens", "million tokens"), "flops": (1e12, "FLOPs", "training FLOPs, 10¹²")}
    across |= {"cpu_seconds": (1, "CPU-time", "CPU-seconds of training steps")}
    names = _known(table.config)
    base = "softmax" if "softmax" in names else names[0] if names else None
    figure, axes = plt.subplots(2, 3, figsize=(12, 7.4), sharey="row")
    for (upper, lower), (what, (unit, short, label)) in zip(axes.T, across.items(), strict=True):
        for place, config in enumerate(names):
            rows, look = table[table.config == config], {"lw": 1.5, **style(config, place)}
            steps = rows.groupby("step")
            _band(upper, steps[what].mean() / unit, steps.held_out_bits_per_byte, **look)
            gaps = _behind(rows, table[table.config == base], what)
            _band(lower, gaps.columns, gaps.clip(-FAR, FAR), **look)
        upper.set(xlabel=label)
        lower.set(xlabel=f"share of {base}'s {short}")
    axes[0, 0].set_ylabel("held-out bits per byte")
    axes[1, 0].set_ylabel(f"less those of {base} at the same cost")
    legend(figure, ncols=3, fontsize=9)
    return figure


def _behind(rows: pd.DataFrame, base: pd.DataFrame, what: str) -> pd.DataFrame:
    """Bits per byte less those of the base's run of the same seed when it had spent as much: a row a seed, a column a
    share of all that the base spent, as far as every seed's run came.
    """
    shares, gaps = np.linspace(0.6, 1, 9), {}
    for seed, some in rows.groupby("seed"):
        other = base[base.seed == seed]
        if len(other):
            at = shares * other[what].max()
            one, same = (np.interp(at, x[what], x.held_out_bits_per_byte, right=np.nan) for x in (some, other))
            gaps[seed] = one - same
    return pd.DataFrame(gaps, index=shares).T.dropna(axis=1)


def positions(analysis: pd.DataFrame) -> plt.Figure:
    """Loss of the same tokens by how much of their past is in sight; its difference to softmax, paired by seed; what
    more than the window gives.
    """
    rows = analysis[analysis.measure.isin(("past", "longer"))].assign(key=lambda t: t.key.astype(int))
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4), width_ratios=[3, 3, 1.4])
    by_run = {"index": "key", "columns": ["config", "seed"], "values": "value"}
    table, longer = (rows[rows.measure == name].pivot_table(**by_run) for name in ("past", "longer"))
    at = np.arange(len(table))
    for place, config in enumerate(_known(rows.config, (*MIXERS, "delta-no-conv", "elu-no-conv"))):
        look, losses = style(config, place), table[config]
        whiskers = {"fmt": f"o{look['ls']}", "lw": 1, "ms": 3, "color": look["color"]}
        _band(left, at, losses.T, marker="o", ms=3, **look)
        if "softmax" in table and config != "softmax":
            gaps = (losses - table["softmax"]).dropna(axis=1)
            _whiskers(middle, at + 0.1 * (place - 3.5), gaps.to_numpy(), **whiskers)
        if config in longer:
            x = np.arange(len(longer)) + 0.06 * (place - 4)
            _whiskers(right, x, longer[config].to_numpy(), **whiskers)
    sights = [f"{sight}" if sight < 3 else f"{sight // 2 + 1}–{sight}" for sight in table.index]
    for axis, names in ((left, sights), (middle, sights), (right, [f"{low}–{2 * low - 1:,}" for low in longer.index])):
        axis.set_xticks(range(len(names)), names, rotation=45, fontsize=8)
        axis.set(xlabel="tokens in sight", xlim=(-0.5, len(names) - 0.5) if names else None)
    middle.axhline(0, color=COLORS["softmax"])
    right.axhline(0, color=COLORS["law"], lw=1)
    left.set(ylabel="loss, nats per token")
    middle.set(ylabel="loss minus that of softmax, nats")
    right.set(ylabel="loss minus that within it, nats", title="beyond the window")
    if left.lines:
        left.legend(fontsize=8)
    return figure


def recall(table: pd.DataFrame) -> plt.Figure:
    """How much worse than softmax on tokens, by what the row has shown of them; beside it, what random tokens gain when
    a row shows them a second time.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), width_ratios=[1.4, 1])
    shown = ["new token", "seen token", "seen pair"]
    names = _known(table.config, MIXERS)
    for place, config in enumerate(names):
        rows = table[table.config == config]
        look = {"color": style(config, place)["color"], "fmt": "o", "ms": 6}
        if config != "softmax":
            means, halves = np.transpose([compare.difference(table, config, "softmax", f"seen {x}")[:2] for x in shown])
            x = np.arange(3) + 0.15 * (place - 2.5)
            left.errorbar(x, means, np.nan_to_num(halves), label=style(config, place)["label"], **look)
        _whiskers(right, [place], [rows["copying gain"]], **look)
    left.axhline(0, color=COLORS["softmax"], lw=1)
    left.set_xticks(range(3), shown)
    left.set(ylabel="loss minus that of softmax, nats", xlim=(-0.5, 2.5))
    left.legend()
    right.axhline(0, color=COLORS["law"], lw=1)
    states = [table[table.config == name].state_bytes_256.iloc[0] / 1024 for name in names]
    labels = [
        f"{style(name)['label'].partition(' (')[0]}\n{state:,.0f} KiB"
        for name, state in zip(names, states, strict=True)
    ]
    right.set_xticks(range(len(names)), labels, fontsize=8)
    right.set(
        ylabel="nats gained by a second showing", title="random tokens, shown twice", xlim=(-0.5, len(names) - 0.5)
    )
    return figure


def kinds(analysis: pd.DataFrame) -> plt.Figure:
    """By kind of token, how much worse than softmax each mixer is: mean of paired seeds, 95 % intervals."""
    rows = analysis[analysis.measure.isin(("kind", "seen"))]
    order = list(dict.fromkeys(rows.sort_values("measure").key))
    figure, axis = plt.subplots(figsize=(8, 0.8 + 0.42 * len(order)))
    names = [name for name in ("elu", "delta", "hybrid") if name in set(rows.config)]
    for place, name in enumerate(names):
        found = np.array([compare.difference(rows[rows.key == key], name, "softmax", "value")[:2] for key in order])
        y = np.arange(len(order)) + 0.18 * (place - (len(names) - 1) / 2)
        look = {"fmt": "o", "ms": 4, "capsize": 2, "color": style(name)["color"], "label": style(name)["label"]}
        axis.errorbar(found[:, 0], y, xerr=np.nan_to_num(found[:, 1]), **look)
    axis.axvline(0, color=COLORS["softmax"], label=NAMES["softmax"])
    axis.axhline(rows[rows.measure == "kind"].key.nunique() - 0.5, color="black", lw=0.8)  # two ways to divide them
    axis.set_yticks(range(len(order)), order)
    axis.invert_yaxis()
    axis.set(xlabel="loss minus that of softmax, nats per token (right: worse)")
    legend(figure, ncols=4)
    return figure


def experts(
    analysis: pd.DataFrame, curves: pd.DataFrame, names: Iterable[str], floor: float | None, even: float | None = None
) -> plt.Figure:
    """How soon choices settle (by chance: `even`, k / E); what decides them; how uneven the load is."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.9))
    deciding = ["token", "token before", "chance"]
    names = _known(name for name in names if name in set(analysis[analysis.measure == "saturation"].config))
    for place, name in enumerate(names):
        rows, look = analysis[analysis.config == name], style(name, place)
        settled = rows[rows.measure == "saturation"].assign(step=lambda t: t.key.astype(int))
        last = settled.step.max()  # where it is one by definition
        steps = settled.step.drop_duplicates().sort_values()
        settled = settled[settled.step.isin(steps[~(steps.diff() < 0.02 * last)]) & (settled.step < last)]
        settled = settled.groupby(["step", "seed"]).value.mean().groupby("step")
        marked = look | {"marker": MARKERS[look["ls"]]}
        _band(left, settled.mean().index / last, settled, ms=4, **marked)
        rest = rows[rows.measure == "specialisation"].groupby(["key", "seed"]).value.mean()
        x = np.arange(3) + 0.12 * (place - (len(names) - 1) / 2)
        _whiskers(middle, x, (rest[key] for key in deciding), fmt=marked["marker"], ms=4, color=look["color"])
        load = curves[curves.config == name].groupby("tokens").maxvio
        _band(right, load.mean().index / 1e6, load, ms=3, lw=1.4, **marked)
    if floor is not None:
        right.axhline(floor, color=COLORS["law"], ls="--", lw=1.2, label="floor: an even router, sampled")
    if even is not None:
        left.axhline(even, color=COLORS["law"], ls=":", lw=1.2, label="choices at random")
    left.set(xlabel="share of the training", ylabel="choices that are final (saturation)", ylim=(0, 1.02))
    middle.set_xticks(range(3), deciding)
    middle.set(ylabel="share of the choice that it decides", ylim=(0, 1.02), xlim=(-0.5, 2.5))
    right.set(xlabel="million tokens", ylabel="MaxVio over some steps", yscale="log")
    legend(figure, ncols=4)
    return figure


def differences(found: Mapping[str, pd.DataFrame]) -> plt.Figure:
    """Paired effects, {xlabel: rows (name, mean, half, neutral, low, high)}: dark where the interval excludes neutral,
    grey diamonds for what was published. Neutral 0 is a difference of losses, less is better; 1 a saving, more is.
    """
    height = 1.6 + 0.35 * max(map(len, found.values()))
    figure, axes = plt.subplots(1, len(found), figsize=(3.4 * len(found), height), sharey=True)
    published = {"color": COLORS["published"], "marker": "D", "ms": 5, "alpha": 0.7}
    for axis, (label, rows) in zip(np.atleast_1d(axes), found.items(), strict=True):
        neutral = rows.neutral.iloc[0]
        axis.axvline(neutral, color="black", lw=1)
        near = rows[(rows["mean"] - neutral).abs() < FAR] if not neutral else rows
        for place, row in enumerate(rows.itertuples()):
            seen = compare.verdict(row.mean - neutral, row.half, 1) != "silent"
            color = COLORS["experts"] if seen else COLORS["loss"]
            if row.Index not in near.index:
                text = f"{row.mean:+.2f} ± {row.half:.2f}"
                edge = {"xycoords": ("axes fraction", "data"), "va": "center", "color": color, "fontsize": 9}
                axis.annotate(
                    text, (0.03 if row.mean < 0 else 0.97, place), ha="left" if row.mean < 0 else "right", **edge
                )
                continue
            axis.plot([row.low, row.high], [place - 0.25] * 2, **published)
            axis.errorbar(row.mean, place, xerr=np.nan_to_num(row.half), fmt="o", capsize=3, color=color)
        axis.set_yticks(range(len(rows)), rows.name)
        if neutral:
            axis.set_xscale("log")
            axis.set_xticks(at := [0.5, 0.7, 1, 1.5, 2, 3], map(str, at))
        axis.minorticks_off()
        side = "better \N{RIGHTWARDS ARROW}" if neutral else "\N{LEFTWARDS ARROW} better"
        axis.set_title(side, loc="right" if neutral else "left", fontsize=9)
        axis.set(xlabel=label, ylim=(len(rows) - 0.5, -0.5))
    means = {"effect, 95 % interval": COLORS["experts"], "interval includes no effect": COLORS["loss"]}
    entries = [plt.Line2D([], [], color=color, marker="o", label=label) for label, color in means.items()]
    entries.append(plt.Line2D([], [], **published, label="published"))
    entries.append(plt.Line2D([], [], color="black", lw=1, label="no effect"))
    figure.legend(handles=entries, loc="outside lower center", ncols=4)
    return figure
