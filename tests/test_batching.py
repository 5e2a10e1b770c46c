"""Sequences that are read together, joining and leaving at any time, against each one alone."""

import random

import pytest
import tiny
import torch
from helpers import seeded

from dsl.batching import Batch
from dsl.generation import generate, turns

TOKENIZER = tiny.bytes_tokenizer(ends=False)


@torch.inference_mode()
def together(model, jobs: list[tuple[int, str, dict]]) -> list[list]:
    """Tokens of jobs (turn to join at, prompt, sampling), as the server's engine makes them."""
    batch, rows, made = Batch(model.model), [], [[] for _ in jobs]
    loops = [turns(model, TOKENIZER, prompt, **sampling) for _, prompt, sampling in jobs]
    for turn in range(100):
        for i, (at, *_) in enumerate(jobs):
            if at == turn:
                loops[i].send(batch.join(next(loops[i])))
                rows.append(i)
        asked = [next(loops[i], None) for i in rows]
        batch.leave([row for row, tokens in enumerate(asked) if tokens is not None])
        rows = [i for i, tokens in zip(rows, asked, strict=True) if tokens is not None]
        if rows:
            answers = batch.step(torch.cat([tokens for tokens in asked if tokens is not None]))
            for i, answer in zip(rows, answers, strict=True):
                made[i].append(loops[i].send(answer))
    assert batch.lengths == [] and batch.state == []
    return made


@pytest.mark.parametrize("stack", tiny.STACKS)
def test_together_as_alone(stack):
    dice = random.Random(seeded().initial_seed())
    model = tiny.shell(**tiny.STACKS[stack]).double()  # so that rounding flips no router's choice
    jobs = []
    for i in range(6):
        sampling = {"max_new_tokens": dice.randint(1, 25), "temperature": i % 2 * 0.7, "seed": i}
        jobs.append((dice.randint(0, 12), "a" * dice.randint(1, 60), sampling))
    jobs.append((3, "b" * 90, {"max_new_tokens": 6, "temperature": 0}))  # up to the window's end
    for (_, prompt, sampling), made in zip(jobs, together(model, jobs), strict=True):
        alone = list(generate(model, TOKENIZER, prompt, **sampling))
        assert [t.id for t in made] == [t.id for t in alone]
        assert [t.state_bytes for t in made] == [t.state_bytes for t in alone]
        assert all(torch.equal(one.experts, other.experts) for one, other in zip(made, alone, strict=True))
        error = max(abs(one.probability - other.probability) for one, other in zip(made, alone, strict=True))
        assert error < 1e-6, error


@torch.inference_mode()
def test_rows_stay_in_the_order_that_is_asked_for():
    batch = Batch(tiny.shell().model)
    for length in (4, 7):
        batch.join(tiny.tokens(1, length))
    memory = batch.state[0].memory
    batch.leave([1, 0])
    assert batch.lengths == [7, 4] and torch.equal(batch.state[0].memory, memory.flip(0))


@torch.inference_mode()
def test_a_row_that_finds_no_room_leaves_the_others_as_they_were(monkeypatch):
    batch = Batch(tiny.shell(layer_types=tiny.FULL).model)
    batch.join(tiny.tokens(1, 4))
    before = batch.lengths, batch.sizes, batch.state
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr("dsl.batching._stacked", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError()))
        batch.join(tiny.tokens(1, 7))
    assert all(now is then for now, then in zip((batch.lengths, batch.sizes, batch.state), before, strict=True))


def test_a_state_that_is_not_known_stays_alone():
    class Mine:
        pass

    batch = Batch(tiny.shell().model)
    batch.join(tiny.tokens(1, 4))
    assert batch.takes_more()
    batch.state[0] = Mine()
    assert not batch.takes_more()
