"""The loop on a real small run: what it leaves, when it stops, what it refuses and what it survives."""

import dataclasses
import logging
import math
import os
import re
import signal
import threading

import pytest
import safetensors.torch
import torch
from runs import assert_same, cache, elsewhere, home, make, table, tensors, train  # noqa: F401

from dsl import checkpoint, data, evaluation, gradients, observer, optim, processes, report, resume, training
from dsl.model import LanguageModel
from dsl.moe import NotFiniteError
from dsl.runlog import columns
from dsl.settings import Run

pytestmark = pytest.mark.usefixtures("home")


def test_a_run_leaves_its_figures_texts_settings_and_checkpoints(capfd):
    seen = []
    before = signal.getsignal(signal.SIGINT), torch.get_num_threads(), list(logging.getLogger("dsl").handlers)
    summary, run = train(on_log=seen.append), make()
    assert (summary.status, summary.step, summary.tokens, summary.skipped_steps) == ("finished", 12, 12 * 2 * 32, 0)
    assert 4 < summary.loss < 6 and 3 < summary.bits_per_byte < 8
    assert (summary.run_dir, summary.log_dir) == (run.run_dir, run.log_dir)

    rows = table(run)
    assert tuple(rows[0]) == columns([0, 1])
    assert [row["step"] for row in rows] == ["4", "6", "8", "12"] == [str(row["step"]) for row in seen]
    assert [bool(row["held_out_bits_per_byte"]) for row in rows] == [False, True, False, True]
    for row in rows:
        assert float(row["lr"]) == pytest.approx(optim.learning_rate(run.train, int(row["step"]) - 1), rel=1e-8)
        assert sum(map(float, row["load_1"].split(";"))) == pytest.approx(1, abs=1e-3)
        assert int(row["tokens"]) == int(row["step"]) * 64 and row["gpu_memory_mb"] == ""
        assert float(row["grad_norm"]) > 0 and float(row["memory_mb"]) > 50 and float(row["cpu_percent"]) > 0
        assert {name for name, text in row.items() if not text} <= {
            "gpu_memory_mb",
            "gpu_percent",
            "held_out_bits_per_byte",
        }
    assert float(rows[-1]["loss"]) == pytest.approx(summary.loss)

    prompts = [(row["step"], row["prompt"]) for row in table(run, "generations.csv")]
    assert prompts[:2] == [("6", "The"), ("6", "An unusual")] and {step for step, _ in prompts} == {"6", "12"}
    assert checkpoint.steps(run.run_dir) == [5, 10, 12]
    assert not any(checkpoint.verify(checkpoint.step_dir(run.run_dir, step)) for step in (5, 10, 12))
    index = checkpoint.index(run.run_dir)
    assert index["steps"] == {"step-000005": None, "step-000010": None, "step-000012": summary.bits_per_byte}
    assert Run.from_yaml(run.log_dir / "hparams.yaml") == run
    (log,) = run.log_dir.glob("*.log")
    text = log.read_text()
    assert all(f"step-0000{step}" in text for step in ("05", "10", "12")) and "parameters" in text
    assert "precision: fp32 on cpu" in text and "step 12/12" in text
    after = signal.getsignal(signal.SIGINT), torch.get_num_threads(), list(logging.getLogger("dsl").handlers)
    assert before == after
    assert "step 4/12" not in "".join(capfd.readouterr()), "progress=False is silent"


def test_a_finished_run_trains_nothing_more_and_says_how_to_go_on(caplog):
    caplog.set_level(logging.INFO)
    first, run = train(max_steps=4), make(max_steps=4)
    before = {path: path.read_bytes() for path in run.log_dir.glob("*.csv")}
    for steps in (4, 2):
        caplog.clear()
        again = train(max_steps=steps)
        assert again == dataclasses.replace(first, status="complete")
        assert f"is complete: step 4 of {steps}" in caplog.text and "set max_steps=8" in caplog.text
    assert before == {path: path.read_bytes() for path in run.log_dir.glob("*.csv")}


def test_stop_at_step_leaves_the_schedule_alone():
    whole = train("whole")
    part = train("part", stop_at_step=7)
    assert (whole.status, part.status, part.step) == ("finished", "stopped", 7)
    assert [row["lr"] for row in table(make("part"))] == [row["lr"] for row in table(make("whole"))[:2]]
    again = train("part", stop_at_step=6)
    assert (again.status, again.step) == ("stopped", 7)


def test_a_first_loss_is_that_of_a_guess():
    train(max_steps=1, warmup_steps=0, logging_steps=1, eval_steps=1)
    (row,) = table(make())
    assert float(row["loss"]) == pytest.approx(math.log(300), abs=0.2)


def test_one_batch_is_learnt_by_heart(monkeypatch):
    batch = torch.randint(300, (2, 33), generator=torch.Generator().manual_seed(3))
    monkeypatch.setattr(data.TokenStream, "next", lambda self, rows: batch)
    settings = {"max_steps": 90, "learning_rate": 2e-2, "lr_scheduler_type": "constant", "logging_steps": 10}
    quiet = {name: 90 for name in ("eval_steps", "save_steps", "sample_steps")}
    assert train(**settings, **quiet, hidden_size=48, intermediate_size=64).loss < 0.05


@pytest.mark.slow
def test_threads_are_those_that_the_run_began_with(caplog):
    caplog.set_level(logging.INFO)
    seen = []
    torch.set_num_threads(2)
    train(stop_at_step=1)
    torch.set_num_threads(1)
    train(stop_at_step=2, logging_steps=1, on_log=lambda row: seen.append(torch.get_num_threads()))
    assert set(seen) == {2} and torch.get_num_threads() == 1
    assert "computing with 2 threads, as this run began, instead of 1" in caplog.text


def poison(monkeypatch, when, loss=math.nan, gradient=None):
    """Spoil the batches whose number, from 0, is in `when`; returns the weights as each batch found them."""
    real, found = training.accumulate, []

    def accumulate(objective, *args):
        found.append({name: value.clone() for name, value in objective.state_dict().items()})
        tally = real(objective, *args)
        if len(found) - 1 in when:
            if gradient is None:
                tally[0] = loss
            else:
                next(objective.parameters()).grad[0, 0] = gradient
        return tally

    monkeypatch.setattr(training, "accumulate", accumulate)
    return found


@pytest.mark.parametrize("spoilt", [{"loss": math.nan}, {"loss": math.inf}, {"gradient": math.nan}], ids=str)
def test_a_batch_that_is_not_finite_is_left_out_and_counted(monkeypatch, caplog, spoilt):
    found = poison(monkeypatch, {2, 5}, **spoilt)
    summary = train(logging_steps=1)
    assert (summary.status, summary.step, summary.skipped_steps) == ("finished", 12, 2) and len(found) == 14
    for before, after, same in ((1, 2, False), (2, 3, True), (3, 4, False), (5, 6, True)):
        equal = all(torch.equal(found[before][name], found[after][name]) for name in found[0])
        assert equal == same, (before, after)
    rows, run = table(make()), make()
    assert [row["skipped_steps"] for row in rows] == list("001122222222")
    rates = [optim.learning_rate(run.train, step) for step in range(12)]
    assert [float(row["lr"]) for row in rows] == pytest.approx(rates, rel=1e-8), "the schedule waits"
    assert int(rows[-1]["tokens"]) == 14 * 64
    assert all(math.isfinite(float(row["loss"])) for row in rows)
    assert "a batch after step 2 is left out, not finite: loss" in caplog.text


def test_moments_do_not_move_where_a_batch_is_left_out(monkeypatch):
    train("clean", max_steps=3)
    poison(monkeypatch, {1})
    batches, real = [], data.TokenStream.next

    def repeated(self, rows):
        batches.append(batches[-1] if len(batches) == 2 else real(self, rows))
        return batches[-1]

    monkeypatch.setattr(data.TokenStream, "next", repeated)
    train("spoilt", max_steps=3)
    folders = [checkpoint.step_dir(make(name).run_dir, 3) for name in ("clean", "spoilt")]
    ends = [checkpoint.read_optimizer(folder) for folder in folders]
    for name, moments in ends[0]["adamw"].items():
        for key, value in moments.items():
            assert torch.equal(value, ends[1]["adamw"][name][key]), (name, key)
    weights = [safetensors.torch.load_file(folder / "model.safetensors") for folder in folders]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_too_many_in_a_row_stop_the_run_and_keep_the_last_good_checkpoint(monkeypatch):
    poison(monkeypatch, set(range(6, 50)), gradient=math.inf)
    run = make(max_bad_steps=3)
    with pytest.raises(training.TrainingError) as error:
        train(max_bad_steps=3)
    good = checkpoint.step_dir(run.run_dir, 5)
    text = str(error.value)
    assert text.startswith("3 batches in a row are not finite after step 6: loss ")
    assert all(part in text for part in ("gradient norm inf", "lr 0.00", "scale 1", f"last good checkpoint is {good}."))
    assert checkpoint.newest(run.run_dir) == (good, [])
    (log,) = run.log_dir.glob("*.log")
    assert "ERROR TrainingError: 3 batches in a row" in log.read_text()


def test_weights_that_are_not_finite_are_never_saved(monkeypatch):
    real = observer.Observer._sample

    def spoil(self):
        texts = real(self)
        with torch.no_grad():
            self.model.model.norm.weight[0] = math.nan
        return texts

    monkeypatch.setattr(observer.Observer, "_sample", spoil)
    with pytest.raises(training.TrainingError, match=r"not saved: norm.weight is not finite at step 6.*step-000005"):
        train(save_steps=1)
    assert checkpoint.steps(make().run_dir) == [3, 4, 5]


@pytest.mark.parametrize("broken", [math.nan, NotFiniteError("router scores")], ids=["nan", "error"])
def test_held_out_text_that_gives_no_figure_is_said_and_left_out(monkeypatch, caplog, broken):
    def measure(model, *_):
        if isinstance(broken, ValueError):
            raise broken
        return broken

    train("whole", logging_steps=5)
    monkeypatch.setattr(evaluation, "bits_per_byte", measure)
    assert (train("run", logging_steps=5).status, train("run").bits_per_byte) == ("finished", None)
    assert [int(row["step"]) for row in table(make())] == [5, 10, 12], "the last step has its row"
    assert caplog.text.count("held-out text cannot be measured") == 2
    weights = [tensors(make(name), 12) for name in ("whole", "run")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


def test_fp16_skips_an_overflow_halves_its_scale_and_goes_on():
    summary = train(precision="fp16", logging_steps=1)
    first = table(make())[0]
    assert summary.status == "finished" and math.isfinite(summary.loss)
    assert float(first["scale"]) == 65536 / 2 ** int(first["skipped_steps"])


def test_the_scale_of_fp16_has_a_floor(monkeypatch):
    poison(monkeypatch, set(range(99)), gradient=math.inf)
    scales, real = [], training.Trainer._left_behind

    def watch(self, loss):
        scales.append(self.precision.scaler.get_scale())
        real(self, loss)

    monkeypatch.setattr(training.Trainer, "_left_behind", watch)
    with pytest.raises(training.TrainingError, match=r"scale 1\. There is"):
        train(precision="fp16", max_bad_steps=20)
    assert scales[:16] == [2.0**n for n in range(15, -1, -1)] and set(scales[16:]) == {1.0}


def test_out_of_memory_names_the_next_batch_to_try(monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB\nmore")

    monkeypatch.setattr(training, "accumulate", full)
    sizes = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 3}
    with pytest.raises(training.TrainingError) as error:
        train(**sizes)
    assert str(error.value) == (
        "cpu is out of memory with 16 rows at a time: try per_device_train_batch_size=12 "
        "gradient_accumulation_steps=4, the same 48 rows a step. CUDA out of memory. Tried to allocate 20 MiB"
    )
    with pytest.raises(training.TrainingError, match="try a shorter max_position_embeddings or a smaller model"):
        train(per_device_train_batch_size=1)


@pytest.mark.parametrize("owner", [gradients.Objective, optim.Optimizer], ids=["forward", "optimizer"])
def test_a_real_failed_allocation_on_a_cpu_names_the_next_batch_to_try(monkeypatch, owner):
    """In the forward pass, and where the optimizer makes its moments; any other RuntimeError stays what it is."""
    name = "forward" if owner is gradients.Objective else "step"
    monkeypatch.setattr(owner, name, lambda self, *given: torch.empty(1 << 60))
    expected = r"^cpu is out of memory with 2 rows at a time: try per_device_train_batch_size=1 gradient_acc.*=2, .*all"
    with pytest.raises(training.TrainingError, match=expected):
        train()
    monkeypatch.setattr(owner, name, lambda self, *given: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size") as error:
        train()
    assert type(error.value) is RuntimeError


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_once_and_returns(number, monkeypatch):
    saves, real = [], checkpoint.save
    monkeypatch.setattr(checkpoint, "save", lambda *args, **options: saves.append(args[1]) or real(*args, **options))
    handler = signal.getsignal(number)

    def ask(row):
        if row["step"] == 6:
            signal.raise_signal(number)

    summary = train(on_log=ask)
    assert (summary.status, summary.step, saves) == ("interrupted", 6, [5, 6])
    assert signal.getsignal(number) is handler
    assert train().status == "finished" and saves == [5, 6, 10, 12]


def test_sigterm_after_sigint_is_not_the_second_interrupt():
    """So papermill ends its kernel on Ctrl-C: a step that outlasts the pause between the two still gets saved."""
    before = signal.getsignal(signal.SIGTERM)

    def ask(row):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)

    summary = train(on_log=ask)
    assert (summary.status, summary.step) == ("interrupted", 4) and checkpoint.steps(make().run_dir) == [4]
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("step", [6, 12])
@pytest.mark.parametrize("phase", [(evaluation, "bits_per_byte"), (observer, "complete")], ids=["measured", "sampled"])
def test_an_interrupt_amid_what_is_due_records_nothing_and_the_next_call_makes_it(monkeypatch, phase, step):
    """No forward pass comes after the signal. A crash after that next call's rows of the step doubles none of them."""
    train("whole")
    (owner, name), forwards, forward = phase, [], LanguageModel.forward
    real = getattr(owner, name)

    def begin(*given, **options):
        forwards[:] = [1] if checkpoint.steps(make().run_dir)[-1] == step - step % 5 else []
        return real(*given, **options)

    def counted(self, *given):
        if not self.training and forwards:
            forwards.append(1)
            if len(forwards) == 3:
                signal.raise_signal(signal.SIGINT)
        return forward(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, begin)
        patch.setattr(LanguageModel, "forward", counted)
        summary = train()
    assert (summary.status, summary.step, len(forwards)) == ("interrupted", step, 3)
    assert checkpoint.index(make().run_dir)["steps"][f"step-{step:06d}"] is None
    assert [row["status"] for row in report.runs()] == ["can go on", "complete"]
    for file in ("metrics.csv", "generations.csv"):
        assert f"{step}" not in [row["step"] for row in table(make(), file)]

    def crash(row):
        if row["step"] == 8:
            raise KeyError

    if step == 6:
        with pytest.raises(KeyError):
            train(on_log=crash)
        assert checkpoint.steps(make().run_dir) == [5, 6]
    assert (train().status, train().status) == ("finished", "complete")
    assert_same(make("whole"), make(), 12)


@pytest.mark.parametrize("backwards", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("patience", [-1, 60], ids=["slow", "quick"])
def test_a_signal_amid_a_step_gives_up_what_takes_long_and_repeats_it(monkeypatch, backwards, patience):
    """The eighth forward pass is of the fourth step, which is finished where that is a matter of seconds."""
    turns = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    train("whole", **turns)
    calls, forward = [], LanguageModel.forward

    def counted(self, *given):
        calls.append(self.training)
        interrupts = self.training and sum(calls) == 8
        if interrupts and not backwards:
            signal.raise_signal(signal.SIGINT)
        out = forward(self, *given)
        if interrupts and backwards:
            out[0].register_hook(lambda gradient: signal.raise_signal(signal.SIGINT))
        return out

    with monkeypatch.context() as patch:
        patch.setattr(processes, "PATIENCE", patience)
        patch.setattr(LanguageModel, "forward", counted)
        summary, last = train(**turns), 3 if patience < 0 else 4
    assert (summary.status, summary.step) == ("interrupted", last) and checkpoint.steps(make().run_dir) == [last]
    assert train(**turns).status == "finished"
    assert_same(make("whole"), make(), 12)


def test_a_signal_right_after_a_save_saves_no_second_time(monkeypatch):
    saves, real = [], checkpoint.save

    def save(*args, **options):
        saves.append(args[1])
        signal.raise_signal(signal.SIGINT)
        return real(*args, **options)

    monkeypatch.setattr(checkpoint, "save", save)
    summary = train()
    assert (summary.status, summary.step, saves) == ("interrupted", 5, [5])


def test_training_in_a_thread_works_without_signals():
    found = []
    thread = threading.Thread(target=lambda: found.append(train(max_steps=2).status))
    thread.start()
    thread.join()
    assert found == ["finished"]


@pytest.mark.slow
def test_two_signals_quit_at_once(home):  # noqa: F811
    code = (
        "import signal, runs\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a job in the background ignores it
        "def ask(row):\n for _ in range(2): signal.raise_signal(signal.SIGINT)\n raise SystemExit('still here')\n"
        "runs.train(on_log=ask)"
    )
    process = elsewhere(code, stderr=-1)
    _, text = process.communicate()
    assert process.returncode in (1, 130, -signal.SIGINT) and "KeyboardInterrupt" in text and "still here" not in text
    assert checkpoint.steps(make().run_dir) == []
    assert train(max_steps=2).status == "finished", "the lock is free"


def test_a_checkpoint_of_another_model_is_refused_by_field(caplog):
    train(stop_at_step=2)
    with pytest.raises(checkpoint.CheckpointError) as error:
        train(hidden_size=48, num_experts=8)
    text = str(error.value)
    assert "hidden_size 24 -> 48" in text and "num_experts 4 -> 8" in text and "head_dim 8 -> 16" in text
    assert "step-000002" in text and "run_name" in text and "max_steps" not in text
    with pytest.raises(checkpoint.CheckpointError, match=r"tokenizer 'bpe:300' -> 'bpe:290'"):
        train(tokenizer="bpe:290", vocab_size=300)
    caplog.set_level(logging.INFO)
    free = {"capacity_factor": 2.0, "bias_update_speed": 0.1, "held_out_bytes": 1000}
    assert train(**free).status == "finished", "settings of training may change"
    assert "bias_update_speed 0.01 -> 0.1, held_out_bytes 2000 -> 1000" in caplog.text


def test_another_corpus_is_refused_unless_it_is_allowed(caplog):
    train(stop_at_step=3)
    with pytest.raises(ValueError, match=r"corpus must be that of the checkpoint.*allow_other_corpus=True"):
        train(held_out=0.5)
    assert checkpoint.steps(make().run_dir) == [3]
    assert train(held_out=0.5, allow_other_corpus=True).status == "finished"
    assert "going on with pydocs" in caplog.text


def test_a_vocabulary_too_small_for_the_tokenizer_names_both(monkeypatch):
    real = training.open_tokenizer

    def larger(settings, corpus):
        tokenizer = real(settings, corpus)
        tokenizer.add_tokens(["one more"])
        return tokenizer

    monkeypatch.setattr(training, "open_tokenizer", larger)
    with pytest.raises(ValueError, match=r"vocab_size must be at least 301, the entries of the tokenizer, got 300"):
        train()


def test_a_damaged_checkpoint_is_named_and_skipped(caplog):
    caplog.set_level(logging.INFO)
    train(stop_at_step=10)
    run = make()
    torn = checkpoint.step_dir(run.run_dir, 10) / "model.safetensors"
    torn.write_bytes(torn.read_bytes()[:-1])
    summary = train()
    assert summary.status == "finished"
    assert re.search(r"skipped .*step-000010: model.safetensors: \d+ bytes instead of", caplog.text)
    assert f"loading {os.path.join('checkpoints', 'run', 'step-000005')}" in caplog.text
    assert [row["step"] for row in table(run)] == ["4", "6", "8", "12"]
    assert (run.run_dir / "step-000010.bad-1").is_dir()


def test_where_the_corpus_cannot_be_read_the_run_saves_and_fails(monkeypatch):
    real, calls = data.TokenStream.next, []

    def fail(self, rows):
        calls.append(rows)
        if len(calls) == 8:
            raise data.StreamError("the network is gone; run it again")
        return real(self, rows)

    monkeypatch.setattr(data.TokenStream, "next", fail)
    with pytest.raises(data.StreamError, match="run it again"):
        train()
    assert checkpoint.steps(make().run_dir) == [5, 7]
    assert train().status == "finished"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device that is always full, on Linux only")
@pytest.mark.parametrize("full", ["metrics.csv", "generations.csv", ".log"])
def test_a_log_file_on_a_full_disk_is_named_and_the_last_good_checkpoint_is_kept(monkeypatch, capfd, full):
    """From step 6 on, for which a row and texts are due: one error, no file left open, and the next call goes on."""
    opened, take_step = [], training.Trainer.take_step

    def fill(self):
        if self.step == 5:
            log = self.log.handlers[0]
            table = next((file for file in self.log.files if file.name.endswith(full)), log.stream)
            os.dup2(os.open("/dev/full", os.O_WRONLY), table.fileno())
            opened.extend([*self.log.files, log.stream])
        return take_step(self)

    expected = rf"cannot write {make().log_dir}/.*{re.escape(full)}: No space left on device. The last good checkpoint"
    with monkeypatch.context() as patch, pytest.raises(OSError, match=expected):
        patch.setattr(training.Trainer, "take_step", fill)
        train()
    assert len(opened) == 3 and all(file.closed for file in opened)
    assert "".join(capfd.readouterr()) == "" and not logging.getLogger("dsl").handlers
    assert checkpoint.newest(make().run_dir) == (checkpoint.step_dir(make().run_dir, 5), [])
    assert train().status == "finished" and [row["step"] for row in table(make())] == ["4", "6", "8", "12"]


def test_a_prompt_longer_than_the_window_is_said_and_left_out(caplog):
    long = "word " * 40
    assert train(max_steps=2, prompts=(long, "The")).status == "finished"
    assert "no text for 'word word" in caplog.text
    assert table(make(), "generations.csv")[0]["prompt"] == "The"


@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_a_sample_that_is_not_finite_is_left_out_once_and_no_seed_is_too_large(monkeypatch, caplog, seed):
    real, seen = observer.complete, []

    def complete(model, tokenizer, prompt, **sampling):
        seen.append(sampling["seed"])
        if len(seen) == 2:
            raise NotFiniteError("router scores must be finite")
        return real(model, tokenizer, prompt, **sampling)

    monkeypatch.setattr(observer, "complete", complete)
    train(max_steps=2, sample_steps=1, seed=seed)
    texts = [(row["step"], row["prompt"]) for row in table(make(), "generations.csv")]
    own = [text for text in texts if text[1] in make().train.prompts]  # the corpus has more
    assert own == [("1", "The"), ("2", "The"), ("2", "An unusual")]
    assert caplog.text.count("no text for 'An unusual': router scores must be finite") == 1
    assert seen[:2] == [seed, (seed + 1) % 2**63] and max(seen) < 2**63


def test_the_only_step_of_one_cycle_is_no_lost_one():
    train(max_steps=1, lr_scheduler_type="one_cycle", warmup_steps=0, logging_steps=1)
    assert float(table(make())[0]["lr"]) == make().train.learning_rate


def test_threads_are_restored_for_as_many_processes_as_noted_them():
    cpu, here = torch.device("cpu"), torch.get_num_threads()
    for noted, world, count in (({"world": 2}, 1, here), ({"world": 1}, 2, here), ({"world": 2}, 2, 3), ({}, 1, 3)):
        with resume.threads(resume.Start(state={"threads": 3, **noted}), cpu, world):
            assert torch.get_num_threads() == count, (noted, world)
        assert torch.get_num_threads() == here
    train(max_steps=1, warmup_steps=0)
    assert checkpoint.read_trainer(checkpoint.step_dir(make().run_dir, 1))["world"] == 1


def test_what_is_due_may_be_a_list_as_it_once_was():
    due = {"norm": 0.5, "seconds": 2.0, "tokens": 64, "batches": 1}
    for saved in (due, [*due.values()]):
        assert resume.Start(state={"due": saved}).due == due
    assert resume.Start(state={"due": None}).due is resume.Start().due is None


def test_a_checkpoint_notes_the_text_that_it_is_measured_on():
    train(stop_at_step=1)
    train(stop_at_step=2, held_out_bytes=500)
    folders = [checkpoint.step_dir(make().run_dir, step) for step in (1, 2)]
    texts = [[data.open_corpus(make().data).fingerprint, size] for size in (2000, 500)]
    assert [checkpoint.read_trainer(folder)["measured_on"] for folder in folders] == texts


def test_a_longer_cosine_goes_on_from_the_newest_step_on_the_new_curve(caplog):
    caplog.set_level(logging.INFO)
    train(logging_steps=1)
    summary = train(logging_steps=1, max_steps=20)
    run = make(max_steps=20)
    assert (summary.status, summary.step) == ("finished", 20)
    assert "on from step 12 on the new cosine curve" in caplog.text
    rows = table(run)
    assert [row["step"] for row in rows] == [str(step) for step in range(1, 21)]
    assert float(rows[12]["lr"]) == pytest.approx(optim.learning_rate(run.train, 12), rel=1e-8)


def test_a_longer_wsd_goes_back_to_before_its_decay(caplog):
    caplog.set_level(logging.INFO)
    settings = {"lr_scheduler_type": "wsd", "decay_share": 0.5, "save_total_limit": 1, "logging_steps": 1}
    train(**settings)
    run = make(**settings)
    assert checkpoint.steps(run.run_dir) == [6, 12], "the last one before the decay is kept from rotation"
    with pytest.raises(ValueError, match="corpus must be that of the checkpoint"):  # nothing is touched yet
        train(**settings, max_steps=20, held_out=0.5)
    summary = train(**settings, max_steps=20)
    assert (summary.status, summary.step) == ("finished", 20)
    assert "back to step 6, the last before the learning rate fell" in caplog.text
    assert (run.run_dir / "step-000012.old-1").is_dir(), "the end of the shorter schedule is set aside"
    rates = [float(row["lr"]) for row in table(run)]
    longer = make(**settings, max_steps=20).train
    assert rates == pytest.approx([optim.learning_rate(longer, step) for step in range(20)], rel=1e-8)
    assert len(table(run, "metrics.old-1.csv")) == 12


@pytest.mark.slow
def test_a_longer_wsd_equals_one_that_was_long_from_the_start():
    settings = {"lr_scheduler_type": "wsd", "decay_share": 0.5}
    train("late", **settings)
    train("late", **settings, max_steps=20)
    train("early", **settings, max_steps=20)
    one, other = (tensors(make(name), 20) for name in ("late", "early"))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.slow
def test_a_notebook_shows_each_line_once_and_its_interrupt_saves(monkeypatch):
    """In a real kernel: interrupted in the middle of a cell, the run returns a summary; the next cell goes on."""
    from jupyter_client.manager import start_new_kernel

    monkeypatch.delenv("PYTEST_CURRENT_TEST")  # a kernel that sees it does not mirror descriptor 2
    here = os.path.dirname(__file__)
    manager, client = start_new_kernel(kernel_name="python3", cwd=here, extra_arguments=["--log-level=ERROR"])
    texts = {"stdout": "", "stderr": ""}

    def read(message):
        if message["msg_type"] == "stream":
            texts[message["content"]["name"]] += message["content"]["text"]
        assert message["msg_type"] != "error", message["content"]
        if "step 6/5000" in texts["stdout"] and not asked:
            asked.append(manager.interrupt_kernel())

    asked = [True]
    try:
        cell = "from dsl import training\nimport runs\n"
        client.execute_interactive(cell, timeout=120, output_hook=read)
        asked.clear()
        cell = (
            "summary = training.train(runs.make(max_steps=5000, save_steps=5000))\nprint(summary.status, summary.step)"
        )
        client.execute_interactive(cell, timeout=120, output_hook=read)
        status, step = texts["stdout"].splitlines()[-1].split()
        assert status == "interrupted" and int(step) >= 6
        assert texts["stdout"].count("step 6/5000") == 1 and "step 6/5000" not in texts["stderr"]
        assert "interrupted: finishing the step" in texts["stderr"]
        client.execute_interactive(
            "print(training.train(runs.make(max_steps=2)).status)", timeout=120, output_hook=read
        )
        assert texts["stdout"].splitlines()[-1] == "complete"
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert checkpoint.steps(make().run_dir) == [int(step)]


def test_the_router_bias_takes_one_step_from_all_micro_batches():
    settings = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "logging_steps": 1}
    train(max_steps=1, warmup_steps=0, **settings)
    (row,), found = table(make()), tensors(make(), 1)
    for layer in (0, 1):
        share = torch.tensor([float(part) for part in row[f"load_{layer}"].split(";")])
        step = 0.01 * torch.sign(0.25 - share)
        bias = found[f"model.layers.{layer}.mlp.router.e_score_correction_bias"]
        assert torch.allclose(bias, step - step.mean(), atol=1e-8)
