"""Runs side by side from their files, also broken ones; and the arithmetic of intervals and verdicts, by hand."""

import math
import sys

import pandas as pd
import pytest
from runs import make

from dsl import compare
from dsl.attention import MIXERS
from dsl.runlog import RunLog
from dsl.settings import SettingsError


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("DSL_HOME", str(tmp_path))
    return tmp_path


def logged(name: str, steps=(4, 8, 12), *, measured=(4, 8, 12), fingerprint="abc", skipped=0, **settings):
    """The log folder of a run with a row at each step: half a second a step on one thread, 64 tokens."""
    run = make(name, moe_layers=[1], **settings)
    with RunLog(run.log_dir) as log:
        log.hparams(run.to_dict(), {"corpus": fingerprint})
        log.open_tables(run.model.moe_layers)
        for step in steps:
            row = {"step": step, "tokens": 64 * step, "loss": 6 - step / 10, "skipped_steps": skipped}
            row |= {"step_seconds": 0.5, "cpu_percent": 80.0, "held_out_bits_per_byte": 4 - step / 10}
            log.row(row if step in measured else row | {"held_out_bits_per_byte": None})
    return run.log_dir


def test_a_run_that_ended(home):
    row = compare.row(logged("whole"))
    assert (row["status"], row["step"], row["tokens"], row["notes"]) == ("complete", 12, 768, "")
    assert row["bits_per_byte"] == pytest.approx(2.8) and row["cpu_seconds"] == pytest.approx(12 * 0.5 * 0.8)
    assert row["tokens_per_cpu_second"] == pytest.approx(64 / 0.4)
    assert row["active_parameters"] < row["parameters"] and row["state_bytes_256"] < row["state_bytes_8192"]


def test_a_run_that_died_shows_how_far_it_came(home):
    row = compare.row(logged("died", (4, 8), measured=(4,), skipped=2))
    assert row["status"] == "stopped at step 8" and row["bits_per_byte"] == pytest.approx(3.6)
    assert row["notes"] == "held-out text was last measured at step 4; 2 batches were left out"


def test_missing_rows_are_counted_and_their_time_is_not_lost(home):
    whole, holes = compare.row(logged("whole")), compare.row(logged("holes", (4, 12), measured=()))
    assert holes["notes"] == "held-out text was never measured; 1 rows are missing"
    assert holes["bits_per_byte"] is None and holes["cpu_seconds"] == pytest.approx(whole["cpu_seconds"])


def test_a_mixer_that_is_not_here_costs_nothing_but_its_figures(home):
    row = compare.row(logged("gone", layer_types=["linear_attention"], linear_attention_kind="not_here:Mixer"))
    assert "its cost is unknown: linear_attention_kind='not_here:Mixer' is code from elsewhere" in row["notes"]
    assert row["status"] == "complete" and "parameters" not in row


def test_code_that_a_log_names_is_not_run(home, monkeypatch):
    (home / "loud_module.py").write_text("raise SystemExit('run')")
    monkeypatch.chdir(home)
    row = compare.row(logged("loud", layer_types=["linear_attention"], linear_attention_kind="loud_module:Mixer"))
    assert "is code from elsewhere" in row["notes"] and "loud_module" not in sys.modules


def test_a_mixer_of_somebodys_that_fails_ends_no_table(home, monkeypatch):
    monkeypatch.setitem(MIXERS, "broken", lambda config: 1 / 0)
    row = compare.row(logged("broken", layer_types=["linear_attention"], linear_attention_kind="broken"))
    assert "its cost is unknown: division by zero" in row["notes"] and row["status"] == "complete"


def test_rows_of_fewer_steps_have_no_maxvio(home):
    place = logged("short", (4, 8, 11, 12, 16), measured=())
    table = pd.read_csv(place / "metrics.csv").assign(maxvio_1=[1.0, 2, 3, 4, 5])
    table.to_csv(place / "metrics.csv", index=False)
    assert compare.curve(place).maxvio.fillna(-1).tolist() == [1, 2, -1, -1, 5]


def test_a_cut_row_is_no_row(home):
    place = logged("cut")
    text = (place / "metrics.csv").read_text()
    (place / "metrics.csv").write_text(text[: text.rindex("12,768") + 2])
    assert compare.row(place)["status"] == "stopped at step 8"


@pytest.mark.parametrize(
    ("spoil", "note"),
    [
        (lambda file: file.unlink(), "no hparams.yaml"),
        (lambda file: file.write_text("model: [1"), "hparams.yaml: "),
        (lambda file: file.write_text("modle: {}"), "unknown section 'modle'"),
        (lambda file: file.write_text("nothing"), "must have sections"),
        (lambda file: file.write_text(file.read_text().replace("train:", "train:\n  later: 1", 1)), "'later'"),
    ],
)
def test_without_settings_the_curve_still_speaks(home, spoil, note):
    place = logged("bare")
    spoil(place / "hparams.yaml")
    row = compare.row(place)
    assert note in row["notes"] and row["bits_per_byte"] == pytest.approx(2.8) and "parameters" not in row


def test_a_run_that_logged_nothing(home):
    empty = logged("empty", ())
    assert compare.row(empty)["status"] == "no row logged"
    (empty / "metrics.csv").write_text("")
    assert compare.row(empty)["status"] == "no row logged"
    (empty / "metrics.csv").unlink()
    assert compare.row(empty)["status"] == "no row logged"


def test_what_cannot_be_compared_is_said(home):
    one = logged("one")
    assert compare.table([one, logged("same", seed=1)])[1] == []
    assert "different corpora" in compare.table([one, logged("other", fingerprint="xyz")])[1][0]
    [tokenizers] = compare.table([one, logged("bpe", tokenizer="bpe:280", vocab_size=280)])[1]
    assert "different tokenizers: compare bits per byte" in tokenizers
    assert "numbers of steps" in compare.table([one, logged("short", (4, 8))])[1][0]
    rows, warnings = compare.table([one, logged("less", held_out_bytes=1000)])
    assert list(rows.run) == ["one", "less"] and "amounts of held-out text" in warnings[0]


def test_names_are_folders_of_logs(home):
    place = logged("mine")
    assert compare.log_dirs("mine, mine") == [place, place]
    for nothing in ("", ","):
        with pytest.raises(SettingsError, match=f"run must name folders of logs/training, got '{nothing}'"):
            compare.log_dirs(nothing)
    with pytest.raises(SettingsError, match="run must name folders of logs/training, got 'mime', did you mean 'mine'"):
        compare.log_dirs("mine,mime")


def test_an_interval_by_hand():
    # mean 2, standard deviation 1, three values: 4.30 / sqrt(3)
    assert compare.interval([1, 2, 3]) == (2.0, pytest.approx(4.30 / math.sqrt(3)))
    mean, half = compare.interval([5.0])
    assert mean == 5 and math.isnan(half)
    assert all(math.isnan(x) for x in compare.interval([]))
    assert compare.interval([1, math.nan, 3])[0] == 2
    twelve = [0.0, 2.0] * 6  # t of 11 degrees of freedom is 2.201
    assert compare.interval(twelve)[1] == pytest.approx(2.201 * math.sqrt(12 / 11) / math.sqrt(12), rel=0.01)


def test_a_difference_is_paired_by_seed():
    rows = [("a", 0, 1.0), ("a", 1, 2.0), ("a", 2, 3.0), ("b", 0, 0.9), ("b", 1, 1.9), ("b", 3, 9.0)]
    table = pd.DataFrame(rows, columns=["config", "seed", "bits_per_byte"])
    mean, half, seeds = compare.difference(table, "a", "b")
    assert (mean, seeds) == (pytest.approx(0.1), 2) and half == pytest.approx(0, abs=1e-12)
    mean, half, seeds = compare.difference(table, "a", "c")
    assert seeds == 0 and math.isnan(mean)


@pytest.mark.parametrize(
    ("mean", "half", "sign", "verdict"),  # a sign of 0: no effect is a claim too
    [
        (-0.3, 0.1, -1, "for"), (-0.3, 0.1, 1, "against"), (0.3, 0.1, 1, "for"),
        (0.3, 0.4, 1, "silent"), (0.3, 0.3, 1, "silent"), (0.3, math.nan, 1, "silent"),
        (0.002, 0.002, 0, "for"), (0.002, 0.006, 0, "silent"), (-0.020, 0.006, 0, "against"),
        (0.0, math.nan, 0, "silent"),
    ],
)  # fmt: skip
def test_a_verdict_needs_its_interval(mean, half, sign, verdict):
    assert compare.verdict(mean, half, sign, margin=0.005) == verdict


def test_no_effect_has_no_margin_unless_it_is_given():
    assert [compare.verdict(mean, 0.0, 0) for mean in (0.0, 1e-6)] == ["for", "against"]
