"""SIGKILL at random points of steps, generation, evaluation, stream and saving: a run that went on ends bit-equal.

A few kills in each test; DSL_SOAK=1 (make soak) makes it 25.
"""

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
from helpers import seeded
from hub_emulator import FAULTS, Hub, write_dataset
from runs import assert_same, cache, elsewhere, home, make, table, train  # noqa: F401

from dsl import checkpoint, data, evaluation, observer, training

pytestmark = [pytest.mark.usefixtures("home"), pytest.mark.slow, pytest.mark.soak, pytest.mark.timeout(7200)]
PHASES = {
    "step": (training, "accumulate"),
    "generation": (observer, "complete"),
    "evaluation": (evaluation, "bits_per_byte"),
    "stream": (data.TokenStream, "next"),
    "saving": (checkpoint, "save"),
}
OFTEN = {"max_steps": 16, "save_steps": 3, "sample_steps": 2, "sample_tokens": 8, "eval_steps": 4}
STREAMED = {
    **{"corpus": "cosmopedia", "held_out": 0.1, "fraction": 1.0, "block_size": 8, "shuffle_rows": 5},
    **{"retry_first_wait": 0.001, "retry_longest_wait": 0.01, "linear_attention_kind": "delta"},
    **{"full_attention_kind": "latent", "optimizer": "muon", "gradient_accumulation_steps": 2},
}
KILLS = (13, 12) if os.environ.get("DSL_SOAK") else (2, 1)


def live(name: str, settings: dict, phase: str, call: int, share: float) -> None:
    """In a process of its own: train, and be killed a share of the way through a call of a phase; 1: right after it."""
    owner, function = PHASES[phase]
    real, seconds = getattr(owner, function), [0.05]

    def timed(*args, **options):
        start = time.perf_counter()
        if len(seconds) == call and share < 1:
            threading.Timer(share * seconds[-1], os.kill, (os.getpid(), signal.SIGKILL)).start()
        try:
            return real(*args, **options)
        finally:
            seconds.append(time.perf_counter() - start)
            if len(seconds) == call + 1:  # the call was shorter than the one before: no kill comes later
                os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, function, timed)
    print(train(name, **settings).status)


def killed(settings: dict, kills: int) -> None:
    chance, done, run, phases = random.Random(seeded().initial_seed()), Counter(), 0, []
    train("whole", **settings)
    while done.total() < kills:
        phases = phases or chance.sample([*PHASES], len(PHASES))
        name, phase = f"parts{run}", phases.pop()
        given = (name, settings, phase, chance.randint(1, 4), chance.random())
        process = elsewhere(f"import test_kills\ntest_kills.live(*{given!r})", stdout=-1)
        out = process.communicate()[0]
        ended = (process.returncode, out)
        assert out == "finished\n" or ended == (-signal.SIGKILL, ""), (given, ended)
        done[phase] += not out
        saved, problems = checkpoint.newest(make(name).run_dir)
        assert problems == [], "a folder exists whole or not at all"
        if saved == checkpoint.step_dir(make(name).run_dir, settings["max_steps"]):  # also by one killed after that
            assert_same(make("whole", **settings), make(name, **settings), settings["max_steps"])
            run += 1
    train(f"parts{run}", **settings)
    assert_same(make("whole", **settings), make(f"parts{run}", **settings), settings["max_steps"])
    assert not [*make(f"parts{run}").run_dir.glob(".step-*")], "nothing half written is left"
    print(f"{done.total()} kills in {run + 1} runs: {dict(done)}")


def test_killed_anywhere_equals_uninterrupted():
    killed(OFTEN, KILLS[0])


def test_killed_after_its_last_save_a_run_is_complete():
    train("whole", **OFTEN)
    process = elsewhere(f"import test_kills\ntest_kills.live(*{('run', OFTEN, 'saving', 6, 1)!r})", stdout=-1)
    assert (process.communicate()[0], process.returncode) == ("", -signal.SIGKILL)
    assert train("run", **OFTEN).status == "complete"
    assert_same(make("whole", **OFTEN), make("run", **OFTEN), OFTEN["max_steps"])


def test_killed_anywhere_while_it_streams_over_a_bad_line(home, monkeypatch):  # noqa: F811
    """Delta and latent, Muon, accumulation, some epochs, and every fifth answer of the hub a fault."""
    shards = [[f"<{shard}.{i}> " + "a few words " * (i % 5) for i in range(20)] for shard in range(3)]
    write_dataset(home / "hub", "HuggingFaceTB/cosmopedia", {"web_samples_v2": shards}, rows_per_group=7)
    faults = random.Random(0)
    with Hub(home / "hub") as hub:
        hub.use(monkeypatch)
        hub.fault = lambda path, span: faults.choice(FAULTS[:-1]) if span and faults.random() < 0.2 else None
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HOME", str(home / "hf"))
        killed({**OFTEN, **STREAMED}, KILLS[1])
        assert int(table(make("whole"))[-1]["epoch"]) >= 1 and hub.injected
        print(f"{len(hub.injected)} faults of the stream")


@pytest.mark.long
def test_after_its_kernel_s_death_the_same_papermill_command_goes_on(home):  # noqa: F811
    notebook = Path(__file__).parents[1] / "notebooks" / "03_train.ipynb"
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", str(notebook), str(home / "out.ipynb")]
    settings = {"preset": "tiny", "max_steps": 300, "save_steps": 20, "sample_steps": 300, "eval_steps": 300}
    command += [word for name, value in settings.items() for word in ("-p", name, str(value))]
    steps = home / "checkpoints" / "tiny"
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as first:
        while not checkpoint.steps(steps) and first.poll() is None:
            time.sleep(0.02)
        for kernel in psutil.Process(first.pid).children():
            kernel.kill()
        assert "died" in first.communicate()[1].lower() and first.returncode != 0
    assert 0 < checkpoint.steps(steps)[-1] < 300
    second = subprocess.run(command, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr[-2000:]
    assert re.search(r"loading checkpoints/tiny/step-000\d\d0", second.stderr) and "step 300/300" in second.stderr
