"""The files of a run: what survives a kill, a resume, a changed header, and what is shown live."""

import csv
import json
import logging
import subprocess
import sys

import pytest
import yaml

from dsl import runlog


def rows(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write(folder, steps, **options):
    with runlog.RunLog(folder) as log:
        log.open_tables([1], **options)
        for step in steps:
            log.row({"step": step, "loss": 2.5, "load_1": "0.5;0.5"})
            log.generation(step, "A prompt, with\na break", 'said "so"\n')


def test_columns_are_the_agreed_ones():
    run = "step tokens epoch loss held_out_bits_per_byte lr grad_norm scale skipped_steps"
    time = "step_seconds tokens_per_second memory_mb cpu_percent gpu_memory_mb gpu_percent"
    layers = "load_3 maxvio_3 entropy_3 dropped_3 dead_3 load_5 maxvio_5 entropy_5 dropped_5 dead_5"
    assert runlog.columns([3, 5]) == (*run.split(), *time.split(), *layers.split())
    assert list(runlog.TIME_COLUMNS) == time.split()


def test_each_row_is_on_disk_at_once(tmp_path):
    with runlog.RunLog(tmp_path) as log:
        log.open_tables([1])
        log.row({"step": 1, "loss": 0.1 + 0.2, "load_1": "0.25;0.75"})
        log.generation(1, "p", "t")
        (row,) = rows(tmp_path / "metrics.csv")
        assert (row["step"], row["loss"], row["load_1"]) == ("1", "0.3", "0.25;0.75")
        assert row["held_out_bits_per_byte"] == ""
        assert rows(tmp_path / "generations.csv") == [{"step": "1", "prompt": "p", "text": "t"}]


def test_resume_cuts_rows_beyond_the_checkpoint_and_torn_ones(tmp_path):
    write(tmp_path, [100, 200, 300])
    for name, torn in (("metrics.csv", "400,12"), ("generations.csv", '400,"A prompt, with\na br')):
        with (tmp_path / name).open("a", encoding="utf-8") as file:
            file.write(torn)
    write(tmp_path, [300, 400], step=200)
    for name in ("metrics.csv", "generations.csv"):
        assert [row["step"] for row in rows(tmp_path / name)] == ["100", "200", "300", "400"]
    assert rows(tmp_path / "generations.csv")[0]["text"] == 'said "so"\n'
    assert not list(tmp_path.glob("*.old-*"))


def test_a_row_that_ends_inside_a_character_is_cut(tmp_path):
    write(tmp_path, [100])
    with (tmp_path / "generations.csv").open("ab") as file:
        file.write('200,p,"caf\u00e9'.encode()[:-1])
    write(tmp_path, [200], step=100)
    assert [row["step"] for row in rows(tmp_path / "generations.csv")] == ["100", "200"]


def test_of_a_table_cut_anywhere_the_whole_rows_are_read(tmp_path):
    """At each of its bytes: a quoted text has line breaks, quotes and commas, of which none ends a row."""
    write(tmp_path, [100])
    path = tmp_path / "generations.csv"
    with path.open("a", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([[200, 'a "q"\n', '"\n'], [300, "caf\u00e9", "\n\r\n,"], [400, "p", "plain"]])
    whole, ends = path.read_bytes(), [0]
    while ends[-1] < len(whole):  # a row ends where as many quotes are open as closed
        at = whole.index(b"\n", ends[-1]) + 1
        while whole[:at].count(b'"') % 2:
            at = whole.index(b"\n", at) + 1
        ends.append(at)
    assert len(ends) == 6
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        assert runlog.complete(path).encode() == whole[: max(end for end in ends if end <= cut)]
    assert runlog.complete(tmp_path / "none.csv") == ""


def test_archive_keeps_the_rows_that_are_cut(tmp_path):
    write(tmp_path, [100, 200, 300])
    write(tmp_path, [], step=100, archive=True)
    assert [row["step"] for row in rows(tmp_path / "metrics.old-1.csv")] == ["100", "200", "300"]
    assert [row["step"] for row in rows(tmp_path / "metrics.csv")] == ["100"]


def test_a_table_with_another_header_is_set_aside_whole(tmp_path):
    for _ in range(2):
        (tmp_path / "metrics.csv").write_text("step,other\n1,2\n")
        write(tmp_path, [1], step=1)
    assert [row["step"] for row in rows(tmp_path / "metrics.csv")] == ["1"]
    for number in (1, 2):
        assert (tmp_path / f"metrics.old-{number}.csv").read_text() == "step,other\n1,2\n"


def test_log_file_takes_messages_of_the_package_only_while_open(tmp_path):
    before = list(runlog.logger.handlers), runlog.logger.level
    with runlog.RunLog(tmp_path):
        logging.getLogger("dsl.data").warning("retry 1 of 5")
        logging.getLogger("elsewhere").warning("not ours")
    runlog.logger.warning("too late")
    (path,) = tmp_path.glob("*.log")
    text = path.read_text()
    assert "WARNING retry 1 of 5" in text and "not ours" not in text and "too late" not in text
    assert (list(runlog.logger.handlers), runlog.logger.level) == before


def test_an_error_ends_in_the_log_file_and_is_left_to_its_catcher_elsewhere(tmp_path, capfd):
    with pytest.raises(ValueError), runlog.RunLog(tmp_path, live=False):
        raise ValueError("the disk is on fire")
    (path,) = tmp_path.glob("*.log")
    assert "ERROR ValueError: the disk is on fire" in path.read_text()
    assert capfd.readouterr() == ("", "")


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with runlog.RunLog(None) as log:
        log.open_tables([1])
        log.row({"step": 1})
        log.generation(1, "p", "t")
        log.sync()
        log.hparams({}, {})
    assert not list(tmp_path.iterdir())


def test_hparams_holds_settings_and_record(tmp_path):
    with runlog.RunLog(tmp_path) as log:
        log.hparams({"name": "r", "train": {"max_steps": 5}}, runlog.environment())
    found = yaml.safe_load((tmp_path / "hparams.yaml").read_text())
    assert found["train"] == {"max_steps": 5}
    assert found["record"]["versions"]["torch"] and "git_revision" in found["record"]


def test_progress_line_says_what_a_reader_wants_to_know():
    row = {"step": 100, "loss": 3.25, "lr": 0.003, "tokens_per_second": 5120.4, "seconds_left": 65}
    line = runlog.progress(row, 700)
    assert line == "step 100/700  loss 3.2500  lr 3.00e-03  5,120 tokens/s  00:01:05 left"
    assert "held-out 2.125 bits/byte" in runlog.progress({**row, "held_out_bits_per_byte": 2.125}, 700)
    assert runlog.progress({**row, "held_out_bits_per_byte": float("nan")}, 700) == line, "pandas' way to say None"
    assert "2 d 01:00:00 left" in runlog.progress({**row, "seconds_left": 2 * 86_400 + 3600}, 700)


SCRIPT = "from dsl.runlog import *\nwith RunLog(None, live=in_notebook()): logger.info('line 7')"


def test_a_terminal_shows_a_line_once():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "line 7\n")


def test_a_terminal_that_has_gone_takes_no_run_with_it():
    code = "import os, signal\nfrom dsl.processes import Interrupt\nwith Interrupt() as interrupt:\n "
    code += "signal.raise_signal(signal.SIGTERM)\n print(interrupt.asked, flush=True)\n"
    command = [sys.executable, "-c", f"{code}{SCRIPT}\nprint('and on')"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stderr.close()
    with process:
        assert process.stdout.read() == "True\nand on\n"


@pytest.mark.slow
def test_papermill_shows_a_line_once_in_the_terminal_and_once_in_the_cell(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTEST_CURRENT_TEST")  # a kernel that sees it does not mirror descriptor 2
    cell = {"cell_type": "code", "id": "a", "metadata": {}, "source": SCRIPT}
    kernel = {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}
    book = {"nbformat": 4, "nbformat_minor": 5, "metadata": kernel}
    cells = [cell | {"outputs": [], "execution_count": None}]
    (tmp_path / "in.ipynb").write_text(json.dumps(book | {"cells": cells}))
    command = [sys.executable, "-m", "papermill", "in.ipynb", "out.ipynb", "--no-progress-bar"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert (done.stdout + done.stderr).count("line 7") == 1
    outputs = json.loads((tmp_path / "out.ipynb").read_text())["cells"][0]["outputs"]
    assert ["".join(o["text"]) for o in outputs if o["name"] == "stdout"] == ["line 7\n"]
    assert "line 7" not in str([o for o in outputs if o["name"] != "stdout"])
