"""fp16 on a CPU, autocast and scaler: an overflow that happens is left out, and the loss follows that of fp32."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from runs import assert_same, cache, home, make, table, train  # noqa: F401

from dsl import training

pytestmark = pytest.mark.usefixtures("home")
OVERFLOW = {"precision": "fp16", "init_scale": 2.0**22, "logging_steps": 1, "max_bad_steps": 40}
NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "03_train.ipynb"


def test_an_overflow_is_left_out_and_the_loss_lies_over_that_of_fp32(monkeypatch):
    """fp32 is made to leave the same batches out, so that both see the same text: within 0.3 % at every step."""
    real, taken = training.Trainer.take_step, []
    monkeypatch.setattr(training.Trainer, "take_step", lambda self: taken.append(real(self)) or taken[-1])
    train("half", **OVERFLOW)
    rows, good = table(make("half")), [*taken]
    assert not good[0] and sum(good) == 12 and int(rows[-1]["skipped_steps"]) == good.count(False)
    for row in rows:  # halved at each overflow, held between
        assert float(row["scale"]) == OVERFLOW["init_scale"] / 2 ** int(row["skipped_steps"])
    assert int(rows[-1]["tokens"]) == len(good) * 64

    accumulate, batches = training.accumulate, iter(good)

    def spoilt(*given):
        tally = accumulate(*given)
        if not next(batches):
            tally[0] = math.nan
        return tally

    monkeypatch.setattr(training, "accumulate", spoilt)
    train("full", logging_steps=1, max_bad_steps=40)
    losses = [[float(row["loss"]) for row in table(make(name))] for name in ("half", "full")]
    worst = max(abs(a / b - 1) for a, b in zip(*losses, strict=True))
    print(f"{good.count(False)} batches left out; the losses differ by {worst:.2%} at most")
    assert 0 < worst < 0.003


def test_stopped_amid_overflows_it_goes_on_bit_for_bit():
    """The scale, and how long it has held, come back from the checkpoint."""
    train("whole", **OVERFLOW)
    for stop in (1, 6, None):
        train("parts", **OVERFLOW, stop_at_step=stop)
    assert_same(make("whole"), make("parts"), 12)


@pytest.mark.slow
@pytest.mark.long
def test_notebook_03_in_fp16_draws_its_scale_and_the_loss_over_that_of_fp32(home):  # noqa: F811
    digests, commands = [], []
    for parameters in (["-p", "run_name", "full"], ["-p", "precision", "fp16", "-p", "init_scale", str(2.0**22)]):
        command = [sys.executable, "-m", "papermill", "--no-progress-bar", str(NOTEBOOK), str(home / "out.ipynb")]
        command += [*parameters, "-p", "preset", "tiny", "-p", "max_bad_steps", "40", "-p", "logging_steps", "1"]
        command += ["-p", "beside", "full"] if digests else []
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        cells = json.loads((home / "out.ipynb").read_text())["cells"]
        outputs = [out.get("data", {}) for cell in cells for out in cell.get("outputs", [])]
        printed = ["".join(out.get("text", "")) for cell in cells for out in cell.get("outputs", [])]
        commands.append(next(text for text in printed if text.startswith("papermill ")).splitlines()[0])
        digests.append(next("".join(o["text/plain"]) for o in outputs if "training loss" in str(o.get("text/plain"))))
    assert "scale of the fp16 loss" not in digests[0] and "run beside" not in digests[0]
    assert "scale of the fp16 loss" in digests[1] and re.search(r"\b[1-9]\d* batches left out: 20 points", digests[1])
    assert "the run beside: 20 points" in digests[1]
    go_on = (
        "papermill notebooks/03_train.ipynb out.ipynb -p preset tiny -p precision fp16 -p beside full -p max_steps 40"
    )
    assert sorted(commands[1].split()) == sorted(
        f"{go_on} -p init_scale 4194304.0 -p max_bad_steps 40 -p logging_steps 1".split()
    )
