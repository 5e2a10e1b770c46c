"""The cost counters: fits on powers that are known, states that were really read, the published cache sizes."""

import math

import pytest
import torch
from helpers import seeded

from dsl import attention, costs
from dsl.config import ModelConfig

LENGTHS = [64, 128, 256, 512, 1024, 2048]


def test_the_exponent_is_fitted_over_the_longer_half():
    """A constant rules the short lengths, as a call's overhead does."""
    for power in (0.0, 1.0, 2.0):
        seconds = [1e-3 if n < 512 else 1e-9 * n**power for n in LENGTHS]
        assert costs.exponent(LENGTHS, seconds) == pytest.approx(power, abs=1e-9)


def test_the_crossover_is_where_two_powers_meet():
    slow, fast = [1e-9 * n**2 for n in LENGTHS], [3e-7 * n for n in LENGTHS]
    assert costs.crossover(LENGTHS, slow, fast) == pytest.approx(300)
    assert costs.crossover(LENGTHS, fast, [t * 2 for t in fast]) == math.inf
    assert costs.crossover(LENGTHS, [t * 2 for t in fast], fast) == 64.0
    unsteady = [2.0, 0.5, 2.0, 0.5, 2.0, 2.0]  # for good only after the last loss
    assert costs.crossover(LENGTHS, unsteady, [1.0] * 6) == pytest.approx(512 * math.sqrt(2))


def test_cache_bytes_are_the_papers():
    """DeepSeek-V2 (2405.04434), table 1: 2 n_g d_h numbers for grouped heads, d_c + d_r for the latent."""
    assert costs.cache_bytes(num_attention_heads=16, num_key_value_heads=4, head_dim=128) == 2 * 2 * 4 * 128
    latent = {"full_attention_kind": "latent", "kv_lora_rank": 512, "qk_rope_head_dim": 64}
    assert costs.cache_bytes(2, 61, **latent) == 70_272
    assert costs.cache_bytes(6 / 8, 60, **latent) == 60 * 576 * 0.75


@pytest.mark.parametrize("kind", attention.MIXERS)
def test_decoding_holds_the_state_that_so_many_tokens_leave(kind, monkeypatch):
    """Read here in one call; the mixer that is timed must have read as many tokens, and just one more."""
    seeded()
    config = ModelConfig(hidden_size=32, num_attention_heads=4, num_key_value_heads=2, kv_lora_rank=12)
    cls, lengths, calls = attention.MIXERS.resolve(kind), (5, 600), []
    monkeypatch.setattr(costs, "cpu_seconds", lambda work: calls.append(work()) or 0.5)
    for n in lengths:
        with torch.no_grad():
            _, want = cls(config)(torch.randn(1, n, 32), None, torch.arange(n)[None], None)
        assert costs.decoding(kind, n, config) == (0.5, want.num_bytes)
    assert [state.length for _, state in calls] == [n + 1 for n in lengths]


def test_training_counts_what_is_kept_for_the_backward_pass(monkeypatch):
    """Of written-out attention at least the T x T weights; of the fused forms a multiple of T."""
    monkeypatch.setattr(costs, "cpu_seconds", lambda work: work() and 0.5)
    kept = {kind: [costs.training(kind, n, heads=2, width=8)[1] for n in (512, 1024)] for kind in costs.FORMS}
    assert kept["written out"][0] >= 4 * 2 * 512**2
    for kind in ("softmax", "elu", "delta"):
        assert 1.9 < kept[kind][1] / kept[kind][0] < 2.1
