"""Committed notebooks keep their form; the checker that says so, and the tool that renews outputs, are tested too.

What the notebooks claim is tested by `pytest --nbval`.
"""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import notebook_tools
import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_a_committed_notebook_is_clean(path):
    assert notebook_tools.problems(path) == []


def test_a_notebook_has_a_number_of_its_own():
    numbers = [re.fullmatch(r"(\d\d)_[a-z_]+\.ipynb", path.name)[1] for path in NOTEBOOKS]
    assert len(set(numbers)) == len(numbers)


def tiny_notebook() -> nbformat.NotebookNode:
    new = nbformat.v4
    parameters = new.new_code_cell("keys = 3  # how many", metadata={"tags": ["parameters"]})
    clock = new.new_code_cell("import time\ntime.time()", metadata={"tags": ["nbval-ignore-output"]})
    check = new.new_code_cell("assert keys > 0\nprint('keys', keys)")
    text = new.new_markdown_cell
    return new.new_notebook(cells=[text("# A claim\nIn few words."), parameters, clock, check, text("## What we saw")])


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> nbformat.NotebookNode:
    """A small notebook as `refresh` writes it."""
    path = tmp_path_factory.mktemp("clean") / "01_claim.ipynb"
    nbformat.write(tiny_notebook(), path)
    assert notebook_tools.refresh(path)
    return nbformat.read(path, as_version=4)


def problems(notebook, tmp_path) -> list[str]:
    path = tmp_path / "x.ipynb"
    path.write_text(json.dumps(notebook))
    return notebook_tools.problems(path)


def test_what_refresh_writes_is_clean(clean, tmp_path):
    assert problems(clean, tmp_path) == []


def stripped(nb):
    for cell in nb.cells[1:4]:
        cell.outputs, cell.execution_count = [], None


def swapped(nb):
    nb.cells[2], nb.cells[3] = nb.cells[3], nb.cells[2]


def doubled_id(nb):
    nb.cells[2].id = nb.cells[3].id


def without_ids(nb):
    for cell in nb.cells:
        del cell["id"]


def old_format(nb):
    without_ids(nb)
    nb.nbformat_minor = 4


def papermill_output(nb):
    nb.metadata["papermill"] = {"exception": None}


def timed_cell(nb):
    nb.cells[2].metadata["execution"] = {"iopub.status.busy": "2026-01-01T00:00:00Z"}


def parameters_that_work(nb):
    nb.cells[1].source = "keys = max(3, 4)"


def parameters_later(nb):
    nb.cells[1].metadata, nb.cells[2].metadata = nb.cells[2].metadata, nb.cells[1].metadata


def mistyped_tag(nb):
    nb.cells[2].metadata["tags"] = ["nbval-ignore-outputs"]


def a_class(nb):
    nb.cells[3].source += "\nclass Mine:\n    pass"


def long_function(nb):
    nb.cells[3].source += "\ndef f(x):\n    x += 1\n    x += 2\n    x += 3\n    x += 4\n    return x"


def long_cell(nb):
    nb.cells[3].source += "\nkeys" * 25


def an_install(nb):
    nb.cells[3].source += "\n%pip install torch"


def no_title(nb):
    nb.cells[0].source = "A claim"


def long_introduction(nb):
    nb.cells[0].source += " and so on" * 60


def no_ending(nb):
    nb.cells[4].source = "That was it."


def no_check(nb):
    nb.cells[3].source = "print('keys', keys)"


def stored_error(nb):
    nb.cells[3].outputs = [nbformat.v4.new_output("error", ename="ValueError", evalue="no", traceback=[])]


def stored_stderr(nb):
    nb.cells[3].outputs = [nbformat.v4.new_output("stream", name="stderr", text="a warning")]


def path_of_a_machine(nb):
    nb.cells[3].outputs = [nbformat.v4.new_output("stream", name="stdout", text="wrote /home/me/dsl/logs/a.csv")]


BREAKS = {
    stripped: "execution counts",
    swapped: "execution counts",
    doubled_id: "not a clean notebook",
    without_ids: "not a clean notebook",
    old_format: "older than 4.5",
    papermill_output: "notebook metadata",
    timed_cell: "cell 2: metadata",
    parameters_that_work: "not a plain literal",
    parameters_later: "first code cell",
    mistyped_tag: "unknown tags",
    a_class: "a class, Mine",
    long_function: "function f of 6 lines",
    long_cell: "27 lines, over 25",
    an_install: "installs something",
    no_title: "open with a title",
    long_introduction: "an introduction of 183 words",
    no_ending: "What we saw",
    no_check: "no assert",
    stored_error: "a stored error, ValueError",
    stored_stderr: "stored stderr",
    path_of_a_machine: "/home/me/dsl/logs/a.csv",
}


@pytest.mark.parametrize("spoil", BREAKS, ids=lambda f: f.__name__)
def test_a_spoiled_notebook_is_refused(spoil, clean, tmp_path):
    notebook = copy.deepcopy(clean)
    spoil(notebook)
    found = problems(notebook, tmp_path)
    assert any(BREAKS[spoil] in line for line in found), found


def test_an_exercise_may_hold_a_class(clean, tmp_path):
    notebook = copy.deepcopy(clean)
    a_class(notebook)
    long_function(notebook)
    notebook.cells[3].metadata["tags"] = ["exercise"]
    assert problems(notebook, tmp_path) == []


def git(folder, *words):
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    subprocess.run(["git", "-C", str(folder), *identity, *words], check=True, capture_output=True)


@pytest.mark.slow
def test_refresh_leaves_a_committed_notebook_that_says_the_same(clean, tmp_path):
    path = tmp_path / "01_claim.ipynb"
    nbformat.write(clean, path)
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "a notebook")
    before = path.read_bytes()
    assert not notebook_tools.refresh(path), "only the clock had moved on"
    assert path.read_bytes() == before
    assert notebook_tools.refresh(path, force=True)

    path.write_text(before.decode().replace("keys = 3 ", "keys = 4 "))
    assert notebook_tools.refresh(path)
    assert "keys 4" in path.read_text()


def test_a_notebook_that_fails_keeps_its_file_and_names_the_error(tmp_path):
    notebook = tiny_notebook()
    notebook.cells[3].source = "assert keys > 5, 'too few keys'"
    path = tmp_path / "01_claim.ipynb"
    nbformat.write(notebook, path)
    before = path.read_bytes()
    command = [sys.executable, str(ROOT / "tests" / "notebook_tools.py"), "refresh", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "too few keys" in done.stderr
    assert path.read_bytes() == before


def test_the_sanitizer_hides_no_result():
    """Numbers that a cell claims must reach the comparison."""
    text = "error 3.1e-04, loss 2.013, 8 experts, 1.60 bits per byte, step 300, load [0.12, 0.13]"
    cell = nbformat.v4.new_code_cell(outputs=[nbformat.v4.new_output("stream", name="stdout", text=text)])
    [(_, outputs)] = notebook_tools.strict(nbformat.v4.new_notebook(cells=[cell]))
    assert outputs[0]["text"] == text
    cell.outputs[0].text = "12.5 s, 1,200 tokens/s, /tmp/dsl-home-ab_12/logs, <f at 0x7f0123456789>, 3.1e-09"
    [(_, outputs)] = notebook_tools.strict(nbformat.v4.new_notebook(cells=[cell]))
    assert outputs[0]["text"] == "TIME, RATE, HOME/logs, <f at ADDRESS>, TINY"
