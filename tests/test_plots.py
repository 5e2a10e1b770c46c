"""Figures say what they show: axes end where what is drawn does, every line has its entry in a legend, once."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from dsl import curves, plots, study_plots
from dsl.schema import TrainConfig


def labels(legend):
    return [text.get_text() for text in legend.get_texts()]


def test_the_last_part_of_quality_ends_with_the_slowest_mean():
    seconds = {0: 10.0, 1: 30.0}  # seeds of one configuration: the mean, which is drawn, ends at 20
    rows = [("hybrid", s, n, 100 * n, x * n / 4, 5.0 - n) for s, x in seconds.items() for n in range(1, 5)]
    names = ["config", "seed", "step", "tokens", "cpu_seconds", "held_out_bits_per_byte"]
    runs = pd.DataFrame([("hybrid", s, 1e9) for s in seconds], columns=["config", "seed", "training_flops"])
    figure = study_plots.quality(pd.DataFrame(rows, columns=names), runs)
    lower = figure.axes[5]
    assert lower.get_xlim() == pytest.approx((12, 20.2)), "the axis ends with the line"
    plt.close(figure)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_both_rates_are_drawn_whole_where_muon_moves_the_matrices(optimizer):
    table = pd.DataFrame({"step": [1, 2, 3], "loss": [3.0, 2, 1], "lr": [0.5, 1.0, 0.0], "scale": 1.0})
    table = table.assign(held_out_bits_per_byte=float("nan"), load_0="0.5;0.5")
    train = TrainConfig(optimizer=optimizer, learning_rate=1.0, muon_learning_rate=2.0)
    figure = curves.training(table, "mine", train=train)
    middle = figure.axes[1]
    drawn = [list(line.get_ydata()) for line in middle.lines]
    assert drawn == [[0.5, 1, 0], [1, 2, 0]][: 1 + (optimizer == "muon")]
    assert middle.get_ylim()[1] > max(map(max, drawn))
    assert ("AdamW" in middle.get_ylabel()) == (optimizer == "adamw")
    assert figure.get_suptitle() == "mine"
    plt.close(figure)


def test_one_legend_has_each_label_once():
    rows = [
        {"pairs": n, "kind": k, "lr": 0.003, "step 1": 0.1, "step 2": 0.9} for n in (4, 8) for k in ("elu", "delta")
    ]
    figure = plots.recall_curves(rows)
    assert [axis.get_legend() for axis in figure.axes] == [None, None]
    assert sorted(labels(figure.legends[0])) == ["delta rule, rate 0.003, 1 seed", "linear (ELU+1), rate 0.003, 1 seed"]
    plt.close(figure)


def test_effects_say_which_side_is_better():
    columns = ["name", "mean", "half", "neutral", "low", "high"]
    found = {
        "bits per byte": pd.DataFrame([("Muon", -0.3, 0.1, 0, 1, 1)], columns=columns),
        "times fewer tokens": pd.DataFrame([("Muon", 2.0, 0.1, 1, 1, 1)], columns=columns),
    }
    figure = study_plots.differences(found)
    assert "better" in figure.axes[0].get_title("left")
    assert "better" in figure.axes[1].get_title("right")
    assert "published" in labels(figure.legends[0])
    plt.close(figure)
