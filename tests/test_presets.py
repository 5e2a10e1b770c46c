"""The presets at their full size: they build, read GPT-2's tokens and take an optimizer step on a CPU."""

import math

import pytest
import torch

from dsl import data, evaluation, optim, settings
from dsl.model import LanguageModel

PUBLISHED = {  # parameters, active for a token: counted by hand from the widths
    "linear_moe": 50257 * 384 + 12 * (640 * 384 + 640 * 4 + 384 * 384 + 8 * 384 + 8 * 3 * 384 * 1024 + 2 * 384) + 384,
    "gqa_moe": 50257 * 512
    + 8 * (2 * 512 * 512 + 2 * 128 * 512 + 2 * 512)
    + 5 * 3 * 512 * 2048
    + 3 * (4 * 512 + 4 * 3 * 512 * 2048)
    + 512,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_those_counted_by_hand(name):
    cost = evaluation.cost(settings.preset(name).model)
    assert cost.parameters == PUBLISHED[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_full_size_takes_a_step_on_a_cpu(name):
    run = settings.preset(name, corpus="pydocs")
    corpus = data.open_corpus(run.data)
    tokenizer = data.open_tokenizer(run.data, corpus)
    assert len(tokenizer) == run.model.vocab_size == 50257
    rows = data.TokenStream(corpus, tokenizer, data=run.data, seed=0, length=64).next(1)
    torch.manual_seed(0)
    model = LanguageModel(run.model).train()
    optimizer = optim.Optimizer(model, run.train)
    hidden, _, stats = model(rows[:, :-1])
    loss = model.loss(hidden, rows[:, 1:])
    loss.backward()
    assert abs(loss.item() - math.log(50257)) < 0.5
    optimizer.set_lr(1e-3)
    optimizer.step()
    optimizer.zero_grad()
    model.update_router_biases(torch.stack([s.counts for s in stats]))
    with torch.no_grad():
        assert model.loss(model(rows[:, :-1])[0], rows[:, 1:]) < loss
