"""The files of dsl in the order in which they read: what each may import, and how docs/CODE.md lists them."""

import ast
from pathlib import Path

DSL = Path(__file__).resolve().parents[1] / "dsl"
SHELVES = {  # a file imports only from those before it
    "the model": ["config", "ops", "attention", "moe", "model"],
    "a run": [
        "schema", "settings", "pydocs", "tables", "corpora", "data", "checkpoint", "hub", "generation", "optim",
        "evaluation", "runlog", "processes", "interval", "gradients", "resume", "card", "observer", "training",
        "report",
    ],
    "experiments": [
        "costs", "recall", "routing", "colors", "plots", "expert_plots", "curves", "compare", "lens", "findings",
        "study_plots", "study",
    ],
    "doors": [
        "widgets", "address", "batching", "engine", "wire", "answers", "serving", "web", "playground", "__main__",
    ],
}  # fmt: skip
ORDER = [name for shelf in SHELVES.values() for name in shelf]
BESIDE = {  # read beside the rest, imported by nothing in dsl; what each may use
    "reference": ["config", "attention", "model"],
    "reference_moe": ["config", "moe", "model", "reference"],
    "museum": ["config", "ops", "attention", "moe", "model", "evaluation", "routing", "reference", "reference_moe"],
}


def tree(name: str) -> ast.Module:
    return ast.parse((DSL / f"{name}.py").read_text(encoding="utf-8"))


def code_lines(name: str) -> int:
    """Lines of code: without docstrings, comments and empty lines."""
    source, said = (DSL / f"{name}.py").read_text(encoding="utf-8").splitlines(), set()
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            said |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return sum(bool(line.strip()) and line.strip()[0] != "#" for i, line in enumerate(source, 1) if i not in said)
