"""What an attention memory can hold: the published recall experiments at laptop size.

Associative retrieval of Schlag et al. 2021 (2102.11174, section 6.1; settings 1 and 2), the interference law of
random keys, and multi-query associative recall (MQAR, 2312.04927) on two layers of our mixers. Knows nothing of text,
runs on disk or figures; the tasks come from `evaluation`. Tolerances stand here, fixed before any run.

Shape letters: B batch, P pairs written, Q queries, N keys = number of values, K width after the feature map,
T time, D hidden size, V vocabulary.
"""

import re
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsl import ops
from dsl.attention import MIXERS, RMSNorm, ShortConvolution
from dsl.config import ModelConfig
from dsl.evaluation import IGNORE, associative_recall, mqar

WIDTH = 64  # of keys before the feature map, as in the paper's figures
BREAK_LOSS = 0.02  # a memory is said to fail at the first N where every seed's evaluation loss is above this
BREAK_POINTS = {"elu": (60, 80), "dpfp1": (120, 140)}  # where that must happen
LOSS_TOLERANCE = 0.03  # absolute, between our loss and the authors', for N up to 140
LAW_TOLERANCE = 0.03  # relative, of the interference law from N = 32 on

GRID = {  # the full setting: N by (setting, memory, rule), one run of `retrieval` for each and seed
    (1, "softmax", "sum"): (40, 100, 200),
    (1, "elu", "sum"): (20, 40, 60, 80, 100, 120, 140),
    (1, "dpfp1", "sum"): (80, 100, 120, 140, 160, 200),
    (2, "dpfp1", "sum"): (20, 40, 80),
    (2, "dpfp1", "delta"): (20, 40, 80, 120, 160),
    (2, "elu", "delta"): (40, 60, 80),
}
GATES = {(1, "elu", "sum", 60), (1, "elu", "sum", 80), (1, "dpfp1", "sum", 120), (1, "dpfp1", "sum", 140)}
GATES |= {(2, "dpfp1", "sum", 40), (2, "dpfp1", "delta", 40)}  # where a bound is checked: three seeds
QUICK = [(1, "softmax", "sum", 40), (1, "elu", "sum", 40), (1, "elu", "sum", 80)]
QUICK += [(2, "dpfp1", "sum", 40), (2, "dpfp1", "delta", 40)]
MQAR_GRID = [("softmax", 3e-3), ("delta", 3e-3), ("taylor", 3e-3), ("elu", 3e-3), ("elu", 1e-2)]  # kind and rate


def retrieval_runs(*, full: bool) -> list[dict]:
    """The arguments of `retrieval` for the full setting (GRID, three seeds in GATES) or the quick one (a minute)."""
    grid = [(*kind, keys, 0) for kind, many in GRID.items() for keys in many] if full else [(*run, 0) for run in QUICK]
    grid += [(*run, seed) for seed in (1, 2) for run in sorted(GATES)] if full else []
    return [dict(zip(("setting", "memory", "rule", "keys", "seed"), run, strict=True)) for run in grid]


def mqar_runs(*, full: bool) -> list[dict]:
    """The arguments of `mqar_curve`: all of MQAR_GRID at 4 and 8 pairs with three seeds, or softmax alone."""
    grid = [(*kind, pairs, seed) for seed in range(3) for kind in MQAR_GRID for pairs in (4, 8)]
    runs = [dict(zip(("kind", "lr", "pairs", "seed"), run, strict=True)) for run in grid]
    return runs if full else runs[1:2]


def means(rows: list[dict]) -> dict[tuple, float]:
    """Mean loss over seeds by (setting, memory, rule, keys)."""
    return pd.DataFrame(rows).groupby(["setting", "memory", "rule", "keys"]).loss.mean().to_dict()


def break_point(rows: list[dict], memory: str) -> tuple[float, float]:
    """Between which numbers of keys a memory fails in setting 1: (the last before any seed's loss is above BREAK_LOSS,
    the first where every seed's is); NaN where there is none.
    """
    seeds = pd.DataFrame(rows).query("setting == 1 and rule == 'sum' and memory == @memory").groupby("keys").loss
    held, failed = seeds.max().cummax() <= BREAK_LOSS, seeds.min() > BREAK_LOSS
    return held[held].index.max(), failed[failed].index.min()


def rank_law(keys: int, width: float) -> float:
    """The least loss of any memory with key features of `width` over `keys` one-hot values, all different.

    What all N queries read is Q S with Q [N, width], a matrix of rank `width`; the values asked for have N singular
    values of one, and no matrix of that rank comes nearer than |difference|^2 = N - width (Eckart and Young 1936).
    """
    return max(0.0, (1 - width / keys) / 2)


def distances(rows: list[dict], published: list[dict]) -> dict[tuple, float]:
    """|mean loss over seeds - the authors'| where both have a point of at most 140 keys."""
    ours, theirs = means(rows), means(published)
    return {point: abs(ours[point] - loss) for point, loss in theirs.items() if point in ours and point[3] <= 140}


def capacity(memory: str, width: int = WIDTH) -> float:
    """How many orthogonal keys fit: the width after the feature map "elu", "dpfp1", ...; infinite for "softmax"."""
    return float("inf") if memory == "softmax" else feature_map(memory)(torch.zeros(width)).numel()


def feature_map(memory: str):
    """The feature map of a memory: "elu", "dpfp1", "dpfp2", ..."""
    if memory == "elu":
        return ops.elu_feature_map
    if not (dpfp := re.fullmatch(r"dpfp([1-9]\d*)", memory)):
        raise ValueError(f"memory must be softmax, elu, dpfp1, dpfp2, ..., got {memory!r}")
    return lambda x: ops.dpfp_feature_map(x, int(dpfp[1]))


def sweep(path: Path, runs: list[dict], measure) -> list[dict]:
    """Measure each run that the CSV file does not hold yet, append its row, and return the rows of all `runs`.

    `measure(**run)` gives a dict, the rest of the row; a sweep that was cut off goes on where it stopped.
    """
    rows = table(path) if path.exists() else []
    for run in runs:
        if not any(run.items() <= row.items() for row in rows):
            rows.append(run | measure(**run))
            path.parent.mkdir(parents=True, exist_ok=True)
            pd.DataFrame(rows[-1:]).to_csv(path, mode="a", header=not path.exists(), index=False)
    return [row for row in rows if any(run.items() <= row.items() for run in runs)]


def table(path: Path) -> list[dict]:
    """The rows of a CSV file."""
    return pd.read_csv(path).to_dict("records")


def read(q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None = None) -> Tensor:
    """What queries q [B, Q, K] read after all pairs k [B, P, K], v [B, P, N] were written -> [B, Q, N].

    Without beta the normalised sum rule, with beta [B, P, 1] the delta rule on keys that sum to one: the last row of
    `ops.linear_attention` and of `ops.delta_rule`, without the rows that nobody asks for.
    """
    if beta is None:
        scores = q @ k.mT
        return scores @ v / (scores.sum(-1, keepdim=True) + ops.EPS)
    q, k = (x / (x.sum(-1, keepdim=True) + ops.EPS) for x in (q, k))
    system = ((k * beta) @ k.mT).tril(-1)
    weights = torch.linalg.solve_triangular(system.mT, k @ q.mT, upper=True, unitriangular=True)
    return (weights * beta).mT @ v


class Memory(nn.Module):
    """One attention layer between learned keys and one-hot values, initialised as the authors do."""

    def __init__(self, keys: int, memory: str, rule: str):
        super().__init__()
        self.keys, self.softmax, self.rule = keys, memory == "softmax", rule
        self.feature_map = None if self.softmax else feature_map(memory)
        self.embed = nn.Embedding(keys, int(2 * keys * 1.1))
        self.key = nn.Linear(keys + self.embed.embedding_dim, WIDTH)
        self.query = nn.Linear(self.embed.embedding_dim, WIDTH)
        self.beta = nn.Linear(keys + self.embed.embedding_dim, 1)
        for layer in (self.key, self.query):
            if self.softmax:
                nn.init.xavier_uniform_(layer.weight)
            else:
                nn.init.uniform_(layer.weight, -(WIDTH**-0.5), WIDTH**-0.5)

    def _of_pair(self, layer: nn.Linear, k: Tensor, v: Tensor) -> Tensor:
        """layer([one-hot of v; embedding of k]) by two look-ups: the same numbers, a hundred times cheaper."""
        of_value, of_key = layer.weight.split([self.keys, self.embed.embedding_dim], 1)
        return F.embedding(v, of_value.mT) + F.embedding(k, self.embed.weight @ of_key.mT) + layer.bias

    def forward(self, k: Tensor, v: Tensor, queries: Tensor) -> Tensor:
        """Pairs k, v [B, P] and queries [B, Q], all int64 -> the values read [B, Q, N]."""
        key, query = self._of_pair(self.key, k, v), self.query(self.embed(queries))
        value = F.one_hot(v, self.keys).to(key.dtype)
        if self.softmax:
            return F.scaled_dot_product_attention(query, key, value)
        beta = self._of_pair(self.beta, k, v).sigmoid() if self.rule == "delta" else None
        return read(self.feature_map(query), self.feature_map(key), value, beta)


def _loss(read_values: Tensor, answers: Tensor) -> Tensor:
    """0.5 |y - one-hot|^2 per query, over those that have an answer."""
    known = answers >= 0
    target = F.one_hot(answers.clamp(min=0), read_values.shape[-1])
    return (0.5 * (read_values - target).square().sum(-1))[known].mean()


def retrieval(keys: int, memory: str, rule: str = "sum", *, setting: int = 1, seed: int = 0, max_steps: int = 100_000):
    """Train one `Memory` on retrieval and return {"loss": best evaluation loss, "step": when, "steps": trained}.

    Setting 1 writes each of `keys` keys once; setting 2 writes 2 `keys` pairs with replacement, and the last value of
    a key counts. As the authors: Adam 1e-3, 32 sequences with one query each; every 100 steps an evaluation of all
    keys on 20 sequences of `keys` pairs; the end at a loss of 0.001 or after more than 10 evaluations without progress.
    """
    generator, again = torch.Generator().manual_seed(seed), setting == 2
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Memory(keys, memory, rule)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    best, best_step = float("inf"), 0
    everything = torch.arange(keys).expand(20, -1)
    for step in range(1, max_steps + 1):
        k, v, answers = associative_recall(32, keys, generator, replacement=again)
        query = k.gather(1, torch.randint(k.shape[1], (32, 1), generator=generator))
        optimizer.zero_grad()
        _loss(model(k, v, query), answers.gather(1, query)).backward()
        optimizer.step()
        if step % 100 == 0 or step == max_steps:
            k, v, answers = associative_recall(20, keys, generator, replacement=again, pairs=keys)
            with torch.no_grad():
                loss = _loss(model(k, v, everything), answers).item()
            if loss < best:
                best, best_step = loss, step
            if loss <= 1e-3 or step - best_step > 1000:
                break
    return {"loss": best, "step": best_step, "steps": step}


def interference(keys: int, width: int, *, phi=None, rule: str = "sum", draws: int = 200, seed: int = 0) -> float:
    """Mean |S^T k_i - v_i|^2 over random unit keys and values of `width`, untrained; the sum rule's law is
    (keys - 1) / width. `phi` maps the keys first (then scaled to length one); rule "delta" writes with beta = 1.
    """
    generator = torch.Generator().manual_seed(seed)
    k = torch.randn(draws, keys, width, generator=generator)
    k = F.normalize(k if phi is None else phi(k), dim=-1)
    v = written = F.normalize(torch.randn(draws, keys, width, generator=generator), dim=-1)
    scores = k @ k.mT
    if rule == "delta":
        written = torch.linalg.solve_triangular(scores.tril(-1), v, upper=False, unitriangular=True)
    return float((scores @ written - v).square().sum(-1).mean())


LINEAR, FULL = ("linear_attention",), ("full_attention",)
MQAR = {  # the state of a layer at width 64: softmax grows with time, delta 64 x 64, elu 64 x 65, taylor 273 x 17
    "softmax": {"layer_types": FULL},
    "delta": {"layer_types": LINEAR, "linear_attention_kind": "delta"},
    "taylor": {"layer_types": LINEAR, "feature_map": "taylor", "head_dim": 16},
    "elu": {"layer_types": LINEAR},
}


class RecallModel(nn.Module):
    """Two mixers with a residual stream and no feed-forward part; every mixer has a convolution of width 4 before it
    or in it, since a layer that cannot look one step back fails for that reason and not for lack of memory.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        D, layers = config.hidden_size, range(config.num_hidden_layers)
        self.embed, self.head = nn.Embedding(config.vocab_size, D), nn.Linear(D, config.vocab_size, bias=False)
        self.norms = nn.ModuleList(RMSNorm(D) for _ in range(len(layers) + 1))
        self.mixers = nn.ModuleList(MIXERS.resolve(config.kind(i))(config) for i in layers)
        bare = (kind == "full_attention" for kind in config.layer_types)
        self.convs = nn.ModuleList(ShortConvolution(D, 4) if is_bare else None for is_bare in bare)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, T] -> the normalised stream [B, T, D]; `head` turns a row into logits."""
        x, positions = self.embed(tokens), torch.arange(tokens.shape[1]).expand_as(tokens)
        for norm, conv, mixer in zip(self.norms, self.convs, self.mixers, strict=False):
            y = conv(norm(x), None)[0] if conv else norm(x)
            x = x + mixer(y, None, positions, None)[0]
        return self.norms[-1](x)


def mqar_config(kind: str, length: int = 64, **sizes) -> ModelConfig:
    """Two layers of `kind`, a key of MQAR or a registered linear mixer, for rows of `length` tokens."""
    return ModelConfig(
        **{"vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1, "moe_layers": ()}
        | {"num_key_value_heads": 1, "max_position_embeddings": length}
        | MQAR.get(kind, {"layer_types": LINEAR, "linear_attention_kind": kind})
        | sizes
    )


def mqar_curve(kind: str, pairs: int, *, lr: float, seed: int = 0, steps: int = 800, length: int = 64, **sizes):
    """Train a `RecallModel` of `mqar_config(kind)` and return {"step N": accuracy}.

    AdamW, constant rate, 64 fresh rows a step; accuracy on 512 fixed rows at every eighth of the steps and at the last.
    Training ends at 99.5 %, and that accuracy is then given for the steps not run.
    """
    config = mqar_config(kind, length, **sizes)
    generator, curve, every = torch.Generator().manual_seed(seed), {}, max(1, steps // 8)
    questions, answers = mqar(512, length, pairs, config.vocab_size, torch.Generator().manual_seed(10**6 + seed))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = RecallModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    for step in range(1, steps + 1):
        tokens, labels = mqar(64, length, pairs, config.vocab_size, generator)
        asked = labels != IGNORE  # logits only where there is an answer: ten times cheaper
        optimizer.zero_grad()
        F.cross_entropy(model.head(model(tokens)[asked]), labels[asked]).backward()
        optimizer.step()
        if step % every == 0 or step == steps:
            asked = answers != IGNORE
            with torch.no_grad():
                guess = model.head(model(questions)[asked]).argmax(-1)
            accuracy = float((guess == answers[asked]).double().mean())
            curve[f"step {step}"] = accuracy
            if accuracy >= 0.995:
                break
    return curve | {f"step {n}": accuracy for n in range(step, steps + 1, every)}
