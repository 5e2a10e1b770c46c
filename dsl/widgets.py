"""Things to move, press and watch in a notebook. Draws with `plots`; knows nothing of mathematics or training.

Where no browser listens (papermill, nbval, nbconvert) a control is a plain picture of its first state, and a training
that would be watched prints its lines.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import pandas as pd

from dsl import colors, curves, plots, runlog
from dsl.settings import Run

POINTS = 300  # of a curve that is drawn while a run trains: more would cost time that the steps want
SERIES = {"loss": "loss, nats per token", "held_out_bits_per_byte": "held-out, bits per byte", "lr": "learning rate"}


def live() -> bool:
    """Whether somebody sees widgets: JupyterLab, VS Code and Colab send metadata, such as the cell's id, with its code;
    papermill, nbconvert and nbval send none. (A kernel of theirs may well inherit a front end's environment.)
    """
    from IPython import get_ipython

    return bool(getattr(get_ipython(), "parent_header", {}).get("metadata"))


def explore(draw: Callable, name: str, **controls):
    """Redraw `draw(**values) -> Figure` whenever a control moves; static, it is saved and shown as NAME.

    A control is (first, low, high), for whole numbers, or a list of choices, the first one first. Returns the widget
    where it is live, else None.
    """
    if not live():
        first = {key: spec[0] for key, spec in controls.items()}
        plots.show(draw(**first), name)
        return None
    import ipywidgets

    def redraw(_=None):
        picture.value = plots.png(draw(**{key: box.value for key, box in boxes.items()}))

    boxes, picture = {}, ipywidgets.Image(format="png")
    for key, spec in controls.items():
        if isinstance(spec, list):
            box = ipywidgets.Dropdown(options=spec, value=spec[0], description=key)
        else:
            value, low, high = spec
            box = ipywidgets.IntSlider(value=value, min=low, max=high, description=key)
        box.add_class(f"dsl-{key.replace('_', '-')}")
        box.observe(redraw, "value")
        boxes[key] = box
    picture.add_class("dsl-picture")
    redraw()
    return ipywidgets.VBox([*boxes.values(), picture])


def table_html(table: pd.DataFrame, index: bool = True) -> str:
    """A table of texts as HTML, at its left, each text with its lines and spaces as they are; escaped.

    pandas' own strips a text, shows its line breaks as two signs, and in JupyterLab stands at the right.
    """
    look = "style='text-align:left;vertical-align:top;white-space:pre-wrap'"

    def row(tag: str, values: Iterable[Any]) -> str:
        texts = (f"{value:.2f}" if isinstance(value, float) else escape(str(value)) for value in values)
        return f"<tr>{''.join(f'<{tag} {look}>{text}</{tag}>' for text in texts)}</tr>".replace("\n", "<br>")

    of = f"{table.columns.name} " if table.columns.name else ""
    head = [table.index.name or ""] * index + [f"{of}{column}" for column in table.columns]
    return f"<table>{row('th', head)}{''.join(row('td', v) for v in table.itertuples(index=index, name=None))}</table>"


def dashboard(run: Run) -> Callable[[Mapping[str, Any]], None] | None:
    """For `train(on_log=)`: a panel in the cell that follows the run, also one that goes on; None where nobody watches.

    Closing the browser loses nothing: the panel is made of the run's files and of the rows that go into them.
    """
    if not live():
        return None
    import ipywidgets
    from IPython.display import display

    try:
        rows = curves.metrics(run.log_dir).to_dict("records")
    except FileNotFoundError:
        rows = []
    panel = ipywidgets.HTML(_page(rows, run) if rows else "reading the corpus")
    panel.add_class("dsl-dashboard")
    display(panel)

    def follow(row: Mapping[str, Any]) -> None:
        rows[:] = [*(old for old in rows if old["step"] < row["step"]), row]
        panel.value = _page(rows, run)

    return follow


def _page(rows: Sequence[Mapping[str, Any]], run: Run) -> str:
    """The newest row in words, the curves, the load of the experts, and the newest texts."""
    row = rows[-1]
    drawn = [_curve(title, [(r["step"], r.get(name)) for r in rows], rows) for name, title in SERIES.items()]
    line = runlog.progress({"seconds_left": 0, **row}, run.train.max_steps)
    return f"<pre>{line}</pre>{''.join(drawn)}{_load(row)}{_texts(run)}"


def _curve(title: str, points: list[tuple[float, float | None]], rows: Sequence[Mapping[str, Any]]) -> str:
    """A small picture as text, which costs a millisecond where a figure costs a second."""
    points = [(x, y) for x, y in points if y is not None and y == y]
    if not points:
        return ""
    every = math.ceil(len(points) / POINTS)
    points = points[(len(points) - 1) % every :: every]  # the last one is always there
    (first, last), values = (rows[0]["step"], rows[-1]["step"]), [y for _, y in points]
    low, high = min(values), max(values)
    wide, tall = 280 / max(last - first, 1), 90 / (high - low or 1)
    path = " ".join(f"{10 + wide * (x - first):.1f},{115 - tall * (y - low):.1f}" for x, y in points)
    words = [(10, 14, f"{title}: {values[-1]:.4g}"), (10, 132, f"step {first:.0f} to {last:.0f}")]
    words += [(200, 14, f"highest {high:.3g}"), (200, 132, f"lowest {low:.3g}")]
    texts = "".join(f"<text x='{x}' y='{y}' font-size='11' fill='currentColor'>{text}</text>" for x, y, text in words)
    color = plots.COLORS["held_out"]
    line = f"<polyline points='{path}' fill='none' stroke='{color}' stroke-width='1.5'/>"
    return f"<svg width='300' height='140'>{line}{texts}</svg>"


def _load(row: Mapping[str, Any]) -> str:
    """Shares of the experts, a row a MoE layer; the darker a cell, the busier."""
    lines = []
    for name in (name for name in row if name.startswith("load_")):
        shares = [float(share) for share in row[name].split(";")]
        cells = (
            f"<td style='background:rgba(86,180,233,{min(1, s * len(shares) / 2):.2f});padding:0 6px'>{s:.0%}</td>"
            for s in shares
        )
        lines.append(f"<tr><th>layer {name.removeprefix('load_')}</th>{''.join(cells)}</tr>")
    return f"<table class='dsl-load'>{''.join(lines)}</table>"


def _texts(run: Run) -> str:
    path = run.log_dir / "generations.csv"
    return _read_texts(path.parent, path.stat().st_size) if path.exists() else ""


@functools.lru_cache(1)
def _read_texts(log_dir: Path, size: int) -> str:
    """The newest texts, read again only when the file has grown: that costs more than the whole page."""
    texts = curves.texts(log_dir)
    if texts.empty:
        return ""
    shown = "\n\n".join(f"{prompt}{text}" for prompt, text in texts.iloc[:, -1].dropna().items())
    return f"<p>step {texts.columns[-1]} writes:</p>{colors.box(escape(shown))}"
