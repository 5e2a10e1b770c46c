"""What the study's tables say: one row of figures a run, and for each published claim whether ours speak for it.

Reads the small tables `04_*.csv` and the list `claims.yaml`; knows no model and no run on disk.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from dsl import compare

TABLES = ("runs", "curves", "analysis", "tokens")
LAST = 3  # measurements at the end whose mean MaxVio counts: one alone is mostly luck


def tables(folder: Path) -> dict[str, Any]:
    """The study's tables by name, and `settings` of each configuration. Raises FileNotFoundError."""
    folder = Path(folder)
    if not (folder / "04_runs.csv").exists():
        raise FileNotFoundError(f"no 04_runs.csv in {folder}: `make study` writes it")
    # among tokens "None" is a word
    found = {name: pd.read_csv(folder / f"04_{name}.csv", keep_default_na=name != "tokens") for name in TABLES}
    return found | {"settings": yaml.safe_load((folder / "04_settings.yaml").read_text("utf-8"))}


def seeds(runs: pd.DataFrame) -> str:
    """How many seeds the configurations have, in words."""
    counts = runs.groupby("config").seed.nunique()
    few, many = counts.min(), counts.max()
    names = "" if few == many else f" ({', '.join(counts.index[counts == few])} {few})"
    return f"{many} seed{'s' if many > 1 else ''}{names}"


def measures(runs: pd.DataFrame, curves: pd.DataFrame, analysis: pd.DataFrame) -> pd.DataFrame:
    """One row a run, one column a figure: what it logged, and "measure key" of its analysis, mean of the layers."""
    named = analysis.assign(name=analysis.measure + " " + analysis.key.astype(str))
    wide = named.pivot_table(index=["config", "seed"], columns="name", values="value")
    maxvio = curves.groupby(["config", "seed"]).maxvio.apply(lambda x: x.tail(LAST).mean())
    table = runs.set_index(["config", "seed"]).join(wide).join(maxvio)
    table["state_bytes_per_token"] = (table.state_bytes_131072 - table.state_bytes_8192) / (131_072 - 8_192)
    if {"copying first", "copying again"} <= set(table):
        table["copying gain"] = table["copying first"] - table["copying again"]
    return table.reset_index()


def reached(curve: pd.DataFrame, level: float, column: str) -> float:
    """How much of `column` a run needed until its held-out bits per byte were at `level`; NaN if it never was."""
    best, spent = curve.held_out_bits_per_byte.cummin().to_numpy(), curve[column].to_numpy()
    if not best[-1] <= level:
        return np.nan
    i = int((best <= level).argmax())  # between the measurements before and after
    return float(np.interp(level, best[[i, i - 1]], spent[[i, i - 1]])) if i else float(spent[0])


def speed_up(curves: pd.DataFrame, of: str, than: str, column: str = "tokens") -> pd.Series:
    """How many times less of `column` one needs than the other to be equally good, by seed: at the end of the worse.

    Between two runs of one length this is cautious: rates that decay hold back what could have ended earlier.
    """
    found = {}
    for seed in sorted(set(curves.seed)):
        one, other = (curves[(curves.config == name) & (curves.seed == seed)] for name in (of, than))
        if len(one) and len(other):
            a, b = one.held_out_bits_per_byte.min(), other.held_out_bits_per_byte.min()
            need = [reached(curve, max(a, b), column) for curve in (one, other)]
            found[seed] = need[1] / need[0]
    return pd.Series(found, dtype=float)


def by_seed(claim: dict[str, Any], table: pd.DataFrame, curves: pd.DataFrame) -> pd.Series:
    """What the runs say to a claim, one number a seed: a difference, a ratio, or what it took to be equally good."""
    measure, of, than = claim["measure"], claim["of"], claim.get("than")
    if measure.startswith("less "):
        return speed_up(curves, of, than, measure.removeprefix("less "))
    if measure not in table:
        return pd.Series(dtype=float)
    one, other = (table[table.config == name].set_index("seed")[measure] for name in (of, than))
    return (one if than is None else one / other if claim.get("ratio") else one - other).dropna()


def claims(table: pd.DataFrame, curves: pd.DataFrame) -> pd.DataFrame:
    """Every claim of claims.yaml: what was published, ours with its 95 % interval, seeds, and the verdict."""
    rows = []
    for claim in yaml.safe_load(Path(__file__).with_name("claims.yaml").read_text("utf-8")):
        row = {"claim": claim["claim"], "published": claim["published"], "source": claim["source"]}
        if why := claim.get("silent"):
            rows.append(row | {"ours": why, "seeds": 0, "verdict": "silent"})
            continue
        found = by_seed(claim, table, curves)
        mean, half = compare.interval(found)
        if claim.get("exact"):  # counted, not measured: no seed can change it
            half = 0.0
        against = claim.get("against", 0.0)
        ours = f"{mean:.4g}" + ("" if half == 0 else " (one seed)")
        if half > 0:
            digits = max(0, 1 - math.floor(math.log10(half)))  # two of the interval's
            ours = f"{mean:.{digits}f} ± {half:.{digits}f}"
        verdict = compare.verdict(mean - against, half, claim["sign"], claim.get("margin", 0.0))
        said = ours + claim["unit"] if len(found) else "not run"
        rows.append(row | {"ours": said, "seeds": len(found), "verdict": verdict})
    return pd.DataFrame(rows)[["claim", "published", "ours", "seeds", "verdict", "source"]]
