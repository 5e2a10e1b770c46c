"""One run under the lens: what its weights say about the past, copying, kinds of tokens and experts.

Writes analysis.csv and token_losses.npz beside a run's log; knows nothing of other runs, but for `of_runs`, which lays
anybody's runs out as the study's tables are. Notebook 04 draws what is found.

Shape letters: N rows, T time, L MoE layers, k experts of a token.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from dsl import checkpoint, compare, data, evaluation, hub, routing, settings
from dsl.model import LanguageModel
from dsl.settings import Run

ROWS = 64  # of which every token's loss is kept
LONGEST = 1024  # tokens of a row beyond the window
COLUMNS = ["measure", "layer", "key", "count", "value"]


def analysis(log_dir: Path) -> Path:
    """Where the figures of a run are, that took its weights to make."""
    return Path(log_dir) / "analysis.csv"


@torch.no_grad()
def token_losses(model: LanguageModel, rows: Tensor) -> Tensor:
    """Loss of every token in nats: rows [N, T + 1] -> [N, T], NaN where nothing is scored; in eval mode."""
    model, parts = model.eval(), []
    for some in rows.split(max(1, 2048 // rows.shape[1])):
        labels = some[:, 1:]
        loss = model.loss(model(some[:, :-1].clamp(min=0))[0], labels, reduction="none")
        parts.append(loss.masked_fill(labels == evaluation.IGNORE, torch.nan))
    return torch.cat(parts)


def seen_before(rows: Tensor) -> np.ndarray:
    """For every predicted token what the row has shown of it before: rows [N, T + 1] -> text [N, T].

    "pair" where the token before it was followed by it earlier: copying is enough (Zoology's recall hits, 2312.04927,
    which leave out pairs that are frequent in training; here they count).
    """
    found = np.full((rows.shape[0], rows.shape[1] - 1), "new token", dtype=object)
    for i, row in enumerate(rows.tolist()):
        tokens, pairs = {row[0]}, set()
        for t, pair in enumerate(pairwise(row)):
            found[i, t] = "seen pair" if pair in pairs else "seen token" if pair[1] in tokens else "new token"
            tokens.add(pair[1])
            pairs.add(pair)
    return found


def token_share(tokens: Tensor, experts: Tensor) -> float:
    """How much of an expert's choice the token's identity decides: mutual information over the choice's entropy."""
    joint = torch.tensor(pd.crosstab(tokens.flatten().numpy(), experts.flatten().numpy(), normalize=True).to_numpy())
    entropy = torch.special.entr(joint.sum(0)).sum()
    mutual = entropy + torch.special.entr(joint.sum(1)).sum() - torch.special.entr(joint).sum()
    return float(mutual / entropy) if entropy > 0 else 0.0


def analyse(source: str | Path) -> Path:
    """Write a run's analysis.csv (columns measure, layer, key, count, value) and token_losses.npz beside its log.

    Raises CheckpointError and the corpus's errors.
    """
    folder, _ = checkpoint.newest(settings.find_run(source) or source)
    if folder is None:
        raise checkpoint.CheckpointError(f"no good checkpoint in {source}")
    model, tokenizer = hub.load(folder)
    run = Run.from_dict(checkpoint.read_trainer(folder)["settings"])
    held_out = settings.preset("tiny").data.held_out_bytes if settings.smoke() else 400_000
    corpus = data.open_corpus(run.data.model_copy(update={"held_out_bytes": held_out}))
    rows, n_bytes = data.held_out_rows(corpus, tokenizer, run.model.max_position_embeddings)
    losses = token_losses(model.model, rows)
    found = [("final", "", "bits_per_byte", n_bytes, float(losses.nansum()) / np.log(2) / n_bytes)]
    found += _past(model.model, rows[:ROWS])
    if "full_attention" not in run.model.layer_types:
        found += _beyond(model.model, losses, data.held_out_rows(corpus, tokenizer, LONGEST)[0])
    found += _copying(model.model, run.model.max_position_embeddings)
    kinds = np.array([routing.kind_of(tokenizer.decode([i])) for i in range(len(tokenizer))], dtype=object)
    for measure, keys in {"seen": seen_before(rows), "kind": kinds[rows[:, 1:].clamp(min=0)]}.items():
        frame = pd.DataFrame({"key": keys.flatten(), "value": losses.flatten()}).dropna()
        found += [(measure, "", key, len(some), some.value.mean()) for key, some in frame.groupby("key")]
    if run.model.moe_layers:
        found += _experts(model.model, run, rows[:, :-1].clamp(min=0)[:ROWS])
    np.savez_compressed(run.log_dir / "token_losses.npz", tokens=rows[:ROWS], losses=losses[:ROWS].half())
    new, place = run.log_dir / "analysis.new", analysis(run.log_dir)
    pd.DataFrame(found, columns=COLUMNS).to_csv(new, index=False)
    os.replace(new, place)
    return place


def _past(model: LanguageModel, rows: Tensor) -> Iterator[tuple]:
    """Loss of the same tokens, the second half of each row, with 1, 2, 3 to 4, 5 to 8, ... tokens in sight.

    Rows are cut into overlapping pieces, of which the second halves are scored: no token is in two of them.
    """
    window = rows.shape[1] - 1
    for sight in (2**i for i in range(window.bit_length()) if window % 2**i == 0):
        first = window // 2 - sight // 2
        pieces = rows[:, first:].unfold(1, sight + 1, sight - sight // 2).flatten(0, 1)
        losses = token_losses(model, pieces)[:, sight // 2 :]
        yield "past", "", sight, int(losses.isfinite().sum()), float(losses.nanmean())


def _beyond(model: LanguageModel, losses: Tensor, longer: Tensor) -> Iterator[tuple]:
    """Where no layer has a limit, what more tokens of past than in training change.

    Both cut the same text into rows, so a token of a longer row is compared with itself in a row of the window.
    """
    window, far = losses.shape[1], token_losses(model, longer)
    gaps = far - F.pad(losses.flatten(), (0, far.numel() - losses.numel()), value=torch.nan).view_as(far)
    for low in (window * 2**i for i in range((LONGEST // window).bit_length() - 1)):
        some = gaps[:, low : 2 * low]
        yield "longer", "", low, int(some.isfinite().sum()), float(some.nanmean())


def _copying(model: LanguageModel, window: int) -> Iterator[tuple]:
    """Loss of random tokens when a row shows them first, and when it shows them again in the same order: what an
    induction head copies (Olsson et al. 2022, 2209.11895), and nothing learnt of text can know.
    """
    half = window // 2
    tokens = torch.randint(model.config.vocab_size, (ROWS, half), generator=torch.Generator().manual_seed(0))
    losses = token_losses(model, torch.cat([tokens, tokens, tokens[:, :1]], 1))
    for key, some in {"first": losses[:, : half - 1], "again": losses[:, half:-1]}.items():
        yield "copying", "", key, some.numel(), float(some.mean())


def _experts(model: LanguageModel, run: Run, tokens: Tensor) -> Iterator[tuple]:
    """How the choices settled over the checkpoints, and what decides them in the last."""
    last = routing.routes(model, tokens)
    for step in checkpoint.steps(run.run_dir):
        then = hub.load(checkpoint.step_dir(run.run_dir, step))[0].model
        same = routing.saturation(routing.routes(then, tokens), last).tolist()
        for layer, share in zip(run.model.moe_layers, same, strict=True):
            yield "saturation", layer, step, tokens.numel(), share
    shuffled = tokens.flatten()[torch.randperm(tokens.numel(), generator=torch.Generator().manual_seed(0))]
    for layer, experts in zip(run.model.moe_layers, last[..., 0], strict=True):
        for key, of in {"token": tokens, "token before": tokens.roll(1, 1), "chance": shuffled}.items():
            yield "specialisation", layer, key, tokens.numel(), token_share(of, experts)


def of_runs(names: str) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame, list[str]]:
    """Runs of anybody's, "one, other": table of `compare`, curves and analysis as the study has them, and what to mind.

    What takes weights is made where there are some, once for each newest checkpoint. Raises SettingsError.
    """
    places = compare.log_dirs(names)
    rows, notes = compare.table(places)
    curves, found = [], []
    for place in places:
        about = {"config": place.name, "seed": 0}
        with suppress(FileNotFoundError):
            curves.append(compare.curve(place).dropna(subset=["held_out_bits_per_byte"]).assign(**about))
        try:
            made, weights = analysis(place), checkpoint.newest(settings.find_run(place.name) or place)[0]
            if weights is None and not made.exists():
                raise checkpoint.CheckpointError(f"no good checkpoint in {place.name}")
            if weights and not (made.exists() and made.stat().st_mtime > weights.stat().st_mtime):
                analyse(place.name)
            found.append(pd.read_csv(made).assign(**about))
        except (RuntimeError, ValueError, OSError) as error:  # no weights, no corpus, no network: the logs still speak
            notes.append(f"{place.name} is shown without its weights: {error}")
    found = found or [pd.DataFrame(columns=[*COLUMNS, "config", "seed"])]
    return rows.assign(config=rows.run, seed=0), pd.concat(curves or [pd.DataFrame()]), pd.concat(found), notes
