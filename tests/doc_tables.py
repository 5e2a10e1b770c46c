"""Tables in README.md and docs/ that are computed: `make docs` writes them, and a test says where one is stale.

A page holds `<!-- table: NAME -->`, the table, `<!-- end -->`; NAME is a function of TABLES.
"""

import ast
import json
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import shelves
import yaml

from dsl import evaluation, settings
from dsl.config import ModelConfig

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in ("CODE", "SCALE", "SPEED"))]
BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", flags=re.DOTALL)


def markdown(head: str, rows: Iterable[Iterable[object]]) -> str:
    columns = head.split(" | ")
    lines = [columns, ["---"] * len(columns), *([str(cell) for cell in row] for row in rows)]
    if {len(line) for line in lines} != {len(columns)}:  # GitHub would show bars instead of a table
        raise ValueError(f"rows must have the columns of {head!r}")
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def notebooks() -> str:
    """One row a notebook that is there, from notebooks/notebooks.yaml."""
    said = yaml.safe_load((ROOT / "notebooks" / "notebooks.yaml").read_text(encoding="utf-8"))
    names = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))
    fields = ("question", "minutes", "reads", "writes", "needs")
    rows = ([f"[{name}](notebooks/{name}.ipynb)", *(said[name][field] for field in fields)] for name in names)
    return markdown("notebook | its question | minutes | reads | writes | needs before", rows)


def presets() -> str:
    """One row a preset: what it is and its size."""
    rows = []
    for name, values in yaml.safe_load((ROOT / "dsl" / "presets.yaml").read_text(encoding="utf-8")).items():
        run = settings.preset(name)
        cost = evaluation.cost(run.model)
        size = f"{cost.parameters / 1e6:.1f} M ({cost.active_parameters / 1e6:.1f} M)"
        rows.append([f"`{name}`", values["about"], size, run.model.max_position_embeddings, f"`{run.data.corpus}`"])
    return markdown("preset | what it is | parameters (active) | window | corpus", rows)


def code() -> str:
    """One row a file of dsl, in the order of reading: what its head says it is, and its lines of code."""
    rows = []
    for shelf, names in {**shelves.SHELVES, "beside them": shelves.BESIDE}.items():
        rows.append([f"**{shelf}**", "", sum(map(shelves.code_lines, names))])
        for name in names:
            said = ast.get_docstring(shelves.tree(name)).partition("\n\n")[0].replace("\n", " ")
            rows.append([f"[{name}](../dsl/{name}.py)", said, shelves.code_lines(name)])
    return markdown("file | what it is | lines", rows)


SMALL = settings.preset("linear_moe").model
LARGE = replace(  # 100 times the parameters
    SMALL,
    hidden_size=2048,
    head_dim=128,
    num_attention_heads=16,
    num_key_value_heads=4,
    num_hidden_layers=24,
    layer_types=("linear_attention",),
    moe_layers="all",
    num_experts=64,
    num_experts_per_tok=6,
    moe_intermediate_size=1408,
)
ROWS = 8  # sequences of a micro-batch on a device


@dataclass(frozen=True)
class Engine:
    name: str
    devices: int
    kind: str  # one, ddp, fsdp, ep


ENGINES = [
    Engine("one process", 1, "one"),
    Engine("DDP", 8, "ddp"),
    Engine("FSDP2", 8, "fsdp"),
    Engine("FSDP2", 64, "fsdp"),
    Engine("FSDP2 and expert parallelism", 8, "ep"),
]


def per_device(config: ModelConfig, engine: Engine) -> tuple[float, float]:
    """(bytes of memory, bytes sent in a training step of one micro-batch) of a device, everything in fp32.

    Rings: an all-reduce sends 2 (n - 1)/n of its tensor, a gather or a scatter (n - 1)/n. FSDP2 gathers weights for
    the forward and again for the backward pass, and scatters gradients; one block of them is whole at a time. Expert
    parallelism keeps experts where they are and sends tokens to them and back, in both passes.
    """
    cost, n, c = evaluation.cost(config, rows=ROWS), engine.devices, config
    experts = 4 * len(c.moe_layers) * c.num_experts * 3 * c.hidden_size * c.moe_intermediate_size
    resident = 2 * cost.weight_bytes + cost.optimizer_bytes
    part = (n - 1) / n
    if engine.kind in ("one", "ddp"):
        return resident + cost.activation_bytes, 2 * part * cost.weight_bytes
    gathered = cost.weight_bytes if engine.kind == "fsdp" else cost.weight_bytes - experts
    whole = 2 * gathered / c.num_hidden_layers
    sent = 3 * part * gathered
    if engine.kind == "ep":
        tokens = ROWS * c.max_position_embeddings * c.num_experts_per_tok * c.hidden_size * 4
        sent += 4 * part * tokens * len(c.moe_layers)
    return resident / n + whole + cost.activation_bytes, sent


def scale() -> str:
    rows = []
    for name, config in {"`linear_moe`": SMALL, "100 times larger": LARGE}.items():
        size = f"{name}, {evaluation.cost(config).parameters / 1e9:.2f} billion"
        for engine in ENGINES:
            memory, sent = per_device(config, engine)
            rows.append([size, engine.name, engine.devices, f"{memory / 2**30:,.1f}", f"{sent / 2**30:,.2f}"])
    return markdown("model | engine | devices | GiB a device | GiB sent a step and device", rows)


# What README says of figures/bench.json and of the study; braces hold the ratio of a pair.
SPEEDS = {
    "ELU+1 linear attention against fused softmax, forward and backward": (
        "{linear-512} times faster at 512 tokens (2.4 to 4.2 on different days), {linear-1024} at 1,024, {linear-8192} "
        "at 8,192"
    ),
    "chunked delta rule against transformers'": "{delta-2048} times faster at 2,048 tokens",
    "a training step of `linear_moe` against transformers' models of its sizes": (
        "{train-mixtral} times as fast as Mixtral, {train-deepseek} as DeepseekV3, {train-qwen3-next} as Qwen3-Next, "
        "{train-llama} as a dense Llama"
    ),
    "its peak memory, 16 rows of 512 tokens at a time": (
        "{memory-mixtral} times smaller than Mixtral's, {memory-deepseek} than DeepseekV3's, {memory-qwen3-next} than "
        "Qwen3-Next's, {memory-llama} than a dense Llama's"
    ),
    "its MoE block": "{moe-mixtral} times as fast as Mixtral's, {moe-dense} times as a dense one of its active size",
    "decoding at 8,192 tokens of context": (
        "{decode-mixtral} times faster than Mixtral; with softmax in the place of ELU+1, as Mixtral has it, {softmax} "
        "times as fast (noise: up to 1.4 times)"
    ),
    "a checkpoint of weights and moments": (
        "loaded {load} and saved {save} times as fast as by transformers and torch, which verify and sync nothing"
    ),
}


def _bench(part: str = "pairs") -> dict:
    return json.loads((ROOT / "figures" / "bench.json").read_text(encoding="utf-8"))[part]


def speeds() -> str:
    """The ratios that README quotes."""
    ratios = {name: f"{row['ratio']:.{2 * (row['ratio'] < 10)}f}" for name, row in _bench().items()}
    mixtral, softmax = (_bench("context")[kind]["8192"]["decode_seconds"] for kind in ("mixtral", "softmax"))
    ratios["softmax"] = f"{mixtral / softmax:.2f}"
    return markdown("what | result", ((what, said.format_map(ratios)) for what, said in SPEEDS.items()))


def bench() -> str:
    """Every pair of the bench, with its goal."""
    rows = []
    for name, row in _bench().items():
        met = "yes" if row["ratio"] >= row["goal"] else "no"
        unit, scale = ("GB", 1e-9) if row["unit"] == "bytes" else ("s", 1)
        amounts = [f"{row[whose] * scale:.3g} {unit}" for whose in ("ours", "theirs")]
        share = f"{row['share_of_ceiling']:.0%}" if "share_of_ceiling" in row else ""
        rows.append([f"`{name}`", row["peer"], *amounts, f"{row['ratio']:.2f}", f"{row['goal']:.2f}", met, share])
    return markdown("pair | against | ours | theirs | ratio | goal | reached | whole step, of the GEMM ceiling", rows)


def context() -> str:
    """What a decoded token costs at each length of context, and the state's bytes."""
    found, rows = _bench("context"), []
    lengths = list(found["elu"])
    for kind, points in found.items():
        cells = [f"{points[n]['decode_seconds'] * 1e3:,.0f}" if n in points else "" for n in lengths]
        rows.append([kind, *cells, *(f"{points[n]['state_bytes'] / 1e6:,.1f}" for n in ("512", "8192"))])
    heads = [f"ms at {int(n):,} tokens" if n == "512" else f"{int(n):,}" for n in lengths]
    return markdown(" | ".join(["kind", *heads, "MB of state at 512", "8,192"]), rows)


def profile() -> str:
    """Shares of the time of a call by kind of work, and how fast its matrix products run."""
    found, rows = _bench("profile"), []
    ceiling = found.pop("gemm_flops")
    for name, sides in found.items():
        for whose, seconds in sides.items():
            flops = seconds.pop("product_flops")
            total = sum(seconds.values())
            shares = [f"{part / total:.0%}" for part in seconds.values()]
            kinds = list(seconds)
            rows.append([f"`{name}`, {whose}", f"{total:.3g} s", *shares, f"{flops / ceiling:.0%}" if flops else ""])
    return markdown(" | ".join(["pair", "time", *kinds, "products alone, of the GEMM ceiling"]), rows)


TABLES = {
    "code": code,
    "notebooks": notebooks,
    "presets": presets,
    "scale": scale,
    "speeds": speeds,
    "bench": bench,
    "context": context,
    "profile": profile,
}


def renewed(text: str) -> str:
    """The page with its tables as they are today."""
    return BLOCK.sub(lambda found: found[1] + TABLES[found[2]]() + found[3], text)


if __name__ == "__main__":
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if renewed(text) != text:
            page.write_text(renewed(text), encoding="utf-8")
            print(f"renewed {page.name}", file=sys.stderr)
