"""The playground in a real JupyterLab and the web page over a real server, both in a headless Chromium."""

import os
import re
import shutil
import sys
import time

import pytest
from browsers import IN_KERNEL, RUN_ALL, jupyter, page
from servers import free_port, process

pytestmark = [pytest.mark.browser, pytest.mark.slow]
SHOTS = os.environ.get("DSL_SHOTS")  # a folder that keeps the pictures, to be looked at
FIGURES = os.environ.get("DSL_FIGURES")  # where `make figures` wants the one that is committed


def shot(window, name: str, tmp_path) -> None:
    path = f"{SHOTS or tmp_path}/{name}.png"
    window.screenshot(path=path)
    assert os.path.getsize(path) > 10_000


def test_playground_in_jupyterlab(chromium, root, tmp_path):
    from playwright.sync_api import expect

    expect.set_options(timeout=300_000)
    (tmp_path / "work").mkdir()
    shutil.copy(root / "notebooks" / "05_playground.ipynb", tmp_path / "work")
    with jupyter(tmp_path, tmp_path / "work") as address, page(chromium) as window:
        window.goto(address)
        window.wait_for_function("() => window.jupyterapp && window.jupyterapp.shell")
        assert window.evaluate(RUN_ALL, "05_playground.ipynb") == []
        text, status = window.locator(".dsl-text").first, window.locator(".dsl-status").first
        go, stop = window.locator("button.dsl-go"), window.locator("button.dsl-halt")
        knob = window.locator(".dsl-length .noUi-handle")
        knob.focus()
        knob.press("End")
        expect(window.locator(".dsl-length .widget-readout")).to_have_text("1000")
        window.evaluate(IN_KERNEL, "panel.length.max = panel.length.value = 10**6")  # no machine ends before Stop
        go.click()
        expect(status).to_contain_text(re.compile(r"running, \d\d+ tokens"))
        assert window.evaluate(IN_KERNEL, "print(6 * 7)").strip() == "42"  # the kernel is free meanwhile
        seen = text.inner_text()
        expect(text).not_to_have_text(seen)  # it streams
        stop.click()
        expect(status).to_contain_text("stopped")
        expect(go).to_be_enabled()
        stopped = text.inner_text()
        token = text.locator("span").nth(1)
        assert "probability" in token.get_attribute("title") and "background" in token.get_attribute("style")
        expect(window.locator(".dsl-load table").first).to_be_visible()
        go.scroll_into_view_if_needed()
        shot(window, "playground", tmp_path)
        if FIGURES:
            window.locator(".jp-OutputArea-output").filter(has=go).screenshot(path=f"{FIGURES}/05_playground.png")
        assert text.inner_text() == stopped  # nothing came after Stop
        knob.focus()
        knob.press("Home")
        go.click()
        expect(status).to_contain_text("done, 1 tokens")  # and it starts again
        window.evaluate(IN_KERNEL, "panel.panels[0].begin = lambda *_: 1 / 0")
        go.click()
        expect(status).to_contain_text("error: ZeroDivisionError")
        shot(window, "playground_error", tmp_path)
        assert window.outside == [] and window.errors == []


def test_web_page(chromium, tmp_path):
    from playwright.sync_api import expect

    expect.set_options(timeout=300_000)
    ports = [free_port(), free_port()]
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    dsl = [sys.executable, "-m", "dsl"]
    with (
        process([*dsl, "serve", "--port", str(ports[0])], f"{urls[0]}/health") as model,
        process([*dsl, "web", "--api", urls[0], "--port", str(ports[1])], urls[1]),
        page(chromium) as window,
    ):
        window.goto(urls[1])
        text, status = window.locator("#text"), window.locator("#status")
        window.locator("#length input[type=number]").fill("900")
        window.locator("#prompt textarea").fill("Raise an error <b>if</b>")
        window.locator("#go").click()
        expect(status).to_contain_text(re.compile(r"\d\d tokens"))
        assert "Raise an error <b>if</b>" in text.inner_text()
        window.locator("#stop").click()
        stopped = ""
        while status.inner_text() != stopped:  # it comes to rest, long before the 900
            stopped = status.inner_text()
            time.sleep(1)
        assert re.fullmatch(r"\d+ tokens", stopped.strip()), stopped
        assert int(stopped.split()[0]) < 900
        assert "expert 0" in text.inner_text()  # the legend
        shot(window, "web", tmp_path)
        model.terminate()
        model.wait(30)
        window.locator("#go").click()
        expect(status).to_contain_text("error: the server does not answer")
        shot(window, "web_error", tmp_path)
        assert window.outside == [] and window.errors == []
