"""Bits per byte, routing load, recall tasks and cost, against arithmetic done here and against the real modules."""

import dataclasses
import math

import pytest
import torch
from helpers import seeded
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from dsl import attention, evaluation, moe, optim
from dsl.config import ModelConfig
from dsl.model import LanguageModel

SMALL = ModelConfig(
    vocab_size=97, hidden_size=48, intermediate_size=80, num_experts=4, num_hidden_layers=3, moe_layers=(1, 2)
)
FULL, PATTERN = ("full_attention",), ("linear_attention", "linear_attention", "full_attention")
KINDS = {
    "elu": {},
    "taylor": {"feature_map": "taylor", "normalize": False},
    "delta": {"linear_attention_kind": "delta"},
    "softmax": {"layer_types": FULL},
    "latent": {"layer_types": FULL, "full_attention_kind": "latent", "q_lora_rank": 24},
    "mixed": {"layer_types": PATTERN, "num_shared_experts": 1, "tie_word_embeddings": False},
}


@pytest.fixture(params=KINDS)
def config(request):
    return dataclasses.replace(SMALL, **KINDS[request.param])


@pytest.fixture
def generator():
    return seeded()


def test_bits_per_byte_is_the_summed_loss_over_bytes(generator):
    model = LanguageModel(SMALL).double().train()
    rows = torch.randint(97, (19, 34))  # in three batches
    rows[-1, 20:] = evaluation.IGNORE
    found = evaluation.bits_per_byte(model, rows, 1000)
    with torch.no_grad():
        logits = model.eval().logits(model(rows[:, :-1].clamp(min=0))[0]).log_softmax(-1)
    scored = rows[:, 1:] != evaluation.IGNORE
    nats = -logits.gather(-1, rows[:, 1:, None].clamp(min=0))[..., 0][scored].sum()
    assert found == pytest.approx(nats.item() / math.log(2) / 1000, rel=1e-9)


def test_measuring_leaves_the_mode_and_the_random_numbers_alone(generator):
    model = LanguageModel(SMALL).train()
    before = torch.get_rng_state()
    evaluation.bits_per_byte(model, torch.randint(97, (2, 9), generator=torch.Generator()), 10)
    assert model.training and torch.equal(torch.get_rng_state(), before)


def test_a_reading_that_fails_leaves_the_mode_alone(generator):
    model = LanguageModel(SMALL).train()
    torch.nn.init.constant_(model.layers[1].mlp.router.weight, torch.inf)
    for read, *more in ((evaluation.bits_per_byte, 10), (evaluation.routing_load,)):
        with pytest.raises(moe.NotFiniteError):
            read(model, torch.randint(97, (2, 9)), *more)
        assert model.training and torch.is_grad_enabled()


def test_load_of_known_counts():
    found = evaluation.load(torch.tensor([[4.0, 4, 4, 4], [8, 0, 8, 0], [0, 0, 0, 0]]))
    assert found.maxvio.tolist() == [0, 1, -1]
    assert found.dead.tolist() == [0, 2, 4]
    assert found.share[1].tolist() == [0.5, 0, 0.5, 0]


def test_routing_load_counts_every_choice_of_every_token(generator):
    model, rows = LanguageModel(SMALL), torch.randint(97, (19, 16))
    found = evaluation.routing_load(model, rows)
    chosen = [stats.experts.flatten() for stats in model.eval()(rows)[2]]
    counts = torch.stack([torch.bincount(experts, minlength=4) for experts in chosen]).double()
    assert torch.allclose(found.share, counts / (19 * 16 * 2), atol=1e-12)


def test_routing_load_of_a_dense_model_is_refused(generator):
    model = LanguageModel(dataclasses.replace(SMALL, moe_layers=()))
    with pytest.raises(ValueError, match=r"model must have layers with experts, got one with moe_layers=\(\)"):
        evaluation.routing_load(model, torch.zeros(1, 4, dtype=torch.int64))


def test_routing_load_needs_no_fp64_of_a_device(generator, monkeypatch):
    """As on MPS, which has none: the counts are made wider on the CPU alone."""

    class There(torch.Tensor):
        def cpu(self):
            return self.as_subclass(torch.Tensor)

        def double(self):
            raise TypeError("Cannot convert a MPS Tensor to float64")

    model, rows = LanguageModel(SMALL), torch.randint(97, (3, 16))
    want, forward = evaluation.routing_load(model, rows), LanguageModel.forward

    def elsewhere(self, tokens):
        *others, stats = forward(self, tokens)
        return *others, [dataclasses.replace(s, counts=s.counts.as_subclass(There)) for s in stats]

    monkeypatch.setattr(LanguageModel, "forward", elsewhere)
    found = evaluation.routing_load(model, rows)
    assert type(found.share) is torch.Tensor and torch.equal(found.share, want.share)


def test_mqar_asks_for_each_key_once_and_labels_its_value(generator):
    tokens, labels = evaluation.mqar(50, 64, 8, 512, generator)
    assert tokens.shape == labels.shape == (50, 64)
    for row, label in zip(tokens.tolist(), labels.tolist(), strict=True):
        values = dict(zip(row[:16:2], row[1:16:2], strict=True))
        assert len(values) == 8 and all(1 <= k < 256 <= v < 512 for k, v in values.items())
        places = [t for t, v in enumerate(label) if v != evaluation.IGNORE]
        assert all(t >= 16 and t % 2 == 0 and label[t] == values[row[t]] for t in places)
        assert sorted(row[t] for t in places) == sorted(values)


def test_mqar_gaps_follow_the_power_law(generator):
    _, labels = evaluation.mqar(4000, 64, 1, 64, generator)
    gap = (labels != evaluation.IGNORE).int().argmax(1).sub(2).div(2, rounding_mode="floor") + 1
    law = torch.arange(1, 32).double() ** -0.99
    for g in (1, 2, 10):
        share = (law[g - 1] / law.sum()).item()
        assert (gap == g).double().mean().item() == pytest.approx(share, abs=5 * (share / 4000) ** 0.5)


def test_mqar_refuses_what_does_not_fit():
    """At the bounds it draws, one beyond either it says both."""
    for length, vocab_size, most in ((64, 512, 16), (67, 512, 16), (64, 24, 11), (64, 25, 11)):
        evaluation.mqar(1, length, most, vocab_size, torch.Generator())
        rule = f"pairs must be at most .* at length={length} and vocab_size={vocab_size}, got {most + 1}"
        with pytest.raises(ValueError, match=rule):
            evaluation.mqar(1, length, most + 1, vocab_size, torch.Generator())


def test_associative_recall_setting_1_is_a_permutation(generator):
    keys, values, answers = evaluation.associative_recall(9, 20, generator)
    assert torch.equal(keys.sort().values, torch.arange(20).expand(9, 20))
    assert torch.equal(values.sort().values, torch.arange(20).expand(9, 20))
    assert torch.equal(answers.gather(1, keys), values)


def test_associative_recall_setting_2_keeps_the_last_value(generator):
    keys, values, answers = evaluation.associative_recall(9, 20, generator, replacement=True)
    assert keys.shape == (9, 40)
    for k, v, answer in zip(keys.tolist(), values.tolist(), answers.tolist(), strict=True):
        last = dict(zip(k, v, strict=True))
        assert answer == [last.get(key, -1) for key in range(20)]
    assert evaluation.associative_recall(2, 20, generator, replacement=True, pairs=20)[0].shape == (2, 20)
    with pytest.raises(ValueError, match=r"keys=20 without replacement, got 21"):
        evaluation.associative_recall(1, 20, generator, pairs=21)


def test_tasks_come_from_their_generator_alone():
    before = torch.get_rng_state()
    one, two = (evaluation.mqar(2, 32, 4, 64, torch.Generator().manual_seed(7))[0] for _ in range(2))
    assert torch.equal(one, two) and torch.equal(torch.get_rng_state(), before)


def test_parameters_are_those_of_the_real_modules(config):
    model, found = LanguageModel(config), evaluation.cost(config)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    unused = sum(p.numel() for b in model.moe_blocks for p in b.experts.parameters()) * 2 // 4
    assert found.active_parameters == found.parameters - unused
    assert found.weight_bytes == 4 * found.parameters and found.optimizer_bytes == 8 * found.parameters


def test_state_bytes_are_those_of_the_real_states(config):
    model, found = LanguageModel(config).eval(), evaluation.cost(config)
    for context in (1, 5, 70):
        state = model(torch.zeros(1, context, dtype=torch.int64))[1]
        assert found.state_bytes(context) == sum(s.num_bytes for s in state)


def test_forward_flops_are_those_that_torch_counts(config):
    """In fp64, where experts are a loop of products that torch's counter sees, and softmax as plain products."""
    model = LanguageModel(config).double().eval()
    tokens = torch.randint(97, (1, 128))
    in_place = {torch.ops.aten.baddbmm_: lambda out, a, b, **_: 2 * math.prod(a) * b[-1]}  # torch does not count it
    counter = FlopCounterMode(display=False, custom_mapping=in_place)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model.logits(model(tokens)[0])
    solves = config.num_hidden_layers * 2 * 32 * 32 if config.linear_attention_kind == "delta" else 0  # not seen
    found = evaluation.cost(config, 128).forward_flops
    assert found == pytest.approx(counter.get_total_flops() / 128 + solves, rel=0.005)


@pytest.mark.parametrize("remade", [False, True])
def test_activations_are_within_a_third_of_what_autograd_keeps(config, remade, monkeypatch):
    config = dataclasses.replace(config, feature_map="elu")
    model, kept = LanguageModel(config), {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def note(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    def made_from(function, *tensors, **options):  # what is made again in the backward pass is made from these
        return checkpoint(function, *map(note, tensors), **options)

    monkeypatch.setattr(moe, "checkpoint", made_from)
    monkeypatch.setattr(moe, "REMADE_FROM", 0 if remade else 10**6)
    tokens = torch.randint(97, (2, 128))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model.loss(model(tokens)[0], tokens)
    measured = sum(size for address, (size, _) in kept.items() if address not in own)
    monkeypatch.setattr(evaluation, "_cost", evaluation._cost.__wrapped__)  # not the cached one
    found = evaluation.cost(config, 128, rows=2)
    assert found.activation_bytes == pytest.approx(measured, rel=0.34)


def test_flops_by_hand():
    """One dense softmax layer: 2 per weight of its six matrices and of the head, 4 T D between tokens."""
    config = ModelConfig(
        **{"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "moe_layers": ()},
        **{"num_attention_heads": 4, "num_key_value_heads": 4, "layer_types": FULL},
    )
    found = evaluation.cost(config, 50)
    weights = 4 * 32 * 32 + 3 * 32 * 64 + 100 * 32
    assert found.forward_flops == 2 * weights + 4 * 50 * 32
    assert found.training_flops == 6 * weights + 12 * 50 * 32
    norms = 2 * 32 + 32 + 2 * 8
    assert found.parameters == found.active_parameters == weights + norms


def test_muon_keeps_one_moment_for_matrices():
    config = ModelConfig(num_hidden_layers=1, hidden_size=48, intermediate_size=64, vocab_size=50)
    model = LanguageModel(config)
    matrices = sum(p.numel() for n, p in model.layers.named_parameters() if p.ndim > 1 and "conv" not in n)
    both = [evaluation.cost(config, optimizer=name).optimizer_bytes for name in ("adamw", "muon")]
    assert both[0] - both[1] == pytest.approx(4 * matrices, rel=0.03)


def test_flops_of_newton_schulz_by_hand():
    """Of a x b, a <= b: x x^T, its square and their product with x, five times; gate and up, q, k and v are apart."""
    sizes = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    square, half, wide = (5 * (4 * a * a * b + 2 * a**3) for a, b in ((32, 32), (16, 32), (32, 64)))
    for changes, experts in (({"moe_layers": ()}, 1), ({"num_experts": 5}, 5), ({"num_shared_experts": 1}, 9)):
        for layer in PATTERN[1:]:
            config = ModelConfig(**sizes, **heads, **changes, layer_types=(layer,))
            found = evaluation.cost(config, optimizer="muon").optimizer_flops
            assert found == 2 * square + 2 * half + 3 * wide * experts  # q and o, k and v, gate and up and down
            assert evaluation.cost(config).optimizer_flops == 0


def test_flops_of_newton_schulz_are_those_that_torch_counts():
    """Of every matrix that the optimizer moves, by its published iteration."""
    config = dataclasses.replace(SMALL, **KINDS["delta"])
    model = LanguageModel(config)
    pairs = [(n, w, optim.matrix_rows(model, n, w)) for n, w in model.named_parameters() if optim.is_matrix(n, w)]
    counter = FlopCounterMode(display=False)
    with counter:
        for _, weight, rows in pairs:
            for part in weight.detach().split(rows, -2):
                y = part.reshape(-1, *part.shape[-2:])
                y = y.mT if y.shape[-2] > y.shape[-1] else y
                for _ in range(5):
                    gram = y @ y.mT
                    y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram), y)
    assert evaluation.cost(config, optimizer="muon").optimizer_flops == counter.get_total_flops()


def test_a_mixer_registered_again_is_counted_again(monkeypatch):
    class Wider(attention.SoftmaxMixer):
        def __init__(self, config):
            super().__init__(config)
            self.more = torch.nn.Linear(7, 9)

    config, found = dataclasses.replace(SMALL, layer_types=FULL, full_attention_kind="mine"), []
    for cls in (attention.SoftmaxMixer, Wider, attention.SoftmaxMixer):
        monkeypatch.setitem(attention.MIXERS, "mine", cls)
        found.append(evaluation.cost(config).parameters)
    assert found == [found[0], found[0] + 3 * (7 * 9 + 9), found[0]]


def test_known_words_counts_long_words_without_regard_to_case():
    known = ["The array holds values", "of any shape"]
    assert evaluation.known_words(["An ARRAY of shape qwerty"], known) == pytest.approx(2 / 3)
    assert evaluation.known_words(["of an x1"], known) == 1.0


def test_copies_finds_every_span_that_stands_in_the_source():
    seed = seeded().initial_seed()
    letters = torch.randint(97, 123, (3000,))
    source = "".join(map(chr, letters.tolist()))
    start, length = seed % 2000, 50 + seed % 30
    text = "-" * (seed % 37) + source[start : start + length] + "." * 20
    assert evaluation.copies(text, source) == [source[s : s + 50] for s in range(start, start + length - 49)]
    assert evaluation.copies(source[start : start + 49] + "!" + source[:30], source) == []
