"""A real JupyterLab and a headless Chromium for tests; each is ended by whom started it."""

import json
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from servers import free_port, process

ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage"]
ARGUMENTS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},  # every cell in the page, also those out of sight
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True},
    "docmanager-extension/plugin": {"autosave": False},
}
RUN_ALL = """async (path) => {
  const app = window.jupyterapp;
  await app.restored;
  const page = await app.commands.execute('docmanager:open', {path, factory: 'Notebook'});
  await page.context.ready; await page.sessionContext.ready;
  await page.sessionContext.session.kernel.info;
  await app.commands.execute('notebook:run-all-cells');
  const cells = [...page.content.widgets].filter(c => c.model.type === 'code');
  return cells.flatMap(c => c.model.sharedModel.toJSON().outputs).filter(o => o.output_type === 'error');
}"""
IN_KERNEL = """async (code) => {
  const kernel = window.jupyterapp.shell.currentWidget.sessionContext.session.kernel;
  let text = ''; const done = kernel.requestExecute({code, store_history: false});
  done.onIOPub = m => { if (m.header.msg_type === 'stream') text += m.content.text; };
  await done.done; return text; }"""


@contextmanager
def jupyter(folder: Path, notebooks: Path) -> Iterator[str]:
    """The address, with its token, of a JupyterLab that shows `notebooks` and keeps all it writes in `folder`."""
    for name, value in SETTINGS.items():
        file = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(value))
    names = "JUPYTER_CONFIG_DIR JUPYTER_DATA_DIR JUPYTER_RUNTIME_DIR JUPYTERLAB_WORKSPACES_DIR IPYTHONDIR"
    places = {name: str(folder / name) for name in names.split()}
    environment = os.environ | places | {"HOME": str(folder), "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings")}
    port, token = free_port(), secrets.token_hex(16)
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--ServerApp.port={port}"]
    command += ["--ServerApp.ip=127.0.0.1", "--ServerApp.port_retries=0", f"--IdentityProvider.token={token}"]
    command += [f"--ServerApp.root_dir={notebooks}", "--LabApp.expose_app_in_browser=True", "--log-level=ERROR"]
    command += ["--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    address = f"http://127.0.0.1:{port}"
    with process(command, f"{address}/api/status?token={token}", env=environment):
        yield f"{address}/lab?token={token}&reset"


@contextmanager
def page(chromium: str) -> Iterator:
    """A Playwright page; `page.outside` lists what it asked of other machines, `page.errors` its errors."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, headless=True, args=ARGUMENTS)
        page = browser.new_page(viewport={"width": 1300, "height": 1000})
        page.set_default_timeout(120_000)
        page.outside, page.errors = [], []
        local = ("http://127.0.0.1", "ws://127.0.0.1", "data:", "blob:")
        page.on("request", lambda r: None if r.url.startswith(local) else page.outside.append(r.url))
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        yield page
        browser.close()
