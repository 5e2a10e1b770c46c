"""A run's files as figures and tables: loss, learning rate, expert load, the texts over training.

Reads metrics.csv and generations.csv, also those of a run that died; never touches a model or a trainer.
"""

import csv
import io
import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from dsl import runlog
from dsl.plots import COLORS
from dsl.schema import TrainConfig


def metrics(log_dir: Path) -> pd.DataFrame:
    """The rows of metrics.csv, complete ones only. Raises FileNotFoundError where a run has written none."""
    text = runlog.complete(Path(log_dir) / "metrics.csv")
    if not text.strip():
        raise FileNotFoundError(f"no metrics.csv in {log_dir}: the run has not logged a step yet")
    table = pd.read_csv(io.StringIO(text))
    return table.astype({name: str for name in table if name.startswith("load_")})  # that of one expert is a number


def load(table: pd.DataFrame) -> dict[int, np.ndarray]:
    """Share of the assignments by MoE layer: {layer: [rows, experts]}."""
    names = [name for name in table if name.startswith("load_")]
    return {int(name[5:]): np.array([[float(x) for x in text.split(";")] for text in table[name]]) for name in names}


def training(
    table: pd.DataFrame, title: str = "", beside: pd.DataFrame | None = None, train: TrainConfig | None = None
) -> plt.Figure:
    """Loss and held-out bits per byte, learning rate, and the most loaded expert of each layer, over the steps.

    `beside` is another run's table, whose loss is drawn too; fp16's scale stands beside the learning rate. The table
    has AdamW's rate; `train`, the run's settings, says whether Muon moves the matrices, and how fast.
    """
    figure, (left, held_out, middle, right) = plt.subplots(1, 4, figsize=(14, 3.2))
    left.plot(table.step, table.loss, color=COLORS["loss"], label=title)
    if beside is not None:
        left.plot(beside.step, beside.loss, ":", color=COLORS["law"], label="the run beside")
        left.legend()
    left.set(xlabel="step", ylabel="training loss, nats per token")
    held_out.plot(table.set_index("step").held_out_bits_per_byte.dropna(), "o-", color=COLORS["held_out"])
    held_out.set(xlabel="step", ylabel="held-out, bits per byte", xlim=left.get_xlim())
    middle.plot(table.step, table.lr, color=COLORS["other"], label="AdamW")
    middle.set(xlabel="step", ylabel="learning rate of AdamW")
    if train is not None and train.optimizer == "muon":
        muon = table.lr * (train.muon_learning_rate / train.learning_rate)  # it follows in proportion
        middle.plot(table.step, muon, "--", color=COLORS["law"], label="Muon")
        middle.set(ylabel="learning rate")
        middle.legend()
    middle.set(ylim=(0, None))  # last: it would keep what is drawn later out
    if (table.scale != 1).any():
        scale = middle.twinx()
        skipped = f"{table.skipped_steps.iloc[-1]:.0f} batches left out"
        scale.step(table.step, table.scale, color=COLORS["latent"], where="post", label=skipped)
        scale.set_yscale("log", base=2)
        scale.set_ylabel("scale of the fp16 loss")
        scale.grid(visible=False)
        scale.legend(loc="lower center")
    layers = load(table)
    for (layer, shares), tone in zip(layers.items(), np.linspace(1, 0.4, len(layers)), strict=True):
        maxvio, color = shares.max(1) * shares.shape[1] - 1, plt.get_cmap("Purples")(tone)
        right.plot(table.step, maxvio, color=color, label=f"layer {layer}")
    right.set(xlabel="step", ylabel="MaxVio = busiest / mean - 1", ylim=(0, None))
    if right.lines:
        right.legend(ncols=2)
    figure.suptitle(title, fontsize=plt.rcParams["axes.titlesize"])
    return figure


def expert_load(table: pd.DataFrame) -> plt.Figure:
    """Share of tokens of each expert over the steps, one heat map a layer; white is the even share.

    Raises ValueError where there are none.
    """
    layers = load(table)
    if not layers:
        raise ValueError("table must have columns load_0, load_1, ..., got none: the run has no experts")
    columns = min(4, len(layers))
    rows = math.ceil(len(layers) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(max(4.5, 3 * columns), 0.8 + 1.7 * rows), squeeze=False)
    look = {"aspect": "auto", "cmap": "RdBu_r", "vmin": 0, "vmax": 2, "interpolation": "nearest"}
    for axis, (layer, shares) in zip(axes.flat, layers.items(), strict=False):
        experts = shares.shape[1]
        steps = table.step.iloc[0], table.step.iloc[-1] + 1
        image = axis.imshow(shares.T * experts, extent=(*steps, experts - 0.5, -0.5), **look)
        axis.grid(False)
        axis.set(title=f"layer {layer}", xlabel="step", ylabel="expert", yticks=range(experts))
    for axis in axes.flat[len(layers) :]:
        axis.remove()
    figure.colorbar(image, ax=figure.axes, label="share / even share", extend="max")
    return figure


def texts(log_dir: Path) -> pd.DataFrame:
    """What the run wrote for each prompt: one row a prompt, one column a sampled step; empty before the first."""
    rows = [*csv.reader(io.StringIO(runlog.complete(Path(log_dir) / "generations.csv")))][1:]
    table = pd.DataFrame(rows, columns=[*runlog.GENERATION_COLUMNS]).astype({"step": int})
    table = table.drop_duplicates(["step", "prompt"], keep="last").assign(text=lambda t: t.text.str[:240])
    return table.pivot(index="prompt", columns="step", values="text").reindex(table.prompt.unique())
