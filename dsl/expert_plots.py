"""Figures of routing: balance and its floor, drops, looking ahead, the bug museum, what experts do.

Takes numbers and tables; never touches a model or a trainer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from dsl.plots import COLORS

METHODS = {"none": "#777777", "aux sequence": "#E69F00", "aux batch": "#56B4E9", "loss-free": COLORS["experts"]}
# Wang et al. 2024 (2408.15664), 1B parameters, 100B tokens: perplexity and MaxVio over the validation set.
PUBLISHED = {"aux batch": (9.56, 0.72), "loss-free": (9.50, 0.04)}
SPEEDS = ("#332288", "#0072B2", "#56B4E9", "#E69F00")


def dynamics(histories: Mapping[float, Sequence[float]], floor: float, law: Mapping[float, float]) -> plt.Figure:
    """MaxVio of each batch over the steps for each update speed, the floor, and where the law expects balance."""
    figure, axis = plt.subplots(figsize=(7.5, 3.8), layout="constrained")
    for (speed, maxvio), color in zip(histories.items(), SPEEDS, strict=False):
        steps = np.arange(1, len(maxvio) + 1)
        smooth = pd.Series(np.asarray(maxvio)).rolling(15, center=True, min_periods=1).mean()
        axis.plot(steps, maxvio, color=color, lw=0.6, alpha=0.3)
        axis.plot(steps, smooth, color=color, lw=1.6, label=f"update speed {speed:g}, mean of 15 steps")
        if speed in law:
            axis.axvline(law[speed], color=color, ls=":", lw=1.2)
    axis.axhline(floor, color=COLORS["law"], ls="--", lw=1.2, label="floor: a perfectly even router, sampled")
    if law:
        axis.plot([], [], color="#777777", ls=":", lw=1.2, label="law: needed bias / update speed")
    axis.set(xscale="log", yscale="log", xlabel="step", ylabel="MaxVio of a batch = max load / mean - 1")
    axis.legend(loc="lower left", fontsize=8)
    return figure


def drops(factors, law, measured, skewed, mark: float | None = None) -> plt.Figure:
    """Share of assignments without room over the capacity factor: the law, an even router, a skewed one."""
    figure, axis = plt.subplots(figsize=(6.5, 3.6), layout="constrained")
    axis.plot(factors, law, color=COLORS["law"], ls="--", label="law for an even random router")
    axis.plot(factors, measured, "o", color=COLORS["experts"], label="even random router, measured")
    axis.plot(factors, skewed, "s-", color=COLORS["taylor"], ms=4, label="skewed router: imbalance, not noise")
    if mark is not None:
        axis.axvline(mark, color="#777777", ls=":", lw=1.2)
        axis.set_title(f"capacity factor {mark:g}: {np.interp(mark, factors, skewed):.1%} dropped")
    axis.set(yscale="log", xlabel="capacity factor", ylabel="dropped share of assignments", ylim=(1e-6, 1.5))
    axis.legend(loc="best", fontsize=8)
    return figure


def look_ahead(shares: Mapping[str, float], trials: int) -> plt.Figure:
    """In how many trials new scores of the last token changed an earlier one; whiskers: two standard errors."""
    figure, axis = plt.subplots(figsize=(7, 2.8), layout="constrained")
    names, values = list(shares), np.array(list(shares.values()))
    colors = [COLORS["experts"] if value == 0 else COLORS["taylor"] for value in values]
    error = 2 * np.sqrt(values * (1 - values) / trials)
    axis.barh(names, 100 * values, xerr=100 * error, color=colors, error_kw={"lw": 1, "ecolor": "#555555"})
    for i, value in enumerate(values):
        axis.text(100 * (value + error[i]) + 1.5, i, f"{100 * value:.0f} %", va="center")
    axis.set(xlabel="trials in which an earlier token notices the last one, %", xlim=(0, 108))
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    return figure


def balance(results: pd.DataFrame, floor: float) -> plt.Figure:
    """Held-out loss against imbalance, one point a training; beside it the published pair."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
    for place, (method, color) in enumerate(METHODS.items()):
        rows = results[results.method == method]
        left.plot(rows.maxvio_global, rows.bits_per_byte, "o", color=color)
        right.plot(rows.maxvio_global, [place] * len(rows), "o", color=color)
        if method in PUBLISHED:
            perplexity, maxvio = PUBLISHED[method]
            right.plot(maxvio, place, "D", color=COLORS["published"], ms=7)
            text = {"xytext": (0, 9), "textcoords": "offset points", "ha": "left", "fontsize": 8}
            right.annotate(f"ppl {perplexity:.2f}", (maxvio, place), **text)
    left.set(xlabel="MaxVio on held-out text", ylabel="held-out bits per byte", xlim=(0, None))
    left.margins(y=0.15)
    right.plot([], [], "D", color=COLORS["published"], label="published, 1B (2408.15664)")
    right.axvline(floor, color=COLORS["law"], ls="--", lw=1.2, label="sampling floor")
    right.set(xlabel="MaxVio on held-out text", xlim=(0, None), ylim=(-0.6, 3.9))
    right.set_yticks(range(len(METHODS)), METHODS)
    for name, color in zip(right.get_yticklabels(), METHODS.values(), strict=True):
        name.set_color(color)  # and so a legend for both halves
    right.legend(fontsize=8, loc="upper right")
    return figure


def museum(caught: pd.DataFrame, losses: pd.DataFrame) -> plt.Figure:
    """Which check sees which bug, and what each does to the loss: that reported in training, and the real one.

    `losses` has columns bug, reported, real, one row a training; those of the shipped code span the noise of seeds.
    """
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 3.6), layout="constrained", sharey=True, gridspec_kw={"width_ratios": [1.5, 1]}
    )
    left.imshow(caught.to_numpy(), cmap="Purples", vmin=0, vmax=1.3, aspect="auto")
    left.set_xticks(range(caught.shape[1]), caught.columns, rotation=35, ha="right", fontsize=8)
    left.set_yticks(range(caught.shape[0]), caught.index)
    left.grid(visible=False)
    left.set_title("checks that fail (dark)")
    shipped = losses[losses.bug == caught.index[0]].real
    right.axvspan(shipped.min(), shipped.max(), color="#e6e6e6", label="shipped code, span of seeds")
    rows = losses.bug.map(list(caught.index).index)
    right.plot(losses.reported, rows, "o", color=COLORS["loss"], label="reported in training")
    right.plot(losses.real, rows, "o", mfc="none", ms=8, color=COLORS["held_out"], label="real tokens only")
    right.set(xlabel="loss, nats per token")
    right.set_title("what it does to the loss")
    right.legend(fontsize=8)
    return figure


def kinds(names: Sequence[str], shares: np.ndarray, title: str = "") -> plt.Figure:
    """How each kind of token is spread over the experts, relative to an even spread."""
    figure, axis = plt.subplots(figsize=(0.9 + 0.75 * shares.shape[1], 0.9 + 0.36 * len(names)), layout="constrained")
    ratio = shares * shares.shape[1]
    image = axis.imshow(ratio, cmap="PuOr_r", vmin=0, vmax=2, aspect="auto")
    for (row, column), value in np.ndenumerate(ratio):
        axis.text(
            column,
            row,
            f"{value:.1f}",
            ha="center",
            va="center",
            fontsize=8,
            color="white" if value > 1.7 or value < 0.3 else "black",
        )
    axis.set(xlabel="expert", xticks=range(shares.shape[1]), title=title)
    axis.set_yticks(range(len(names)), names)
    axis.grid(visible=False)
    figure.colorbar(image, label="share / even share")
    return figure


def journey(pieces: Sequence[str], experts: np.ndarray, num_experts: int) -> plt.Figure:
    """One sentence's way through the layers: the first expert of each token in each layer; experts [L, T]."""
    figure, axis = plt.subplots(figsize=(max(6, 0.42 * len(pieces)), 0.9 + 0.42 * len(experts)), layout="constrained")
    axis.imshow(
        experts, cmap=plt.get_cmap("tab20", num_experts), vmin=-0.5, vmax=num_experts - 0.5, aspect="auto", alpha=0.7
    )
    for (layer, step), expert in np.ndenumerate(experts):
        axis.text(step, layer, int(expert), ha="center", va="center", fontsize=9)
    axis.set_xticks(range(len(pieces)), pieces, rotation=60, ha="right", family="monospace", fontsize=8)
    axis.set_yticks(range(len(experts)), [f"layer {layer}" for layer in range(len(experts))])
    axis.grid(visible=False)
    return figure


def silent(routed: np.ndarray, shared: np.ndarray | None) -> plt.Figure:
    """Rise of the loss when one expert falls silent: routed [L, E], shared [L]."""
    figure, axis = plt.subplots(figsize=(6.5, 3.2), layout="constrained")
    for layer, row in enumerate(routed):
        axis.plot(
            np.full(len(row), layer),
            np.sort(row),
            "o",
            color=COLORS["experts"],
            label="" if layer else "one routed expert",
        )
    if shared is not None:
        axis.plot(np.arange(len(shared)), shared, "D", color=COLORS["taylor"], ms=8, label="the shared expert")
    axis.set(xlabel="layer", ylabel="rise of the loss, nats per token", xticks=range(len(routed)))
    axis.margins(x=0.3)
    axis.legend(fontsize=8)
    return figure
