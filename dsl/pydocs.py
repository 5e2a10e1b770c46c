"""The documentation that every installation has: Python's language topics and the docstrings of installed packages.

Reads source files with `ast` and imports none of them. Knows nothing of settings, caches or tokens, and needs only
the standard library, so that the file also serves as its own worker process (`python pydocs.py`): several read at
once, on any system, without a guard in the caller's main module.
"""

import ast
import gc
import hashlib
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
import sysconfig
import tokenize
import warnings
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

FORMAT = 2  # raise it when documents come out differently
# What `pip install dsl` brings anyway and documents well; one that is missing is skipped, and the key says so.
PACKAGES = (
    "numpy", "torch", "matplotlib", "pandas", "transformers", "networkx", "huggingface_hub", "datasets", "pydantic",
    "IPython", "tornado", "traitlets", "jinja2", "PIL", "fsspec", "tqdm",
)  # fmt: skip
DISTRIBUTIONS = {"IPython": "ipython", "PIL": "pillow"}  # where pip has another name
# Tests and copies of other packages; "modular_*" in transformers repeats what "modeling_*" says.
_SKIPPED = {"test", "tests", "testing", "idle_test", "_vendor", "site-packages", "dist-packages", "__pycache__"}
_SHORTEST = 200  # characters of a document
_SESSION = re.compile(r"(?m)^\s*(>>>|In \[\d+\]:)")  # typed at a prompt: little prose, and the same lines everywhere


def files(*, small: bool = False) -> list[tuple[str, str]]:
    """(name, path) of every source file to read, in a fixed order; `small`: a few modules of the standard library."""
    library = Path(sysconfig.get_paths()["stdlib"])
    if small:
        return [(f"python/{p.name}", str(p)) for p in sorted(library.glob("[a-d]*.py"))]
    roots = {"python": library}
    for package in PACKAGES:
        if (spec := importlib.util.find_spec(package)) and spec.origin:
            roots[package] = Path(spec.origin).parent
    found = []
    for package, root in roots.items():
        for folder, inner, names in os.walk(root):
            inner[:] = sorted(set(inner) - _SKIPPED)
            at = Path(folder).relative_to(root).as_posix().removeprefix(".")
            wanted = sorted(n for n in names if n.endswith(".py") and not n.startswith("modular_"))
            found += [("/".join(filter(None, (package, at, name))), os.path.join(folder, name)) for name in wanted]
    return found


def key(*, small: bool = False) -> str:
    """Names what `documents` would read, without reading it: versions of Python and packages, and the file list."""
    versions = [sys.version]
    for name in () if small else (DISTRIBUTIONS.get(package, package) for package in PACKAGES):
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            versions.append(f"{name} missing")
    names = [name for name, _ in files(small=small)]
    return hashlib.sha256(json.dumps([FORMAT, versions, names]).encode()).hexdigest()[:16]


def documents(*, small: bool = False, processes: int | None = None) -> dict[str, str]:
    """Name -> text, a document for a source file or a language topic; no paragraph twice, and no shell sessions."""
    listed = files(small=small)
    texts, seen = {}, set()
    parts = dict(zip((name for name, _ in listed), _extract_all([path for _, path in listed], processes), strict=True))
    for topic in parts.pop("python/pydoc_data/topics.py", []):
        parts[f"topics/{topic[0]}"] = [("", topic[1])]
    for name, docstrings in parts.items():
        kept = []
        for head, text in docstrings:
            fresh = []
            for paragraph in re.split(r"\n\s*\n", text.strip("\n")):
                words = " ".join(paragraph.split())
                if words and words not in seen and not _SESSION.search(paragraph):
                    seen.add(words)
                    fresh.append(paragraph.rstrip())
            if fresh:
                kept.append((head + "\n" if head else "") + "\n\n".join(fresh))
        text = "\n\n".join(kept) + "\n"
        if len(text) >= _SHORTEST:
            texts[name] = text
    return texts


def _head(node: ast.AST) -> str:
    """The line that names a class or a function and its parameters, without annotations."""
    if isinstance(node, ast.Module):
        return ""
    if isinstance(node, ast.ClassDef):
        return f"class {node.name}:"
    a = node.args
    for each in (*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))):
        each.annotation = None
    return f"def {node.name}({ast.unparse(a)}):"


def _walk(node: ast.AST, found: list[tuple[str, str]]) -> None:
    if text := ast.get_docstring(node, clean=False):
        found.append((_head(node), "\n".join(line.rstrip() for line in inspect.cleandoc(text).split("\n"))))
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            _walk(child, found)


def _extract(paths: list[str]) -> list[list[tuple[str, str]]]:
    """For each file its (head line, docstring) in order; for the language topics (name, text)."""
    results = []
    gc_was_on = gc.isenabled()
    gc.disable()  # trees have no cycles; collecting among so many nodes costs a third of the time
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's escape sequences
        for path in paths:
            found: list[tuple[str, str]] = []
            try:
                with tokenize.open(path) as file:
                    tree = ast.parse(file.read())
            except (SyntaxError, ValueError, OSError):  # a template, or Python of another age
                tree = None
            if tree and path.endswith(os.path.join("pydoc_data", "topics.py")):
                table = next(n.value for n in tree.body if isinstance(n, ast.Assign) and isinstance(n.value, ast.Dict))
                found = [(k.value, v.value) for k, v in zip(table.keys, table.values, strict=True)]
            elif tree:
                _walk(tree, found)
            results.append(found)
    if gc_was_on:
        gc.enable()
    return results


def _extract_all(paths: list[str], processes: int | None) -> list[list[tuple[str, str]]]:
    count = processes or min(4, os.cpu_count() or 1)
    if len(paths) < 200 or count == 1:
        return _extract(paths)

    def work(some: list[str]) -> list[list[tuple[str, str]]]:
        command = [sys.executable, "-I", "-S", "-X", "utf8", __file__]
        done = subprocess.run(command, input=json.dumps(some).encode(), stdout=subprocess.PIPE, check=True)
        return json.loads(done.stdout)

    with ThreadPoolExecutor(count) as pool:
        shares = list(pool.map(work, [paths[i::count] for i in range(count)]))
    return [shares[i % count][i // count] for i in range(len(paths))]


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_extract(json.load(sys.stdin))))
