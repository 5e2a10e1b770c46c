"""What is measured on one run's weights, by hand on rows of few tokens; then a real tiny run under the lens."""

import math
import shutil

import pytest
import tiny
import torch
from helpers import assert_close, seeded
from runs import cache, home, train  # noqa: F401

from dsl import checkpoint, evaluation, lens, settings


def test_what_a_row_has_shown_before():
    rows = torch.tensor([[1, 2, 3, 1, 2, 3, 9, 2], [5, 5, 5, 6, 1, 2, 7, 7]])
    assert lens.seen_before(rows).tolist() == [
        ["new token", "new token", "seen token", "seen pair", "seen pair", "new token", "seen token"],
        ["seen token", "seen pair", "new token", "new token", "new token", "new token", "seen token"],
    ]


def test_a_choice_by_the_token_alone_and_by_chance():
    tokens = torch.tensor([[7, 9, 7, 9, 300, 300]])
    by_token = torch.tensor([[0, 1, 0, 1, 2, 2]])
    assert lens.token_share(tokens, by_token) == pytest.approx(1)
    assert lens.token_share(tokens, torch.tensor([[0, 1, 1, 0, 0, 1]])) == pytest.approx(0, abs=1e-9)
    assert lens.token_share(tokens, torch.zeros(1, 6, dtype=torch.long)) == 0
    # of 7 7 9 9 the choices are 0 1 2 2: entropy 1.5 bits, of which the token leaves half a bit open
    share = lens.token_share(torch.tensor([7, 7, 9, 9]), torch.tensor([0, 1, 2, 2]))
    assert share == pytest.approx(1 / 1.5)


def test_losses_of_tokens_sum_to_the_loss_of_the_model():
    seeded()
    model = tiny.shell().model
    rows = tiny.tokens(11, 20)
    rows[3, 15:] = evaluation.IGNORE
    losses = lens.token_losses(model, rows)
    assert losses.shape == (11, 19) and torch.equal(losses.isnan(), rows[:, 1:] == evaluation.IGNORE)
    bits = evaluation.bits_per_byte(model, rows, 100)
    assert_close("bits per byte", losses.nansum() / math.log(2) / 100, torch.tensor(bits))


def test_the_same_tokens_are_scored_with_less_and_less_in_sight():
    seeded()
    model, rows = tiny.shell().model.double(), tiny.tokens(5, 17)
    found = {key: (count, value) for *_, key, count, value in lens._past(model, rows)}
    assert [*found] == [1, 2, 4, 8, 16] and {count for count, _ in found.values()} == {5 * 8}
    assert found[16][1] == pytest.approx(float(lens.token_losses(model, rows)[:, 8:].mean()), abs=1e-9)
    alone = [lens.token_losses(model, rows[:, t : t + 2]) for t in range(8, 16)]
    assert found[1][1] == pytest.approx(float(torch.cat(alone).mean()), abs=1e-9)
    # with 4 in sight each piece of two scored tokens sees one or two more before them
    pieces = [lens.token_losses(model, rows[:, t - 2 : t + 3])[:, 2:] for t in range(8, 16, 2)]
    assert found[4][1] == pytest.approx(float(torch.cat(pieces).mean()), abs=1e-9)


def test_what_is_shown_again_is_scored_apart(monkeypatch):
    asked = []

    def losses(model, rows):  # every token costs its place in the row
        asked.append(rows)
        return torch.arange(rows.shape[1] - 1.0).expand(len(rows), -1)

    monkeypatch.setattr(lens, "token_losses", losses)
    found = {key: (count, value) for *_, key, count, value in lens._copying(tiny.shell().model, 8)}
    [rows] = asked
    assert rows.shape[1] == 9 and torch.equal(rows[:, :4], rows[:, 4:8])
    # the first showing predicts places 1, 2, 3 from 0, 1, 2; the second the same tokens from 4, 5, 6
    assert found == {"first": (3 * len(rows), 1.0), "again": (3 * len(rows), 5.0)}


def test_a_token_of_a_longer_row_is_compared_with_itself():
    seeded()
    config = {"layer_types": ["linear_attention"], "max_position_embeddings": 32, "vocab_size": 257}
    model, text = tiny.shell(**config).model.double(), tiny.tokens(2 * 1024 - 40 + 1)
    short, long = (cut(text, length) for length in (32, 1024))
    losses = lens.token_losses(model, short)
    found = {key: (count, value) for *_, key, count, value in lens._beyond(model, losses, long)}
    far, near = lens.token_losses(model, long).flatten(), losses.flatten()
    same = [i for i in range(len(near)) if 64 <= i % 1024 < 128]
    assert found[64][0] == len(same) == 128
    assert found[64][1] == pytest.approx(float((far[same] - near[same]).mean()), abs=1e-9)
    assert [*found] == [32, 64, 128, 256, 512]


def cut(text: torch.Tensor, length: int) -> torch.Tensor:
    count = -(-(len(text) - 1) // length)
    padded = torch.full((count * length + 1,), evaluation.IGNORE)
    padded[: len(text)] = text
    return padded.unfold(0, length + 1, length)


@pytest.mark.slow
def test_a_run_under_the_lens(home):  # noqa: F811
    sizes = {"max_steps": 4, "save_steps": 2, "save_total_limit": 9, "held_out_bytes": 20_000}
    train("mine", moe_layers=[1], layer_types=["linear_attention"], **sizes)
    rows, curves, found, notes = lens.of_runs("mine")
    assert notes == [] and list(rows.config) == ["mine"] and len(curves) == 1
    kinds = found.groupby("measure").size()
    assert {"final", "past", "longer", "copying", "seen", "kind", "saturation", "specialisation"} == set(kinds.index)
    at = found.set_index(["measure", "key"]).value
    assert at["final", "bits_per_byte"] == pytest.approx(rows.bits_per_byte[0], rel=1e-4)
    assert at["saturation", "4"] == 1 and 0 <= at["saturation", "2"] <= 1
    assert (at["specialisation"].between(0, 1)).all()
    assert at["past"].index.tolist() == ["1", "2", "4", "8", "16", "32"], "to the window of 32"
    assert at["longer"].index.tolist() == ["32", "64", "128", "256", "512"], "and beyond it, without a softmax layer"
    sums = found.assign(sum=found.value * found["count"]).groupby("measure")[["sum", "count"]].sum()
    assert sums.loc["seen"].tolist() == pytest.approx(sums.loc["kind"].tolist()), "both sort the same tokens"
    made = lens.analysis(settings.home() / "logs" / "training" / "mine")
    stamp = made.stat().st_mtime_ns
    assert lens.of_runs("mine")[2].equals(found) and made.stat().st_mtime_ns == stamp, "made once"
    shutil.rmtree(home / "checkpoints" / "mine")
    assert lens.of_runs("mine")[2].equals(found), "and kept when the weights are gone"


@pytest.mark.parametrize("logged", ["", "step,tokens,loss,held_out_bits_per_byte,step_seconds,cpu_percent\n"])
def test_a_run_without_weights_is_shown_by_its_log(logged, home):  # noqa: F811
    place = home / "logs" / "training" / "gone"
    place.mkdir(parents=True)
    (place / "metrics.csv").write_text(logged)
    rows, curves, found, notes = lens.of_runs("gone")
    assert "gone is shown without its weights: no good checkpoint" in notes[-1]
    assert len(rows) == 1 and curves.empty and found.empty


def test_without_a_checkpoint_there_is_nothing_to_analyse(home):  # noqa: F811
    with pytest.raises(checkpoint.CheckpointError, match="no good checkpoint in nobody"):
        lens.analyse("nobody")
