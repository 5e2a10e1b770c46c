"""Accumulation equals the big batch; what an interval of steps adds up to; processes and signals."""

import dataclasses
import json
import logging
import math
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from helpers import assert_close, seeded

from dsl import optim, runlog
from dsl.config import ModelConfig
from dsl.gradients import Objective, accumulate
from dsl.interval import Interval, gpu_percent
from dsl.model import LanguageModel
from dsl.processes import Interrupt, Processes

CONFIG = ModelConfig(
    **{"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_experts": 4},
    **{"layer_types": ("linear_attention", "full_attention"), "num_attention_heads": 4, "router_z_loss_coef": 0.01},
    **{"balance": "aux_loss", "aux_loss_scope": "sequence", "aux_loss_coef": 0.1, "capacity_factor": 1.0},
)
FP32 = optim.precision("fp32", "cpu")


def batch(rows, padded):
    tokens, labels = torch.randint(61, (2, rows, 24))
    if padded:
        for row, kept in enumerate(torch.randint(1, 25, (rows,)).tolist()):
            labels[row, kept:] = -100
        labels[0] = -100
    return tokens, labels


def gradients(model, tokens, labels, rows):
    model.zero_grad()
    total = accumulate(Objective(model), tokens, labels, rows, FP32, Processes())
    return total, {name: weight.grad.clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("padded", [False, True], ids=["full rows", "labels of unequal number"])
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_accumulation_equals_the_big_batch(rows, padded):
    """In fp64, with every loss on. Sequence-wise losses are of rows: they average alike only where rows are full."""
    seeded()
    config = dataclasses.replace(CONFIG, balance="loss_free", router_z_loss_coef=0.0) if padded else CONFIG
    model = LanguageModel(config).double()
    tokens, labels = batch(8, padded)
    whole, expected = gradients(model, tokens, labels, 8)
    split, found = gradients(model, tokens, labels, rows)
    for name in expected:
        assert_close(name, found[name], expected[name], 1e-10)
    assert_close("loss", split[:1], whole[:1], 1e-12)
    assert torch.equal(split[5:], whole[5:]), "counts"
    assert whole[5:].sum() == 8 * 24 * 2 * 2


def test_the_loss_counts_each_label_once():
    seeded()
    model = LanguageModel(CONFIG).double()
    tokens, labels = batch(6, padded=True)
    total, _ = gradients(model, tokens, labels, 2)
    with torch.no_grad():
        each = model.loss(model(tokens)[0], labels, reduction="none")
    assert total[0].item() == pytest.approx((each.sum() / (labels != -100).sum()).item(), rel=1e-9)


def test_scaled_gradients_are_those_times_the_scale():
    seeded()
    model = LanguageModel(CONFIG)
    tokens, labels = batch(2, padded=False)
    scaled = dataclasses.replace(FP32, scaler=torch.amp.GradScaler("cpu", init_scale=128.0))
    _, plain = gradients(model, tokens, labels, 2)
    model.zero_grad()
    accumulate(Objective(model), tokens, labels, 2, scaled, Processes())
    for name, weight in model.named_parameters():
        assert torch.equal(weight.grad, 128 * plain[name]), name


def one_step(counts, loss=2.0, entropy=1.0, dropped=0.0):
    """The tally of a step of two layers."""
    head = torch.tensor([loss, entropy, entropy, dropped, dropped], dtype=torch.float64)
    return torch.cat([head, torch.tensor(counts, dtype=torch.float64).flatten()])


def test_an_interval_is_the_mean_of_its_steps_and_the_sum_of_their_counts():
    interval = Interval(CONFIG)
    interval.add(one_step([[4, 4, 4, 4], [0, 8, 4, 4]], loss=2.0, entropy=1.0, dropped=0.25))
    interval.add(one_step([[4, 4, 4, 4], [0, 8, 4, 4]], loss=4.0, entropy=1.5, dropped=0.0))
    interval.spend(0.5, 100)
    interval.spend(0.5, 100)
    row = interval.close()
    assert row["loss"] == 3.0 and row["tokens_per_second"] == 200 and row["step_seconds"] == 0.5
    assert (row["load_0"], row["load_1"]) == ("0.25;0.25;0.25;0.25", "0;0.5;0.25;0.25")
    assert (row["maxvio_0"], row["maxvio_1"], row["dead_1"]) == (0, 1, 1)
    assert row["entropy_0"] == 1.25 and row["dropped_0"] == 0.125
    assert {*runlog.TIME_COLUMNS, "step"} <= set(row) | {"step"} <= set(runlog.columns([0, 1]))
    interval.add(one_step([[1, 1, 1, 1], [1, 1, 1, 1]], loss=7.0))
    interval.spend(0.5, 100)
    assert interval.close()["loss"] == 7.0, "the next interval starts from nothing"


def test_half_an_interval_goes_through_json_exactly():
    interval, other = Interval(CONFIG), Interval(CONFIG)
    interval.add(one_step(torch.rand(2, 4).tolist(), loss=1 / 3, entropy=math.pi))
    other.load_state_dict(json.loads(json.dumps(interval.state_dict())), torch.device("cpu"))
    for one in (interval, other):
        one.add(one_step(torch.ones(2, 4).tolist()))
        one.spend(1, 1)
    rows = interval.close(), other.close()
    assert all(rows[0][name] == rows[1][name] for name in rows[0] if name not in runlog.TIME_COLUMNS)
    assert rows[1]["step_seconds"] == 1, "of the batches that this process took"


def test_half_an_interval_goes_on_where_there_is_no_fp64(monkeypatch):
    """On MPS, whose tallies are fp32: what is sent there is no wider."""
    interval, sent = Interval(CONFIG), []
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device: sent.append((tensor.dtype, device)) or tensor)
    for kind in ("mps", "cpu"):
        interval.load_state_dict({"steps": 1, "sums": [0.25] * 13}, torch.device(kind))
        assert interval.sums.tolist() == [0.25] * 13
    assert sent == [(torch.float32, torch.device("mps")), (torch.float64, torch.device("cpu"))]


def test_what_was_spent_can_be_spent_again():
    interval, other = Interval(CONFIG), Interval(CONFIG)
    interval.spend(0.5, 100)
    interval.spend(1.0, 50)
    other.spend(**interval.spent())
    assert other.spent() == interval.spent() == {"seconds": 1.5, "tokens": 150, "batches": 2}


def test_an_expert_that_starves_or_hoards_is_named_once(caplog):
    caplog.set_level(logging.INFO)
    interval = Interval(dataclasses.replace(CONFIG, num_hidden_layers=6, moe_layers=(2, 5)))

    def close(counts):
        caplog.clear()
        interval.add(one_step(counts))
        interval.spend(1, 1)
        interval.close()
        return [record.getMessage() for record in caplog.records]

    even, bad = [[25, 25, 25, 25], [25, 25, 25, 25]], [[25, 25, 25, 25], [2, 40, 20, 38]]
    assert close(even) == []
    assert close(bad) == [
        "layer 5: expert 1 hoards, with 1.60 of an even share",
        "layer 5: expert 3 hoards, with 1.52 of an even share",
        "layer 5: expert 0 starves, with 0.08 of an even share",
    ]
    assert close(bad) == [] and close(even) == [] and len(close(bad)) == 3


def test_the_use_of_a_gpu_is_logged_where_it_can_be_read(monkeypatch):
    class NVMLError(Exception):
        pass

    def fail(error):
        raise error

    gpu, cpu = map(torch.device, ("cuda", "cpu"))
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: 37)
    assert (gpu_percent(gpu), gpu_percent(cpu)) == (37, None)
    for error in (ModuleNotFoundError("nvidia-ml-py"), RuntimeError("no driver"), NVMLError("not supported")):
        monkeypatch.setattr(torch.cuda, "utilization", lambda device, error=error: fail(error))
        assert gpu_percent(gpu) is None


def test_the_first_signal_asks_and_handlers_come_back():
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    for number in (signal.SIGINT, signal.SIGTERM):
        with Interrupt() as interrupt:
            assert not interrupt.asked
            signal.raise_signal(number)
            assert interrupt.asked
        assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_the_second_signal_quits_at_once():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it from the start
    with Interrupt(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        time.sleep(60)
    script = (
        "import signal, time\nfrom dsl.processes import Interrupt\n"
        "with Interrupt():\n for _ in range(2): signal.raise_signal(signal.SIGTERM)\n time.sleep(60)"
    )
    done = subprocess.run([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    assert done.returncode == -signal.SIGTERM and done.stderr.count("once more quits") == 1


def test_in_another_thread_signals_are_left_alone():
    found = []

    def work():
        with Interrupt() as interrupt:
            found.append((interrupt.asked, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [(False, signal.getsignal(signal.SIGINT))]
