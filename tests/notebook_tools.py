"""Notebooks as files: run them, renew their stored outputs without noise, and say what is wrong with one.

    python tests/notebook_tools.py refresh notebooks/*.ipynb      write fresh outputs where they say something new
    python tests/notebook_tools.py run notebooks/*.ipynb          run only, for the figures
    python tests/notebook_tools.py check notebooks/*.ipynb        the rules of a committed notebook

`refresh` is the only thing that writes outputs into a committed notebook: JupyterLab's own save adds times, widget
states with random ids and the reader's settings.
"""

import argparse
import ast
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import nbformat
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).resolve().parents[1]
SANITIZE = Path(__file__).with_name("nbval_sanitize.cfg")

WIDGET = "application/vnd.jupyter.widget-view+json"
PICTURES = {"image/png", "image/jpeg"}
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
CELL_METADATA = {"tags", "jupyter", "editable", "deletable"}
TAGS = {
    "parameters",
    "exercise",  # a solution or an example of the reader's own code: may hold a class and be longer
    "nbval-ignore-output",
    "nbval-check-output",
    "raises-exception",
    "nbval-raises-exception",
}
MAY_RAISE = {"raises-exception", "nbval-raises-exception"}
CELL_LINES, EXERCISE_LINES, FUNCTION_LINES, INTRODUCTION_WORDS = 25, 45, 5, 120
MAX_BYTES = 1_000_000
MACHINE_PATH = re.compile(r"(?<![\w./])/(?:root|home|Users|tmp|work|opt|var)/\S+")


def run(path: Path, timeout: int = 3600) -> nbformat.NotebookNode:
    """The notebook, executed in its own folder by this interpreter's kernel. Raises CellExecutionError."""
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook,
        timeout=timeout,
        kernel_name="python3",
        record_timing=False,
        store_widget_state=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(path.resolve().parent)}},
    ).execute()
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL, "language_info": {"name": "python"}})
    for cell in notebook.cells:
        cell.metadata = nbformat.from_dict({k: v for k, v in cell.metadata.items() if k in CELL_METADATA})
        for output in cell.get("outputs", []):
            output.get("data", {}).pop(WIDGET, None)  # an id that no reader's page can resolve
    return notebook


def strict(notebook: nbformat.NotebookNode) -> list:
    """What nbval compares of the outputs: text after the sanitizer, without pictures and without ignored cells."""
    rules = re.findall(r"^regex: (.*)\nreplace: (.*)$", SANITIZE.read_text(encoding="utf-8"), flags=re.MULTILINE)

    def plain(value):
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items() if k not in PICTURES}
        if isinstance(value, list):
            return [plain(v) for v in value]
        for pattern, text in rules if isinstance(value, str) else ():
            value = re.sub(pattern, text, value)
        return value

    cells = [c for c in notebook.cells if c.cell_type == "code"]
    return [
        (c.execution_count, None if "nbval-ignore-output" in c.metadata.get("tags", []) else plain(c.outputs))
        for c in cells
    ]


def committed(path: Path) -> bool:
    """Whether git holds the file just as it is."""
    command = ["git", "-C", str(path.resolve().parent), "status", "--porcelain", "--ignored", "--", path.name]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode == 0 and not done.stdout.strip()


def refresh(path: Path, force: bool = False) -> bool:
    """Run the notebook and store its outputs; whether the file changed.

    A committed notebook whose strict outputs come out the same is left alone, so that clocks and pictures make no
    diff; one that was edited is stored whole, so that all its outputs are of one run.
    """
    before = nbformat.read(path, as_version=4)
    after = run(path)
    if not force and committed(path) and strict(before) == strict(after):
        return False
    text = nbformat.writes(after) + "\n"
    if text == path.read_text(encoding="utf-8"):
        return False
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)
    return True


def problems(path: Path) -> list[str]:
    """What is wrong with a committed notebook, of what nbval lets pass: form, order, style."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # missing or doubled cell ids are warnings
        try:
            notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
            nbformat.validate(notebook)
        except (Warning, ValueError, nbformat.ValidationError) as error:
            return [f"not a clean notebook: {type(error).__name__}: {str(error)[:200]}"]
    found = []
    if (notebook.nbformat, notebook.nbformat_minor) < (4, 5):
        found.append(f"format {notebook.nbformat}.{notebook.nbformat_minor}, older than 4.5, has no cell ids")
    if notebook.metadata.get("kernelspec", {}).get("name") != "python3":
        found.append("the kernel is not python3")
    if extra := set(notebook.metadata) - {"kernelspec", "language_info"}:
        found.append(f"notebook metadata {sorted(extra)}")
    if path.stat().st_size > MAX_BYTES:
        found.append(f"{path.stat().st_size} bytes, over {MAX_BYTES}")
    code = [c for c in notebook.cells if c.cell_type == "code"]
    counts = [c.execution_count for c in code]
    if counts != list(range(1, len(code) + 1)):
        found.append(f"not run from top to bottom in a fresh kernel: execution counts {counts}")
    found += _story(notebook)
    for i, cell in enumerate(notebook.cells):
        found += [f"cell {i}: {what}" for what in _cell(cell)]
    return found


def _story(notebook) -> list[str]:
    """Title and introduction, parameters first, a check somewhere, and what was seen at the end."""
    found = []
    first = notebook.cells[0] if notebook.cells else None
    if first is None or first.cell_type != "markdown" or not first.source.startswith("# "):
        found.append("does not open with a title")
    else:
        words = len(first.source.partition("\n")[2].split())
        if words > INTRODUCTION_WORDS:
            found.append(f"an introduction of {words} words, over {INTRODUCTION_WORDS}")
    code = [c for c in notebook.cells if c.cell_type == "code"]
    tagged = [i for i, c in enumerate(code) if "parameters" in c.metadata.get("tags", [])]
    if tagged != [0]:
        found.append(f"the parameters cell must be the first code cell and the only one, found {tagged}")
    if not any(isinstance(node, ast.Assert) for c in code for node in ast.walk(_tree(c.source))):
        found.append("no assert")
    headings = [line for c in notebook.cells if c.cell_type == "markdown" for line in c.source.splitlines()]
    if "## What we saw" not in headings:
        found.append("no closing section '## What we saw'")
    return found


def _tree(source: str) -> ast.Module:
    return ast.parse(TransformerManager().transform_cell(source))


def _cell(cell) -> list[str]:
    """One cell: its size, its metadata, its code, its outputs."""
    found = []
    tags = set(cell.metadata.get("tags", []))
    lines = len(cell.source.splitlines())
    limit = EXERCISE_LINES if "exercise" in tags else CELL_LINES
    if not cell.source.strip():
        found.append("empty")
    if lines > limit:
        found.append(f"{lines} lines, over {limit}")
    if tags - TAGS:
        found.append(f"unknown tags {sorted(tags - TAGS)}")
    if extra := set(cell.metadata) - CELL_METADATA:
        found.append(f"metadata {sorted(extra)}")
    if cell.cell_type != "code":
        return found
    if re.search(r"^\s*(!|%)\s*(pip|conda|uv|apt)", cell.source, flags=re.MULTILINE):
        found.append("installs something")
    tree = _tree(cell.source)
    if "parameters" in tags:
        found += [f"not a plain literal: {ast.unparse(n)[:60]!r}" for n in tree.body if not _literal(n)]
    for node in ast.walk(tree) if "exercise" not in tags else ():
        if isinstance(node, ast.ClassDef):
            found.append(f"a class, {node.name}")
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            if length > FUNCTION_LINES:
                found.append(f"function {node.name} of {length} lines, over {FUNCTION_LINES}")
    for output in cell.outputs:
        if output.output_type == "error" and not tags & MAY_RAISE:
            found.append(f"a stored error, {output.ename}")
        if output.output_type == "stream" and output.name == "stderr":
            found.append(f"stored stderr: {output.text[:60]!r}")
        if path := MACHINE_PATH.search(output.get("text", "") or str(output.get("data", {}).get("text/plain", ""))):
            found.append(f"a path of one machine in the output: {path.group()}")
    return found


def _literal(node: ast.stmt) -> bool:
    if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
        return False
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    try:
        ast.literal_eval(node.value)
    except ValueError:
        return False
    return len(targets) == 1 and isinstance(targets[0], ast.Name)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["refresh", "run", "check"])
    parser.add_argument(
        "--force", action="store_true", help="refresh: store all outputs, also where only clocks differ"
    )
    parser.add_argument("notebooks", nargs="*", type=Path)
    options = parser.parse_args(arguments)
    if options.what == "check":
        found = [f"{path.name}: {what}" for path in options.notebooks for what in problems(path)]
        print("\n".join(found) or f"{len(options.notebooks)} notebooks are clean")
        return bool(found)
    os.environ.setdefault("DSL_CACHE", str(ROOT / ".cache" / "dsl"))
    with tempfile.TemporaryDirectory(prefix="dsl-home-") as home:  # as a reader sees it who has trained nothing yet
        os.environ.setdefault("DSL_HOME", home)
        os.environ["IPYTHONDIR"] = str(Path(home) / "ipython")
        for path in options.notebooks:
            start = time.perf_counter()
            verdict = "ran"
            try:
                if options.what == "run":
                    run(path)
                else:
                    verdict = "renewed" if refresh(path, options.force) else "says the same as before"
            except CellExecutionError as error:
                print(f"{path}: {error}", file=sys.stderr)
                return 1
            print(f"{path}: {verdict}, {time.perf_counter() - start:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
