"""The bench of the parts: attention, experts, the loss head, data, checkpoints; and how a pair is registered.

A pair is a function under `@pair` that returns two callables, ours and the peer's, and facts for the table if it
has any: "tokens" of a call, and ours' "flops". A callable that returns a float has measured itself.
"""

import itertools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Pair:
    """Ours and a peer: the ratio peer / ours that is asked of us, and what is measured."""

    build: Callable
    peer: str
    goal: float
    unit: str  # seconds (of CPU) or bytes
    rounds: int | None  # None: many, after a warm-up


PAIRS: dict[str, Pair] = {}


def pair(name: str, peer: str, goal: float, *, unit: str = "seconds", rounds: int | None = None, **arguments):
    """Register `build(**arguments)` under a name."""

    def register(build):
        PAIRS[name] = Pair(lambda: build(**arguments), peer, goal, unit, rounds)
        return build

    return register


def _both_ways(out: Callable[[], torch.Tensor], inputs: list[torch.Tensor]) -> Callable[[], object]:
    gradient = torch.randn_like(out())
    return lambda: torch.autograd.grad(out(), inputs, gradient)


@pair("linear-512", "scaled_dot_product_attention, 512 tokens", 3.0, length=512)
@pair("linear-1024", "scaled_dot_product_attention, 1,024 tokens", 3.5, length=1024)
@pair("linear-8192", "scaled_dot_product_attention, 8,192 tokens", 15.0, length=8192)
def linear(length: int):
    """Normalised chunked ELU+1 against fused causal softmax, forward and backward: B 2, 6 and 2 heads of 64,
    fp32; chunks of 32, as our mixer uses them."""
    from dsl import ops

    q, k, v = (torch.randn(2, length, heads, 64, requires_grad=True) for heads in (6, 2, 2))
    heads_first = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in (q, k, v)]

    def ours():
        return ops.linear_attention(ops.elu_feature_map(q), ops.elu_feature_map(k), v, chunk_size=32)[0]

    def peer():
        return F.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)

    return _both_ways(ours, [q, k, v]), _both_ways(peer, heads_first)


@pair("delta-2048", "transformers' torch_chunk_gated_delta_rule, 2,048 tokens", 2.0, length=2048)
def delta(length: int):
    """The gated chunked delta rule, forward and backward: B 1, 6 heads of 64, fp32; chunks of 32, as our mixer uses
    them, against the peer's own 64 (with 32 it is slower).
    """
    from transformers.models.qwen3_next import modeling_qwen3_next as qwen

    from dsl import ops

    q, k, v = (torch.randn(1, length, 6, 64) for _ in range(3))
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    beta, decay = torch.rand(1, length, 6), -torch.rand(1, length, 6)
    inputs = [x.requires_grad_() for x in (q, k, v, beta, decay)]

    def ours():
        return ops.delta_rule(q * 64**-0.5, k, v, beta, log_decay=decay, chunk_size=32)[0]

    def peer():
        return qwen.torch_chunk_gated_delta_rule(q, k, v, g=decay, beta=beta)[0]

    ours_out, peer_out = ours(), peer()
    error = float(((ours_out - peer_out).abs().max() / peer_out.abs().max()).detach())
    if not error < 1e-4:
        raise ValueError(f"ours and the peer must agree within 1e-4, got a relative error of {error:.1e}")
    return _both_ways(ours, inputs), _both_ways(peer, inputs)


SIZES = {"hidden_size": 384, "num_experts_per_tok": 2}


@pair("moe-dense", "a dense SwiGLU of equal active size", 1 / 1.10, beside="dense")
@pair("moe-mixtral", "transformers' Mixtral block", 1.2, beside="mixtral")
def experts(beside: str):
    """The MoE block, forward and backward: 1,024 tokens, hidden 384, 8 experts top-2 of inner width 1,024, fp32."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    from dsl import moe
    from dsl.config import ModelConfig

    ours = moe.MoE(ModelConfig(**SIZES, num_experts=8, moe_intermediate_size=1024), 0)
    if beside == "dense":
        other = moe.SwiGLU(384, 2 * 1024)
    else:
        config = MixtralConfig(**SIZES, intermediate_size=1024, num_local_experts=8)
        config._experts_implementation = "grouped_mm"  # its fastest here; its loop takes a quarter longer
        other = MixtralSparseMoeBlock(config)
    x = torch.randn(2, 512, 384, requires_grad=True)
    for parameter in (*ours.parameters(), *other.parameters()):
        torch.nn.init.normal_(parameter, std=0.02)

    def first(y):
        return y[0] if isinstance(y, tuple) else y

    def both_ways(block):
        return _both_ways(lambda: first(block(x)), [x, *block.parameters()])

    return both_ways(ours), both_ways(other)


@pair("loss-head", "cross_entropy of all logits, 1,024 tokens of 50,257", 1.0)
def loss_head():
    """Head and loss, forward and backward, hidden 384; the peer holds 206 MB of logits and as much of gradients."""
    from dsl import settings
    from dsl.model import LanguageModel

    model = LanguageModel(settings.preset("linear_moe", num_hidden_layers=1, moe_layers=[]).model)
    hidden, labels = torch.randn(2, 512, 384, requires_grad=True), torch.randint(50257, (2, 512))
    weights = [hidden, model.lm_head.weight]

    def peer():
        logits = model.logits(hidden).flatten(0, 1)
        return torch.autograd.grad(F.cross_entropy(logits, labels.flatten()), weights)

    return lambda: torch.autograd.grad(model.loss(hidden, labels), weights), peer, {"tokens": 1024}


@pair("data", "transformers' tokenizer encoding the same documents, ours cached", 5.0)
def data_loading():
    """A pool of 1,024 shuffled rows of 256 tokens from pydocs; the tokens are on the disk, the peer encodes text."""
    from dsl import data, settings

    run = settings.preset("quickstart")
    corpus = data.open_corpus(run.data)
    tokenizer = data.open_tokenizer(run.data, corpus)
    stream = data.TokenStream(corpus, tokenizer, data=run.data, seed=0, length=256)
    tokens, texts = 1024 * 256, []
    while tokens > 0:
        texts.append(corpus.texts[len(texts)])
        tokens -= len(tokenizer(texts[-1])["input_ids"])
    return lambda: stream.next(1024), lambda: tokenizer(texts), {"tokens": 1024 * 256}


@pair("save", "save_pretrained and torch.save, without sums, sync or rotation", 0.5, reading=False)
@pair("load", "from_pretrained and torch.load, unverified", 0.5, reading=True)
def checkpoints(reading: bool):
    """The quickstart with its moments; ours writes sums and reads them again before it trusts a file."""
    from dsl import checkpoint, data, hub, optim, settings

    run, steps = settings.preset("quickstart"), itertools.count(1)
    tokenizer = data.open_tokenizer(run.data, data.open_corpus(run.data))
    model = hub.DslForCausalLM(hub.DslConfig(**run.model.to_dict()))
    optimizer, tokens = optim.Optimizer(model.model, run.train), torch.randint(4096, (2, 65))
    model.model.loss(model.model(tokens[:, :-1])[0], tokens[:, 1:]).backward()
    optimizer.step()
    folder = tempfile.TemporaryDirectory(prefix="bench")

    def at(who: str) -> Path:
        return Path(folder.name, who)

    def save():
        state = {"bits_per_byte": None}
        parts = {"model": model, "tokenizer": tokenizer, "trainer": state, "optimizer": optimizer.state_dict()}
        checkpoint.save(at("ours"), next(steps), **parts, keep=2)

    def peer_save():
        model.save_pretrained(at("peer"))
        tokenizer.save_pretrained(at("peer"))
        torch.save(optimizer.state_dict(), at("peer") / "optimizer.pt")

    def load():
        place, _ = checkpoint.newest(at("ours"))
        hub.DslForCausalLM.from_pretrained(place)
        checkpoint.read_optimizer(place)

    def peer_load():
        hub.DslForCausalLM.from_pretrained(at("peer"))
        torch.load(at("peer") / "optimizer.pt", weights_only=True)

    save()
    peer_save()
    return (load, peer_load) if reading else (save, peer_save)
