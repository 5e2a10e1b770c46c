"""A run that is stopped, killed or interrupted anywhere ends bit for bit like one that was not (CPU, one thread)."""

import json
import logging
import platform
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from runs import SMALL, assert_same, cache, elsewhere, home, make, table, tensors, train  # noqa: F401

from dsl import checkpoint, data, hub, resume, training
from dsl.__main__ import main
from dsl.runlog import TIME_COLUMNS
from dsl.settings import Run

pytestmark = pytest.mark.usefixtures("home")
VARIANTS = {
    "linear and softmax": {},
    "delta and latent, Muon, accumulation": {
        **{"linear_attention_kind": "delta", "full_attention_kind": "latent", "optimizer": "muon"},
        **{"gradient_accumulation_steps": 2, "lr_scheduler_type": "wsd", "num_shared_experts": 1},
    },
    "fp16 and its scaler": {"precision": "fp16"},
    "bf16, one_cycle, capacity": {"precision": "bf16", "lr_scheduler_type": "one_cycle", "capacity_factor": 1.0},
}


SLOW = ("linear and softmax", "bf16, one_cycle, capacity")  # most of which the other tests do as well


@pytest.mark.parametrize("variant", [pytest.param(v, marks=[pytest.mark.slow] * (v in SLOW)) for v in VARIANTS])
def test_stopped_twice_equals_uninterrupted(variant):
    """The stops are inside intervals of logging, evaluation and saving; the corpus ends and begins again meanwhile."""
    settings = VARIANTS[variant]
    train("whole", **settings)
    for stop in (5, 7):
        torch.rand(stop)  # what others draw meanwhile does not matter
        random.random()
        train("parts", **settings, stop_at_step=stop)
    assert train("parts", **settings).status == "finished"
    assert_same(make("whole"), make("parts"), 12)


def test_stopped_around_the_end_of_the_corpus(home):  # noqa: F811
    lines = (json.dumps({"text": f"document {i}: " + "words and words " * (i % 5)}) + "\n" for i in range(60))
    (home / "corpus.jsonl").write_text("".join(lines))
    settings = {
        "corpus": f"local:{home / 'corpus.jsonl'}",
        "held_out": 0.1,
        "fraction": 1.0,
        "block_size": 7,
        "shuffle_rows": 5,
    }
    train("whole", **settings)
    for stop in (4, 5, 7, 9, None):
        train("parts", **settings, stop_at_step=stop)
    assert int(table(make("parts"))[-1]["epoch"]) >= 1, "the corpus is too large for this test"
    assert_same(make("whole", **settings), make("parts", **settings), 12)


def test_numbers_drawn_by_the_model_itself_go_on(home):  # noqa: F811
    """A mixer of the reader's own may draw random numbers: the state of torch's generator is part of a checkpoint."""
    (home / "noisy.py").write_text(
        "import torch\nfrom dsl.attention import LinearMixer\n"
        "class Noisy(LinearMixer):\n"
        "    def forward(self, x, *others):\n"
        "        y, state = super().forward(x, *others)\n"
        "        return y * (1 + 0.1 * torch.randn_like(y) * self.training), state\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(home)
        train("whole", linear_attention_kind="noisy:Noisy")
        train("parts", linear_attention_kind="noisy:Noisy", stop_at_step=7)
        torch.rand(3)
        train("parts", linear_attention_kind="noisy:Noisy")
    assert_same(make("whole"), make("parts"), 12)


def test_weights_lie_in_memory_as_they_would_without_a_stop(monkeypatch):
    """At multiples of 64 bytes: the sums of a CPU's matrix products depend on it, in the last bit and now and then."""
    train(stop_at_step=5)
    real, found = training.Trainer.loop, []

    def loop(self, on_log):
        found.extend(t.data_ptr() % 64 for t in (*self.model.parameters(), *self.model.buffers()))
        return real(self, on_log)

    monkeypatch.setattr(training.Trainer, "loop", loop)
    train()
    assert found and not any(found)


def far_ahead(run: Run, step: int) -> None:
    """A checkpoint of the run at a step that it would reach in days: its newest one, with another place in the data."""
    newest, _ = checkpoint.newest(run.run_dir)
    model, tokenizer = hub.load(newest)
    state, optimizer = checkpoint.read_trainer(newest), checkpoint.read_optimizer(newest)
    state["data"]["place"][0] = state["epoch"] = step // 2
    state |= {"step": step, "tokens": step * state["tokens"] // state["step"]}
    checkpoint.save(run.run_dir, step, model=model, tokenizer=tokenizer, trainer=state, optimizer=optimizer)


def test_the_first_new_step_is_as_much_work_at_step_100000_as_at_step_10(monkeypatch):
    """Counted, not timed: documents that are encoded, and every call of a Python function."""
    settings, run = {"max_steps": 200_000}, make(max_steps=200_000)
    real, encoded, calls = data._Encoded.encode, [], [0]

    def encode(self, documents):
        encoded.extend(documents)
        return real(self, documents)

    def count(frame, event, argument):
        calls[0] += event == "call"

    monkeypatch.setattr(data._Encoded, "encode", encode)
    for step in (9, 10):  # the first resume imports what it needs
        train(**settings, stop_at_step=step)
    work = []
    for step in (10, 100_000):
        if step != 10:
            far_ahead(run, step)
        calls[0] = 0
        encoded.clear()
        sys.setprofile(count)
        try:
            assert train(**settings, stop_at_step=step + 1).step == step + 1
        finally:
            sys.setprofile(None)
        work.append((len(encoded), calls[0]))
    print(work)
    (documents, functions), (more_documents, more_functions) = work
    assert 0 < more_documents <= 2 * documents and 1000 < more_functions < 1.2 * functions
    assert int(checkpoint.read_trainer(checkpoint.newest(run.run_dir)[0])["epoch"]) >= 50_000


def test_random_numbers_of_gpus_that_are_not_here_are_left_out_with_a_line(caplog):
    caplog.set_level(logging.INFO)
    state, device = resume.random_state(torch.device("cpu")), torch.device("cpu")
    resume.set_random_state(state, device)
    assert not caplog.messages
    resume.set_random_state({**state, "cuda": [state["torch"]] * 2}, device)
    assert caplog.messages == ["random numbers of GPUs do not go on: the checkpoint holds those of 2, here are 0"]


def test_hparams_say_what_made_the_run_and_repeat_it_in_a_fresh_home(home, monkeypatch, capsys):  # noqa: F811
    train("first")
    file, before = make("first").log_dir / "hparams.yaml", (table(make("first")), tensors(make("first"), 12))
    record = yaml.safe_load(file.read_text())["record"]
    assert record["corpus"] == data.open_corpus(make().data).fingerprint and len(record["corpus"]) == 16
    assert (record["threads"], record["python"]) == (1, platform.python_version())
    assert record["versions"]["torch"] == torch.__version__ and record["precision"].startswith("fp32 on cpu")
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert (record["git_revision"] is None) == (head.returncode != 0)

    monkeypatch.setenv("DSL_HOME", str(home / "fresh"))
    assert main(["train", "--config", str(file)]) == 0 and "status: finished" in capsys.readouterr().out
    again = table(make("first")), tensors(make("first"), 12)
    rows = [[{k: v for k, v in row.items() if k not in TIME_COLUMNS} for row in each] for each, _ in (before, again)]
    assert rows[0] == rows[1] and rows[0]
    assert all(torch.equal(value, again[1][name]) for name, value in before[1].items())


@pytest.mark.slow
def test_new_processes_equal_one_process():
    """N steps, a new process, N more, and once more: the second resume is tested as well."""
    train("whole")
    for stop in (6, 9, None):
        process = elsewhere(f"import runs\nprint(runs.train('parts', stop_at_step={stop}).status)", stdout=-1)
        assert process.communicate()[0].strip() == ("stopped" if stop else "finished")
    assert_same(make("whole"), make("parts"), 12)


@pytest.mark.slow
def test_a_signal_to_the_process_saves_and_the_next_one_goes_on():
    train("whole")
    code = "import runs, time\nprint(runs.train('parts', on_log=lambda row: time.sleep(0.5)).status)"
    process = elsewhere(code, stdout=-1)
    wait_for(process, lambda: len(rows("parts")) >= 1)
    process.send_signal(signal.SIGTERM)
    assert process.communicate()[0].strip() == "interrupted" and process.returncode == 0
    assert checkpoint.newest(make("parts").run_dir)[0] is not None
    assert train("parts").status == "finished"
    assert_same(make("whole"), make("parts"), 12)


def rows(name):
    try:
        return table(make(name))
    except FileNotFoundError:
        return []


def wait_for(process, ready, seconds=600):
    """Until something is there, or the process has ended by itself."""
    for _ in range(seconds * 100):
        if ready() or process.poll() is not None:
            return
        time.sleep(0.01)
    process.kill()
    raise AssertionError("the run did not get there")


WIDE = {"per_device_train_batch_size": 6, "save_steps": 4, "save_total_limit": 9, "logging_steps": 1}


def torchrun(home, count: int, code: str) -> tuple[int, str]:  # noqa: F811
    """Run code in so many processes; the exit code, and what they and torchrun say on stderr."""
    (home / "ddp.py").write_text(code)
    words = ["torchrun", f"--nproc-per-node={count}", "--standalone", str(home / "ddp.py")]
    code = f"import sys\nfrom torch.distributed.run import main\nsys.argv = {words}\nmain()"
    process = elsewhere(code, stderr=-1)
    errors = process.communicate()[1]
    return process.returncode, errors


@pytest.mark.slow
@pytest.mark.long
def test_the_number_of_processes_may_change_at_a_resume(home):  # noqa: F811
    """From 2 to 1, 1 to 2, and 2 to 3: the same place in the data and the same losses as one process, to rounding.

    And within a step, in fp64: gradients to rounding, counts exactly.
    """
    train("one", **WIDE)
    train("many", stop_at_step=4, **WIDE)
    for count, stop in ((2, 8), (3, 12)):
        code, errors = torchrun(home, count, DDP.format(settings={**WIDE, "stop_at_step": stop}))
        assert code == 0, errors[-3000:]
        found = json.loads((home / "ddp.json").read_text())
        assert found["world"] == count and found["difference"] < 1e-12 and found["counts"]
        if count == 2:
            shutil.copytree(make("many").run_dir, make("back").run_dir)
            shutil.copytree(make("many").log_dir, make("back").log_dir)
    train("back", **WIDE)
    for name in ("many", "back"):
        for step in (4, 8, 12):
            folders = [checkpoint.step_dir(make(run).run_dir, step) for run in ("one", name)]
            cursors = [checkpoint.read_trainer(folder)["data"] for folder in folders]
            assert cursors[0] == cursors[1] and cursors[0]["taken"], (name, step)
        rows = [table(make(run)) for run in ("one", name)]
        assert [row["step"] for row in rows[1]] == [str(step) for step in range(1, 13)]
        for column in ("loss", "grad_norm", "held_out_bits_per_byte", "tokens", "maxvio_0"):
            figures = [[float(row[column] or 0) for row in each] for each in rows]
            assert figures[1] == pytest.approx(figures[0], rel=1e-3), (name, column)


DDP = """
import json, os, pathlib, torch, runs
from dsl import optim
from dsl.gradients import Objective, accumulate
from dsl.model import LanguageModel
from dsl.processes import Processes

torch.distributed.init_process_group()
runs.train("many", **{settings})
torch.manual_seed(1)
model = LanguageModel(runs.make().model).double()
tokens, labels = torch.randint(300, (2, 10, 16))
labels[2, 3:] = -100
precision = optim.precision("fp32", "cpu")
with Processes() as processes:
    tally = accumulate(processes.wrap(Objective(model)), tokens, labels, 5, precision, processes)
found = [p.grad.clone() for p in model.parameters()]
model.zero_grad()
os.environ["WORLD_SIZE"] = "1"
os.environ["RANK"], rank = "0", os.environ["RANK"]
expected = accumulate(Objective(model), tokens, labels, 5, precision, Processes())
difference = max((a - p.grad).abs().max().item() for a, p in zip(found, model.parameters(), strict=True))
if rank == "0":
    values = dict(difference=difference, counts=torch.equal(tally[5:], expected[5:]), world=processes.world)
    pathlib.Path(os.environ["DSL_HOME"], "ddp.json").write_text(json.dumps(values))
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.timeout(600)  # or torchrun waits for ever
def test_where_one_process_fails_all_end_and_one_tells(home):  # noqa: F811
    code, errors = torchrun(home, 2, FAILS)
    assert code == 1 and [int(path.read_text()) for path in sorted(home.glob("step.*"))] == [3, 3]
    assert errors.count("TrainingError: cpu is out of memory with 2 rows at a time") == 1, errors
    assert errors.count("process 1 of 2 failed first") == 1 and errors.count("Traceback") <= 2, errors  # and torchrun's
    assert "peer" not in errors


FAILS = """
import os, pathlib, torch, runs
from dsl import training

real, calls = training.accumulate, []
def accumulate(*given):
    calls.append(given)
    rank = os.environ["RANK"]
    pathlib.Path(os.environ["DSL_HOME"], "step." + rank).write_text(str(len(calls)))
    return torch.empty(1 << 60) if rank == "1" and len(calls) == 3 else real(*given)
training.accumulate = accumulate
runs.train()
"""
