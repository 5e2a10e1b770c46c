"""Schedules against torch's, Muon against torch.optim.Muon matrix by matrix, states that survive, precision."""

import copy
import io
import math
import types
from itertools import pairwise

import pytest
import torch
from helpers import seeded
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import dsl.optim as optim
from dsl.config import ModelConfig
from dsl.model import LanguageModel
from dsl.optim import Muon, Optimizer, decay_start, learning_rate, orthogonalize, precision
from dsl.settings import TrainConfig


@pytest.fixture(autouse=True)
def _seed():
    seeded()


def torch_rates(make, steps, top):
    """What a torch scheduler sets before each optimizer step."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=top)
    scheduler, rates = make(optimizer), []
    for step in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step + 1 < steps:
            scheduler.step()
    return rates


@pytest.mark.parametrize("steps", [2, 3, 4, 7, 10, 100, 1001])
def test_one_cycle_is_torchs(steps):
    train = TrainConfig(max_steps=steps, learning_rate=3e-3, lr_scheduler_type="one_cycle")
    want = torch_rates(lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 3e-3, total_steps=steps), steps, 3e-3)
    assert [learning_rate(train, step) for step in range(steps)] == pytest.approx(want, rel=1e-9)
    assert learning_rate(train, steps + 5) == pytest.approx(want[-1])


def test_one_cycle_rises_for_warmup_steps():
    train = TrainConfig(max_steps=1000, learning_rate=1.0, lr_scheduler_type="one_cycle", warmup_steps=200)
    make = lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1.0, total_steps=1000, pct_start=0.2)  # noqa: E731
    assert [learning_rate(train, step) for step in range(1000)] == pytest.approx(torch_rates(make, 1000, 1.0))


@pytest.mark.parametrize("ratio", [0.0, 0.1])
def test_cosine_is_torchs(ratio):
    train = TrainConfig(max_steps=300, learning_rate=2e-3, lr_scheduler_type="cosine", min_lr_ratio=ratio)
    make = lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 300, eta_min=2e-3 * ratio)  # noqa: E731
    want = torch_rates(make, 300, 2e-3)
    assert [learning_rate(train, step) for step in range(300)] == pytest.approx(want, rel=1e-6, abs=1e-12)
    assert learning_rate(train, 300) == learning_rate(train, 9999) == pytest.approx(2e-3 * ratio)


@pytest.mark.parametrize("kind", ["cosine", "wsd", "constant"])
def test_warm_up_rises_in_equal_steps_to_the_top(kind):
    train = TrainConfig(max_steps=100, warmup_steps=10, learning_rate=0.5, lr_scheduler_type=kind)
    assert [learning_rate(train, step) for step in range(10)] == pytest.approx([0.05 * n for n in range(1, 11)])
    assert learning_rate(train, 10) == 0.5 and learning_rate(train, 50) <= 0.5


def test_wsd_is_flat_then_linear():
    train = TrainConfig(
        max_steps=100, warmup_steps=5, learning_rate=1.0, lr_scheduler_type="wsd", decay_share=0.4, min_lr_ratio=0.1
    )
    assert decay_start(train) == 60
    assert all(learning_rate(train, step) == 1.0 for step in range(5, 61))
    falling = [learning_rate(train, step) for step in range(60, 101)]
    assert [a - b for a, b in pairwise(falling)] == pytest.approx([0.9 / 40] * 40)
    assert falling[-1] == learning_rate(train, 5000) == pytest.approx(0.1)
    flat = TrainConfig(max_steps=100, lr_scheduler_type="wsd", decay_share=0.001)  # of no step
    assert learning_rate(flat, 99) == learning_rate(flat, 5000) == flat.learning_rate


def test_wsd_takes_the_same_steps_before_its_decay_when_it_is_lengthened():
    short = TrainConfig(max_steps=100, lr_scheduler_type="wsd", warmup_steps=7)
    long = TrainConfig(max_steps=1000, lr_scheduler_type="wsd", warmup_steps=7)
    same = [learning_rate(short, step) == learning_rate(long, step) for step in range(100)]
    assert all(same[: decay_start(short)]) and not any(same[decay_start(short) + 1 :])
    assert decay_start(TrainConfig(lr_scheduler_type="cosine")) is None


def relative(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


@pytest.mark.parametrize("shape", [(64, 96), (96, 64), (48, 48), (8, 32)])
def test_newton_schulz_is_torchs(shape):
    x = torch.randn(3, *shape)
    constants = (3.4445, -4.7750, 2.0315)
    want = torch.stack([torch.optim._muon._zeropower_via_newtonschulz(one, constants, 5, 1e-7) for one in x])
    assert relative(orthogonalize(x), want) < 4e-2  # torch computes in bf16


@pytest.mark.parametrize("rank", [48, 3])
def test_newton_schulz_of_a_long_matrix_is_the_same_polynomial_of_its_singular_values(rank):
    x = torch.randn(2, 48, rank) @ torch.randn(2, rank, 96)  # long: computed on the short side
    u, values, vh = torch.linalg.svd(x.double(), full_matrices=False)
    values = values / values.norm(dim=-1, keepdim=True)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    assert relative(orthogonalize(x), u @ values.diag_embed() @ vh) < 1e-3
    assert relative(orthogonalize(x.mT), (u @ values.diag_embed() @ vh).mT) < 1e-3


@pytest.mark.parametrize("shape", [(128, 256), (256, 128)])
def test_singular_values_of_a_wide_matrix(shape):
    values = torch.linalg.svdvals(orthogonalize(torch.randn(4, *shape)))
    print("singular values", values.min().item(), values.max().item())
    assert values.min() > 0.65 and values.max() < 1.16  # [.68, 1.13] measured


def test_a_tall_matrix_costs_what_a_wide_one_does():
    counts = []
    for shape in [(2, 16, 64), (2, 64, 16)]:
        with FlopCounterMode(display=False) as counter:
            orthogonalize(torch.randn(shape))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_newton_schulz_keeps_fp64_and_survives_zeros():
    x = torch.randn(2, 8, 12, dtype=torch.float64)
    x[1] = 0
    y = orthogonalize(x)
    assert y.dtype == torch.float64 and torch.equal(y[1], x[1]) and y[0].isfinite().all()


def test_muon_moves_each_expert_as_torchs(monkeypatch):
    """Same momentum, decay, scale and direction; torch's bf16 is switched to fp32 for the comparison."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)
    monkeypatch.setitem(optim.CHUNK, "cpu", 3 * 24 * 32)  # three matrices at a time, so that chunks end inside a stack
    stack, wide, tall = torch.randn(4, 48, 32), torch.randn(24, 80), torch.randn(64, 32)
    ours = [nn.Parameter(x.clone()) for x in (stack, wide, tall)]
    rows = [[24, 24], [24], [40, 24]]
    parts = [[*expert.split(24)] for expert in stack] + [[wide], [*tall.split([40, 24])]]
    theirs = [nn.Parameter(x.clone()) for group in parts for x in group]
    muon = Muon(ours, rows, 0.02, 0.1, 0.9)
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.9, adjust_lr_fn="original")
    for _ in range(4):
        grads = [torch.randn_like(x) for x in ours]
        for weight, grad in zip(ours, grads, strict=True):
            weight.grad = grad
        split = [one for expert in grads[0] for one in expert.split(24)] + [grads[1], *grads[2].split([40, 24])]
        for weight, grad in zip(theirs, split, strict=True):
            weight.grad = grad.clone()
        muon.step()
        reference.step()
    got = [one for expert in ours[0] for one in expert.split(24)] + [ours[1], *ours[2].split([40, 24])]
    assert len(got) == len(theirs) == 11
    for one, want in zip(got, theirs, strict=True):
        assert relative(one, want) < 1e-5


def test_muon_leaves_alone_what_has_no_gradient():
    weight = nn.Parameter(torch.randn(4, 6))
    before = weight.detach().clone()
    Muon([weight], [[4]], 0.1, 0.1, 0.9).step()
    assert torch.equal(weight, before)


def tiny(**changes):
    return LanguageModel(
        ModelConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            layer_types=("linear_attention", "full_attention"),
            linear_attention_kind="delta",
            moe_layers=(1, 2),
            num_experts=4,
            **changes,
        )
    )


def teach(model, optimizer, steps, batches):
    for step in range(steps):
        tokens = batches[step]
        hidden, _, stats = model(tokens[:, :-1])
        (model.loss(hidden, tokens[:, 1:]) + sum(layer.aux_loss for layer in stats)).backward()
        optimizer.step()
        optimizer.zero_grad()


def kinds(model, optimizer):
    names = {weight: name for name, weight in model.named_parameters()}
    return {
        kind: {names[w]: group["weight_decay"] for group in one.param_groups for w in group["params"]}
        for kind, one in optimizer.kinds.items()
    }


def test_who_moves_what():
    model = tiny(tie_word_embeddings=False)
    moved = kinds(model, Optimizer(model, TrainConfig(optimizer="muon", weight_decay=0.3)))
    assert sorted([*moved["adamw"], *moved["muon"]]) == sorted(name for name, _ in model.named_parameters())
    assert set(moved["muon"].values()) == {0.3}
    endings = {name.split(".", 2)[-1] for name in moved["muon"]}
    assert endings == {
        "mixer.qkv_proj.weight", "mixer.ba_proj.weight", "mixer.g_proj.weight", "mixer.o_proj.weight",
        "mixer.q_proj.weight", "mixer.k_proj.weight", "mixer.v_proj.weight",
        "mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate_up_proj.weight", "mlp.down_proj.weight",
    }  # fmt: skip
    decayed = {name for name, decay in moved["adamw"].items() if decay}
    assert decayed == {"embed_tokens.weight", "lm_head.weight", *(f"layers.{i}.mlp.router.weight" for i in (1, 2))}
    moved = kinds(model, Optimizer(model, TrainConfig(optimizer="adamw", weight_decay=0.3)))
    still = {name for name, decay in moved["adamw"].items() if not decay}
    assert still == {n for n, w in model.named_parameters() if w.ndim == 1 or "conv" in n}


def test_fused_projections_are_orthogonalized_one_by_one():
    model = tiny()
    optimizer = Optimizer(model, TrainConfig(optimizer="muon"))
    rows = {name: optimizer.kinds["muon"].rows[weight] for name, weight in model.named_parameters()
            if weight in optimizer.kinds["muon"].rows}  # fmt: skip
    assert rows["layers.0.mixer.qkv_proj.weight"] == [32, 16, 16]
    assert rows["layers.0.mlp.gate_up_proj.weight"] == rows["layers.1.mlp.experts.gate_up_proj"] == [48, 48]
    assert rows["layers.1.mlp.experts.down_proj"] == rows["layers.1.mixer.q_proj.weight"] == [32]


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_saved_state_goes_on_bit_for_bit_whatever_the_order(kind):
    train, batches = TrainConfig(optimizer=kind, learning_rate=3e-3), torch.randint(0, 64, (8, 2, 17))
    model = tiny()
    optimizer = Optimizer(model, train)
    teach(model, optimizer, 4, batches)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    second = copy.deepcopy(model)
    turned = types.SimpleNamespace(
        named_parameters=lambda: reversed(list(second.named_parameters())), get_submodule=second.get_submodule
    )
    again = Optimizer(turned, train)
    again.load_state_dict(state)
    teach(model, optimizer, 4, batches[4:])
    teach(second, again, 4, batches[4:])
    for (name, one), (_, other) in zip(model.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(one, other), name
    first, last = optimizer.state_dict(), again.state_dict()
    assert first.keys() == last.keys() == ({"adamw", "muon"} if kind == "muon" else {"adamw"})
    for group in first:
        assert first[group].keys() == last[group].keys() and first[group]
        for name, moments in first[group].items():
            assert all(torch.equal(value, last[group][name][key]) for key, value in moments.items())
    loaded = state["adamw"]["norm.weight"]["exp_avg"]
    assert not torch.equal(loaded, last["adamw"]["norm.weight"]["exp_avg"]), "loading must copy"


def test_a_state_of_something_else_is_refused_by_name():
    model = tiny()
    batches = torch.randint(0, 64, (1, 2, 9))
    muon = Optimizer(model, TrainConfig(optimizer="muon"))
    muon.load_state_dict({})  # nothing saved yet
    teach(model, muon, 1, batches)
    with pytest.raises(ValueError, match=r"moves layers\.0\.mixer\.ba_proj\.weight by muon, this one does not"):
        Optimizer(model, TrainConfig()).load_state_dict(muon.state_dict())
    state = muon.state_dict()
    state["adamw"]["norm.weight"]["exp_avg"] = torch.zeros(16)
    with pytest.raises(ValueError, match=r"moments of norm\.weight must have shape \[32\], got \[16\]"):
        muon.load_state_dict(state)


def test_rates_follow_the_schedule_in_proportion():
    optimizer = Optimizer(tiny(), TrainConfig(optimizer="muon", learning_rate=4e-3, muon_learning_rate=0.02))
    optimizer.set_lr(1e-3)
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == [1e-3, 1e-3, 0.005]


def test_adamw_is_torchs_with_the_betas_of_the_settings():
    weight = nn.Linear(5, 5)
    other = copy.deepcopy(weight)
    train = TrainConfig(adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-3, weight_decay=0.2, learning_rate=0.1)
    ours = Optimizer(weight, train)
    groups = [{"params": [other.weight], "weight_decay": 0.2}, {"params": [other.bias], "weight_decay": 0.0}]
    theirs = torch.optim.AdamW(groups, lr=0.1, betas=(0.8, 0.9), eps=1e-3)
    for _ in range(3):
        x = torch.randn(7, 5)
        for module, one in ((weight, ours), (other, theirs)):
            one.zero_grad()
            module(x).square().mean().backward()
            one.step()
    torch.testing.assert_close(weight.weight, other.weight)
    torch.testing.assert_close(weight.bias, other.bias)


def machine(monkeypatch, cuda=False, bf16=False, mps=False):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    def supported(including_emulation=True):
        return including_emulation or bf16

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)


@pytest.mark.parametrize(
    ("have", "name", "device"),
    [
        ({}, "fp32", "cpu"),
        ({"mps": True}, "fp32", "mps"),
        ({"cuda": True, "bf16": True}, "bf16", "cuda"),
        ({"cuda": True}, "fp16", "cuda"),
    ],
)
def test_auto_takes_what_the_device_does_well(monkeypatch, have, name, device):
    machine(monkeypatch, **have)
    chosen = precision()
    assert (chosen.name, chosen.device.type) == (name, device) and chosen.reason.startswith(f"{name} on {device}: ")
    assert chosen.scaler.is_enabled() == (name == "fp16")
    assert precision("auto", "cpu").name == "fp32"


@pytest.mark.parametrize(("have", "name"), [({"cuda": True}, "bf16"), ({"mps": True}, "fp16"), ({"mps": True}, "bf16")])
def test_a_precision_asked_for_by_name_is_had_or_refused(monkeypatch, have, name):
    machine(monkeypatch, **have)
    with pytest.raises(ValueError, match=f"precision must be .* got '{name}'"):
        precision(name)
    with pytest.raises(ValueError, match=r"precision must be .* got 'fp8'"):
        precision("fp8", "cpu")
    with pytest.raises(ValueError, match="device must be one that torch finds here, got 'xpu'"):
        precision(name, "xpu")


@pytest.mark.parametrize(("name", "dtype"), [("fp32", None), ("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_autocast_on_a_cpu(name, dtype):
    chosen = precision(name, "cpu")
    with chosen.autocast():
        y = torch.randn(4, 4) @ torch.randn(4, 4)
    assert y.dtype == (dtype or torch.float32) and chosen.reason == f"{name} on cpu: as asked"


def test_a_scale_is_restored_or_its_absence_said():
    scaled, plain = precision("fp16", "cpu"), precision("fp32", "cpu")
    state = {**scaled.scaler.state_dict(), "scale": 256.0, "_growth_tracker": 7}
    assert scaled.load_scaler(state) is None and scaled.scaler.state_dict() == state
    assert plain.load_scaler(plain.scaler.state_dict()) is None
    assert plain.load_scaler(state) == "the saved loss scale 256 is not used in fp32"
    fresh = precision("fp16", "cpu")
    assert fresh.load_scaler(plain.scaler.state_dict()) == "no loss scale was saved: fp16 starts at 65536"


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_a_step_that_overflows_in_fp16_is_skipped_whole(kind):
    chosen, model, tokens = precision("fp16", "cpu"), tiny(), torch.randint(0, 64, (2, 9))
    optimizer = Optimizer(model, TrainConfig(optimizer=kind))
    chosen.load_scaler({**chosen.scaler.state_dict(), "scale": 128.0})  # low: the other steps do not overflow

    def step(factor):
        with chosen.autocast():
            hidden, _, _ = model(tokens[:, :-1])
            loss = model.loss(hidden, tokens[:, 1:]) * factor
        chosen.scaler.scale(loss).backward()
        chosen.scaler.unscale_(optimizer)
        chosen.scaler.step(optimizer)
        chosen.scaler.update()
        optimizer.zero_grad()

    step(1.0)
    weights = copy.deepcopy(model.state_dict())
    state = copy.deepcopy(optimizer.state_dict())
    step(math.inf)
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    for group, moments in optimizer.state_dict().items():
        for name, one in moments.items():
            assert all(torch.equal(state[group][name][key], value) for key, value in one.items())
    assert chosen.scaler.get_scale() == 64
    step(1.0)
    assert not torch.equal(weights["norm.weight"], model.state_dict()["norm.weight"])
