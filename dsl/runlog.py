"""What a run writes while it trains: metrics.csv, generations.csv, hparams.yaml, a log, progress lines.

Knows files and the terminal; nothing of models, data or the loop that calls it. What a notebook draws later
is in these files, flushed row by row, so closing a browser or killing a kernel loses nothing.
"""

from __future__ import annotations

import csv
import io
import logging
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

# The only columns that may differ between two runs of the same seed, machine, versions and threads.
TIME_COLUMNS = ("step_seconds", "tokens_per_second", "memory_mb", "cpu_percent", "gpu_memory_mb", "gpu_percent")
RUN_COLUMNS = (
    *("step", "tokens", "epoch", "loss", "held_out_bits_per_byte"),
    *("lr", "grad_norm", "scale", "skipped_steps"),
)
LAYER_COLUMNS = ("load", "maxvio", "entropy", "dropped", "dead")
GENERATION_COLUMNS = ("step", "prompt", "text")
logger = logging.getLogger("dsl")


def columns(moe_layers: Iterable[int]) -> tuple[str, ...]:
    """Header of metrics.csv; `load_i` holds the experts' shares of layer i's assignments, joined by ';'."""
    layers = (f"{name}_{layer}" for layer in moe_layers for name in LAYER_COLUMNS)
    return (*RUN_COLUMNS, *TIME_COLUMNS, *layers)


@contextmanager
def _writing(path: Any) -> Iterator[None]:
    """Says of a full disk, or one that cannot be written, which file wanted it and what there still is."""
    try:
        yield
    except OSError as error:
        kept = "The last good checkpoint is kept; with that mended, the same command goes on from it"
        raise OSError(f"cannot write {path}: {error.strerror or error}. {kept}") from error


class _File(logging.FileHandler):
    """A log file that stops the run where it cannot be written, as the tables do; logging would print and go on."""

    def handleError(self, record: logging.LogRecord) -> None:
        with _writing(self.baseFilename):
            raise


class RunLog:
    """The log folder of one run, open. As a context manager it sends what the `dsl` loggers say to a new log file and,
    unless `live` is None, to whoever watches: the terminal, and the notebook cell where `live` is true.

    `folder=None` is a process that writes no files. Every method raises OSError, with one message that names the file.
    """

    def __init__(self, folder: Path | None, live: bool | None = None):
        self.folder, self.columns, self.files = folder, (), []
        self.handlers: list[logging.Handler] = []
        if folder is not None:
            with _writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
                file = _File(folder / time.strftime("%Y-%m-%dT%H-%M-%S.log"), encoding="utf-8")
            file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
            self.handlers.append(file)
        if live is not None:
            self.handlers.append(_Live(live))

    def __enter__(self) -> RunLog:
        self.level = logger.level
        logger.setLevel(logging.INFO)
        for handler in self.handlers:
            logger.addHandler(handler)
        return self

    def __exit__(self, kind, error, trace) -> None:
        for handler in reversed(self.handlers):  # the file last: whoever watches is told of an error by who catches it
            with suppress(OSError):  # a full disk, of which the run knows: each row and line was flushed before
                if error is not None and handler is self.handlers[0]:
                    logger.error("%s: %s", kind.__name__, error)
            logger.removeHandler(handler)
            with suppress(OSError):
                handler.close()
        logger.setLevel(self.level)
        for file in self.files:
            with suppress(OSError):
                file.close()

    def open_tables(self, moe_layers: Iterable[int], step: int = 0, *, archive: bool = False) -> None:
        """Open both tables to go on after `step`: rows beyond it are cut, since the run will write them again.

        `archive` first copies a table that is cut, for rows that will not come back as they were.
        """
        self.columns = columns(moe_layers)
        for name, header in (("metrics.csv", self.columns), ("generations.csv", GENERATION_COLUMNS)):
            if self.folder is not None:
                with _writing(self.folder / name):
                    self.files.append(_reopen(self.folder / name, header, step, archive))

    def row(self, values: Mapping[str, Any]) -> None:
        """Append one row to metrics.csv; a column without a value stays empty."""
        self._write(0, [_text(values.get(name)) for name in self.columns])

    def generation(self, step: int, prompt: str, text: str) -> None:
        """Append one row to generations.csv."""
        self._write(1, [step, prompt, text])

    def _write(self, table: int, row: list) -> None:
        for file in self.files[table : table + 1]:
            with _writing(file.name):
                csv.writer(file).writerow(row)
                file.flush()

    def sync(self) -> None:
        """Put both tables on the disk itself: a checkpoint that outlives a power cut has its rows."""
        for file in self.files:
            with _writing(file.name):
                os.fsync(file.fileno())

    def hparams(self, settings: Mapping[str, Any], record: Mapping[str, Any]) -> None:
        """Write hparams.yaml: every setting, and a `record` of where and with what the run was made."""
        if self.folder:
            path, both = self.folder / "hparams.yaml", {**settings, "record": dict(record)}
            with _writing(path):
                new = path.with_name("hparams.yaml.new")
                new.write_text(yaml.safe_dump(both, sort_keys=False, allow_unicode=True), encoding="utf-8")
                os.replace(new, path)


def _text(value: Any) -> str:
    # Nine digits name a float32 exactly.
    return "" if value is None else f"{value:.9g}" if isinstance(value, float) else str(value)


def complete(path: Path) -> str:
    """The text of a table, less a last row that a kill or a full disk cut short; empty where there is no file."""
    if not path.exists():
        return ""
    with path.open(newline="", encoding="utf-8", errors="replace") as file:  # a row may end inside a character
        text = file.read()
    end = text.rfind("\n") + 1
    while text.count('"', 0, end) % 2:  # a line that ends in quotes ends no row
        end = text.rfind("\n", 0, end - 1) + 1
    return text[:end]


def _reopen(path: Path, header: tuple[str, ...], step: int, archive: bool):
    """Open a table to append after `step`; a table with another header is set aside under a new name."""
    old = list(csv.reader(io.StringIO(complete(path))))
    same = bool(old) and tuple(old[0]) == header
    keep = [row for row in old[1:] if len(row) == len(header) and int(row[0]) <= step] if same else []
    if old and (not same or (archive and len(keep) < len(old) - 1)):
        names = (path.with_name(f"{path.stem}.old-{n}.csv") for n in range(1, sys.maxsize))
        aside = next(name for name in names if not name.exists())
        shutil.copyfile(path, aside)
        logger.info("%s: the earlier rows are kept in %s", path.name, aside.name)
    new = path.with_name(path.name + ".new")
    with new.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *keep])
    os.replace(new, path)
    return path.open("a", newline="", encoding="utf-8")


def in_notebook() -> bool:
    """Is this code run by a Jupyter kernel?"""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return hasattr(shell, "kernel")


class _Live(logging.Handler):
    """Lines for whoever watches: the process's own stderr (papermill's terminal) and, if asked, the cell.

    A kernel mirrors what reaches descriptor 2 into the cell, where each line would show twice; the copy that
    it keeps of the terminal's descriptor avoids that.
    """

    def __init__(self, cell: bool):
        super().__init__(logging.INFO)
        self.cell = cell

    def emit(self, record: logging.LogRecord) -> None:
        text, terminal = self.format(record), getattr(sys.stderr, "_original_stdstream_copy", None)
        if self.cell:
            print(text, flush=True)
        with suppress(OSError):  # a terminal that has gone takes no run with it
            if terminal is not None:
                os.write(terminal, (text + "\n").encode())
            elif sys.__stderr__ is not None:
                print(text, file=sys.__stderr__, flush=True)


def duration(seconds: float) -> str:
    """Days, hours, minutes and seconds."""
    days = f"{seconds // 86_400:.0f} d " if seconds >= 86_400 else ""
    return days + time.strftime("%H:%M:%S", time.gmtime(seconds))


def progress(row: Mapping[str, Any], last: int) -> str:
    """One line for people: step, loss, held-out bits per byte, learning rate, tokens/s, time left."""
    held_out = row.get("held_out_bits_per_byte")
    measured = "" if held_out is None or held_out != held_out else f"  held-out {held_out:.3f} bits/byte"
    return (
        f"step {row['step']}/{last}  loss {row['loss']:.4f}{measured}  lr {row['lr']:.2e}  "
        f"{row['tokens_per_second']:,.0f} tokens/s  {duration(row['seconds_left'])} left"
    )


def environment() -> dict[str, Any]:
    """Python, platform, versions of what decides the bits, and the git revision (None outside a checkout)."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    found = subprocess.run(git, capture_output=True, text=True, check=False) if shutil.which("git") else None
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: version(name) for name in ("torch", "transformers", "tokenizers", "numpy")},
        "git_revision": (found.stdout.strip() or None) if found else None,
    }
