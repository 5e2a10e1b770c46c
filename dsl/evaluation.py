"""What a model can do and what it costs: bits per byte, routing load, recall tasks, cost counters.

Knows models and tensors; nothing of corpora, runs on disk or how a model was trained.

Shape letters: N rows, B batch, T time, P pairs, L MoE layers, E experts, D hidden size, H query heads, G key-value
heads, K width of a head after the feature map, V width of a value, C chunk size.
"""

import functools
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dsl import moe, ops, optim
from dsl.attention import MIXERS
from dsl.config import ModelConfig
from dsl.model import LanguageModel

IGNORE = -100  # the label of a position that is not scored


@contextmanager
def _reading(model: nn.Module) -> Iterator[LanguageModel]:
    """The plain core of a model or of its Hugging Face shell, in eval mode and without gradients."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield getattr(model, "model", model)
    finally:
        model.train(training)


def bits_per_byte(model: nn.Module, rows: Tensor, n_bytes: int) -> float:
    """Bits per byte of text: the summed loss of rows [N, T + 1] of token ids (or IGNORE) over their bytes."""
    nats = 0.0
    with _reading(model) as core:
        for some in rows.split(8):
            tokens, labels = (t.to(core.embed_tokens.weight.device) for t in (some[:, :-1].clamp(min=0), some[:, 1:]))
            nats += core.loss(core(tokens)[0], labels).item() * int((labels != IGNORE).sum())
    return nats / math.log(2) / n_bytes


@dataclass(frozen=True)
class Load:
    """How L layers of E experts share the work: `share` [L, E] sums to one per layer, the rest are [L].

    `maxvio` = max share * E - 1 (2408.15664); `dead` counts experts that got nothing; `entropy` (nats) is that of the
    router's mean scores and `dropped` the share of assignments without room, both None where only counts are known.
    """

    share: Tensor
    maxvio: Tensor
    dead: Tensor
    entropy: Tensor | None = None
    dropped: Tensor | None = None


def load(counts: Tensor, entropy: Tensor | None = None, dropped: Tensor | None = None) -> Load:
    """`Load` from assignments per layer and expert, counts [L, E]; a layer without tokens has shares of zero."""
    share = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    return Load(share, share.amax(-1) * counts.shape[-1] - 1, (counts == 0).sum(-1), entropy, dropped)


def routing_load(model: nn.Module, rows: Tensor) -> Load:
    """The `Load` over token ids rows [N, T], in eval mode (dropless), on the CPU; ValueError for a dense model."""
    counts = 0.0
    with _reading(model) as core:
        if not core.moe_blocks:
            raise ValueError("model must have layers with experts, got one with moe_layers=()")
        for some in rows.split(8):
            stats = core(some.to(core.embed_tokens.weight.device))[2]
            counts = counts + torch.stack([s.counts for s in stats]).cpu().double()  # MPS has no float64
    return load(counts)


def known_words(texts: Iterable[str], known: Iterable[str], least: int = 4) -> float:
    """Share of the words of `least` letters or more in `texts` that also stand in `known`; 1 where there are none."""
    word = re.compile(rf"[^\W\d_]{{{least},}}")
    vocabulary = {w.lower() for text in known for w in word.findall(text)}
    found = [w.lower() in vocabulary for text in texts for w in word.findall(text)]
    return sum(found) / len(found) if found else 1.0


def copies(text: str, source: str, length: int = 50) -> list[str]:
    """The spans of `length` characters of `text` that stand in `source` to the letter."""
    half = length // 2  # a copied span holds a whole aligned half: few of them have to be looked for
    hits = {i for i in range(0, len(text) - half + 1, half) if text[i : i + half] in source}
    starts = (s for s in range(len(text) - length + 1) if -(-s // half) * half in hits)
    return [text[s : s + length] for s in starts if text[s : s + length] in source]


def mqar(batch: int, length: int, pairs: int, vocab_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Multi-query associative recall: tokens and labels [B, T], the label standing at the second sight of a key.

    Keys from [1, V/2) and values from [V/2, V) stand in pairs, then each key once more at an even slot whose gap
    follows p(g) ~ g^-0.99; the rest is random. Source: Zoology (2312.04927), appendix on MQAR.
    """
    half, slots = vocab_size // 2, length // 2 - pairs
    if slots < pairs or half - 1 < pairs:
        rule = f"at most length // 4 and vocab_size // 2 - 1 at length={length} and vocab_size={vocab_size}"
        raise ValueError(f"pairs must be {rule}, got {pairs}")

    def draw(weights: Tensor) -> Tensor:
        return torch.multinomial(weights.expand(batch, -1), pairs, generator=generator)

    keys, values = draw(torch.ones(half - 1)) + 1, draw(torch.ones(vocab_size - half)) + half
    tokens = torch.randint(vocab_size, (batch, length), generator=generator)
    tokens[:, : 2 * pairs] = torch.stack([keys, values], -1).flatten(1)
    places = 2 * pairs + 2 * draw(torch.arange(1, slots + 1).double() ** -0.99)
    labels = torch.full_like(tokens, IGNORE)
    return tokens.scatter(1, places, keys), labels.scatter(1, places, values)


def associative_recall(batch: int, keys: int, generator: torch.Generator, *, replacement: bool = False, pairs=None):
    """Key-value pairs and what each key is last bound to: (keys [B, P], values [B, P], answers [B, number of keys]).

    Without replacement (setting 1) P = `keys`, each key and value once; with it (setting 2) P = 2 `keys` unless given,
    and the last value wins; an answer is -1 where its key never came. Source: Schlag et al. 2021 (2102.11174), 6.1.
    """
    P = pairs or (2 * keys if replacement else keys)
    if not replacement and keys < P:
        raise ValueError(f"pairs must be at most keys={keys} without replacement, got {P}")
    weights = torch.ones(batch, keys)
    k, v = (torch.multinomial(weights, P, replacement, generator=generator) for _ in range(2))
    last = torch.full((batch, keys), -1).scatter_reduce(1, k, torch.arange(P).expand(batch, P), "amax")
    return k, v, v.gather(1, last.clamp(min=0)).where(last >= 0, -1)


@dataclass(frozen=True)
class Cost:
    """What a model needs: FLOPs (two per multiply-add) are per token but for the optimizer's, memory is in bytes.

    `optimizer_flops` are those of one step's Newton-Schulz (Keller Jordan 2024, Muon) as it is published: of a matrix
    a x b, a <= b, five times 4 a^2 b + 2 a^3. AdamW's are not counted: a few per number.
    """

    parameters: int
    active_parameters: int  # those that one token meets
    forward_flops: float
    state_bytes_fixed: int  # of one sequence
    state_bytes_per_token: int
    weight_bytes: int
    optimizer_bytes: int
    optimizer_flops: int  # a step, however many tokens it has
    activation_bytes: int  # kept for the backward pass of one micro-batch

    @property
    def training_flops(self) -> float:
        """Forward and backward: the gradients of inputs and of weights cost as much again each."""
        return 3 * self.forward_flops

    @property
    def training_bytes(self) -> int:
        """Weights, gradients, moments and activations."""
        return 2 * self.weight_bytes + self.optimizer_bytes + self.activation_bytes

    def state_bytes(self, context: int) -> int:
        """What one sequence keeps in memory after `context` tokens."""
        return self.state_bytes_fixed + context * self.state_bytes_per_token

    def __str__(self) -> str:
        sizes = {"weights": self.weight_bytes, "gradients": self.weight_bytes}
        sizes |= {"optimizer": self.optimizer_bytes, "activations": self.activation_bytes}
        parts = ", ".join(f"{name} {size / 1e6:,.0f}" for name, size in sizes.items())
        return (
            f"{self.parameters / 1e6:.1f} M parameters, {self.active_parameters / 1e6:.1f} M active for a token; "
            f"{self.training_flops / 1e6:,.0f} MFLOPs a token in training; "
            f"memory about {self.training_bytes / 1e6:,.0f} MB ({parts})"
        )


def cost(config: ModelConfig, context: int | None = None, *, rows: int = 1, optimizer: str = "adamw") -> Cost:
    """What a model of this config costs at `context` tokens (default: the training window), `rows` at a time.

    Counted on the real modules without their memory: parameters are theirs, state bytes (fp32) their states'. FLOPs
    are 2 per weight that a token meets, plus what the mixers do between tokens at full length, as the field counts it
    (12 L T D for softmax in training). A registered mixer counts by its weights alone; activations are an estimate,
    within a third at head-wide features.
    """
    kinds, routers = map(config.kind, range(config.num_hidden_layers)), [config.router] if config.moe_layers else []
    classes = (*map(MIXERS.resolve, kinds), *map(moe.ROUTERS.resolve, routers))
    return _cost(config, classes, context or config.max_position_embeddings, rows, optimizer)


@functools.cache
def _cost(c: ModelConfig, classes: tuple[type, ...], T: int, rows: int, optimizer: str) -> Cost:
    """`classes` are what the names of mixers and router stand for now: another may be registered later."""
    with FakeTensorMode():
        model = LanguageModel(c)
        x, positions = torch.empty(1, 2, c.hidden_size), torch.arange(2)[None]
        mixers = [block.mixer for block in model.layers]
        one, two = (sum(m(x[:, :n], None, positions[:, :n], None)[1].num_bytes for m in mixers) for n in (1, 2))
    total = sum(p.numel() for p in model.parameters())
    muon = _newton_schulz_flops(model) if optimizer == "muon" else 0
    matrices, blocks = (sum(p.numel() for p in part.parameters() if p.ndim > 1) for part in (model, model.layers))
    stacks = sum(p.numel() for block in model.moe_blocks for p in block.experts.parameters())
    idle = stacks - stacks * c.num_experts_per_tok // c.num_experts
    looked_up = 0 if c.tie_word_embeddings else model.embed_tokens.weight.numel()
    kinds = [c.kind(layer) for layer in range(c.num_hidden_layers)]
    remade = rows * T * c.num_experts_per_tok >= moe.REMADE_FROM
    routed = (2 * c.moe_intermediate_size + c.hidden_size) * (1 if remade else 2)
    experts = c.num_experts_per_tok * routed + 4 * c.num_shared_experts * c.moe_intermediate_size
    dense = 4 * c.intermediate_size * (c.num_hidden_layers - len(c.moe_layers))
    kept = sum(KEPT.get(kind, 20) * c.hidden_size for kind in kinds) + dense + experts * len(c.moe_layers)
    return Cost(
        parameters=total,
        active_parameters=total - idle,
        forward_flops=2 * (matrices - idle - looked_up) + sum(_mixing_flops(c, kind, T) for kind in kinds),
        state_bytes_fixed=2 * one - two,
        state_bytes_per_token=two - one,
        weight_bytes=4 * total,
        optimizer_bytes=8 * total - (4 * blocks if optimizer == "muon" else 0),
        optimizer_flops=muon,
        activation_bytes=4 * rows * T * kept,
    )


def _newton_schulz_flops(model: LanguageModel) -> int:
    flops = 0
    for name, weight in model.named_parameters():
        for rows in optim.matrix_rows(model, name, weight) if optim.is_matrix(name, weight) else ():
            (a, b), stacked = sorted((rows, weight.shape[-1])), weight.shape[:-2].numel()
            flops += 5 * stacked * (4 * a * a * b + 2 * a**3)
    return flops


# Numbers per hidden unit and token that a mixer and its norms keep for the backward pass: measured.
KEPT = {"softmax": 12, "elu": 17, "delta": 27, "latent": 24}


def _mixing_flops(c: ModelConfig, kind: str, T: int) -> int:
    """FLOPs per token of what a mixer does between tokens, in the form that trains."""
    H, G, V = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    if kind == "softmax":
        return 2 * T * H * 2 * V
    if kind == "latent":
        return 2 * T * H * (c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim)
    if kind == "elu":
        K, V, C = ops.FEATURE_MAPS[c.feature_map](torch.zeros(V)).numel(), V + c.normalize, min(T, 32)
        return 2 * C * H * (K + V) + 2 * (H + G) * K * V
    if kind == "delta":
        K, C = V, min(T, 32)
        return 2 * C * (G * (2 * K + V) + H * (K + V)) + G * C * C + 2 * (H + 2 * G) * K * V
    return 0
