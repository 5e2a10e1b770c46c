"""A run's files as figures and tables: loss, learning rate, expert load, the texts over training.

Reads metrics.csv and generations.csv, also those of a run that died; never touches a model or a trainer.
"""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from dsl import plots


def metrics(log_dir: Path) -> pd.DataFrame:
    """The rows of metrics.csv, complete ones only. Raises FileNotFoundError where a run has written none."""
    path = Path(log_dir) / "metrics.csv"
    if not path.exists():
        raise FileNotFoundError(f"no metrics.csv in {log_dir}: the run has not logged a step yet")
    return pd.read_csv(path).dropna(subset=["step", "loss"])


def load(table: pd.DataFrame) -> dict[int, np.ndarray]:
    """Share of the assignments by MoE layer: {layer: [rows, experts]}."""
    names = [name for name in table if name.startswith("load_")]
    return {int(name[5:]): np.array([[float(x) for x in text.split(";")] for text in table[name]]) for name in names}


def training(table: pd.DataFrame, title: str = "", beside: pd.DataFrame | None = None) -> plt.Figure:
    """Loss and held-out bits per byte, learning rate, and the most loaded expert of each layer, over the steps.

    `beside` is another run's table, whose loss is drawn too; fp16's scale stands beside the learning rate.
    """
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    left.plot(table.step, table.loss, color=plots.COLORS["loss"], label="training loss, nats per token")
    if beside is not None:
        left.plot(beside.step, beside.loss, ":", color=plots.COLORS["law"], label="training loss of the run beside")
    held_out = table.dropna(subset=["held_out_bits_per_byte"])
    left.plot(
        held_out.step,
        held_out.held_out_bits_per_byte,
        "o-",
        color=plots.COLORS["held_out"],
        label="held-out, bits per byte",
    )
    left.set(xlabel="step", ylabel="nats per token, bits per byte", title=title)
    left.legend(frameon=False)
    middle.plot(table.step, table.lr, color=plots.COLORS["other"])
    middle.set(xlabel="step", ylabel="learning rate")
    if (table.scale != 1).any():
        scale = middle.twinx()
        skipped = f"{table.skipped_steps.iloc[-1]:.0f} batches left out"
        scale.step(table.step, table.scale, color=plots.COLORS["latent"], where="post", label=skipped)
        scale.set_yscale("log", base=2)
        scale.set_ylabel("scale of the fp16 loss")
        scale.legend(loc="lower center")
    for layer, shares in load(table).items():
        right.plot(table.step, shares.max(1) * shares.shape[1] - 1, label=f"layer {layer}")
    right.set(xlabel="step", ylabel="MaxVio = busiest / mean - 1", ylim=(0, None))
    if right.lines:
        right.legend(frameon=False, ncols=2)
    return figure


def expert_load(table: pd.DataFrame) -> plt.Figure | None:
    """Share of tokens of each expert over the steps, one heat map a layer; white is the even share."""
    layers = load(table)
    if not layers:
        return None
    columns = min(4, len(layers))
    rows = math.ceil(len(layers) / columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(3 * columns, 0.8 + 1.7 * rows), layout="constrained", squeeze=False
    )
    even = 1 / next(iter(layers.values())).shape[1]
    for axis, (layer, shares) in zip(axes.flat, layers.items(), strict=False):
        steps = table.step
        image = axis.imshow(
            shares.T / even,
            aspect="auto",
            cmap="RdBu_r",
            vmin=0,
            vmax=2,
            interpolation="nearest",
            extent=(steps.iloc[0], steps.iloc[-1] + 1, shares.shape[1] - 0.5, -0.5),
        )
        axis.grid(False)
        axis.set(title=f"layer {layer}", xlabel="step", ylabel="expert", yticks=range(shares.shape[1]))
    for axis in axes.flat[len(layers) :]:
        axis.remove()
    figure.colorbar(image, ax=axes, label="share of tokens / even share")
    return figure


def texts(log_dir: Path, characters: int = 240) -> pd.DataFrame:
    """What the run wrote for each prompt: one row a prompt, one column a sampled step."""
    table = pd.read_csv(Path(log_dir) / "generations.csv", keep_default_na=False)
    table = table.drop_duplicates(["step", "prompt"], keep="last")
    table["text"] = table.text.str.slice(0, characters)
    return table.pivot(index="prompt", columns="step", values="text").reindex(table.prompt.unique())
