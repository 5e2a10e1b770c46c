"""Figures of routing: balance and its floor, drops, looking ahead, the bug museum, what experts do.

Takes numbers and tables; never touches a model or a trainer.
"""

import math
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.colors import ListedColormap, TwoSlopeNorm

from dsl.colors import PALETTE
from dsl.plots import COLORS, legend

# Colours of this notebook's own: none of a mixer's. Wrong: what leaks, is uneven or is not balanced.
WRONG, EXPERTS = "#882255", COLORS["experts"]
METHODS = {"none": (WRONG, "o"), "aux sequence": ("#CCBB44", "s"), "aux batch": ("#44AA99", "^")}
METHODS |= {"loss-free": (EXPERTS, "v")}
# Wang et al. 2024 (2408.15664), 1B parameters, 100B tokens: perplexity and MaxVio over the validation set.
PUBLISHED = {"auxiliary loss,\nscope not stated": (9.56, 0.72), "loss-free": (9.50, 0.04)}
SPEEDS = (EXPERTS, "#7668C4", "#B5ABE6", "#D6D0F2")  # darker is faster


def dynamics(
    histories: Mapping[float, Sequence[float]], floor: float, law: Mapping[float, float], guess: float | None = None
) -> plt.Figure:
    """MaxVio of each batch over the steps for each update speed, the floor, and where the law expects balance."""
    figure, axis = plt.subplots(figsize=(7.5, 4.4))
    for (speed, maxvio), color in zip(histories.items(), SPEEDS, strict=False):
        each, window = pd.Series(maxvio, range(1, len(maxvio) + 1)), min(15, len(maxvio))
        axis.plot(each, color=color, lw=0.6, alpha=0.4)
        smooth = each.rolling(window, center=True).mean().dropna()  # means of whole windows only
        axis.plot(smooth, color=color, lw=1.6, label=f"update speed {speed:g}, mean of {window} steps")
        if speed in law:
            axis.axvline(law[speed], color=color, ls=":", lw=1.2)
    axis.axhline(floor, color=COLORS["law"], lw=0.9, label="floor: a perfectly even router, sampled")
    if law:
        axis.plot([], [], color="#777777", ls=":", lw=1.2, label="law: needed bias / update speed")
    if guess is not None:
        axis.axvline(guess, color=COLORS["law"], ls="--", lw=1.2, label="my guess for speed 0.001")
    axis.set(xscale="log", yscale="log", xlabel="step", ylabel="MaxVio of a batch = max load / mean - 1")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def drops(factors, law, measured, skewed, mark: float | None = None) -> plt.Figure:
    """Share of assignments without room over the capacity factor: the law, an even router, a skewed one."""
    figure, axis = plt.subplots(figsize=(6.5, 3.6))
    axis.plot(factors, law, color=COLORS["law"], ls="--", label="law for an even random router")
    axis.plot(factors, measured, "o", color=EXPERTS, label="even random router, measured")
    axis.plot(factors, skewed, "s-", color=WRONG, ms=4, label="skewed router: imbalance, not noise")
    if mark is not None:
        axis.axvline(mark, color="#777777", ls=":", lw=1.2)
        axis.set_title(f"capacity factor {mark:g}: the skewed router drops {np.interp(mark, factors, skewed):.1%}")
    axis.set(yscale="log", xlabel="capacity factor", ylabel="dropped share of assignments", ylim=(1e-6, 1.5))
    axis.legend()
    return figure


def look_ahead(shares: Mapping[str, float], trials: int, guess: float | None = None) -> plt.Figure:
    """In how many trials new scores of the last token changed an earlier one; whiskers: two standard errors."""
    figure, axis = plt.subplots(figsize=(7, 2.8))
    names, values = list(shares), np.array(list(shares.values()))
    colors = [EXPERTS if value == 0 else WRONG for value in values]
    error = 2 * np.sqrt(values * (1 - values) / trials)
    axis.barh(names, 100 * values, xerr=100 * error, color=colors, error_kw={"lw": 1, "ecolor": COLORS["law"]})
    for i, value in enumerate(values):
        axis.text(100 * (value + error[i]) + 1.5, i, f"{100 * value:.0f} %", va="center")
    axis.set(xlabel="trials in which an earlier token notices the last one, %", xlim=(0, 108))
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    if guess is not None:
        axis.axvline(100 * guess, color=COLORS["law"], ls="--", lw=1.2, label="my guess for expert choice")
        axis.legend(loc="upper right")
    return figure


def balance(results: pd.DataFrame, floor: float) -> plt.Figure:
    """Held-out loss less the mean of its seed, which is the larger part, against imbalance, one point a training;
    beside it the published pair.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    apart = results.bits_per_byte - results.groupby("seed").bits_per_byte.transform("mean")
    names = list(METHODS | PUBLISHED)
    for method, (color, marker) in METHODS.items():
        rows = results[results.method == method]
        left.plot(rows.maxvio_global, apart[rows.index], marker, color=color, label=method)
        right.plot(rows.maxvio_global, [names.index(method)] * len(rows), marker, color=color)
    for method, (perplexity, maxvio) in PUBLISHED.items():
        right.plot(maxvio, names.index(method), "D", color=COLORS["published"], ms=7)
        text = {"xytext": (0, 9), "textcoords": "offset points", "ha": "left", "fontsize": 8}
        right.annotate(f"perplexity {perplexity:.2f}", (maxvio, names.index(method)), **text)
    ylabel = "held-out bits per byte\nless the mean of the seed"
    left.set(xlabel="MaxVio on held-out text", ylabel=ylabel, xlim=(0, None))
    left.margins(y=0.1)
    right.plot([], [], "D", color=COLORS["published"], label="published, 1B (2408.15664)")
    right.axvline(floor, color=COLORS["law"], lw=0.9, label="sampling floor")
    right.set(xlabel="MaxVio on held-out text", xlim=(0, None), ylim=(-0.6, len(names) - 0.3))
    right.set_yticks(range(len(names)), names)
    legend(figure, ncols=6)
    return figure


def museum(caught: pd.DataFrame, losses: pd.DataFrame) -> plt.Figure:
    """Which check sees which bug, and what each does to the loss: that reported in training, and the real one.

    `losses` has columns bug, seed, reported, real, one row a training. Drawn is the difference from the mean of the
    shipped code, whose seeds span the noise; a line marks the first of them, whose start and data the bugs share.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), sharey=True, width_ratios=[1.5, 1])
    left.imshow(caught.to_numpy(), cmap="Purples", vmin=0, vmax=1.3, aspect="auto")
    left.set_xticks(range(caught.shape[1]), caught.columns, rotation=35, ha="right", fontsize=8)
    left.set_yticks(range(caught.shape[0]), caught.index)
    left.grid(visible=False)
    left.set(title="checks that fail (dark)")
    shipped = losses[losses.bug == caught.index[0]].sort_values("seed").real
    noise = shipped - shipped.mean()
    right.axvspan(noise.min(), noise.max(), color="#e6e6e6", label="shipped code, span of seeds")
    right.axvline(noise.iloc[0], color="#777777", ls=":", lw=1.2, label="shipped code, seed of the bugs")
    rows = losses.bug.map(list(caught.index).index)
    right.plot(losses.reported - shipped.mean(), rows, "o", color=COLORS["loss"], label="reported in training")
    ring = {"mfc": "none", "ms": 8, "color": COLORS["held_out"]}
    right.plot(losses.real - shipped.mean(), rows, "o", **ring, label="real tokens only")
    right.set_xscale("symlog", linthresh=0.1, linscale=1.5)
    right.xaxis.set_major_formatter("{x:g}")
    scale = "symlog axis: linear between -0.1 and 0.1"
    xlabel = f"loss less the mean of shipped, nats per token\n({scale})"
    right.set(xlabel=xlabel, title="what it does to the loss")
    right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.26))
    return figure


def settling(table: pd.DataFrame, loads: Mapping[int, np.ndarray], settled: pd.DataFrame, even: float) -> plt.Figure:
    """A training settles: load of every expert in each layer, entropy of the routers, saturation; over the steps.

    `table` is a run's metrics.csv and `loads` its shares by layer, [rows, experts]; `settled` has the steps of the
    checkpoints as index and a column a layer: the share of the last checkpoint's choices that each made already; `even`
    is what choices at random would share, k / E.
    """
    figure, axes = plt.subplots(1, len(loads) + 2, figsize=(3.2 * len(loads) + 6.4, 3))
    for place, (axis, (layer, shares)) in enumerate(zip(axes, loads.items(), strict=False)):
        count = shares.shape[1]
        axis.plot(table.step, shares * count, color=EXPERTS, lw=0.8, alpha=0.7)
        axis.axhline(1, color=COLORS["law"], ls="--", lw=1.2)
        axis.set(xlabel="step", ylabel="load / even load", title=f"layer {layer}: {count} experts", ylim=(0, None))
        style = {"color": SPEEDS[place % len(SPEEDS)], "label": f"layer {layer}"}
        axes[-2].plot(table.step, table[f"entropy_{layer}"], **style)
        axes[-1].plot(settled.index, settled.iloc[:, place], "o-", **style)
    axes[-2].axhline(math.log(count), color=COLORS["law"], ls="--", lw=1.2)
    axes[-2].set(xlabel="step", ylabel=f"entropy, nats (max ln {count})", title="mean scores of the routers")
    shared = "choices shared with\nthe last checkpoint"
    axes[-1].set(xlabel="step of the checkpoint", ylabel=shared, ylim=(0, 1.02), title="saturation")
    axes[-1].axhline(even, color=COLORS["law"], ls=":", lw=1.2, label="at random")
    axes[-1].legend()  # and of the panel beside it
    return figure


def kinds(names: Sequence[str], shares: np.ndarray, title: str = "") -> plt.Figure:
    """How each kind of token is spread over the experts, relative to an even spread."""
    figure, axis = plt.subplots(figsize=(0.9 + 0.75 * shares.shape[1], 0.9 + 0.36 * len(names)))
    ratio = shares * shares.shape[1]
    norm = TwoSlopeNorm(1, vmin=0, vmax=max(2, ratio.max()))
    image = axis.imshow(ratio, cmap="PuOr_r", norm=norm, aspect="auto")
    for (row, column), value in np.ndenumerate(ratio):
        color = "black" if np.dot(image.to_rgba(value)[:3], (0.30, 0.59, 0.11)) > 0.5 else "white"  # by the luminance
        axis.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=8, color=color)
    axis.set(xlabel="expert", xticks=range(shares.shape[1]), yticks=range(len(names)), yticklabels=names, title=title)
    axis.grid(visible=False)
    figure.colorbar(image, label="share / even share")
    return figure


def journey(pieces: Sequence[str], experts: np.ndarray, num_experts: int) -> plt.Figure:
    """One text's way through the layers, ten tokens a row: each token's first expert in each layer [L, T], as many
    experts at most as PALETTE has colours, which they have in texts too.
    """
    per_row, layers = 10, len(experts)
    rows = math.ceil(len(pieces) / per_row)
    figure, axes = plt.subplots(rows, 1, figsize=(9, (0.34 * layers + 0.4) * rows), squeeze=False)
    look = {"cmap": ListedColormap(PALETTE[:num_experts]), "vmin": -0.5, "vmax": num_experts - 0.5, "aspect": "auto"}
    for axis, start in zip(axes[:, 0], range(0, len(pieces), per_row), strict=True):
        part, some = pieces[start : start + per_row], experts[:, start : start + per_row]
        axis.imshow(some, **look)
        for (layer, step), expert in np.ndenumerate(some):
            axis.text(step, layer, int(expert), ha="center", va="center", fontsize=9)
        seen = [piece.replace("\n", "\\n").replace(" ", "\N{OPEN BOX}") for piece in part]
        axis.set_xticks(range(len(part)), seen, family="monospace", fontsize=8)
        axis.set_yticks(range(layers), [f"layer {layer}" for layer in range(layers)])
        axis.set_xlim(-0.5, per_row - 0.5)
        axis.xaxis.tick_top()
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
        axis.grid(visible=False)
    return figure


def silent(routed: np.ndarray, shared: np.ndarray | None) -> plt.Figure:
    """Rise of the loss when one expert falls silent: routed [L, E], shared [L]."""
    figure, axis = plt.subplots(figsize=(6.5, 3.2))
    for layer, row in enumerate(routed):
        axis.plot([layer] * len(row), np.sort(row), "o", color=EXPERTS, label="" if layer else "one routed expert")
    if shared is not None:
        axis.plot(np.arange(len(shared)), shared, "D", color=SPEEDS[1], ms=8, label="the shared expert")
    axis.set(xlabel="layer", ylabel="rise of the loss, nats per token", xticks=range(len(routed)))
    axis.margins(x=0.3)
    axis.legend()
    return figure
