"""What a reader sees of a run before it starts and while it trains: a forecast in words, a panel that follows."""

import html
import re
import time

import pandas as pd
import pytest
import torch
from runs import cache, home, make, table, train  # noqa: F401

from dsl import compare, curves, report, training, widgets
from dsl.runlog import RunLog

pytestmark = pytest.mark.usefixtures("home")


@pytest.fixture
def panels(monkeypatch):
    """The panels that a notebook would show."""
    shown = []
    monkeypatch.setattr(widgets, "live", lambda: True)
    monkeypatch.setattr("IPython.display.display", shown.append)
    return shown


def test_without_a_frontend_there_is_no_panel_and_the_lines_are_printed(capfd):
    assert widgets.dashboard(make()) is None
    training.train(make(), on_log=widgets.dashboard(make()))
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("step ") and "/12  loss" in line]
    assert len(lines) == len(table(make())) == 4


def test_the_panel_follows_a_run_and_one_that_goes_on(panels):
    pages, follow = [], widgets.dashboard(make())
    (panel,) = panels
    panel.observe(lambda change: pages.append(change["new"]), "value")
    train(on_log=follow, stop_at_step=8)
    assert len(pages) == len(table(make())) == 3
    assert "step 4/12  loss" in pages[0] and "step 8/12" in pages[-1]
    assert [page.count("<polyline") for page in pages] == [2, 3, 3], "held-out bits are there once they are measured"
    loss = float(table(make())[-1]["loss"])
    assert f"loss, nats per token: {loss:.4g}" in pages[-1] and "held-out, bits per byte: 5." in pages[-1]
    shares = re.findall(r"(\d+)%</td>", re.search(r"<tr><th>layer 1</th>.*?</tr>", pages[-1])[0])
    assert len(shares) == 4 and abs(sum(map(int, shares)) - 100) <= 2
    assert "step 6 writes" in pages[-1] and "step 6 writes" not in pages[0] and "An unusual" in pages[-1]

    again = widgets.dashboard(make())
    assert "step 8/12" in panels[1].value, "what the files hold is shown at once"
    train(on_log=again)
    points = re.search(r"points='([^']*)'", panels[1].value)[1].split()
    assert "step 12/12" in panels[1].value and len(points) == len(table(make())) == 4


@pytest.mark.parametrize(
    ("metrics", "generations"),
    [("12,768,,4.8,", "12,The,"), ("12,768,0,4.8,,0.1,1,1,0" + 10 * ",9", '12,The,"a\n'), ("1", '12,"The"')],
)
def test_a_row_that_a_full_disk_cut_short_is_no_row(panels, monkeypatch, metrics, generations):
    """For the panel, the tables and the forecast, before the run goes on and mends its files."""
    alone = {"num_experts": 1, "num_experts_per_tok": 1}
    train(stop_at_step=8, **alone)
    log = make().log_dir
    whole, texts = curves.metrics(log), curves.texts(log)
    for name, torn in {"metrics.csv": metrics, "generations.csv": generations}.items():
        with (log / name).open("a", encoding="utf-8") as file:
            file.write(torn)
    pd.testing.assert_frame_equal(curves.metrics(log), whole)
    pd.testing.assert_frame_equal(curves.texts(log), texts)
    assert compare.row(log)["step"] == 8
    with monkeypatch.context() as patch:
        patch.setattr(report, "LanguageModel", lambda config: pytest.fail("measured anew"))
        assert report.forecast(make(**alone))["time"].endswith("as the run's log says")
    follow = widgets.dashboard(make(**alone))
    assert "step 8/12" in panels[0].value and "nan" not in panels[0].value, "step 8 measured nothing"
    assert "step 6 writes" in panels[0].value and "100%</td>" in panels[0].value
    train(on_log=follow, **alone)
    assert "step 12/12" in panels[0].value and [*curves.metrics(log).step] == [4, 6, 8, 12]


def test_texts_are_texts_and_there_may_be_none(tmp_path):
    assert curves.texts(tmp_path).empty
    with RunLog(tmp_path) as log:
        log.open_tables([])
        assert curves.texts(tmp_path).empty
        log.generation(3, "1", "007")
    assert curves.texts(tmp_path).to_dict() == {3: {"1": "007"}}


def test_a_page_does_not_grow_with_the_run():
    """What an update costs is bounded: a thousand rows and a hundred thousand draw as many points."""
    sizes = []
    for count in (1_000, 100_000):
        row = {"loss": 3.0, "lr": 1e-3, "tokens_per_second": 9.0, "load_1": "0.5;0.5", "held_out_bits_per_byte": None}
        page = widgets._page([{**row, "step": step, "loss": 3 + 1 / step} for step in range(1, count)], make())
        sizes.append(page.count(","))
    assert max(sizes) < 2 * widgets.POINTS + 20, "two curves and little else"


def test_texts_are_shown_as_text(panels):
    train(max_steps=6)
    path = make().log_dir / "generations.csv"
    path.write_text("step,prompt,text\n6,The,<script>alert(1)</script>\n")
    widgets.dashboard(make())
    assert "&lt;script&gt;" in panels[0].value and "<script>" not in panels[0].value


def test_a_table_of_texts_keeps_their_lines_and_spaces():
    texts = pd.DataFrame({1: ["  a\n    <b>"], 20: [repr("\n")]}, index=pd.Index(["p"], name="prompt"))
    page = widgets.table_html(texts.rename_axis(columns="step"))
    cells = re.findall(r"<(t[hd]) style='[^']*text-align:left[^']*white-space:pre-wrap'>(.*?)</\1>", page)
    assert [text for _, text in cells[:3]] == ["prompt", "step 1", "step 20"]
    assert [html.unescape(text) for _, text in cells[3:]] == ["p", "  a<br>    <b>", r"'\n'"]
    assert "<b>" not in page and "0.50" in widgets.table_html(pd.DataFrame({"x": [0.5]}), index=False)


def test_a_forecast_counts_memory_work_and_time(monkeypatch):
    run = make(per_device_train_batch_size=2, gradient_accumulation_steps=3)
    told = report.forecast(run)
    assert told["work"].startswith("0 MFLOPs a token, 192 tokens a step, ") and told["work"].endswith(" in 12 steps")
    assert re.fullmatch(r"holds it with up to [\d,]{6,} rows at a time", told["a GPU of 12 GB"])
    assert re.fullmatch(r"00:\d\d:\d\d at \d+\.\d\d s a step, measured on 2 rows", told["time"])
    assert "2 rows at a time" in told["memory of the tensors"] and "active for a token" in told["model"]
    monkeypatch.setattr(report, "SMALL_GPU", 1e5)
    assert report.forecast(run)["a GPU of 12 GB"] == "does not hold it"


def test_a_run_that_goes_on_is_forecast_from_its_own_log(monkeypatch):
    train(stop_at_step=8)
    monkeypatch.setattr(report, "LanguageModel", lambda config: pytest.fail("measured anew"))
    told = report.forecast(make(max_steps=20))
    assert told["work"].endswith(" in 12 steps") and told["time"].endswith("s a step, as the run's log says")


def test_the_work_of_a_gpu_is_timed_to_its_end(monkeypatch):
    seen = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: seen.append("wait"))
    monkeypatch.setattr(time, "perf_counter", lambda: seen.append("clock") or 0.0)
    for device, expected in (("cuda", "wait clock work wait clock"), ("cpu", "clock work clock")):
        seen.clear()
        report._timed(torch.device(device), seen.append, "work")
        assert seen == expected.split()


def test_a_forecast_leaves_random_numbers_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    report.forecast(make())
    assert torch.equal(before, torch.get_rng_state())
