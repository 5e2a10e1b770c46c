"""The pages under docs/: every name in them exists, and what was computed for them is what is computed today."""

import functools
import importlib
import re
import tomllib
from importlib.metadata import metadata
from pathlib import Path

import doc_tables
import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def resolve(name: str):
    """The object of a dotted name; `mixtral.X` is X of transformers' module for the model, fields count as names."""
    first, *rest = name.split(".")
    if first in ("dsl", "transformers"):
        value = importlib.import_module(first)
    else:
        value = importlib.import_module(f"transformers.models.{first}.modeling_{first}")

    def step(value, part):
        fields = getattr(value, "model_fields", {})
        return fields[part] if part in fields else getattr(value, part)

    return functools.reduce(step, rest, value)


NAMES = re.findall(r"`([a-z]\w*(?:\.\w+)+)`", page("GLOSSARY.md").split("## Attention")[1])


@pytest.mark.slow  # half a dozen of transformers' models are imported
@pytest.mark.parametrize("name", sorted(set(NAMES)))
def test_every_name_of_the_glossary_exists(name):
    resolve(name)


def test_the_glossary_names_everything_on_both_sides():
    rows = [line.split("|")[1:-1] for line in page("GLOSSARY.md").splitlines() if re.match(r"\| (?!term|-)", line)]
    assert len(rows) >= 25
    for row in rows:
        assert len(row) == 5 and all(cell.strip() for cell in row), row
        assert "`dsl." in row[2] and re.search(r"\d{4}\.\d{5}|github\.io", row[4]), row
        assert re.search(r"sec\. |eq\. |fig\. |abstract|algorithm", row[4]), f"where in the paper: {row}"
    assert len({row[0] for row in rows}) == len(rows)


@pytest.mark.slow
def test_a_name_that_is_not_there_is_found():
    for wrong in ("dsl.ops.linear_atention", "mixtral.MixtralAtention", "dsl.ModelConfig.experts"):
        with pytest.raises(AttributeError):
            resolve(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("path", doc_tables.PAGES, ids=lambda path: path.name)
def test_computed_tables_are_current(path):
    text = path.read_text(encoding="utf-8")
    assert doc_tables.BLOCK.search(text)
    assert doc_tables.renewed(text) == text, "run `make docs`"


def test_what_an_engine_takes_by_hand():
    small = doc_tables.SMALL
    weights = doc_tables.evaluation.cost(small).weight_bytes
    kept = doc_tables.evaluation.cost(small, rows=doc_tables.ROWS).activation_bytes
    alone, pair = (doc_tables.per_device(small, doc_tables.Engine("", n, "ddp")) for n in (1, 2))
    assert alone == (4 * weights + kept, 0) and pair == (4 * weights + kept, weights)  # 2 (n - 1)/n of the gradient
    memory, sent = doc_tables.per_device(small, doc_tables.Engine("", 2, "fsdp"))
    assert memory == 2 * weights + kept + 2 * weights / 12 and sent == 1.5 * weights


def test_every_link_of_the_pages_leads_somewhere():
    for path in DOCS.glob("*.md"):
        text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)#\s]+)\)", text):
            assert re.match(r"https?://", target) or (path.parent / target).exists(), f"{path.name}: {target}"


def licence(name: str) -> str:
    about = metadata(name)
    stated = (c.split(" :: ")[-1] for c in about.get_all("Classifier") or [] if c.startswith("License :: OSI"))
    return about.get("License-Expression") or next(stated, None) or about["License"].splitlines()[0]


def test_dependencies_and_their_licences_are_those_of_the_page():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *(one for group in project["optional-dependencies"].values() for one in group)]
    rows = re.findall(r"^\| ([\w.-]+) \|.*\| ([^|]+) \|$", page("DEPENDENCIES.md"), flags=re.MULTILINE)
    said = {name: text for name, text in rows if name != "package"}
    assert set(said) == {re.match(r"[\w.-]+", one)[0] for one in wanted}
    assert said == {name: licence(name) for name in said}
