"""The study as a command, on tiny runs: killed and begun again, runs that fail, and what is refused."""

import os
import shutil
import signal
import subprocess
import sys
import time

import nbformat
import pandas as pd
import pytest
from runs import cache, elsewhere, home, train  # noqa: F401

from dsl import findings, lens, study
from dsl.settings import SettingsError

COMMAND = "import sys; from dsl import study; sys.exit(study.main(sys.argv[1:]))"
SMALL = ["--steps", "2", "--seeds", "1", "--jobs", "1", "--only"]
MANY = 30  # steps that take a second or more, so that a kill between two of them comes in time


def test_the_plan_has_every_configuration_of_a_seed_before_the_next(monkeypatch):
    monkeypatch.delenv("DSL_SMOKE", raising=False)
    runs = study.plan(700, 5)
    assert len(runs) == 5 * len(study.GRID) and len({run.name for _, run in runs}) == len(runs)
    assert [run.train.seed for _, run in runs] == sorted(run.train.seed for _, run in runs)
    runs = {config: run for config, run in runs[: len(study.GRID)]}
    assert len({(run.data, run.train.max_steps) for run in runs.values()}) == 1, "the same data for all"
    assert runs["hybrid"].model.layer_types.count("full_attention") == 1
    for mixer in ("softmax", "hybrid"):
        assert runs[f"{mixer}-dense"].model.moe_layers == () and len(runs[mixer].model.moe_layers) == 2
    assert runs["hybrid-aux"].model.balance == "aux_loss" and runs["hybrid-adamw"].train.optimizer == "adamw"


def test_an_unknown_configuration_is_refused_before_anything_is_trained(capsys, tmp_path):
    with pytest.raises(SettingsError, match="unknown configuration 'sofmax', did you mean 'softmax'"):
        study.train_grid(2, 1, ["softmax", "sofmax"], tmp_path)
    with pytest.raises(SystemExit) as end:
        study.main(["--only", "hybird", "--tables", str(tmp_path)])
    assert end.value.code == 2 and "did you mean 'hybrid'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_no_run_is_done_no_table(tmp_path, monkeypatch):
    monkeypatch.setenv("DSL_HOME", str(tmp_path))
    study.collect(study.plan(2, 1), tmp_path / "tables")
    with pytest.raises(FileNotFoundError, match="make study"):
        findings.tables(tmp_path / "tables")


def test_a_run_of_another_version_is_collected_without_its_settings(tmp_path, monkeypatch):
    monkeypatch.setenv("DSL_HOME", str(tmp_path))
    grid = study.plan(2, 1, ["hybrid-aux"])
    log_dir = grid[0][1].log_dir
    columns = "step,tokens,loss,held_out_bits_per_byte,step_seconds,cpu_percent,skipped_steps"
    files = {"hparams.yaml": "train: {later: 1}", "generations.csv": "step,prompt,text\n2,a,b\n"}
    files["metrics.csv"] = f"{columns}\n2,9,5,3,1,90,0\n"
    files["analysis.csv"] = ",".join(lens.COLUMNS) + "\nfinal,,bits_per_byte,9,2.5\n"
    log_dir.mkdir(parents=True)
    for name, text in files.items():
        (log_dir / name).write_text(text)
    study.collect(grid, tmp_path / "tables")
    found = findings.tables(tmp_path / "tables")
    assert found["runs"].final_bits_per_byte.tolist() == [2.5] and "'later'" in found["runs"].notes[0]
    assert found["settings"] == {}


@pytest.mark.slow
@pytest.mark.long
def test_a_run_that_fails_is_named_and_the_others_go_on(home, monkeypatch, capfd):  # noqa: F811
    bad = home / "checkpoints" / "study-2-softmax-0"
    bad.parent.mkdir(parents=True)
    bad.write_text("a file where a folder should be")
    assert study.main([*SMALL, "softmax", "elu", "--tables", str(home / "tables")]) == 1
    assert "failed: study-2-softmax-0" in capfd.readouterr().out
    assert list(pd.read_csv(home / "tables" / "04_runs.csv").config) == ["elu"]
    bad.unlink()
    assert study.main([*SMALL, "softmax", "elu", "--tables", str(home / "tables")]) == 0
    found = findings.tables(home / "tables")
    assert sorted(found["runs"].config) == ["elu", "softmax"] and set(found["settings"]) == {"elu", "softmax"}
    assert findings.seeds(found["runs"]) == "1 seed" and found["runs"].notes.isna().all()
    claims = findings.claims(findings.measures(*(found[t] for t in ("runs", "curves", "analysis"))), found["curves"])
    verdicts = claims[claims.verdict != "silent"]
    assert list(verdicts.claim) == ["A linear model's state does not grow with the context"], "one seed proves nothing"


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(sys.platform == "win32", reason="kills a process group")
def test_a_study_that_is_killed_goes_on(home):  # noqa: F811
    arguments = [*SMALL, "softmax", "elu", "--tables", str(home / "tables"), "--steps", str(MANY)]
    code = f"import sys; sys.argv[1:] = {arguments!r}; {COMMAND}"
    process = elsewhere(code, start_new_session=True)
    first, second = (run for _, run in study.plan(MANY, 1, ["softmax", "elu"]))
    while not (second.log_dir / "metrics.csv").exists():  # the second is in its training
        assert process.poll() is None, "ended too early"
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert lens.analysis(first.log_dir).exists() and not lens.analysis(second.log_dir).exists()
    made = lens.analysis(first.log_dir).stat().st_mtime_ns
    assert elsewhere(code).wait() == 0
    assert lens.analysis(first.log_dir).stat().st_mtime_ns == made, "what is there is not made again"
    assert sorted(pd.read_csv(home / "tables" / "04_runs.csv").config) == ["elu", "softmax"]
    assert len(list((home / "checkpoints" / first.name).glob("step-*"))) == 1, "only the last weights are kept"


@pytest.mark.slow
@pytest.mark.long
def test_notebook_04_looks_at_anybodys_runs(home, root):  # noqa: F811
    train("mine", moe_layers=[1])
    died = home / "logs" / "training" / "died"
    shutil.copytree(home / "logs" / "training" / "mine", died)
    text = (died / "metrics.csv").read_text().splitlines()
    (died / "metrics.csv").write_text("\n".join(text[:2]) + "\n")
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", "--cwd", str(home)]
    command += [str(root / "notebooks" / "04_analysis.ipynb"), str(home / "out.ipynb"), "-p", "run"]
    done = subprocess.run([*command, "mine, died"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    outputs = str([cell.get("outputs") for cell in nbformat.read(home / "out.ipynb", as_version=4).cells])
    assert "stopped at step 4" in outputs and "died is shown without its weights" in outputs
    figures = home / "figures" / "runs" / "runs"
    assert {path.name for path in figures.iterdir()} >= {"04_runs_quality.png", "04_runs_positions.png"}
    done = subprocess.run([*command, "mime"], capture_output=True, text=True)
    assert done.returncode and "did you mean 'mine'" in done.stderr
