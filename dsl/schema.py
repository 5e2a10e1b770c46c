"""What may be set, and the checks: one rule at every door (notebook, shell, file, keyword).

Text that means a number, a boolean, None or a list is converted; anything else is refused with the field, the rule
and the value. Knows nothing of presets, files or tensors, and loads neither torch nor transformers, so that a
mistyped setting costs no more than Python's start.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import os
import re
import sys
from collections.abc import Iterable
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, field_validator, model_validator

from dsl.config import HINTS, ModelConfig

CORPORA = ("pydocs", "cosmopedia", "wikitext")
MIXERS = {"linear_attention": ("elu", "delta"), "full_attention": ("softmax", "latent")}
PROMPTS = (
    "Explain the concept of quantum entanglement in simple terms:",
    "Write a short story about a time traveler who:",
    "Here's a recipe for a delicious vegetarian dish:",
    "The most fascinating discovery in astronomy was:",
    "The future of artificial intelligence will likely involve:",
)


class SettingsError(ValueError):
    """One or more broken rules, one line each in the message and in `.problems`."""

    def __init__(self, problems: str | Iterable[str]):
        self.problems = problems.splitlines() if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


def suggest(name: Any, known: Iterable[str]) -> str:
    """ ", did you mean 'x'?" for the nearest of the known names; all of them where none is near."""
    known = list(known)
    near = difflib.get_close_matches(str(name), known, 1)
    return f", did you mean {near[0]!r}?" if near else f" (known: {', '.join(known)})"


class _Loader(yaml.SafeLoader):
    """Refuses a name that is given twice in one section, of which YAML would take the last."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node, seen = super().compose_mapping_node(anchor), set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value!r} is given twice", problem_mark=key.start_mark)
            seen.add(str(key.value))
        return node


def read_yaml(text: str) -> Any:
    """Plain values from YAML or JSON (a part of it); SettingsError says where it breaks."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # of a date, a number, a thousand brackets
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        said = " ".join(str(getattr(error, "problem", error)).split())
        raise SettingsError(f"not YAML or JSON{where}: {said}") from None


def kinds(annotation: Any) -> set[Any]:
    """The types that an annotation allows: {int, NoneType} of `int | None`, {tuple, int} of `tuple[int, ...]`."""
    return {get_origin(kind) or kind for kind in (*get_args(annotation), annotation)}


def convert(value: Any, annotation: Any) -> Any:
    """Text that means None, a number or a list becomes that; a boolean does not pass for a number."""
    allowed = kinds(annotation)
    if isinstance(value, bool) and allowed & {int, float} and bool not in allowed:
        raise ValueError("must be a number")
    if not isinstance(value, str):
        return value
    text = value.strip()
    if NoneType in allowed and text.lower() in ("none", "null"):
        return None
    if tuple in allowed and text != "all":
        if text.startswith("["):
            return read_yaml(text)
        return [value] if str in allowed else [item.strip() for item in text.split(",")]
    if allowed & {int, float}:
        with contextlib.suppress(ValueError):  # what is no number is refused by its field
            return int(text) if re.fullmatch(r"[+-]?\d+", text) else float(text)
    return value


def _lines(error: ValidationError, known: Iterable[str]) -> Iterable[str]:
    seen = set()
    for problem in error.errors(include_url=False):
        name, value = ".".join(map(str, problem["loc"][:1])), problem["input"]
        text = problem["msg"].removeprefix("Value error, ").replace("Input should", "must", 1)
        if problem["type"] == "extra_forbidden":
            yield f"unknown setting {name!r}{suggest(name, known)}"
        elif problem["type"] == "missing":
            yield f"{name} is missing"
        elif not name:
            yield from text.splitlines()
        elif name not in seen:  # a union reports each of its members: the first is enough
            yield f"{name} {text}, got {value!r}"
        seen.add(name)


class Section(BaseModel):
    """A checked group of settings: frozen, no unknown names, broken rules raised as SettingsError."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def __init__(self, **values: Any):
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise SettingsError(_lines(error, type(self).model_fields)) from None

    @field_validator("*", mode="before")
    @classmethod
    def _convert(cls, value: Any, info: Any) -> Any:
        return convert(value, cls.model_fields[info.field_name].annotation)


def _of(default: Any, text: str, **rules: Any) -> Any:
    return Field(default, description=text, **rules)


class DataConfig(Section):
    """What is read, and how."""

    corpus: str = _of("pydocs", "pydocs | cosmopedia | wikitext | hf:owner/name:config:column | local:PATH")
    fraction: float = _of(1.0, "share of the training documents that is used", gt=0, le=1)
    tokenizer: str | None = _of(None, "bpe:SIZE | gpt2 | folder | hub name; None: the corpus decides")
    column: str = _of("text", "column that holds the text")
    held_out: float = _of(0.01, "share of documents kept for evaluation, chosen by hash", gt=0, lt=1)
    held_out_bytes: int = _of(400_000, "most bytes of text that an evaluation reads", ge=1)
    block_size: int = _of(1024, "documents that are shuffled together", ge=1)
    shuffle_rows: int = _of(1024, "rows of tokens that are shuffled together", ge=1)
    retry_attempts: int = _of(8, "attempts at reading before a run gives up", ge=1)
    retry_first_wait: float = _of(1.0, "seconds before the second attempt; doubles from there", ge=0)
    retry_longest_wait: float = _of(60.0, "most seconds between two attempts", ge=0)
    allow_other_corpus: bool = _of(False, "resume although the corpus has changed since the checkpoint")

    @model_validator(mode="after")
    def _rules(self) -> DataConfig:
        path = "/" in self.corpus or os.path.exists(self.corpus)  # whether it exists is asked when it is opened
        if not (self.corpus in CORPORA or path or self.corpus.startswith(("hf:", "local:"))):
            raise ValueError(f"unknown corpus {self.corpus!r}{suggest(self.corpus, CORPORA)}")
        if (self.tokenizer or "").startswith("bpe:") and (self.vocabulary or 0) < 257:
            raise ValueError(f"tokenizer must be bpe:SIZE with 257 entries or more, got {self.tokenizer!r}")
        return self

    @property
    def vocabulary(self) -> int | None:
        """Entries of the tokenizer, where its name says them."""
        size = re.fullmatch(r"bpe:(\d+)", self.tokenizer or "")
        return int(size[1]) if size else {"gpt2": 50_257}.get(self.tokenizer)


class TrainConfig(Section):
    """How a model is trained; steps are optimizer steps."""

    max_steps: int = _of(1000, "steps of the whole schedule", ge=1)
    stop_at_step: int | None = _of(None, "stop here, the schedule still ending at max_steps", ge=1)
    save_steps: int = _of(100, "steps between checkpoints", ge=1)
    eval_steps: int = _of(100, "steps between measurements on held-out documents", ge=1)
    logging_steps: int = _of(10, "steps between rows of metrics.csv", ge=1)
    sample_steps: int = _of(100, "steps between texts generated from the prompts", ge=1)
    learning_rate: float = _of(1e-3, "highest rate of AdamW", gt=0)
    warmup_steps: int = _of(0, "steps of linear warm-up (one_cycle: of its rise)", ge=0)
    weight_decay: float = _of(0.01, "decoupled weight decay of matrices", ge=0)
    max_grad_norm: float = _of(1.0, "gradients are clipped to this norm", gt=0)
    lr_scheduler_type: Literal["cosine", "one_cycle", "wsd", "constant"] = _of("cosine", "learning rate's shape")
    min_lr_ratio: float = _of(0.0, "last learning rate over the highest", ge=0, le=1)
    decay_share: float = _of(0.5, "share of max_steps in which wsd decays", gt=0, le=1)
    per_device_train_batch_size: int = _of(8, "rows of a micro-batch of all processes, unlike transformers'", ge=1)
    gradient_accumulation_steps: int = _of(1, "micro-batches of a step", ge=1)
    save_total_limit: int = _of(3, "checkpoints kept, beside the best", ge=1)
    seed: int = _of(0, "of weights, data order and samples", ge=0, lt=2**63)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = _of("auto", "auto: fp32 on a CPU, else what the GPU does")
    init_scale: float = _of(65536.0, "first scale of fp16's loss; halves where gradients overflow", ge=1)
    optimizer: Literal["adamw", "muon"] = _of("adamw", "muon: for matrices, AdamW for the rest")
    muon_learning_rate: float = _of(0.02, "highest rate of Muon", gt=0)
    momentum: float = _of(0.95, "of Muon", ge=0, lt=1)
    adam_beta1: float = _of(0.9, "decay of AdamW's first moment", ge=0, lt=1)
    adam_beta2: float = _of(0.95, "decay of AdamW's second moment", ge=0, lt=1)
    adam_epsilon: float = _of(1e-8, "added to AdamW's denominator", gt=0)
    max_bad_steps: int = _of(10, "steps in a row with a non-finite loss or gradient before a run stops", ge=1)
    prompts: tuple[str, ...] = _of(PROMPTS, "beginnings of the generated texts")
    sample_tokens: int = _of(100, "tokens generated for a prompt", ge=1)

    @model_validator(mode="after")
    def _rules(self) -> TrainConfig:
        if self.warmup_steps >= self.max_steps:
            rule = f"be less than max_steps={self.max_steps}"
        elif self.lr_scheduler_type == "wsd" and self.warmup_steps > self.max_steps * (1 - self.decay_share):
            rule = f"end before the decay, the last {self.decay_share:.0%} of max_steps={self.max_steps}"
        else:
            return self
        raise ValueError(f"warmup_steps must {rule}, got {self.warmup_steps}")


class Sampling(Section):
    """How tokens are chosen."""

    max_new_tokens: int = _of(100, "most tokens to add", ge=1)
    temperature: float = _of(1.0, "0 takes the likeliest", ge=0)
    top_k: int | None = _of(None, "sample from so many of the likeliest tokens", ge=1)
    top_p: float | None = _of(None, "sample from the likeliest that sum to this", gt=0, le=1)
    repetition_penalty: float = _of(1.0, "above 1: repeat less", gt=0)
    seed: int | None = _of(None, "makes sampling repeatable; further samples count on", ge=0, lt=2**63)


_most = {"num_hidden_layers": 10_000}  # a ModelConfig names the kind of each layer
_fields = {
    f.name: (HINTS[f.name], _of(f.default, f.metadata["help"], le=_most.get(f.name)))
    for f in dataclasses.fields(ModelConfig)
}
ModelFields = create_model("ModelFields", __base__=Section, **_fields)
SECTIONS = {"model": ModelFields, "data": DataConfig, "train": TrainConfig}
# setting -> section: names are unique over the sections, so that a flat keyword says where it goes
FIELDS = {field: name for name, section in SECTIONS.items() for field in section.model_fields}


def model_config(**values: Any) -> ModelConfig:
    """A ModelConfig from plain values: types checked here, rules by itself, names looked up; SettingsError."""
    checked = ModelFields(**values)
    try:
        config = ModelConfig(**checked.model_dump(exclude_unset=True))
    except ValueError as error:
        raise SettingsError(str(error)) from None
    for family in dict.fromkeys(config.layer_types):
        check_registered(f"{family}_kind", getattr(config, f"{family}_kind"), MIXERS[family])
    check_registered("router", config.router, ("top_k",))
    return config


def check_registered(field: str, name: Any, known: Iterable[str]) -> None:
    """SettingsError unless the name is known, registered in this process, or a "module:Class"."""
    module, registry = ("dsl.moe", "ROUTERS") if field == "router" else ("dsl.attention", "MIXERS")
    loaded = getattr(sys.modules.get(module), registry, None)  # nothing is registered before torch is loaded
    known = (*known, *(own for own in loaded or () if own not in loaded.builtin))
    if ":" not in str(name) and name not in known:
        raise SettingsError(f"unknown {field} {name!r}{suggest(name, known)}")
