"""The playground without a browser: the very handlers that the buttons call, on tiny checkpoints."""

import threading
import time
from dataclasses import replace

import pytest
import tiny
import torch

from dsl import playground
from dsl.generation import complete, generate
from dsl.hub import load
from dsl.playground import Playground


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Two runs of one untrained model, with and without attention over everything."""
    monkeypatch.setenv("DSL_HOME", str(tmp_path))
    torch.manual_seed(0)
    for name, changes in (("one", {}), ("two", {"layer_types": tiny.FULL})):
        folder = tmp_path / "checkpoints" / name / "step-000007"
        tiny.shell(**changes).save_pretrained(folder)
        tiny.bytes_tokenizer(ends=False).save_pretrained(folder)
    return tmp_path


def run(panel: Playground, **values) -> list[str]:
    for name, value in {"length": 12, "temperature": 0.5, "seed": 3, **values}.items():
        getattr(panel, name).value = value
    panel.generate()
    texts = panel.join(300)
    assert (panel.go.disabled, panel.halt.disabled) == (False, True)
    return texts


def test_the_controls_reach_the_loop_and_the_panel_shows_what_it_gave(home):
    panel = Playground("one", prompt="a <b>")
    [text] = run(panel, top_k=5, top_p=0.9, penalty=1.2)
    model, tokenizer = load("checkpoints/one/step-000007")
    how = {"max_new_tokens": 12, "temperature": 0.5, "seed": 3, "top_k": 5, "top_p": 0.9, "repetition_penalty": 1.2}
    assert text == complete(model, tokenizer, "a <b>", **how)
    side = panel.panels[0]
    assert side.status.value.startswith("done, 12 tokens, ") and " bytes" in side.status.value
    assert "a &lt;b&gt;" in side.text.value and side.text.value.count("<span") == 12
    assert [label for label, _ in side.layer.options] == ["layer 0", "layer 1", "layer 2"]
    before = side.text.value
    assert side.layer.label == "layer 0"
    side.layer.value = 2
    assert side.text.value != before and side.text.value.count("<span") == 12


def test_two_side_by_side_have_one_prompt_and_seed(home):
    panel = Playground("one", "two")
    assert [side.source.description for side in panel.panels] == ["Checkpoint", "Beside"]
    texts = run(panel)
    how = {"max_new_tokens": 12, "temperature": 0.5, "seed": 3}
    assert texts == [
        complete(*load(f"checkpoints/{name}/step-000007"), "Return a new", **how) for name in ("one", "two")
    ]
    panel.panels[1].source.value = panel.panels[0].source.value
    one, other = run(panel)
    assert one == other == texts[0]


def test_stop_ends_within_a_token_and_it_starts_again(home, monkeypatch):
    made, ask = [], threading.Event()

    def slowly(*args, **options):
        for token in generate(*args, **options):
            made.append(token)
            ask.set()
            time.sleep(0.02)
            yield token

    monkeypatch.setattr(playground, "generate", slowly)
    panel = Playground("one")
    panel.length.value = 500
    panel.generate()
    assert ask.wait(30)
    panel.generate()  # a second click while it runs
    panel.stop()
    at = len(made)
    [text] = panel.join(300)
    assert at <= len(made) <= at + 1 and panel.panels[0].status.value.startswith("stopped, ") and text
    assert len(run(panel)[0]) > 0 and panel.panels[0].status.value.startswith("done, 12 tokens")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda home, panel: (home / "checkpoints/one/step-000007/config.json").write_text("{"), "error: cannot load"),
        (lambda home, panel: setattr(panel.prompt, "value", ""), "error: prompt must not be empty"),
        (lambda home, panel: setattr(panel.panels[0], "advance", lambda: 1 / 0), "error: ZeroDivisionError"),
    ],
)
def test_an_error_is_shown_and_does_not_end_it(home, spoil, said):
    panel = Playground("one", "two")
    spoil(home, panel)
    run(panel)
    assert panel.panels[0].status.value.startswith(said)
    if "prompt" not in said:
        assert panel.panels[1].status.value.startswith("done")


def test_an_error_in_drawing_is_shown_and_leaves_the_buttons_and_the_other_side(home, monkeypatch):
    panel = Playground("one", "two")
    run(panel)
    assert "<table" in panel.panels[0].load.value
    side, draw = panel.panels[0], panel.panels[0].draw
    monkeypatch.setattr(side, "draw", lambda: 1 / 0 if side.end != "running" and side.tokens else draw())
    run(panel)
    assert side.status.value.startswith("error: ZeroDivisionError") and panel.panels[1].status.value.startswith("done")
    monkeypatch.setattr(side, "begin", lambda *_: 1 / 0)
    monkeypatch.setattr(side, "draw", lambda: 1 / 0)
    run(panel)
    assert side.status.value.startswith("error: ZeroDivisionError") and panel.panels[1].status.value.startswith("done")
    monkeypatch.setattr(panel, "_guard", lambda *_: 1 / 0)
    panel.go.disabled = True
    with pytest.raises(ZeroDivisionError):
        panel._run("a", {})
    assert not panel.go.disabled


def test_no_load_of_the_last_run_stands_beside_an_error(home):
    panel = Playground("one")
    run(panel)
    (home / "checkpoints/two/step-000007/config.json").write_text("{")
    panel.panels[0].source.value = panel.panels[0].source.options[-1][1]
    run(panel)
    assert panel.panels[0].status.value.startswith("error: cannot load") and panel.panels[0].load.value == ""


def test_a_prompt_beyond_a_window_is_said_on_its_side_alone(home):
    panel = Playground("one", "two", prompt="a" * 200)
    run(panel)
    assert panel.panels[0].status.value.startswith("done")
    assert "max_position_embeddings=96" in panel.panels[1].status.value


def test_text_is_escaped(home):
    model, tokenizer = load("checkpoints/one/step-000007")
    tokens = list(generate(model, tokenizer, "a", max_new_tokens=200, temperature=2, seed=0))
    shown = playground.text_html("<script>&", tokens)
    assert "<script" not in shown and shown.count("<span") == shown.count("</span") == 200 and "&#x27;" in shown


def test_load_counts_every_visit(home):
    model, tokenizer = load("checkpoints/one/step-000007")
    tokens = list(generate(model, tokenizer, "a", max_new_tokens=9, seed=0))
    load_so_far = playground.load_so_far(tokens, 4)
    assert load_so_far.shape == (3, 4) and (load_so_far.sum(1) == 9 * 2).all()
    by_hand = sum(2 in token.experts[1] for token in tokens)
    assert load_so_far[1, 2] == by_hand
    assert playground.load_so_far([replace(t, experts=t.experts[:0]) for t in tokens], 4).dtype == load_so_far.dtype
    assert "layer 5" in playground.load_html(tokens, [1, 3, 5], 4) and playground.load_html([], [1], 4) == ""


def test_places_are_the_steps_on_disk(home):
    names = [name for name, _ in playground.places()]
    assert names[-2:] == ["one, step 7", "two, step 7"] and names[0].startswith("demo")
    named = Playground(str(home / "checkpoints/two/step-000007")).panels[0].source.value
    assert named == str(home / "checkpoints/two/step-000007")
