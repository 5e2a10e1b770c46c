"""The whole plain core: what must hold of any stack of mixers and experts."""

import math

import pytest
import torch

from dsl.config import ModelConfig
from dsl.model import LanguageModel

STACKS = {
    "elu": {},
    "elu, no denominator": {"normalize": False},
    "delta": {"linear_attention_kind": "delta"},
    "softmax, one kv head": {"layer_types": ["full_attention"], "num_key_value_heads": 1},
    "softmax, groups": {"layer_types": ["full_attention"]},
    "softmax, full heads": {"layer_types": ["full_attention"], "num_key_value_heads": 6},
    "latent": {"layer_types": ["full_attention"], "full_attention_kind": "latent", "q_lora_rank": 32},
    "delta and latent 3:1": {
        "layer_types": ["linear_attention"] * 3 + ["full_attention"],
        "linear_attention_kind": "delta",
        "full_attention_kind": "latent",
        "num_shared_experts": 1,
        "router_score": "sigmoid",
        "n_group": 4,
        "topk_group": 2,
    },
    "elu and softmax, dense and experts": {"layer_types": ["linear_attention", "full_attention"], "moe_layers": [1, 2]},
}


def build(seed: int = 0, std: float | None = None, **changes) -> LanguageModel:
    """A small model; `std` draws all matrices wider than the initialisation does, so that every part matters."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 211, "hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 6}
    model = LanguageModel(ModelConfig(**{**sizes, **changes}))
    if std:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=std)
            for buffer in model.buffers():
                buffer.normal_(std=0.05)
    return model


def random_tokens(*shape: int) -> torch.Tensor:
    seed = torch.seed() % 2**31
    print(f"seed {seed}")
    return torch.randint(211, shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=STACKS, ids=list(STACKS))
def stack(request):
    return STACKS[request.param]


def test_loss_at_initialisation_is_that_of_a_uniform_guess(stack):
    model, tokens = build(**stack), random_tokens(4, 65)
    hidden, _, _ = model(tokens[:, :-1])
    assert abs(model.loss(hidden, tokens[:, 1:]).item() - math.log(211)) < 0.1


def test_every_parameter_gets_a_gradient(stack):
    model, tokens = build(std=0.1, **stack), random_tokens(2, 33)
    hidden, _, _ = model(tokens[:, :-1])
    model.loss(hidden, tokens[:, 1:]).backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


def test_loss_forms_agree_and_skip_ignored_labels(stack):
    model, tokens = build(std=0.1, **stack).eval(), random_tokens(2, 33)
    hidden, _, _ = model(tokens[:, :-1])
    labels = tokens[:, 1:].clone()
    labels[0, 5:] = -100
    each = model.loss(hidden, labels, reduction="none")
    assert each.shape == labels.shape and (each[0, 5:] == 0).all()
    torch.testing.assert_close(model.loss(hidden, labels), each.sum() / (labels != -100).sum())
    torch.testing.assert_close(model.loss(hidden, labels, reduction="sum"), each.sum())


@torch.no_grad()
def test_cached_equals_uncached(stack):
    """Prefill, single steps and chunks on top of a state give what one call over all tokens gives."""
    model, tokens = build(std=0.15, **stack).double().eval(), random_tokens(2, 70)
    whole = model.logits(model(tokens)[0])
    state, parts = None, []
    for start, end in [(0, 20), (20, 21), (21, 22), (22, 65), (65, 70)]:
        hidden, state, _ = model(tokens[:, start:end], state)
        parts.append(model.logits(hidden))
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5 * whole.abs().max().item(), rtol=1e-5)
    assert {part.length for part in state} == {70}


@torch.no_grad()
def test_left_padding_changes_nothing(stack):
    model, tokens = build(std=0.15, **stack).double().eval(), random_tokens(2, 30)
    whole = model(tokens)[0]
    padded = torch.cat([torch.full((2, 5), 7), tokens], 1)
    keep = torch.arange(35).expand(2, 35) >= 5
    positions = (keep.cumsum(1) - 1).clamp_min(0)
    hidden, state, _ = model(padded[:, :20], None, positions[:, :20], keep[:, :20])
    step, state, _ = model(padded[:, 20:21], state, positions[:, 20:21], keep[:, 20:21])
    rest, _, _ = model(padded[:, 21:], state, positions[:, 21:], keep[:, 21:])
    got = torch.cat([hidden, step, rest], 1)[:, 5:]
    torch.testing.assert_close(got, whole, atol=2e-5 * whole.abs().max().item(), rtol=1e-5)


@torch.no_grad()
def test_prefix_is_independent_of_what_follows(stack):
    """Finite difference and prefix equality: no output before a changed token moves, in training mode and in eval."""
    model = build(std=0.15, capacity_factor=1.0, **stack).double()
    tokens = random_tokens(3, 40)
    changed = tokens.clone()
    changed[:, 25] = (changed[:, 25] + 1) % 211
    for mode in (model.train(), model.eval()):
        before, after = mode(tokens)[0], mode(changed)[0]
        assert (before[:, :25] - after[:, :25]).abs().max() < 1e-12
        assert (before[:, 25:] - after[:, 25:]).abs().max() > 1e-3
    whole, prefix = model(tokens)[0], model(tokens[:, :25])[0]
    assert (whole[:, :25] - prefix).abs().max() < 1e-12


@torch.no_grad()
def test_order_matters(stack):
    """Swapping two early tokens changes the last output: there is a source of order in every stack."""
    model, tokens = build(std=0.15, **stack).eval(), random_tokens(1, 12)
    tokens[0, 2], tokens[0, 3] = 5, 9
    swapped = tokens.clone()
    swapped[0, 2], swapped[0, 3] = 9, 5
    assert (model(tokens)[0][:, -1] - model(swapped)[0][:, -1]).abs().max() > 1e-4


@torch.no_grad()
def test_rows_of_a_state_are_those_of_the_batch(stack):
    model, tokens = build(std=0.15, **stack).eval(), random_tokens(3, 20)
    _, state, _ = model(tokens[:, :19])
    index = torch.tensor([2, 0])
    picked, _, _ = model(tokens[index, 19:], [part.rows(index) for part in state])
    torch.testing.assert_close(picked, model(tokens)[0][index, 19:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_and_16_bit_weights_stay_finite(stack, dtype):
    model, tokens = build(std=0.05, **stack), random_tokens(2, 33)
    with torch.autocast("cpu", dtype):
        hidden, _, _ = model(tokens[:, :-1])
        loss = model.loss(hidden, tokens[:, 1:])
    loss.backward()
    assert loss.dtype == torch.float32 and all(p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        whole = model.eval()(tokens)[0]
        narrow = model.to(dtype)(tokens)[0]
    assert narrow.dtype == dtype and (narrow.float() - whole).abs().mean() < 0.2 * whole.abs().mean()


def test_one_batch_is_learnt_by_heart():
    torch.manual_seed(0)
    model, tokens = build(layer_types=["linear_attention", "full_attention"], num_hidden_layers=2), random_tokens(4, 33)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(150):
        hidden, _, _ = model(tokens[:, :-1])
        loss = model.loss(hidden, tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 0.05:
            return
    pytest.fail(f"loss is still {loss.item():.3f}")


def test_window_of_softmax_layers_is_a_stated_limit():
    model = build(layer_types=["linear_attention", "full_attention"], max_position_embeddings=16).eval()
    _, state, _ = model(random_tokens(1, 16))
    with pytest.raises(ValueError, match=r"max_position_embeddings=16.*got 17"):
        model(random_tokens(1, 1), state)
    endless = build(max_position_embeddings=16).eval()
    assert endless(random_tokens(1, 40))[0].shape == (1, 40, 48)


def test_state_of_another_model_is_refused():
    _, state, _ = build(num_hidden_layers=2)(random_tokens(1, 4))
    with pytest.raises(ValueError, match="state must have one entry for each of 4 layers, got 2"):
        build()(random_tokens(1, 4), state)
    _, state, _ = build(hidden_size=96)(random_tokens(1, 4))
    with pytest.raises(ValueError, match=r"state must have a window of shape \[B, W - 1, C\]"):
        build()(random_tokens(2, 4), [part.rows(torch.tensor([0, 0])) for part in state])


def test_balancing_touches_only_the_bias_and_only_where_it_is_asked_for():
    model = build()
    counts = torch.rand(len(model.moe_blocks), 8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.update_router_biases(counts)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {f"layers.{i}.mlp.router.e_score_correction_bias" for i in range(4)}
    other = build(balance="aux_loss")
    assert not any("bias" in name for name, _ in other.named_buffers())
    other.update_router_biases(counts)
