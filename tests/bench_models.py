"""The bench of whole models: training steps, peak memory, the first step after a restart, decoding against context.

Ours is the `linear_moe` preset; the peers are transformers' models of its widths, depth, vocabulary and active size,
with the fastest of their own implementations. `python tests/bench_models.py NAME` takes a step of 16 x 512 tokens of
one of them and prints the peak memory of its process.
"""

import functools
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable

import torch
from bench_parts import pair

COMMON = {
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 50257,
    "max_position_embeddings": 2**17 + 512,
    "tie_word_embeddings": True,
}


def peer_model(name: str):
    """A transformers model: 2 x 1,024 inner units are active in each layer of all of them."""
    import transformers

    shared = {"num_experts_per_tok": 1, "moe_intermediate_size": 1024}  # one routed beside one shared, where it has one
    deepseek = {"n_routed_experts": 8, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0}
    latent = {"kv_lora_rank": 64, "q_lora_rank": None, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64}
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 6, "head_dim": 64}
    widths = {"linear_key_head_dim": 64, "linear_value_head_dim": 64, "shared_expert_intermediate_size": 1024}
    family, sizes = {
        "mixtral": ("Mixtral", {"intermediate_size": 1024, "num_local_experts": 8, "num_experts_per_tok": 2}),
        "deepseek": (
            "DeepseekV3",
            {**shared, **deepseek, **latent, "num_key_value_heads": 6, "intermediate_size": 2048},
        ),
        "qwen3-next": ("Qwen3Next", {**shared, **linear, **widths, "num_experts": 8}),
        "llama": ("Llama", {"intermediate_size": 2048}),
    }[name]
    config = getattr(transformers, family + "Config")(**{**COMMON, **sizes})
    if name != "llama":
        config._experts_implementation = "grouped_mm"  # the fastest of theirs on a CPU
    return getattr(transformers, family + "ForCausalLM")(config)


def stepper(name: str, rows: int) -> Callable[[], None]:
    """A training step of `rows` x 512 tokens with clipping and AdamW: ours, or a peer's by name."""
    tokens = torch.randint(50257, (rows, 513))
    if name == "ours":
        from dsl import settings
        from dsl.model import LanguageModel

        model = LanguageModel(settings.preset("linear_moe").model).train()

        def loss():
            return model.loss(model(tokens[:, :-1])[0], tokens[:, 1:])
    else:
        model = peer_model(name).train()

        def loss():
            return model(input_ids=tokens[:, :-1], labels=tokens[:, :-1], use_cache=False).loss

    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)

    def work():
        loss().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return work


@pair("train-mixtral", "a training step of transformers' Mixtral", 1.3, beside="mixtral")
@pair("train-deepseek", "a training step of transformers' DeepseekV3", 1.0, beside="deepseek")
@pair("train-qwen3-next", "a training step of transformers' Qwen3-Next", 1.0, beside="qwen3-next")
@pair("train-llama", "a training step of transformers' Llama, dense", 0.9, beside="llama")
def training_step(beside: str):
    """2 x 512 tokens, optimizer included."""
    from dsl import evaluation, settings

    flops = evaluation.cost(settings.preset("linear_moe").model).training_flops * 1024
    return stepper("ours", 2), stepper(beside, 2), {"tokens": 1024, "flops": flops}


def _child(*command: str, home: str | None = None) -> str:
    """What it printed, at one thread; with runs under `home`. Raises RuntimeError with what it complained of."""
    from dsl import settings

    env = {**os.environ, "OMP_NUM_THREADS": "1", "DSL_CACHE": str(settings.cache_dir())}
    done = subprocess.run(
        [sys.executable, *command], env=env | ({"DSL_HOME": home} if home else {}), capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return done.stdout


@pair("memory-mixtral", "Mixtral's peak, a step of 16 x 512", 1 / 0.6, unit="bytes", rounds=1, beside="mixtral")
@pair("memory-deepseek", "DeepseekV3's peak, a step of 16 x 512", 1.0, unit="bytes", rounds=1, beside="deepseek")
@pair("memory-qwen3-next", "Qwen3-Next's peak, a step of 16 x 512", 1.0, unit="bytes", rounds=1, beside="qwen3-next")
@pair("memory-llama", "the peak of Llama, dense, a step of 16 x 512", 1.0, unit="bytes", rounds=1, beside="llama")
def memory(beside: str):
    """The peak of a process that takes two steps of 16 x 512 tokens: weights, moments, activations and logits."""
    return tuple(functools.partial(_peak, name) for name in ("ours", beside))


@functools.cache
def _peak(name: str) -> float:
    return float(_child(__file__, name))


PEER_START = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).train()
optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
optimizer.load_state_dict(torch.load(sys.argv[1] + "/optimizer.pt", weights_only=True))
tokens = torch.randint(4096, (8, 256))
model(input_ids=tokens, labels=tokens).loss.backward()
optimizer.step()
"""


@pair("first-step", "a script that loads a Llama and takes a step", 0.67, rounds=3)
def first_step():
    """From a new process to the first new step of a quickstart that had stopped: `dsl train`, which also verifies the
    checkpoint, opens corpus and logs, and saves; the peer has random tokens and saves nothing.
    """
    import transformers

    folder = tempfile.TemporaryDirectory(prefix="bench")
    sizes = {**COMMON, "hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 4096}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, intermediate_size=344))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    model(input_ids=torch.zeros(1, 8).long(), labels=torch.zeros(1, 8).long()).loss.backward()
    optimizer.step()
    model.save_pretrained(folder.name + "/peer")
    torch.save(optimizer.state_dict(), folder.name + "/peer/optimizer.pt")
    steps = iter(range(1, 100))

    def spent(*command: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        _child(*command, home=folder.name)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    def ours() -> float:
        return spent("-m", "dsl", "train", "quickstart", "--run-name", "bench", "--stop-at-step", str(next(steps)))

    ours()  # the run that stopped
    return ours, lambda: spent("-c", PEER_START, folder.name + "/peer")


LENGTHS = [512, 8192, 65536, 131072]
READ = 512  # tokens read on top of a context, to see what one of them costs there


def _filled(model, length: int):
    """States of random numbers, as `length` tokens would leave them."""
    from dsl import attention

    states, x = [], torch.randn(1, 4, model.config.hidden_size)
    for block in model.layers:
        _, state = block.mixer(x, None, torch.arange(4)[None], None)
        for name, value in state.tensors().items():
            if isinstance(state, attention.SoftmaxState | attention.LatentState):
                setattr(state, name, torch.randn(1, length, *value.shape[2:]))
        state.length = length
        states.append(state)
    return states


def reader(kind: str, length: int):
    """(makes a state of `length` tokens, reads more tokens after it, the state's bytes) of our mixers or of Mixtral."""
    tokens = torch.randint(50257, (1, READ))
    if kind == "mixtral":
        from transformers import DynamicCache

        model = peer_model("mixtral").eval()

        def filled():
            cache, kv = DynamicCache(config=model.config), torch.randn(2, 1, 2, length, 64)
            for layer in range(12):
                cache.update(kv[0], kv[1], layer)
            return cache

        def read(count: int, cache) -> None:
            model(input_ids=tokens[:, :count], past_key_values=cache, use_cache=True, logits_to_keep=1)

        return filled, read, 2 * 12 * length * 2 * 64 * 4

    from dsl import settings
    from dsl.model import LanguageModel

    run = settings.preset("linear_moe", mixer=kind, max_position_embeddings=COMMON["max_position_embeddings"])
    model = LanguageModel(run.model).eval()
    states = _filled(model, length)

    def read(count: int, states) -> None:
        model.logits(model(tokens[:, :count], states)[0][:, -1:])

    return lambda: states, read, sum(state.num_bytes for state in states)


@torch.no_grad()
def context(once) -> dict[str, dict]:
    """CPU-seconds of a decoded token and of one of READ more read at once, and bytes, by kind and context."""
    table: dict[str, dict] = {}
    for kind in ("elu", "delta", "softmax", "latent", "mixtral"):
        for length in LENGTHS[:2] if kind == "mixtral" else LENGTHS:
            torch.manual_seed(0)
            filled, read, state_bytes = reader(kind, length)
            times = {1: [], READ: []}
            for count, rounds in ((1, 12), (READ, 2)):
                for _ in range(rounds):
                    state = filled()  # a peer's cache grows
                    times[count].append(once(lambda: read(count, state)))  # noqa: B023
            row = {"decode_seconds": min(times[1]), "prefill_seconds": min(times[READ]) / READ}
            table.setdefault(kind, {})[str(length)] = {**row, "state_bytes": state_bytes}
    return table


@pair("decode-elu", "itself at 512 tokens of context, at 65,536, five tokens", 0.95, kinds=("elu", "elu"))
@pair("decode-delta", "the delta rule at 512 tokens of context, at 65,536, five tokens", 0.95, kinds=("delta", "delta"))
@pair("decode-mixtral", "Mixtral, at 8,192 tokens of context, five tokens", 1.3, kinds=("elu", "mixtral"))
def decode(kinds: tuple[str, str]):
    """One new token, weights and states of the `linear_moe` sizes, batch 1."""
    lengths = (8192, 8192) if "mixtral" in kinds else (65536, 512)

    def work(kind: str, length: int):
        torch.manual_seed(0)
        filled, read, _ = reader(kind, length)
        state = filled()

        @torch.no_grad()
        def decoded():
            for _ in range(5):  # a peer's cache grows by them, of 8,192
                read(1, state)

        return decoded

    return *(work(kind, length) for kind, length in zip(kinds, lengths, strict=True)), {"tokens": 5}


if __name__ == "__main__":
    step = stepper(sys.argv[1], 16)
    step()
    step()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
