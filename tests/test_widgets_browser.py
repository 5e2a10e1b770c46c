"""The slider of notebook 01 in a real browser, a JupyterLab in a headless Chromium; and its static form without one."""

import nbformat
import pytest
from browsers import RUN_ALL, jupyter, page


@pytest.mark.browser
@pytest.mark.slow
def test_moving_the_slider_redraws_the_figure(chromium, root, tmp_path, monkeypatch):
    """The notebook's own cells are run, those that the slider needs, from a copy."""
    from playwright.sync_api import expect

    source = nbformat.read(root / "notebooks" / "01_attention.ipynb", as_version=4)
    needed = ("my_guess =", "settings.parameters(", "many, d = [", "widgets.explore(")
    cells = [c for c in source.cells if c.cell_type == "code" and any(text in c.source for text in needed)]
    assert len(cells) == len(needed)
    (tmp_path / "work").mkdir()
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=source.metadata), tmp_path / "work" / "slider.ipynb")
    monkeypatch.setenv("DSL_HOME", str(tmp_path))
    with jupyter(tmp_path, tmp_path / "work") as address, page(chromium) as window:
        window.goto(address)
        window.wait_for_function("() => window.jupyterapp && window.jupyterapp.shell")
        assert window.evaluate(RUN_ALL, "slider.ipynb") == []
        picture, handle = window.locator("img.dsl-picture"), window.locator(".dsl-keys .noUi-handle")
        expect(picture).to_be_visible()
        before = picture.get_attribute("src")
        handle.focus()
        handle.press("ArrowRight")
        expect(window.locator(".dsl-keys .widget-readout")).to_have_text("65")
        expect(picture).not_to_have_attribute("src", before, timeout=120_000)
        before = picture.get_attribute("src")
        window.locator(".dsl-features select").select_option("dpfp1")
        expect(picture).not_to_have_attribute("src", before, timeout=120_000)


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.long
def test_the_panel_of_a_training_follows_it_in_place(chromium, root, tmp_path, monkeypatch):
    from playwright.sync_api import expect

    source = nbformat.read(root / "notebooks" / "03_train.ipynb", as_version=4)
    needed = ("preset =", "settings.notebook_run(", "dsl.train(")
    cells = [c for c in source.cells if c.cell_type == "code" and any(text in c.source for text in needed)][:3]
    (tmp_path / "work").mkdir()
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=source.metadata), tmp_path / "work" / "train.ipynb")
    monkeypatch.setenv("DSL_HOME", str(tmp_path))
    with jupyter(tmp_path, tmp_path / "work") as address, page(chromium) as window:
        window.goto(address)
        window.wait_for_function("() => window.jupyterapp && window.jupyterapp.shell")
        assert window.evaluate(RUN_ALL, "train.ipynb") == []
        panel = window.locator(".dsl-dashboard")
        expect(panel).to_have_count(1)
        expect(panel.locator("pre").first).to_contain_text("step 20/20")
        expect(panel.locator("polyline")).to_have_count(3)
        expect(panel.locator(".dsl-load tr")).to_have_count(2)
        expect(window.locator(".jp-OutputArea-output", has_text="finished at step 20")).to_have_count(1)
        assert window.locator(".jp-OutputArea-output", has_text="tokens/s").count() == 1, (
            "the panel, and no lines below"
        )
        assert window.errors == []


@pytest.mark.slow
def test_a_front_end_is_known_by_what_it_sends_and_not_by_the_environment(monkeypatch):
    """`!papermill` typed in a cell inherits the environment of that cell's kernel, and sends no metadata."""
    from jupyter_client.manager import run_kernel

    for name in ("JPY_SESSION_NAME", "VSCODE_PID"):
        monkeypatch.setenv(name, "1")
    code, said = "from dsl import widgets; print(widgets.live())", []
    with run_kernel() as client:
        for client.session.metadata in ({}, {"cellId": "a"}, {"colab": {"cell_id": "a"}}):
            client.execute_interactive(code, output_hook=lambda message: said.append(message["content"]), timeout=300)
    said = [content["text"] for content in said if "text" in content]
    assert said == ["False\n", "True\n", "True\n"]


def test_without_a_browser_the_first_picture_is_shown(tmp_path, monkeypatch):
    from matplotlib import pyplot as plt

    from dsl import widgets

    monkeypatch.delenv("DSL_FIGURES", raising=False)
    monkeypatch.setenv("DSL_HOME", str(tmp_path))
    assert not widgets.live()

    def draw(keys, features):
        figure, axis = plt.subplots()
        axis.plot([keys, 2], label=features)
        return figure

    assert widgets.explore(draw, "01_x", keys=(7, 1, 9), features=["elu", "none"]) is None
    assert (tmp_path / "figures" / "runs" / "notebooks" / "01_x.png").stat().st_size > 1000


def test_live_controls_redraw(monkeypatch):
    from matplotlib import pyplot as plt

    from dsl import widgets

    monkeypatch.setattr(widgets, "live", lambda: True)
    seen = []

    def draw(keys, features):
        seen.append((keys, features))
        return plt.figure(figsize=(1 + keys / 10, 1))

    box = widgets.explore(draw, "01_x", keys=(7, 1, 9), features=["elu", "none"])
    slider, choice, picture = box.children
    first = picture.value
    slider.value = 9
    choice.value = "none"
    assert seen == [(7, "elu"), (9, "elu"), (9, "none")] and picture.value != first
    assert bytes(picture.value).startswith(b"\x89PNG") and not plt.get_fignums()
