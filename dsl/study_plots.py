"""Figures of the study, and of any runs beside each other: quality against cost, past, recall, experts, differences.

Takes the tables of `findings` (columns config, seed, ...); never touches a model or a trainer. Bands span the seeds,
whiskers are 95 % intervals.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from dsl import compare
from dsl.plots import COLORS, NAMES, ticks

HYBRID = "#882255"  # delta and softmax in one model, three to one
STYLES = {  # colour by mixer, line by what else is changed
    "quickstart": (COLORS["other"], "-"),
    **{kind: (COLORS[kind], "-") for kind in ("softmax", "elu", "delta")},
    "hybrid": (HYBRID, "-"),
    "softmax-dense": (COLORS["softmax"], "--"),
    "hybrid-dense": (HYBRID, "--"),
    "hybrid-aux": (HYBRID, ":"),
    "hybrid-adamw": (HYBRID, "-."),
}
LABELS = {"quickstart": "quickstart (ELU+1 : softmax 1:1)", "hybrid": "hybrid (delta : softmax 3:1)"}
LABELS |= {"softmax-dense": "softmax, dense", "hybrid-dense": "hybrid, dense", "hybrid-aux": "hybrid, auxiliary loss"}
LABELS |= {"hybrid-adamw": "hybrid, AdamW"}
MARKERS = {"-": "o", "--": "s", ":": "v", "-.": "^"}
MIXERS = ("softmax", "quickstart", "hybrid", "delta", "elu")
OTHERS = ("#332288", "#E69F00", "#009E73", "#0072B2", "#CC79A7", "#D55E00", "#8C6D31", "#777777")


def style(config: str, place: int = 0) -> dict[str, str]:
    """Colour, line and label of a configuration; a run of somebody's own takes the colour of its place."""
    color, line = STYLES.get(config, (OTHERS[place % len(OTHERS)], "-"))
    return {"color": color, "ls": line, "label": LABELS.get(config, NAMES.get(config, config))}


def _known(configs: Iterable[str], order: Iterable[str] = STYLES) -> list[str]:
    there = list(dict.fromkeys(configs))
    return [*(c for c in order if c in there), *(c for c in there if c not in STYLES)]


def quality(curves: pd.DataFrame, runs: pd.DataFrame, tail: float = 0.4) -> plt.Figure:
    """Held-out bits per byte against tokens, training FLOPs and CPU-time; below, the last part, where they differ."""
    flops = runs.groupby("config").training_flops.first()
    table = curves.assign(flops=curves.tokens * curves.config.map(flops))
    axes_of = {"tokens": (1e6, "million tokens"), "flops": (1e12, "training FLOPs, 10¹²")}
    axes_of |= {"cpu_seconds": (1, "CPU-seconds of training steps")}
    figure, axes = plt.subplots(2, 3, figsize=(12, 7.4), layout="constrained", sharey="row")
    for column, (what, (unit, label)) in enumerate(axes_of.items()):
        for place, config in enumerate(_known(table.config)):
            rows = table[table.config == config].groupby("step")
            x, y = rows[what].mean() / unit, rows.held_out_bits_per_byte
            for axis in axes[:, column]:
                axis.plot(x, y.mean(), lw=1.5, **style(config, place))
                axis.fill_between(x, y.min(), y.max(), color=style(config, place)["color"], alpha=0.15, lw=0)
        high = table[what].max() / unit
        axes[0, column].set(xlabel=label)
        axes[1, column].set(xlabel=label, xlim=((1 - tail) * high, 1.01 * high) if high > 0 else None)
    late = table[table.tokens > (1 - tail) * table.tokens.max()].held_out_bits_per_byte
    if len(late):
        room = 0.05 * (late.max() - late.min())
        axes[1, 0].set_ylim(late.min() - room, late.max() + room)
    for axis in axes[:, 0]:
        axis.set_ylabel("held-out bits per byte")
    lines = axes[0, 0].get_legend_handles_labels()
    figure.legend(*lines, loc="outside lower center", ncols=3, fontsize=9)
    return figure


def _spread(values: pd.Series) -> tuple[float, float]:
    mean, half = compare.interval(values)
    return mean, 0.0 if np.isnan(half) else half


def _bins(axis: plt.Axes, lows: Iterable[int]) -> None:
    """Places 0, 1, ... named as the doublings that begin at `lows`."""
    names = [f"{low}" if low < 2 else f"{low}–{2 * low - 1:,}" for low in lows]
    axis.set_xticks(range(len(names)), names, rotation=45, fontsize=8)
    axis.set(xlabel="tokens seen before", xlim=(-0.5, max(len(names), 1) - 0.5))


def positions(analysis: pd.DataFrame) -> plt.Figure:
    """Loss by the tokens seen before; its difference to softmax, paired by seed; what more than the window gives."""
    rows = analysis[analysis.measure.isin(("position", "longer"))].assign(key=lambda t: t.key.astype(int))
    shape = {"figsize": (13, 4), "layout": "constrained", "width_ratios": [3, 3, 1.4]}
    figure, (left, middle, right) = plt.subplots(1, 3, **shape)
    table = rows[rows.measure == "position"].pivot_table(index="key", columns=["config", "seed"], values="value")
    for place, config in enumerate(_known(rows.config, MIXERS)):
        look, at = style(config, place) | {"ls": "-"}, np.arange(len(table))
        losses, whiskers = table[config], {"fmt": "o-", "lw": 1, "ms": 3, "capsize": 2, "color": look["color"]}
        left.plot(at, losses.mean(axis=1), "o", ms=3, **look)
        left.fill_between(at, losses.min(axis=1), losses.max(axis=1), color=look["color"], alpha=0.15, lw=0)
        if "softmax" in table and config != "softmax":
            gaps = (losses - table["softmax"]).dropna(axis=1)
            found = np.array([_spread(gap) for gap in gaps.to_numpy()])
            middle.errorbar(at + 0.12 * (place - 2.5), *found.T, **whiskers)
        longer = rows[(rows.config == config) & (rows.measure == "longer")].groupby("key").value
        if len(longer):
            found = np.array([_spread(values) for _, values in longer])
            right.errorbar(np.arange(len(found)) + 0.06 * (place - 2.5), *found.T, **whiskers)
            _bins(right, sorted(longer.groups))
    for axis in (left, middle):
        _bins(axis, table.index)
    middle.axhline(0, color=COLORS["softmax"])
    right.axhline(0, color=COLORS["law"], lw=1)
    left.set(ylabel="loss, nats per token")
    middle.set(ylabel="loss minus that of softmax, nats")
    right.set(ylabel="loss minus that within it, nats", title="beyond the window")
    if left.lines:
        left.legend(fontsize=8)
    return figure


def recall(table: pd.DataFrame, mqar: pd.DataFrame, beside: str = "softmax") -> plt.Figure:
    """Against the bytes of state: how much worse than softmax on pairs shown before, and on what was not shown; beside
    it the task of notebook 01.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", width_ratios=[1.4, 1])
    for place, config in enumerate(_known(table.config, MIXERS)):
        state = table[table.config == config].state_bytes_256.iloc[0] / 1024
        look = {"color": style(config, place)["color"], "ms": 7, "capsize": 3}
        for nudge, measure, fill in ((0.98, "seen seen pair", "full"), (1.02, "seen new token", "none")):
            mean, half, _ = compare.difference(table, config, beside, measure)
            left.errorbar(
                state * nudge * (1 + 0.1 * (config == "elu")),
                mean,
                np.nan_to_num(half),
                fmt="o",
                fillstyle=fill,
                **look,
            )
        left.plot([], [], color=look["color"], label=style(config, place)["label"])
    left.plot([], [], "ko", label="pairs that the row has shown before")
    left.plot([], [], "ko", mfc="none", label="tokens that it has not shown")
    left.axhline(0, color=COLORS[beside], lw=1)
    left.set(xlabel="state after 256 tokens, KiB", ylabel=f"loss minus that of {beside}, nats", xlim=(24, 1024))
    ticks(left, [32, 64, 128, 256, 512])
    left.legend(fontsize=8)
    kinds = [kind for kind in ("softmax", "delta", "taylor", "elu") if kind in set(mqar.kind)]
    for place, kind in enumerate(kinds):
        values = mqar[mqar.kind == kind].iloc[:, -1]
        right.plot([place] * len(values), values, "o", color=COLORS[kind], alpha=0.6)
    right.set_xticks(range(len(kinds)), [NAMES[kind] for kind in kinds], fontsize=8)
    right.set(ylabel="share of values recalled", title="MQAR, notebook 01: 4 and 8 pairs, all seeds", ylim=(None, 1.01))
    return figure


def kinds(analysis: pd.DataFrame, names: Iterable[str] = ("elu", "delta", "hybrid"), beside: str = "softmax"):
    """By kind of token, how much worse than softmax each mixer is: mean of paired seeds, 95 % intervals."""
    rows = analysis[analysis.measure.isin(("kind", "seen"))]
    order = list(dict.fromkeys(rows.sort_values("measure").key))
    figure, axis = plt.subplots(figsize=(8, 0.8 + 0.42 * len(order)), layout="constrained")
    names = [name for name in names if name in set(rows.config)]
    for place, name in enumerate(names):
        found = np.array([compare.difference(rows[rows.key == key], name, beside, "value")[:2] for key in order])
        y = np.arange(len(order)) + 0.18 * (place - (len(names) - 1) / 2)
        look = {"fmt": "o", "ms": 4, "capsize": 2, "color": style(name)["color"], "label": style(name)["label"]}
        axis.errorbar(found[:, 0], y, xerr=np.nan_to_num(found[:, 1]), **look)
    axis.axvline(0, color=COLORS[beside])
    axis.set_yticks(range(len(order)), order)
    axis.invert_yaxis()
    axis.set(xlabel=f"loss minus that of {beside}, nats per token (right: worse)")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    return figure


def experts(analysis: pd.DataFrame, curves: pd.DataFrame, names: Iterable[str], floor: float | None) -> plt.Figure:
    """How soon choices settle; what decides them; how uneven the load is."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.9), layout="constrained")
    names = _known(name for name in names if name in set(analysis[analysis.measure == "saturation"].config))
    for place, name in enumerate(names):
        rows, look = analysis[analysis.config == name], style(name, place)
        settled = rows[rows.measure == "saturation"].assign(step=lambda t: t.key.astype(int))
        last = settled.step.max()  # where it is one by definition
        steps = settled.step.drop_duplicates().sort_values()
        settled = settled[settled.step.isin(steps[~(steps.diff() < 0.02 * last)]) & (settled.step < last)]
        settled = settled.groupby(["step", "seed"]).value.mean().groupby("step")
        share = np.array(sorted(settled.groups)) / last
        marker = MARKERS[look["ls"]]
        left.plot(share, settled.mean(), marker, ms=4, **look)
        left.fill_between(share, settled.min(), settled.max(), color=look["color"], alpha=0.15, lw=0)
        rest = rows[rows.measure == "specialisation"].groupby(["key", "seed"]).value.mean()
        found = np.array([_spread(rest[key]) for key in ("token", "token before", "chance")])
        x = np.arange(3) + 0.12 * (place - (len(names) - 1) / 2)
        middle.errorbar(x, *found.T, fmt=marker, ms=4, capsize=2, color=look["color"])
        load = curves[curves.config == name].groupby("tokens").maxvio
        right.plot(load.mean().index / 1e6, load.mean(), marker, ms=3, **look | {"lw": 1.4})
        right.fill_between(load.mean().index / 1e6, load.min(), load.max(), color=look["color"], alpha=0.15, lw=0)
    if floor is not None:
        right.axhline(floor, color=COLORS["law"], ls="--", lw=1.2, label="floor: an even router, sampled")
    left.set(xlabel="share of the training", ylabel="choices that are final (saturation)", ylim=(0, 1.02))
    middle.set_xticks(range(3), ["token", "token before", "chance"])
    middle.set(ylabel="share of the choice that it decides", ylim=(0, 1.02), xlim=(-0.5, 2.5))
    right.set(xlabel="million tokens", ylabel="MaxVio between two measurements", yscale="log")
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    return figure


def differences(found: Mapping[str, pd.DataFrame]) -> plt.Figure:
    """Paired effects, {xlabel: rows (name, mean, half, neutral, low, high)}: dark where the interval excludes neutral,
    grey bars for what was published.
    """
    figure, axes = plt.subplots(1, len(found), figsize=(3.4 * len(found), 3.2), layout="constrained", sharey=True)
    for axis, (label, rows) in zip(np.atleast_1d(axes), found.items(), strict=True):
        neutral = rows.neutral.iloc[0]
        axis.axvline(neutral, color="black", lw=1)
        for place, row in enumerate(rows.itertuples()):
            seen = compare.verdict(row.mean - neutral, row.half, 1) != "silent"
            color = COLORS["experts"] if seen else COLORS["loss"]
            axis.plot([row.low, row.high], [place - 0.25] * 2, "D-", color=COLORS["published"], ms=5, alpha=0.7)
            axis.errorbar(row.mean, place, xerr=np.nan_to_num(row.half), fmt="o", capsize=3, color=color)
        axis.set_yticks(range(len(rows)), rows.name)
        axis.locator_params(axis="x", nbins=5)
        axis.set(xlabel=label, ylim=(len(rows) - 0.5, -0.5))
    return figure
