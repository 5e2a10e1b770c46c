"""Small real runs on the offline corpus: to start them here or in another process, and to compare what they leave."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from dsl import checkpoint, training
from dsl.runlog import TIME_COLUMNS
from dsl.settings import Run, preset

SMALL = {
    **{"hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 1, "intermediate_size": 32},
    **{
        "max_position_embeddings": 32,
        "tokenizer": "bpe:300",
        "vocab_size": 300,
        "held_out_bytes": 2000,
        "fraction": 0.004,
    },
    **{"per_device_train_batch_size": 2, "max_steps": 12, "warmup_steps": 1, "learning_rate": 5e-3},
    **{"logging_steps": 4, "eval_steps": 6, "save_steps": 5, "sample_steps": 6, "sample_tokens": 3},
    **{"prompts": ("The", "An unusual"), "bias_update_speed": 0.01},
}


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def home(tmp_path, monkeypatch, cache):
    """A fresh home for runs; the prepared corpus is shared."""
    for name, value in (("DSL_HOME", tmp_path), ("DSL_CACHE", cache), ("DSL_SMOKE", "1"), ("OMP_NUM_THREADS", "1")):
        monkeypatch.setenv(name, str(value))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(before)


def make(name: str = "run", **settings) -> Run:
    return preset("tiny", run_name=name, **{**SMALL, **settings})


def train(name: str = "run", *, on_log=None, **settings) -> training.Summary:
    return training.train(make(name, **settings), on_log=on_log, progress=False)


def elsewhere(code: str, **options) -> subprocess.Popen:
    """Run code in a new process that finds these helpers."""
    here = Path(__file__).parent
    places = [str(here), str(here.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, text=True, **options)


def table(run: Run, name: str = "metrics.csv") -> list[dict[str, str]]:
    with (run.log_dir / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def tensors(run: Run, step: int) -> dict[str, torch.Tensor]:
    """Weights, buffers and moments of a checkpoint by name."""
    folder = checkpoint.step_dir(run.run_dir, step)
    found = safetensors.torch.load_file(folder / "model.safetensors")

    def walk(prefix, value):
        if isinstance(value, dict):
            for name, inner in value.items():
                walk(f"{prefix}/{name}", inner)
        else:
            found[prefix] = torch.as_tensor(value)

    walk("optimizer", checkpoint.read_optimizer(folder))
    return found


def assert_same(one: Run, other: Run, step: int) -> None:
    """Bit for bit: weights, router biases, moments, random numbers, cursor, and both tables but for time."""
    first, second = tensors(one, step), tensors(other, step)
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different, different
    states = [checkpoint.read_trainer(checkpoint.step_dir(run.run_dir, step)) for run in (one, other)]
    for state in states:
        assert state["settings"].pop("name")
    assert states[0] == states[1]
    for name in ("metrics.csv", "generations.csv"):
        rows = [
            [{k: v for k, v in row.items() if k not in TIME_COLUMNS} for row in table(r, name)] for r in (one, other)
        ]
        assert rows[0] and rows[0] == rows[1], name
