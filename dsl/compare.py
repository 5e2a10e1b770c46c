"""Runs side by side, from their files alone: what each is, what it cost, how good it became, and with what certainty.

Reads hparams.yaml and metrics.csv, also of a run that died or lost rows; loads no weights. What is uncertain or not
comparable is said in the `notes` of a row, never averaged away.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dsl import curves, evaluation, settings
from dsl.config import check_foreign
from dsl.schema import read_yaml, suggest
from dsl.settings import Run, SettingsError

CONTEXTS = (256, 8_192, 131_072)  # at which states are counted
# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom n; beyond, 1.96 + 2.5 / n is right to 1 %.
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


def settings_of(log_dir: Path) -> tuple[Run | None, dict[str, Any], str]:
    """(the run, its record, what is wrong with the file): settings that this version refuses are no run."""
    try:
        values = read_yaml((log_dir / "hparams.yaml").read_text("utf-8"))
        return Run.from_dict(values), values.get("record") or {}, ""
    except FileNotFoundError:
        return None, {}, "no hparams.yaml: cost and corpus are unknown"
    except (ValueError, AttributeError) as error:
        return None, {}, f"hparams.yaml: {str(error).splitlines()[0]}"


def log_dirs(names: str) -> list[Path]:
    """The log folders of runs, "one, other", of one at least. Raises SettingsError."""
    home = settings.home() / "logs" / "training"
    known = sorted(path.name for path in home.glob("*") if path.is_dir())
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if unknown := [name for name in wanted or [names] if name not in known]:
        raise SettingsError(
            f"run must name folders of logs/training, got {name!r}{suggest(name, known)}" for name in unknown
        )
    return [home / name for name in wanted]


def curve(log_dir: Path) -> pd.DataFrame:
    """metrics.csv with the time spent in steps so far, as `seconds` and as `cpu_seconds` of all threads, and the
    layers' mean `maxvio`, NaN in rows of fewer steps than usual, where chance alone makes it larger.

    A row's speed is that of its interval; where rows are missing, the next row's stands for them.
    """
    table = curves.metrics(log_dir)
    steps = table.step.diff().fillna(table.step)
    spent = steps * table.step_seconds
    cpu = spent * table.cpu_percent / 100
    maxvio = table.filter(like="maxvio_").mean(axis=1).where(steps >= steps.median())
    return table.assign(seconds=spent.cumsum(), cpu_seconds=cpu.cumsum(), maxvio=maxvio)


def row(log_dir: Path) -> dict[str, Any]:
    """One run as one row of a table; None where its files do not say."""
    run, record, problem = settings_of(log_dir)
    notes, found = [problem] if problem else [], {"run": log_dir.name, "status": "no row logged"}
    if run:
        found |= {"seed": run.train.seed, "corpus": run.data.corpus, "fingerprint": record.get("corpus")}
        found |= {"tokenizer": run.data.tokenizer or "of the corpus", "vocab_size": run.model.vocab_size}
        found |= {"held_out_bytes": run.data.held_out_bytes, "max_steps": run.train.max_steps}
        try:
            check_foreign(vars(run.model))  # the file may be anybody's: no code is run because it names it
            cost = evaluation.cost(run.model, run.model.max_position_embeddings // 2, optimizer=run.train.optimizer)
            found |= {name: getattr(cost, name) for name in ("parameters", "active_parameters", "training_flops")}
            rows = run.train.per_device_train_batch_size * run.train.gradient_accumulation_steps
            found["optimizer_flops"] = cost.optimizer_flops / (rows * run.model.max_position_embeddings)
            found |= {f"state_bytes_{n}": cost.state_bytes(n) for n in CONTEXTS}
        except Exception as error:  # a mixer of somebody's, which is not here or raises what it likes
            notes.append(f"its cost is unknown: {error}")
    try:
        table = curve(log_dir)
    except FileNotFoundError:
        table = pd.DataFrame()
    if len(table):
        last, step = table.iloc[-1], int(table.step.iloc[-1])
        measured = table.set_index("step").held_out_bits_per_byte.dropna()
        found |= {"step": step, "tokens": int(last.tokens), "loss": last.loss, "cpu_seconds": last.cpu_seconds}
        found |= {"tokens_per_cpu_second": last.tokens / last.cpu_seconds if last.cpu_seconds else None}
        found |= {"bits_per_byte": measured.iloc[-1] if len(measured) else None}
        complete = run is not None and step >= run.train.max_steps
        found["status"] = "complete" if complete else f"stopped at step {step}"
        if measured.empty:
            notes.append("held-out text was never measured")
        elif measured.index[-1] < step:
            notes.append(f"held-out text was last measured at step {int(measured.index[-1])}")
        due = range(run.train.logging_steps, step + 1, run.train.logging_steps) if run else ()
        if missing := set(due) - set(table.step.astype(int)):
            notes.append(f"{len(missing)} rows are missing")
        if int(last.skipped_steps):
            notes.append(f"{int(last.skipped_steps)} batches were left out")
    return found | {"notes": "; ".join(notes)}


def table(log_dirs: Iterable[Path]) -> tuple[pd.DataFrame, list[str]]:
    """A row for each run, and what keeps them from being compared."""
    rows = pd.DataFrame([row(path) for path in log_dirs])
    return rows, apart(rows)


def apart(rows: pd.DataFrame) -> list[str]:
    """What keeps runs from being compared, in words."""
    tokenizers = "have different tokenizers: compare bits per byte; loss is per token, and tokens differ in size"
    reasons = {
        "fingerprint": "read different corpora: neither loss nor bits per byte can be compared",
        "vocab_size": tokenizers,
        "tokenizer": tokenizers,
        "held_out_bytes": "were measured on different amounts of held-out text",
        "step": "were trained for different numbers of steps",
    }
    found = (reason for column, reason in reasons.items() if column in rows and rows[column].nunique() > 1)
    return [f"these runs {reason}" for reason in dict.fromkeys(found)]


def interval(values: Iterable[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval by Student's t; NaN for one value, which shows no spread."""
    x = np.asarray([v for v in values if v == v], float)
    if len(x) < 2:
        return (float(x.mean()) if len(x) else math.nan), math.nan
    t = T95[len(x) - 2] if len(x) - 2 < len(T95) else 1.96 + 2.5 / (len(x) - 1)
    return float(x.mean()), float(t * x.std(ddof=1) / math.sqrt(len(x)))


def difference(rows: pd.DataFrame, one: str, other: str, column: str = "bits_per_byte") -> tuple[float, float, int]:
    """(mean, half width, seeds) of `one` minus `other`, paired by seed: the same data in the same order."""
    pair = rows[rows.config.isin((one, other))].pivot_table(index="seed", columns="config", values=column)
    both = pair.dropna() if {one, other} <= set(pair) else pair.iloc[:0]
    gaps = both[one] - both[other] if len(both) else []
    return *interval(gaps), len(both)


def verdict(mean: float, half: float, sign: int, margin: float = 0.0) -> str:
    """Is the 95 % interval evidence for an effect of that sign, against it, or silent? A sign of 0: for none at all,
    within `margin`.
    """
    if sign == 0:
        return "for" if abs(mean) + half <= margin else "against" if abs(mean) - half > margin else "silent"
    if not half < abs(mean):  # NaN too: one seed says nothing
        return "silent"
    return "for" if mean * sign > 0 else "against"
