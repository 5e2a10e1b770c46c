"""Figures say what they show: axes end where what is drawn does, every line has its entry in a legend, once."""

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from dsl import curves, plots, study_plots
from dsl.runlog import RunLog
from dsl.schema import TrainConfig


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


def labels(legend):
    return [text.get_text() for text in legend.get_texts()]


def test_the_last_part_of_quality_is_less_the_softmax_run_of_the_same_seed_at_the_same_cost():
    rows = [
        (c, s, n, 100 * n, 5 + s + x - n)
        for c, x in (("softmax", 0), ("hybrid", 0.1))
        for s in (0, 1)
        for n in range(1, 6)
    ]
    table = pd.DataFrame(rows, columns=["config", "seed", "step", "tokens", "held_out_bits_per_byte"])
    # a step of seed 1 takes three times as long as one of seed 0, and one of hybrid a tenth longer: it ends at 110 %
    table["cpu_seconds"] = table.step * (1 + 2 * table.seed) * (1 + 0.1 * (table.config == "hybrid"))
    runs = pd.DataFrame([("softmax", 1e9), ("hybrid", 2e9)], columns=["config", "training_flops"])
    figure = study_plots.quality(table, runs.assign(optimizer_flops=0))
    last = [{line.get_color(): line.get_xydata()[-1] for line in axis.lines} for axis in figure.axes[3:]]
    tokens, flops, seconds = (ends[study_plots.HYBRID] for ends in last)
    assert tokens == pytest.approx((1, 0.1)), "after as many tokens"
    assert flops == pytest.approx((1, study_plots.FAR)), (
        "after half as many steps: 2.5 + .1 bits behind, beyond the frame"
    )
    # at the end of softmax, 5 steps, hybrid has made 5 / 1.1 of them
    assert seconds == pytest.approx((1, study_plots.FAR)) and study_plots.FAR < 5 - 5 / 1.1 + 0.1
    assert figure.axes[3].get_ylabel() == "less those of softmax at the same cost"


def test_runs_of_two_windows_share_the_bins_beyond_them():
    wide, narrow = (("wide", key, 1.0) for key in (8, 16)), (("narrow", key, 2.0) for key in (2, 4, 8, 16))
    rows = [(config, 0, measure, key, x) for config, key, x in (*wide, *narrow) for measure in ("past", "longer")]
    table = pd.DataFrame(rows, columns=["config", "seed", "measure", "key", "value"])
    figure = study_plots.positions(table)
    left, _, right = figure.axes
    assert [text.get_text() for text in left.get_xticklabels()] == ["2", "3–4", "5–8", "9–16"]
    assert [text.get_text() for text in right.get_xticklabels()] == ["2–3", "4–7", "8–15", "16–31"]
    drawn = [[round(x) for x, y in line.get_xydata() if y == y] for line in right.lines]
    assert [2, 3] in drawn and [0, 1, 2, 3] in drawn, "the wide one has nothing before 8"


def test_an_effect_that_would_hide_the_others_is_written_out():
    rows = [("small", 0.01, 0.002, 0.0), ("large", -0.4, 0.05, 0.0)]
    table = pd.DataFrame(rows, columns=["name", "mean", "half", "neutral"]).assign(low=float("nan"), high=float("nan"))
    [axis] = study_plots.differences({"bits per byte": table}).axes
    assert [text.get_text() for text in axis.texts] == ["-0.40 ± 0.05"]
    assert max(abs(x) for x in axis.get_xlim()) < 0.1


@pytest.mark.parametrize("layers", [1, 3, 4, 5])
def test_expert_load_has_a_panel_for_each_layer(layers):
    table = pd.DataFrame({"step": [1, 2]} | {f"load_{i}": ["0.5;0.5", "0.2;0.8"] for i in range(layers)})
    figure = curves.expert_load(table)
    assert [axis.get_title() for axis in figure.axes] == [*(f"layer {i}" for i in range(layers)), ""]


@pytest.mark.parametrize("experts", [0, 1])
def test_a_run_with_one_expert_or_none_is_drawn_from_its_files(tmp_path, experts):
    with RunLog(tmp_path) as log:
        log.open_tables(range(experts))
        for step in (1, 2):
            log.row({"step": step, "loss": 3.0, "lr": 0.1, "scale": 1.0, "load_0": "1"})
    table = curves.metrics(tmp_path)
    assert [axis.get_title() for axis in curves.training(table).axes] == [""] * 4
    assert [(layer, shares.tolist()) for layer, shares in curves.load(table).items()] == [(0, [[1], [1]])][:experts]
    if experts:
        assert curves.expert_load(table).axes[0].get_title() == "layer 0"
    else:
        with pytest.raises(ValueError, match="has no experts"):
            curves.expert_load(table)


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
