"""The grid of small trainings behind notebook 04: which they are, running them, and what is kept of each.

Every run is an ordinary run of `dsl.train` under its own name, in a process of its own with one thread; a study that
was killed goes on where it was. What the notebook reads are small tables, `04_*.csv`, renewed after every run.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml

from dsl import checkpoint, compare, hub, lens, plots, settings, training
from dsl.schema import suggest
from dsl.settings import Run, SettingsError, preset

MOE = {"moe_layers": [1, 3]}  # two of four layers, so that layers can be compared
ELU = MOE | {"layer_types": ["linear_attention"], "linear_attention_kind": "elu"}
DELTA = ELU | {"linear_attention_kind": "delta"}
HYBRID = DELTA | {"layer_types": ["linear_attention"] * 3 + ["full_attention"]}
NO_CONVOLUTION = {"linear_conv_kernel_dim": 0}
# The rates of `quickstart` when the study was made; it has been tuned further since, the other configurations have not.
RATES = {"muon_learning_rate": 0.01, "momentum": 0.95, "adam_beta2": 0.95}
GRID = {  # changes to the preset `quickstart`, which has experts, loss-free balancing and Muon
    "quickstart": {},
    "softmax": MOE | {"layer_types": ["full_attention"]},
    "elu": ELU,
    "delta": DELTA,
    "hybrid": HYBRID,
    "softmax-dense": {"layer_types": ["full_attention"], "moe_layers": []},
    "hybrid-dense": HYBRID | {"moe_layers": []},
    "elu-no-conv": ELU | NO_CONVOLUTION,
    "delta-no-conv": DELTA | NO_CONVOLUTION,
    "hybrid-aux": HYBRID | {"balance": "aux_loss"},
    "hybrid-adamw": HYBRID | {"optimizer": "adamw", "learning_rate": 6e-3},  # the best of three rates, 100 steps
}
SETTINGS = {"quick": (40, 1), "full": (350, 5)}  # steps and seeds of each; 350 steps: three minutes of a core


def plan(steps: int, seeds: int, only: Sequence[str] = ()) -> list[tuple[str, Run]]:
    """The runs, all configurations of the first seed first; a smoke test takes `tiny` runs. Raises SettingsError."""
    if unknown := [name for name in only if name not in GRID]:
        raise SettingsError(f"unknown configuration {unknown[0]!r}{suggest(unknown[0], GRID)}")
    start = "tiny" if settings.smoke() else "quickstart"
    every = {"eval_steps": 12, "save_steps": 6, "sample_steps": 4, "logging_steps": 60}
    train = {field: max(steps // times, 1) for field, times in every.items()}
    train |= {"max_steps": steps, "save_total_limit": 99, "num_hidden_layers": 4}
    train |= {} if settings.smoke() else {"sample_tokens": 60, "held_out_bytes": 100_000, **RATES}
    return [
        (config, preset(start, run_name=f"study-{steps}-{config}-{seed}", seed=seed, **train, **GRID[config]))
        for seed in range(seeds)
        for config in (only or GRID)
    ]


def train_grid(steps: int, seeds: int, only: Sequence[str], folder: Path, jobs: int = 1) -> list[str]:
    """Train and analyse what is not there yet, some at once; the names of runs that failed.

    Tables of all that is there, also of configurations that `only` leaves out, go into `folder`.
    """
    grid, chosen = plan(steps, seeds), plan(steps, seeds, only)

    def finish(run: Run) -> int:
        command = [sys.executable, "-c", "from dsl import study; study.one()"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, input=run.to_json(), text=True, env=environment).returncode

    missing, failed = [run for _, run in chosen if not lens.analysis(run.log_dir).exists()], []
    print(f"study: {len(chosen) - len(missing)} of {len(chosen)} runs are there", file=sys.stderr, flush=True)
    pool = ThreadPoolExecutor(jobs)
    try:
        for run, problem in zip(missing, pool.map(finish, missing), strict=True):
            failed += [run.name] if problem else []
            collect(grid, folder)
            print(f"study: {run.name} {'failed' if problem else 'is done'}", file=sys.stderr, flush=True)
    finally:  # interrupted: no further run is begun
        pool.shutdown(cancel_futures=True)
    collect(grid, folder)
    return failed


def one() -> None:
    """The work of one process: the run on stdin as JSON, its analysis, and of its checkpoints the last ones kept."""
    run = Run.from_yaml(sys.stdin.read())
    torch.set_num_threads(1)
    if training.train(run).status not in ("finished", "complete"):
        sys.exit(130)
    lens.analyse(run.run_dir)
    checkpoint.rotate(run.run_dir, 1)


def collect(grid: Sequence[tuple[str, Run]], folder: Path) -> None:
    """Tables of the runs that are done, into `folder`: runs, curves, analysis, tokens, settings."""
    folder.mkdir(parents=True, exist_ok=True)
    done = [(config, run) for config, run in grid if lens.analysis(run.log_dir).exists()]
    tables: dict[str, list[pd.DataFrame]] = {"runs": [], "curves": [], "analysis": []}
    first = dict(reversed(done))  # of each configuration
    for config, run in done:
        about = {"config": config, "seed": run.train.seed}
        more = pd.read_csv(lens.analysis(run.log_dir))
        final = {"final_bits_per_byte": more.value[more.measure == "final"].item()}
        tables["runs"].append(pd.DataFrame([{**about, **compare.row(run.log_dir), **final}]))
        tables["curves"].append(curve(run.log_dir).assign(**about))
        tables["analysis"].append(more[more.measure != "final"].assign(**about))
    for name, parts in tables.items():
        if parts:
            pd.concat(parts).to_csv(folder / f"04_{name}.csv", index=False, float_format="%.5g")
    examples(done).to_csv(folder / "04_tokens.csv", index=False, float_format="%.3f")
    made = {config: compare.settings_of(run.log_dir)[:2] for config, run in first.items()}  # not as they would be now
    chosen = {config: run.to_dict() | {"record": record} for config, (run, record) in made.items() if run}
    (folder / "04_settings.yaml").write_text(yaml.safe_dump(chosen, sort_keys=False, allow_unicode=True), "utf-8")


def curve(log_dir: Path) -> pd.DataFrame:
    """A run's rows with a held-out measurement; `maxvio` is the mean of the rows since the one before."""
    table = compare.curve(log_dir)
    since = table.held_out_bits_per_byte.notna().cumsum().shift(fill_value=0)
    table = table.assign(maxvio=table.groupby(since).maxvio.transform("mean"))
    columns = ["step", "tokens", "seconds", "cpu_seconds", "loss", "held_out_bits_per_byte", "maxvio"]
    return table.dropna(subset=["held_out_bits_per_byte"])[columns]


def examples(done: Sequence[tuple[str, Run]]) -> pd.DataFrame:
    """Single tokens that the mixers judge most differently: text before, the token, mean loss of each mixer in nats."""
    mixers = ("softmax", "elu", "delta", "hybrid")
    kept = [(config, run, np.load(run.log_dir / "token_losses.npz")) for config, run in done if config in mixers]
    if {config for config, *_ in kept} != set(mixers):
        return pd.DataFrame(columns=["before", "token", "seen", *mixers])
    tokens = kept[0][2]["tokens"]
    means = {name: np.mean([z["losses"].astype(float) for c, _, z in kept if c == name], 0) for name in mixers}
    tokenizer = hub.load(checkpoint.newest(kept[0][1].run_dir)[0])[1]
    seen, gap = lens.seen_before(torch.from_numpy(tokens)), np.nan_to_num(means["elu"] - means["softmax"])
    order = np.argsort(gap, axis=None)
    rows = []
    for i, t in (divmod(int(place), gap.shape[1]) for place in (*order[-40:][::-1], *order[:40])):
        text = tokenizer.decode(tokens[i, max(0, t - 15) : t + 1]), tokenizer.decode(tokens[i, t + 1 : t + 2])
        rows.append((*text, seen[i, t], *(means[name][i, t] for name in mixers)))
    return pd.DataFrame(rows, columns=["before", "token", "seen", *mixers])


def main(arguments: Sequence[str] | None = None) -> int:
    """The command behind `make study`."""
    parser = argparse.ArgumentParser("python -m dsl.study", description=__doc__.split("\n")[0])
    sizes = "; ".join(f"{name}: {steps} steps, seeds: {seeds}" for name, (steps, seeds) in SETTINGS.items())
    parser.add_argument("--setting", choices=SETTINGS, default="full", help=f"{sizes} (%(default)s)")
    parser.add_argument("--steps", type=int, help="training steps of each run instead of the setting's")
    parser.add_argument("--seeds", type=int, help="seeds of each configuration instead of the setting's")
    parser.add_argument("--only", nargs="+", default=(), metavar="NAME", help=f"some of {', '.join(GRID)}")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at once, one thread each (%(default)s)")
    parser.add_argument("--tables", type=Path, help="folder of the tables (figures/runs/study-SETTING)")
    options = parser.parse_args(arguments)
    steps, seeds = SETTINGS[options.setting]
    folder = options.tables or plots.folder(f"study-{options.steps or options.setting}")
    try:
        failed = train_grid(options.steps or steps, options.seeds or seeds, options.only, folder, options.jobs)
    except SettingsError as error:
        parser.error(str(error))
    print(f"tables in {folder}; to see them: papermill notebooks/04_analysis.ipynb out.ipynb -p tables {folder}")
    for name in failed:
        print(f"failed: {name}; logs/training/{name} says why, and the same command tries again")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
