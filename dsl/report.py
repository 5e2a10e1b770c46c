"""What is on the disk and how good it is, as plain values: runs, held-out figures, a checkpoint's verdict.

Knows models, corpora and folders; nothing of terminals or notebooks, which show what it returns.
"""

import csv
import io
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import PreTrainedTokenizerBase

from dsl import checkpoint, data, evaluation, generation, hub, optim, runlog, settings
from dsl.gradients import Objective, accumulate
from dsl.model import LanguageModel
from dsl.moe import NotFiniteError
from dsl.processes import Processes
from dsl.settings import DataConfig, Run

FROM_CHANCE = 8.0  # bits per byte that a guess costs
SMALL_GPU = 12e9  # bytes
PROBE = 1024  # tokens of a measured micro-batch on a CPU


def forecast(run: Run) -> dict[str, str]:
    """What a training will cost here, in words: work, memory, whether a small GPU holds it, and time to its end.

    The time of a step comes from the run's own log, else from a few steps that are made and thrown away.
    """
    train, device = run.train, optim.precision(run.train.precision).device
    rows = train.per_device_train_batch_size
    one, cost = (evaluation.cost(run.model, rows=n, optimizer=train.optimizer) for n in (1, rows))
    free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else psutil.virtual_memory().available
    most = int((SMALL_GPU - cost.training_bytes + cost.activation_bytes) // one.activation_bytes)
    fits = f"holds it with up to {most:,} rows at a time" if most >= 1 else "does not hold it"
    tokens = rows * train.gradient_accumulation_steps * run.model.max_position_embeddings
    newest, _ = checkpoint.newest(run.run_dir)
    left = max(0, train.max_steps - (checkpoint.read_trainer(newest)["step"] if newest else 0))
    seconds, source = _step_seconds(run)
    return {
        "model": f"{cost.parameters / 1e6:.1f} M parameters, {cost.active_parameters / 1e6:.1f} M active for a token",
        "work": f"{cost.training_flops / 1e6:,.0f} MFLOPs a token, {tokens:,} tokens a step, "
        f"{cost.training_flops * tokens * left:.1e} FLOPs in {left:,} steps",
        "memory of the tensors": f"about {cost.training_bytes / 1e9:.2f} GB with {rows} rows at a time, beside the "
        f"libraries'; {free / 1e9:.1f} GB are free",
        "a GPU of 12 GB": fits,
        "time": f"{runlog.duration(seconds * left)} at {seconds:.2f} s a step, {source}",
    }


def _step_seconds(run: Run) -> tuple[float, str]:
    rows = csv.DictReader(io.StringIO(runlog.complete(run.log_dir / "metrics.csv")))
    if logged := [float(row["step_seconds"]) for row in rows if row.get("step_seconds")]:
        return statistics.median(logged[-5:]), "as the run's log says"
    train, precision, length = run.train, optim.precision(run.train.precision), run.model.max_position_embeddings
    rows = train.per_device_train_batch_size
    if precision.device.type == "cpu":
        rows = min(rows, max(1, PROBE // length))
    with torch.random.fork_rng():
        model = LanguageModel(run.model).to(precision.device).train()
        tokens = torch.randint(run.model.vocab_size, (rows, length + 1))
        optimizer, objective = optim.Optimizer(model, train), Objective(model)
        work = (objective, tokens[:, :-1], tokens[:, 1:], rows, precision, Processes())
        _, part = (_timed(precision.device, accumulate, *work) for _ in range(2))  # the first is slower
        _, rest = (_timed(precision.device, optimizer.step) for _ in range(2))
    whole = part * train.per_device_train_batch_size / rows * train.gradient_accumulation_steps + rest
    return whole, f"measured on {rows} rows"


def _timed(device: torch.device, work: Callable[..., Any], *given: Any) -> float:
    """Seconds until the work is done: a GPU still works when its caller goes on."""
    wait = torch.accelerator.synchronize if device.type != "cpu" else lambda: None
    wait()
    start = time.perf_counter()
    work(*given)
    wait()
    return time.perf_counter() - start


def runs() -> list[dict[str, Any]]:
    """Every run at home, one row each: steps reached and wanted, the last figures logged, its state."""
    return [_row(path) for path in sorted((settings.home() / "checkpoints").glob("*")) if path.is_dir()]


def _row(folder: Path) -> dict[str, Any]:
    newest, skipped = checkpoint.newest(folder)
    row: dict[str, Any] = {"run": folder.name, "step": None, "max_steps": None, "loss": None, "bits_per_byte": None}
    status = "no checkpoint"
    if newest:
        trainer = checkpoint.read_trainer(newest)
        row |= {"step": trainer["step"], "loss": trainer["loss"], "bits_per_byte": trainer.get("last_bits_per_byte")}
        row["max_steps"] = trainer["settings"]["train"]["max_steps"]
        status = "complete" if row["step"] >= row["max_steps"] and not trainer.get("due") else "can go on"
    return row | {"status": status + (f", {len(skipped)} damaged" if skipped else "")}


def measure(model: hub.DslForCausalLM, tokenizer: PreTrainedTokenizerBase, **flat: Any) -> dict[str, Any]:
    """Held-out bits per byte, and how the experts share the work; of the run's own corpus, DataConfig's fields changed.

    Raises ValueError for settings, and the corpus's errors.
    """
    folder = Path(model.name_or_path)
    known = checkpoint.read_trainer(folder)["settings"]["data"] if (folder / "trainer.json").exists() else {}
    config = DataConfig(**known | flat)
    corpus = data.open_corpus(config)
    rows, n_bytes = data.held_out_rows(corpus, tokenizer, model.config.max_position_embeddings)
    corpus.close()
    result = {
        "checkpoint": model.name_or_path,
        "corpus": config.corpus,
        "held_out_bytes": n_bytes,
        "tokens": int((rows[:, 1:] != evaluation.IGNORE).sum()),
        "bits_per_byte": round(evaluation.bits_per_byte(model, rows, n_bytes), 4),
    }
    if blocks := model.model.moe_blocks:
        load = evaluation.routing_load(model, rows[:256, :-1].clamp(min=0))
        figures = zip(blocks, load.maxvio.tolist(), load.dead.tolist(), strict=True)
        result["layers"] = [
            {"layer": block.layer_index, "maxvio": round(maxvio, 3), "experts_without_tokens": int(dead)}
            for block, maxvio, dead in figures
        ]
    return result


def examine(source: str, **flat: Any) -> dict[str, Any]:
    """`measure`, the texts that follow the five prompts, and a verdict: `problems` is empty where all is well.

    A problem is a newer step that is damaged, a prompt that nothing follows, a model that is broken or no better than
    chance, an expert without work. Raises CheckpointError where there is nothing to examine.
    """
    model, tokenizer = hub.load(source)
    folder = settings.find_run(source)
    skipped = checkpoint.newest(folder)[1] if folder and not (folder / "config.json").exists() else []
    problems = [f"{path} is damaged: {problem}" for path, problem in skipped]
    sampling = {"max_new_tokens": 60, "temperature": 0.8, "seed": 0}
    texts, result = {}, {"checkpoint": model.name_or_path, "bits_per_byte": math.nan}
    for prompt in settings.TrainConfig().prompts:
        texts[prompt], why = "", ""
        try:
            texts[prompt] = generation.complete(model, tokenizer, prompt, **sampling)
        except ValueError as error:  # the prompt is too long for the window, or a figure is not finite
            why = f": {error}"
        problems += [] if texts[prompt].strip() else [f"nothing follows {prompt!r}{why}"]
    try:
        result = measure(model, tokenizer, **flat)
    except NotFiniteError as error:
        problems.append(f"held-out text cannot be measured: {error}")
    if not result["bits_per_byte"] < FROM_CHANCE:  # NaN too
        problems.append(f"bits_per_byte must be below {FROM_CHANCE}, that of a guess, got {result['bits_per_byte']}")
    for layer in result.get("layers", ()):
        if layer["experts_without_tokens"]:
            problems.append("layer {layer}: experts without tokens, {experts_without_tokens}".format(**layer))
    return {**result, "texts": texts, "problems": problems, "verdict": "bad" if problems else "good"}
