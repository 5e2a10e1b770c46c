"""A run, written down: name, model, data and training; presets, YAML and JSON; where its files live; notebooks' doors.

Knows nothing of tensors, and loads neither torch nor transformers. The fields and their checks are in `dsl.schema`.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import json
import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any

import yaml
from pydantic import create_model

from dsl.config import ModelConfig
from dsl.schema import (
    FIELDS,
    MIXERS,
    SECTIONS,
    DataConfig,
    Section,
    SettingsError,
    TrainConfig,
    check_registered,
    kinds,
    model_config,
    read_yaml,
    suggest,
)

PRESETS: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("presets.yaml").read_text("utf-8"))


class ParameterError(SettingsError):
    """A notebook's parameters are wrong; Jupyter and papermill show it as one line, without a traceback."""

    def __str__(self) -> str:
        return "; ".join(self.problems)

    def _render_traceback_(self) -> list[str]:
        return [f"ParameterError: {self}"]


@dataclasses.dataclass(frozen=True)
class Run:
    """A training that has a name: the same name goes on from its checkpoints. Raises SettingsError."""

    name: str
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", self.name):
            raise SettingsError(f"run_name must be letters, digits, '.', '_' or '-', got {self.name!r}")
        size = self.data.vocabulary or 0
        if size > self.model.vocab_size:
            rule = f"be at least {size}, the entries of tokenizer={self.data.tokenizer!r}"
            raise SettingsError(f"vocab_size must {rule}, got {self.model.vocab_size}")

    @property
    def run_dir(self) -> Path:
        """Folder of the step folders."""
        return home() / "checkpoints" / self.name

    @property
    def log_dir(self) -> Path:
        """Folder of metrics.csv, generations.csv, hparams.yaml and the logs."""
        return home() / "logs" / "training" / self.name

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Run:
        """A run from sections name, model, data, train; `preset` names what they change; `record` is skipped."""
        if not isinstance(values, Mapping):
            raise SettingsError(f"settings must have sections name, model, data, train, got {values!r}")
        known = ("name", "preset", *SECTIONS, "record", "about")
        problems = [f"unknown section {name!r}{suggest(name, known[:-2])}" for name in values if name not in known]
        for name in SECTIONS:
            if not isinstance(values.get(name) or {}, Mapping):
                problems.append(f"section {name!r} must hold settings, got {values[name]!r}")
        if problems:
            raise SettingsError(problems)
        start = values.get("preset")
        merged = _merge(_preset(start) if start is not None else {}, values)
        parts: dict[str, Any] = {}
        for name, make in {**SECTIONS, "model": model_config}.items():
            try:
                parts[name] = make(**merged[name])
            except SettingsError as error:
                problems += error.problems
        if problems:
            raise SettingsError(problems)
        name = start if values.get("name") is None else values["name"]
        return cls(str(name) if isinstance(name, int) else name, **parts)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `Run.from_dict(run.to_dict()) == run`."""
        sections = {"data": self.data.model_dump(mode="json"), "train": self.train.model_dump(mode="json")}
        return {"name": self.name, "model": _short(self.model), **sections}

    @classmethod
    def from_yaml(cls, source: str | Path) -> Run:
        """A run from YAML or JSON: text, or the Path of a file (whose name serves a run that has none)."""
        if not isinstance(source, Path):
            return cls.from_dict(read_yaml(source))
        try:
            values = read_yaml(source.read_text(encoding="utf-8"))
            name = re.sub(r"[^A-Za-z0-9._-]+", "-", source.stem)
            return cls.from_dict({"name": name, **values} if isinstance(values, dict) else values)
        except SettingsError as error:
            raise SettingsError(f"{source}: {problem}" for problem in error.problems) from None
        except (OSError, UnicodeDecodeError) as error:
            raise SettingsError(f"cannot read {source}: {getattr(error, 'strerror', None) or error}") from None

    def to_yaml(self) -> str:
        """The text that `from_yaml` reads."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=110)

    def to_json(self) -> str:
        """The same as JSON, which `from_yaml` reads too."""
        return json.dumps(self.to_dict(), indent=2)

    def override(self, **flat: Any) -> Run:
        """This run with settings changed by field name; also `run_name`, and `mixer` for one mixer in all layers."""
        return Run.from_dict(_override(self.to_dict(), flat))


def preset(name: str, **flat: Any) -> Run:
    """The preset's run, with settings changed by field name as in `Run.override`."""
    return Run.from_dict(_override({"name": name, **_preset(name)}, flat))


def _preset(name: Any) -> dict[str, Any]:
    if not isinstance(name, str) or name not in PRESETS:
        raise SettingsError(f"unknown preset {name!r}{suggest(name, PRESETS)}")
    return PRESETS[name]


def _override(base: Mapping[str, Any], flat: Mapping[str, Any]) -> dict[str, Any]:
    changes: dict[str, dict[str, Any]] = {name: {} for name in SECTIONS}
    flat = dict(flat)
    name, mixer = flat.pop("run_name", None), flat.pop("mixer", None)
    if mixer is not None:
        check_registered("mixer", mixer, (*MIXERS["linear_attention"], *MIXERS["full_attention"]))
        family = "full_attention" if mixer in MIXERS["full_attention"] else "linear_attention"
        changes["model"] = {"layer_types": [family], f"{family}_kind": mixer}
    known = (*FIELDS, "preset", "run_name", "mixer")
    if problems := [f"unknown setting {given!r}{suggest(given, known)}" for given in flat if given not in FIELDS]:
        raise SettingsError(problems)
    for field, value in flat.items():
        changes[FIELDS[field]][field] = value
    return {"name": base["name"] if name is None else name, **_merge(base, changes)}


def _merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Sections of a run with changes laid over them; two settings follow others unless they are changed too.

    A shorter max_steps shrinks warmup_steps to the same share (a longer one keeps it: a run that is lengthened has
    warmed up already), and a tokenizer whose size is known sets vocab_size.
    """
    merged = {name: {**base.get(name, {}), **(changes.get(name) or {})} for name in SECTIONS}
    new = {field for name in SECTIONS for field in changes.get(name) or {}}
    with contextlib.suppress(SettingsError):  # what is wrong is said when the sections are built, all at once
        if base and "max_steps" in new and "warmup_steps" not in new:
            before = TrainConfig(**base.get("train", {}))
            steps = TrainConfig(**merged["train"] | {"warmup_steps": 0}).max_steps
            shorter = before.warmup_steps * min(steps, before.max_steps) // before.max_steps
            merged["train"]["warmup_steps"] = shorter
    with contextlib.suppress(SettingsError):
        if "tokenizer" in new and "vocab_size" not in new and (size := DataConfig(**merged["data"]).vocabulary):
            merged["model"]["vocab_size"] = size
    return merged


def _short(config: ModelConfig) -> dict[str, Any]:
    """The plain values of a ModelConfig, what follows from others left open so that those may be changed."""
    values, types = config.to_dict(), config.layer_types
    period = next(n for n in range(1, len(types) + 1) if all(kind == types[i % n] for i, kind in enumerate(types)))
    values["layer_types"] = values["layer_types"][:period]
    for name, value in ((f.name, f.default) for f in dataclasses.fields(config) if f.default in (None, "all")):
        if ModelConfig(**values | {name: value}) == config:
            values[name] = value
    return values


def _repository() -> Path | None:
    above = Path(__file__).resolve().parents[1]
    return above if (above / "pyproject.toml").exists() or (above / "notebooks").is_dir() else None


def _from_environment(variable: str, default: Path) -> Path:
    chosen = os.environ.get(variable)
    return Path(chosen).expanduser().resolve() if chosen else default


def home() -> Path:
    """Folder of checkpoints/, logs/ and figures/runs/: DSL_HOME, else the repository, else where one stands."""
    return _from_environment("DSL_HOME", _repository() or Path.cwd())


def cache_dir() -> Path:
    """Folder of what can be made again: DSL_CACHE, else .cache/dsl at home."""
    return _from_environment("DSL_CACHE", home() / ".cache" / "dsl")


def smoke() -> bool:
    """Whether DSL_SMOKE asks for the smallest work (tests, CI)."""
    return os.environ.get("DSL_SMOKE", "").lower() not in ("", "0", "false", "no")


def find_run(source: str | Path) -> Path | None:
    """The folder that a run's name, a run folder or a step folder means; None where there is none.

    A bare name is looked up among the checkpoints, at home and then in the repository (which holds `demo`); a path
    is tried as it stands, then from those two.
    """
    if not str(source):
        return None
    roots = [root for root in (home(), _repository()) if root]
    named = [root / "checkpoints" / source for root in roots]
    paths = [Path(source).expanduser(), *(root / source for root in roots)]
    bare = len(Path(source).parts) == 1
    return next((path for path in (named + paths if bare else paths + named) if path.is_dir()), None)


def _assigned(source: str) -> list[str]:
    """Names that a cell assigns."""
    try:
        nodes = ast.parse(source).body
    except (SyntaxError, ValueError):  # of a magic
        return []
    nodes = [node for node in nodes if isinstance(node, ast.Assign | ast.AnnAssign) and node.value]
    places = [place for node in nodes for place in getattr(node, "targets", None) or [node.target]]
    parts = [part for place in places for part in ast.walk(place) if isinstance(part, ast.Name)]
    return [part.id for part in parts if isinstance(part.ctx, ast.Store)]


def _cells(namespace: Mapping[str, Any], anchor: str) -> tuple[list[str], list[str]]:
    """Names set by the notebook's parameters cell, and by the one that papermill injected after it.

    They are read from IPython's history, where the newest of each counts: cells are run again by hand in
    JupyterLab. The parameters cell is known by its anchor, a name that only it assigns.
    """
    found: dict[bool, list[str]] = {}
    for source in reversed(namespace.get("In", [])):
        names, injected = _assigned(source), source.startswith("# Parameters")
        if injected or anchor in names:
            found.setdefault(injected, [name for name in names if not name.startswith("PAPERMILL_")])
    return found.get(False, []), found.get(True, [])


def parameters(namespace: Mapping[str, Any], **schema: Any) -> Any:
    """A notebook's parameters, checked: `P = parameters(globals(), guess=int, full=bool)`, then `P.guess`.

    The first name is one that only the parameters cell assigns. Raises ParameterError.
    """
    cell, injected = _cells(namespace, next(iter(schema)))
    section = create_model("Parameters", __base__=Section, **{name: (kind, ...) for name, kind in schema.items()})
    try:
        return section(**{name: namespace[name] for name in (*schema, *cell, *injected) if name in namespace})
    except SettingsError as error:
        raise ParameterError(error.problems) from None


def _given(namespace: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a notebook that describes a run; without those that leave a value to the preset."""
    cell, injected = _cells(namespace, "preset")
    optional = {n for n, s in FIELDS.items() if NoneType in kinds(SECTIONS[s].model_fields[n].annotation)}
    flat = {name: namespace[name] for name in (*cell, *injected)}
    flat = {name: v for name, v in flat.items() if v is not None or (name in injected and name in optional)}
    return {**flat, "preset": "tiny"} if smoke() and "preset" not in injected else flat


def notebook_run(namespace: Mapping[str, Any], **also: Any) -> Run:
    """The run that a notebook's parameters describe: preset, run_name, mixer, and any setting by its field name.

    Parameters in `also`, with their types, are the notebook's own business.
    None means the preset's value, but where papermill passes None to a setting that may be None. Under DSL_SMOKE
    the preset is `tiny`, unless papermill passes one. Raises ParameterError.
    """
    flat = _given(namespace)
    own = create_model("Parameters", __base__=Section, **{name: (kind, None) for name, kind in also.items()})
    try:
        own(**{name: flat.pop(name) for name in also if name in flat})
        return preset(flat.pop("preset", "quickstart"), **flat)
    except SettingsError as error:
        raise ParameterError(error.problems) from None


def papermill_command(namespace: Mapping[str, Any], notebook: str, **changes: Any) -> str:
    """What to type in a shell for the notebook with the parameters that it has here, some of them changed."""
    words = ["papermill", notebook, "out.ipynb"]
    for name, value in {**_given(namespace), **changes}.items():
        words += ["-p", name, json.dumps(list(value)) if isinstance(value, list | tuple) else str(value)]
    return shlex.join(words)
