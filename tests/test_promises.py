"""One test for each promise of the README, named as the promise; commands are read from the page and run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dsl import settings

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
BIN = Path(sys.prefix) / ("Scripts" if os.name == "nt" else "bin")
SMALL = "--max-steps 2 --held-out-bytes 4000 --sample-tokens 4 --per-device-train-batch-size 1"

# How a test runs each command of the page: the same command, its work made small (None: as it stands).
COMMANDS = {
    "make train": "make -o {stamp} train VENV={prefix}",
    "make test": "make -o {stamp} -n test VENV={prefix}",
    'make train ARGS="-p max_steps 1400"': 'make -o {stamp} -n train VENV={prefix} ARGS="-p max_steps 22"',
    "source .venv/bin/activate": "sh -c '. {bin}/activate'",
    "papermill notebooks/03_train.ipynb out.ipynb -p max_steps 10000": (
        "papermill notebooks/03_train.ipynb {tmp}/out.ipynb -p max_steps 24"
    ),
    "dsl train quickstart --run-name mine --max-steps 300": f"dsl train quickstart --run-name mine {SMALL}",
    'dsl generate --checkpoint checkpoints/demo --prompt "Return a new array" --max-new-tokens 60': None,
    "dsl test-checkpoint --checkpoint checkpoints/demo": None,
    "dsl runs": None,
    "jupyter lab": "jupyter lab --version",
    # started, asked and stopped by test_serving, test_web and test_docker; here: that they are known
    "dsl serve --checkpoint checkpoints/demo": "dsl serve --help",
    "dsl web --api http://127.0.0.1:8000": "dsl web --help",
    "docker compose -f docker/compose.yaml up": "cat docker/compose.yaml",
}


@pytest.fixture(scope="module")
def shell(tmp_path_factory):
    """Runs a command line from the repository's root as somebody who typed it, in a home of its own."""
    home = tmp_path_factory.mktemp("home")
    outside = {name: value for name, value in os.environ.items() if name not in ("ARGS", "MAKEFLAGS", "MAKEOVERRIDES")}
    environment = {**outside, "DSL_HOME": str(home), "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    places = {"stamp": BIN.parent / "installed", "prefix": sys.prefix, "bin": BIN, "tmp": home}

    def run(command: str) -> subprocess.CompletedProcess:
        line = command.format(**places)
        done = subprocess.run(line, shell=True, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        return done

    run.home = home
    return run


def commands() -> list[str]:
    """The command lines of the page: fenced blocks without a language, and the inline `jupyter lab`."""
    lines = [line.strip() for kind, block in BLOCKS if not kind for line in block.splitlines()]
    first = ("make", "dsl", "papermill", "source", "jupyter", "torchrun", "pytest", "pip", "docker")
    return [line for line in lines if line.startswith(tuple(f"{word} " for word in first))] + ["jupyter lab"]


def test_every_command_of_the_page_is_run_by_a_test():
    assert sorted(set(commands())) == sorted(COMMANDS)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="make and sh")
def test_make_train_trains_and_the_notebook_goes_on(shell):
    first = shell(COMMANDS["make train"])
    assert re.search(r"step 20/20  loss [\d.]+  held-out [\d.]+ bits/byte  lr \S+  [\d,]+ tokens/s", first.stderr)
    shell(COMMANDS["papermill notebooks/03_train.ipynb out.ipynb -p max_steps 10000"])
    steps = {path.name for path in (shell.home / "checkpoints" / "tiny").glob("step-*")}
    assert {"step-000020", "step-000024"} <= steps
    figures = {path.name for path in (shell.home / "figures" / "runs" / "tiny").iterdir()}
    assert figures == {"03_training.png", "03_expert_load.png"}


@pytest.mark.skipif(os.name == "nt", reason="make and sh")
def test_make_train_passes_parameters_on(shell):
    done = shell(COMMANDS['make train ARGS="-p max_steps 1400"'])
    assert "logs/03_train.out.ipynb -p max_steps 22" in done.stdout


def test_make_test_runs_the_tests(shell):
    assert "pytest tests" in shell(COMMANDS["make test"]).stdout


@pytest.mark.skipif(os.name == "nt", reason="make")
def test_every_make_target_of_the_page_is_there(shell):
    targets = sorted(set(re.findall(r"`make ([a-z-]+)", README)) - {"train", "test"})
    assert len(targets) >= 5
    shell(f"make -o {{stamp}} -n {' '.join(targets)} VENV={{prefix}}")


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith(("dsl", "jupyter", "source", "docker"))])
def test_command_works(shell, command):
    done = shell(COMMANDS[command] or command)
    assert done.stdout.strip() or command.startswith("source")


@pytest.mark.slow
def test_python_example_works(shell):
    (example,) = (block for kind, block in BLOCKS if kind == "python")
    small = "max_steps=4, held_out_bytes=4000, sample_tokens=4, per_device_train_batch_size=1"
    script = example.replace("max_steps=300", small) + "\nprint(summary.status, model.config.model_type)"
    script += "\nprint(type(AutoModelForCausalLM.from_pretrained(summary.run_dir / 'step-000004')).__name__)"
    path = shell.home / "example.py"
    path.write_text(script, encoding="utf-8")
    lines = shell(f"{sys.executable} {path}").stdout.splitlines()
    assert lines[-2:] == ["finished dsl", "DslForCausalLM"]


def test_links_and_pictures_resolve():
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    assert targets and [t for t in targets if "://" not in t and not (ROOT / t).exists()] == []


def test_presets_of_the_page_are_the_presets():
    table = README.split("## Presets")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)`", table, flags=re.MULTILINE)) == set(settings.PRESETS)


def test_every_preset_runs_offline_on_pydocs():
    for name in settings.PRESETS:
        assert settings.preset(name, corpus="pydocs").data.corpus == "pydocs"


def test_names_in_the_table_of_words_are_settings():
    table = README.split("## Words")[1].split("\n## ")[0]
    names = re.findall(r"`(\w+)(?:=\"?(\w+)\"?)?`", table)
    assert names
    for name, value in names:
        if name in settings.FIELDS and value:
            settings.preset("tiny", **{name: value})
        assert name in {*settings.FIELDS, *settings.PRESETS, "None"}, name


def test_demo_is_a_small_trained_checkpoint():
    folder = ROOT / "checkpoints" / "demo"
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 10e6
    from dsl import load

    model, tokenizer = load("checkpoints/demo")
    assert len(tokenizer) <= model.config.vocab_size and not model.training


def test_notebooks_of_the_table_exist():
    table = README.split("## The notebooks")[1].split("\n## ")[0]
    named = set(re.findall(r"\(notebooks/(\w+)\.ipynb\)", table))
    assert named == {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}


def test_licence_is_mit():
    assert (ROOT / "LICENSE").read_text(encoding="utf-8").startswith("MIT License")


def test_versions_are_pinned_and_conda_installs_the_same():
    pins = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    assert "torch==2.13.0\n" in pins
    parts = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
    (pip,) = (part["pip"] for part in parts if isinstance(part, dict))
    assert "-r requirements.txt" in pip
