"""The promises of the README; its commands are read from the page and run.

Not run here: `make test` and the second `make train`, whose commands are shown only; `jupyter lab`, which test_browser
starts and opens; `docker compose`, for want of Docker: test_docker reads its file and starts what is in the images.
"""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from runs import SMALL, cache, home  # noqa: F401
from servers import free_port, process

from dsl import settings, training

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
BIN = Path(sys.prefix) / ("Scripts" if os.name == "nt" else "bin")
TRAIN = "dsl train quickstart --run-name mine --max-steps 2 --held-out-bytes 4000 --sample-tokens 4"
TRAIN += " --per-device-train-batch-size 1"

# How a test runs each command of the page: the same command, its work made small (None: as it stands).
COMMANDS = {
    "make train": "make -o {stamp} train VENV={prefix}",
    "make test": "make -o {stamp} -n test VENV={prefix}",
    'make train ARGS="-p max_steps 1400"': 'make -o {stamp} -n train VENV={prefix} ARGS="-p max_steps 22"',
    "source .venv/bin/activate": "sh -c '. {bin}/activate'",
    "papermill notebooks/03_train.ipynb out.ipynb -p max_steps 10000": (
        "papermill notebooks/03_train.ipynb {tmp}/out.ipynb -p max_steps 24"
    ),
    "dsl train quickstart --run-name mine --max-steps 300": TRAIN,
    'dsl generate --checkpoint checkpoints/demo --prompt "Return a new array" --max-new-tokens 60': None,
    "dsl test-checkpoint --checkpoint checkpoints/demo": None,
    "dsl runs": "mkdir -p {tmp}/checkpoints && cp -r checkpoints/demo {tmp}/checkpoints && dsl runs",
    "jupyter lab": "jupyter lab --version",
    "dsl serve --checkpoint checkpoints/demo": "dsl serve --checkpoint checkpoints/demo --port {api}",
    "dsl web --api http://127.0.0.1:8000": "dsl web --api http://127.0.0.1:{api} --port {page}",
    "docker compose -f docker/compose.yaml up": None,
}
SAYS = {  # what a command prints
    "dsl train": "status: finished",
    "dsl generate": "^Return a new array.+",
    "dsl test-checkpoint": "problems",
    "dsl runs": "^demo +700 .*complete",
    "jupyter lab": r"^\d+\.\d+",
    "source .venv/bin/activate": "",
}


@pytest.fixture(scope="module")
def shell(tmp_path_factory):
    """Runs a command line from the repository's root as somebody who typed it, in a home of its own."""
    place = tmp_path_factory.mktemp("home")
    outside = {name: value for name, value in os.environ.items() if name not in ("ARGS", "MAKEFLAGS", "MAKEOVERRIDES")}
    environment = {**outside, "DSL_HOME": str(place), "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    places = {"stamp": BIN.parent / "installed", "prefix": sys.prefix, "bin": BIN, "tmp": place}

    def run(command: str) -> subprocess.CompletedProcess:
        line = command.format(**places)
        done = subprocess.run(line, shell=True, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        return done

    run.home, run.environment = place, environment
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
    assert (shell.home / "logs" / "03_train.out.ipynb").exists(), "and not among the user's own"
    figures = {path.name for path in (shell.home / "figures" / "runs" / "tiny").iterdir()}
    assert figures == {"03_training.png", "03_expert_load.png"}


@pytest.mark.skipif(os.name == "nt", reason="make and sh")
def test_make_train_passes_parameters_on(shell):
    done = shell(COMMANDS['make train ARGS="-p max_steps 1400"'])
    assert re.search(r"papermill .* notebooks/03_train.ipynb .*03_train.out.ipynb\S* -p max_steps 22", done.stdout)


def test_make_test_runs_the_tests(shell):
    assert "pytest tests" in shell(COMMANDS["make test"]).stdout


@pytest.mark.skipif(os.name == "nt", reason="make")
def test_every_make_target_of_the_page_is_there(shell):
    targets = sorted(set(re.findall(r"`make ([a-z-]+)", README)) - {"train", "test"})
    assert len(targets) >= 5
    shell(f"make -o {{stamp}} -n {' '.join(targets)} VENV={{prefix}}")


@pytest.mark.slow
@pytest.mark.parametrize("start", SAYS)
def test_command_works(shell, start):
    [command] = (command for command in COMMANDS if command.startswith(start))
    assert re.search(SAYS[start], shell(COMMANDS[command] or command).stdout, flags=re.MULTILINE)


@pytest.mark.slow
def test_the_server_and_the_page_answer(shell):
    ports = {"api": free_port(), "page": free_port()}
    serve, web = (
        shlex.split(COMMANDS[command].format(**ports))
        for command in ("dsl serve --checkpoint checkpoints/demo", "dsl web --api http://127.0.0.1:8000")
    )
    api, page = (f"http://127.0.0.1:{port}" for port in ports.values())
    here = {"cwd": ROOT, "env": shell.environment}
    with process(serve, f"{api}/health", **here), process(web, page, **here):
        asked = {"model": "demo", "prompt": "Return a new array", "max_tokens": 4}
        answer = httpx.post(f"{api}/v1/completions", json=asked, timeout=300).json()
        assert answer["choices"][0]["text"], answer
        assert "gradio" in httpx.get(page, timeout=300).text


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


@pytest.mark.slow
@pytest.mark.parametrize("name", settings.PRESETS)
def test_every_preset_runs_offline_on_pydocs(name, home):  # noqa: F811
    """Two steps of its kinds of layers, experts and optimizer, at the smallest width."""
    run = settings.preset(name, **{**SMALL, "corpus": "pydocs", "max_steps": 2})
    assert training.train(run, progress=False).status == "finished"


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
    assert README.rstrip().endswith("MIT licence.")
    assert (ROOT / "LICENSE").read_text(encoding="utf-8").startswith("MIT License\n")
    assert '\nlicense = "MIT"\n' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
