"""Figures say what they show: axes end where what is drawn does, every line has its entry in a legend, once."""

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from dsl import curves, plots, study_plots
from dsl.schema import TrainConfig


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


def labels(legend):
    return [text.get_text() for text in legend.get_texts()]


def test_the_last_part_of_quality_ends_with_the_slowest_mean():
    seconds = {0: 10.0, 1: 30.0}  # seeds of one configuration: the mean, which is drawn, ends at 20
    rows = [("hybrid", s, n, 100 * n, x * n / 4, 5.0 - n) for s, x in seconds.items() for n in range(1, 5)]
    names = ["config", "seed", "step", "tokens", "cpu_seconds", "held_out_bits_per_byte"]
    runs = pd.DataFrame([("hybrid", s, 1e9) for s in seconds], columns=["config", "seed", "training_flops"])
    figure = study_plots.quality(pd.DataFrame(rows, columns=names), runs)
    assert figure.axes[5].get_xlim() == pytest.approx((12, 20.2)), "the axis ends with the line"


def test_runs_of_two_windows_share_the_bins_beyond_them():
    wide, narrow = (("wide", key, 1.0) for key in (8, 16)), (("narrow", key, 2.0) for key in (2, 4, 8, 16))
    rows = [(config, 0, measure, key, x) for config, key, x in (*wide, *narrow) for measure in ("position", "longer")]
    table = pd.DataFrame(rows, columns=["config", "seed", "measure", "key", "value"])
    figure = study_plots.positions(table)
    right = figure.axes[2]
    assert [text.get_text() for text in right.get_xticklabels()] == ["2–3", "4–7", "8–15", "16–31"]
    drawn = [[round(x) for x, y in line.get_xydata() if y == y] for line in right.lines]
    assert [2, 3] in drawn and [0, 1, 2, 3] in drawn, "the wide one has nothing before 8"


@pytest.mark.parametrize("layers", [1, 3, 4, 5])
def test_expert_load_has_a_panel_for_each_layer(layers):
    table = pd.DataFrame({"step": [1, 2]} | {f"load_{i}": ["0.5;0.5", "0.2;0.8"] for i in range(layers)})
    figure = curves.expert_load(table)
    assert [axis.get_title() for axis in figure.axes] == [*(f"layer {i}" for i in range(layers)), ""]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_both_rates_are_drawn_whole_where_muon_moves_the_matrices(optimizer):
    table = pd.DataFrame({"step": [1, 2, 3], "loss": [3.0, 2, 1], "lr": [0.5, 1.0, 0.0], "scale": 1.0})
    table = table.assign(held_out_bits_per_byte=float("nan"), load_0="0.5;0.5")
    train = TrainConfig(optimizer=optimizer, learning_rate=1.0, muon_learning_rate=2.0)
    figure = curves.training(table, "mine", train=train)
    middle = figure.axes[2]
    drawn = [list(line.get_ydata()) for line in middle.lines]
    assert drawn == [[0.5, 1, 0], [1, 2, 0]][: 1 + (optimizer == "muon")]
    assert middle.get_ylim()[1] > max(map(max, drawn))
    assert ("AdamW" in middle.get_ylabel()) == (optimizer == "adamw")
    assert figure.get_suptitle() == "mine"


def test_one_legend_has_each_label_once():
    rows = [
        {"pairs": n, "kind": k, "lr": 0.003, "step 1": 0.1, "step 2": 0.9} for n in (4, 8) for k in ("elu", "delta")
    ]
    figure = plots.recall_curves(rows)
    assert [axis.get_legend() for axis in figure.axes] == [None, None]
    assert sorted(labels(figure.legends[0])) == ["delta rule, rate 0.003, 1 seed", "linear (ELU+1), rate 0.003, 1 seed"]


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
