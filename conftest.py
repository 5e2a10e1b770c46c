"""Where every test and every notebook under pytest runs: a fresh home and the smallest work.

This file stands at the root so that it also holds for `pytest --nbval notebooks/01_attention.ipynb`; notebook kernels
inherit the environment. Nobody's runs, logs or figures are touched. What is costly to make and the same for all (the
corpus that was read, trained tokenizers) is shared between runs through DSL_CACHE.
"""

import os
import shutil
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent
HOME = tempfile.mkdtemp(prefix="dsl-home-")

os.environ["DSL_HOME"] = HOME
os.environ["IPYTHONDIR"] = os.path.join(HOME, "ipython")  # no start-up files of the user's in the kernels
os.environ.setdefault("DSL_SMOKE", "1")  # DSL_SMOKE=0 pytest --nbval: the notebooks at their readers' setting
os.environ.setdefault("DSL_CACHE", str(ROOT / ".cache" / "dsl"))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests are small: threads cost more than they give
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
for name in ("JPY_SESSION_NAME", "VSCODE_PID", "DSL_API_KEY", "DSL_FIGURES"):  # pytest may be started from a notebook
    os.environ.pop(name, None)
if "DSL_TEST_FIGURES" in os.environ:  # `make figures`: here the tests do draw into the committed folder
    os.environ["DSL_FIGURES"] = os.environ["DSL_TEST_FIGURES"]


def pytest_configure(config):
    if config.getoption("nbval_sanitize_with", None) == "tests/nbval_sanitize.cfg":
        config.option.nbval_sanitize_with = str(ROOT / "tests" / "nbval_sanitize.cfg")  # from any folder


def pytest_unconfigure(config):
    shutil.rmtree(HOME, ignore_errors=True)
