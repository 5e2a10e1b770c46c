"""How figures look, where they are saved and how a notebook shows them; then the figures of attention and experts.

A colour means one thing in the whole workbook. Takes arrays; never touches a model or a trainer.
"""

import base64
import io
import os
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from dsl import settings

# Okabe and Ito's palette, told apart by colour-blind readers too.
COLORS = {
    "softmax": "#0072B2",
    "elu": "#E69F00",
    "delta": "#009E73",
    "latent": "#CC79A7",
    "taylor": "#D55E00",
    "dpfp": "#8C6D31",
    "other": "#56B4E9",
    "experts": "#332288",
    "loss": "#777777",
    "held_out": "#332288",
    "published": "#999999",
    "law": "#000000",
}
mpl.rcParams.update(
    {
        "figure.constrained_layout.use": True,
        "figure.constrained_layout.w_pad": 0.1,  # inches: a y label stays clear of the panel on its left
        "figure.dpi": 90,
        "savefig.dpi": 150,
        "figure.facecolor": "white",
        "savefig.facecolor": "white",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#e6e6e6",
        "axes.axisbelow": True,
        "font.size": 10,
        "axes.titlesize": 10,
        "legend.fontsize": 8,
        "legend.frameon": False,
        "lines.linewidth": 1.8,
    }
)


def folder(run: str = "notebooks") -> Path:
    """Where figures go: the committed folder where DSL_FIGURES names it (make figures), else figures/runs/RUN."""
    chosen = os.environ.get("DSL_FIGURES")
    return Path(chosen) if chosen else settings.home() / "figures" / "runs" / run


def show(figure: plt.Figure, name: str, run: str = "notebooks") -> None:
    """Save the figure as NAME.png and display it: the picture for people, a digest in text for checks; close it.

    The digest rounds what is drawn to two digits, so that a notebook's stored output can be compared on another
    machine (pictures cannot).
    """
    from IPython.display import display

    place = folder(run)
    place.mkdir(parents=True, exist_ok=True)
    figure.savefig(place / f"{name}.png", metadata={"Software": None})
    display({"text/plain": digest(figure), "image/png": base64.b64encode(png(figure)).decode()}, raw=True)


def png(figure: plt.Figure) -> bytes:
    """The figure as a small PNG for the screen; closes it."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=mpl.rcParams["figure.dpi"], metadata={"Software": None})
    plt.close(figure)
    return picture.getvalue()


def digest(figure: plt.Figure) -> str:
    """What a figure shows, in a few rounded numbers a line."""
    lines = []
    for axis in figure.axes:
        lines.append(" | ".join(filter(None, (axis.get_title(), axis.get_xlabel(), axis.get_ylabel()))))
        for line in axis.get_lines():
            y = np.asarray(line.get_ydata(), float)
            if (y := y[~np.isnan(y)]).size:
                span = f"{_round(y[0])} .. {_round(y[-1])}, from {_round(y.min())} to {_round(y.max())}"
                lines.append(f"  {line.get_label()}: {y.size} points, {span}")
        for bars in axis.containers:
            heights = [_round(bar.get_height()) for bar in bars if hasattr(bar, "get_height")]
            lines.append(f"  {bars.get_label()}: bars {' '.join(heights)}")
        for image in axis.get_images():
            values = np.asarray(image.get_array(), float)
            lines.append(f"  image {values.shape}, mean {_round(values.mean())}")
    return "\n".join(lines)


def _round(x: float) -> str:
    return f"{x + 0.0:.2g}"  # without a minus before zero


NAMES = {"softmax": "softmax", "elu": "linear (ELU+1)", "delta": "delta rule", "latent": "latent (MLA)"}
NAMES |= {"taylor": "linear (Taylor, Based)", "dpfp1": "linear (DPFP-1)", "written out": "softmax, written out"}

LINES = {"softmax": "s-", "written out": "s:", "elu": "D-", "delta": "v--", "latent": "^-"}

SHORT = {"softmax": "softmax", "elu": "ELU+1", "dpfp1": "DPFP-1", "dpfp2": "DPFP-2", "dpfp3": "DPFP-3"}
MARKERS = {("softmax", "sum"): "s", ("elu", "sum"): "D", ("dpfp1", "sum"): "o"}
MARKERS |= {("dpfp2", "sum"): "P", ("dpfp3", "sum"): "X", ("elu", "delta"): "v", ("dpfp1", "delta"): "^"}


def _color(kind: str) -> str:
    return COLORS.get(kind, COLORS["dpfp"] if kind.startswith("dpfp") else COLORS["other"])


def retrieval(rows: list[dict], published: list[dict], capacities: dict[str, float], guess: float) -> plt.Figure:
    """Loss over number of keys, ours (mean and span of seeds) over the authors' points; setting 1 left, with the law of
    rank (1 - width / N) / 2 of each of `capacities`, 2 right.
    """
    figure, axes = plt.subplots(1, 2, figsize=(10, 5.2), sharey=True)
    kind, measured = ["setting", "memory", "rule"], {row["memory"] for row in rows}
    for (setting, memory, rule), theirs in pd.DataFrame(published).sort_values("keys").groupby(kind):
        grey = {"color": COLORS["published"], "lw": 1, "ms": 7, "alpha": 0.7}
        label = f"{_memory(memory, rule)}, authors"
        axes[setting - 1].plot(theirs["keys"], theirs.loss, f"{MARKERS[memory, rule]}:", **grey, label=label)
    for (setting, memory, rule), mine in pd.DataFrame(rows).groupby(kind):
        axis, marker, seeds = axes[setting - 1], MARKERS[memory, rule], mine.groupby("keys").loss
        color = COLORS["delta"] if rule == "delta" else _color(memory)
        look = {"color": color, "ls": "--" if marker == "v" else "-", "marker": marker, "ms": 4}
        axis.plot(seeds.mean(), **look, label=f"{_memory(memory, rule)}, ours")
        axis.vlines(seeds.mean().index, seeds.min(), seeds.max(), color=color, lw=3, alpha=0.4)
    titles = ("Setting 1: each key is written once", "Setting 2: keys come again, the last value counts")
    for axis, title in zip(axes, titles, strict=True):
        axis.set(xlabel="number of keys N", title=title)
        ticks(axis, [n for n in (20, 40, 80, 160, 320, 600) if n <= axis.dataLim.xmax])
    for i, (memory, width) in enumerate(capacities.items()):
        color = _color(memory) if memory in measured else COLORS["published"]
        axes[0].axvline(width, color=color, ls=":", lw=1.2, label=f"_bound, {memory}")
        many = np.linspace(width, axes[0].dataLim.xmax)
        label = f"_law, {memory}" if i else "law, (1 − d / N) / 2"
        axes[0].plot(many, (1 - width / many) / 2, "--", color=COLORS["law"], lw=0.9, label=label)
        note = f"{SHORT[memory]}, d = {width:.0f}"
        place = {"xytext": (-2, 0), "textcoords": "offset points", "rotation": 90, "ha": "right", "va": "top"}
        axes[0].annotate(note, (width, 0.6), **place, fontsize=8, color=color)
    axes[0].axvline(guess, color="black", ls="-.", lw=1.2, label=f"my guess: N = {guess:g}")
    axes[0].set(ylabel="retrieval loss, 0.5 |error|²", ylim=(-0.012, 0.61))
    for axis in axes:
        axis.legend(fontsize=7.5, loc="upper left", bbox_to_anchor=(0, -0.14), ncols=2)
    axes[0].get_legend().set_title("grey: the authors' logs, Schlag et al. 2021", {"size": 7.5})
    return figure


def _memory(memory: str, rule: str) -> str:
    return SHORT[memory] if rule == "sum" else f"delta rule, {SHORT[memory]}"


def interference(keys, curves: dict[tuple[str, str], list[float]], width: float, marked: int) -> plt.Figure:
    """Retrieval error of untrained random keys over their number, {(rule, features): values}, over the law's line."""
    figure, axis = plt.subplots(figsize=(6.4, 4))
    law = [(n - 1) / width for n in keys]
    axis.plot(keys, law, color=COLORS["law"], lw=1.2, label=f"law of the sum rule, (N - 1) / {width:g}")
    for (rule, features), values in curves.items():
        color, marker = (COLORS["delta"], "v") if rule == "delta" else (_color(features), "o")
        axis.plot(keys, values, marker, ms=5, color=color, label=f"{rule} rule, features: {features}")
    axis.axvline(marked, color="black", ls="--", lw=1, label=f"N = {marked}")
    axis.set(xlabel="number of keys N", ylabel="mean squared error of a read value", yscale="log")
    ticks(axis, keys)
    axis.legend(loc="upper left")
    return figure


def legend(figure: plt.Figure, **look) -> None:
    """One legend below all panels, each label once."""
    found = [axis.get_legend_handles_labels() for axis in figure.axes]
    entries = {label: handle for handles, labels in found for handle, label in zip(handles, labels, strict=True)}
    figure.legend(entries.values(), entries.keys(), loc="outside lower center", **look)


def ticks(axis, values) -> None:
    """A logarithmic x axis with plain numbers where the points are."""
    axis.set_xscale("log", base=2)
    axis.set_xticks(values, [f"{n / 1024:g}k" if n >= 1024 and n % 1024 == 0 else f"{n:g}" for n in values])
    axis.minorticks_off()


def recall_curves(rows: list[dict]) -> plt.Figure:
    """MQAR accuracy over training steps: thin lines for seeds, thick for the mean, a panel for each number of pairs."""
    panels = pd.DataFrame(rows).groupby("pairs")
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 3.8), sharey=True, squeeze=False)
    for (pairs, panel), axis in zip(panels, axes[0], strict=True):
        for (kind, lr), mine in panel.groupby(["kind", "lr"]):
            curves = mine.filter(like="step ").rename(columns=lambda name: int(name.split()[1]))
            look = {"color": _color(kind), "ls": "--" if lr > 5e-3 else "-"}
            axis.plot(curves.T, **look, lw=0.6, alpha=0.6, label="_")
            label = f"{NAMES.get(kind, kind)}, rate {lr:g}, {len(mine)} seed{'s' * (len(mine) > 1)}"
            axis.plot(curves.mean(), **look, lw=2.2, label=label)
        axis.set(xlabel="training steps (64 rows of 64 tokens)", title=f"{pairs} pairs")
    axes[0, 0].set(ylabel="share of values recalled", ylim=(-0.02, 1.02))
    legend(figure, ncols=3)
    return figure


def scaling(lengths, panels: dict[str, dict[str, list[float]]], xlabel: str, notes: dict | None = None) -> plt.Figure:
    """Log-log curves over length, a panel for each quantity {"ylabel": {kind: values}}; notes join the labels."""
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 3.8), squeeze=False)
    for (ylabel, curves), axis in zip(panels.items(), axes[0], strict=True):
        for kind, values in curves.items():
            note = (notes or {}).get((ylabel, kind), "")
            color = _color("softmax" if kind == "written out" else kind)
            label, size = NAMES.get(kind, kind) + note, 6 if kind == "elu" else 4  # seen where delta lies on it
            axis.plot(lengths[: len(values)], values, LINES.get(kind, "o-"), ms=size, color=color, label=label)
        axis.set(xlabel=xlabel, ylabel=ylabel, yscale="log")
        ticks(axis, lengths)
        axis.legend()
    return figure
