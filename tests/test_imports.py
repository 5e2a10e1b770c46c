"""The arrows between the files of dsl point one way, and its doors open without loading what they do not need."""

import ast
import os
import subprocess
import sys

import pytest
import shelves
from shelves import BESIDE, DSL, ORDER, code_lines, tree

MODEL = shelves.SHELVES["the model"]
FILES = sorted(p.stem for p in DSL.glob("*.py") if p.stem != "__init__")
LINES = 330


def imported(name: str) -> set[str]:
    """Modules that a file imports, anywhere in it; those of dsl as `dsl.x`."""
    found = set()
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: a relative import, line {node.lineno}"
            found |= {f"dsl.{a.name}" for a in node.names} if node.module == "dsl" else {node.module}
    return found


def own(name: str) -> set[str]:
    return {module.split(".")[1] for module in imported(name) if module.startswith("dsl.")}


@pytest.mark.parametrize("name", FILES)
def test_arrows_point_one_way(name):
    known = ORDER[: ORDER.index(name)] if name in ORDER else BESIDE.get(name)
    assert known is not None, f"dsl/{name}.py has no place in the order: give it one here"
    assert own(name) <= set(known), f"dsl/{name}.py imports what comes after it: {sorted(own(name) - set(known))}"


@pytest.mark.parametrize("name", [n for n in MODEL if n in FILES])
def test_the_model_shelf_needs_only_torch(name):
    packages = {module.partition(".")[0] for module in imported(name)}
    assert packages - sys.stdlib_module_names <= {"torch", "dsl"}


def test_only_the_doors_know_pictures_and_servers():
    others = set().union(*(imported(n) for n in FILES if n in ORDER[: ORDER.index("plots")]))
    assert not {m.partition(".")[0] for m in others} & {"matplotlib", "ipywidgets", "fastapi", "uvicorn", "gradio"}


@pytest.mark.parametrize("name", FILES)
def test_files_are_short_and_say_what_they_are(name):
    lines = (DSL / f"{name}.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= LINES, "which idea wants a file of its own?"
    assert ast.get_docstring(tree(name)), "opens without saying what it is"


def test_the_model_shelf_reads_in_one_sitting():
    """At most 900 lines of code: without docstrings, comments and empty lines."""
    assert sum(map(code_lines, MODEL)) <= 900


@pytest.mark.parametrize("door", ["dsl", "dsl.config", "dsl.schema", "dsl.settings", "dsl.__main__"])
def test_a_mistyped_setting_costs_no_torch(door):
    code = f"import sys, {door}; print(*sorted({{'torch', 'transformers', 'matplotlib'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


def test_waiting_threads_spin_shortly_unless_the_environment_says_otherwise():
    code = "import sys, os, dsl; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    outside = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    for given, want in (({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")):
        done = subprocess.run([sys.executable, "-c", code], env=outside | given, capture_output=True, text=True)
        assert done.stdout.split() == [want, "False"]


def test_an_arrow_that_turns_back_is_seen(tmp_path, monkeypatch):
    (tmp_path / "ops.py").write_text("def f():\n    from dsl import model\n    import dsl.hub\n    import torch.nn\n")
    monkeypatch.setattr(shelves, "DSL", tmp_path)
    assert own("ops") == {"model", "hub"}
    assert not own("ops") <= set(MODEL[:1])
