"""The playground: a prompt, its controls, and what happens inside the model while the text comes.

Generation runs in a thread, so the kernel stays free; only the values of widgets are set from there, never printed
output. What is shown is made by plain functions from `Token`s, which work without a browser too. Knows nothing of how
tokens are made.

Shape letters: L MoE layers, E experts.
"""

import threading
import time
from collections.abc import Sequence
from html import escape

import ipywidgets as W
import torch
from torch import Tensor

from dsl import checkpoint, colors, hub, settings
from dsl.generation import Token, generate

PAUSE = 0.1  # seconds between two updates of the screen, at least


def places() -> list[tuple[str, str]]:
    """(name, folder) of every step of the demo, then of every run at home; the newest step of each first."""
    runs = [path for path in sorted((settings.home() / "checkpoints").glob("*")) if path.is_dir()]
    demo = settings.find_run("demo")
    runs = [demo, *(run for run in runs if run != demo)] if demo else runs
    steps = [(run, step) for run in runs for step in reversed(checkpoint.steps(run))]
    return [(f"{run.name}, step {step}", str(checkpoint.step_dir(run, step))) for run, step in steps]


def load_so_far(tokens: Sequence[Token], experts: int) -> Tensor:
    """How often each expert was chosen, [L, E] int64."""
    chosen = torch.stack([token.experts for token in tokens]).transpose(0, 1).flatten(1)
    counts = [row.bincount(minlength=experts) for row in chosen]
    return torch.stack(counts) if counts else chosen.new_empty(0, experts)


def text_html(prompt: str, tokens: Sequence[Token], layer: int = 0) -> str:
    """The text; each token in the colour of its first expert in row `layer`, with its figures on hover."""
    return colors.box(escape(prompt) + "".join(_span(token, layer) for token in tokens))


def _span(token: Token, layer: int) -> str:
    experts = token.experts[layer].tolist() if layer < len(token.experts) else []
    told = [f"probability {token.probability:.3f}", *[f"experts {', '.join(map(str, experts))}"][: len(experts)]]
    told += [f"{p:.3f} {text!r}" for _, text, p in token.runners_up]
    return colors.span(token.text, experts[0] if experts else None, "\n".join(told))


def load_html(tokens: Sequence[Token], layers: Sequence[int], experts: int) -> str:
    """One row a MoE layer: each expert's share of the assignments so far, in the expert's colour; it is the legend."""
    if not tokens or not layers:
        return ""
    head = "".join(f"<th style='{colors.style(expert)}'>{expert}</th>" for expert in range(experts))
    rows = [f"<tr><th>expert</th>{head}</tr>"]
    for layer, row in zip(layers, load_so_far(tokens, experts), strict=True):
        cells = "".join(f"<td style='text-align:right;padding:0 4px'>{share:.0%}</td>" for share in row / row.sum())
        rows.append(f"<tr><th>layer {layer}</th>{cells}</tr>")
    return f"<table class='dsl-load'>{''.join(rows)}</table>"


class Panel:
    """One checkpoint's side of the screen: its choice, text, load and figures."""

    def __init__(self, options: list[tuple[str, str]], value: str | None, name: str = "Checkpoint"):
        wide = {"width": "auto", "max_width": "100%"}  # never past the edge of its side
        self.source = W.Dropdown(options=options, value=value, description=name, layout=wide)
        self.layer = W.Dropdown(options=[], description="Colours of", layout={"width": "230px", "display": "none"})
        self.text, self.load, self.status = W.HTML(colors.box("")), W.HTML(), W.HTML("ready" if value else "")
        for name in ("source", "layer", "text", "load", "status"):
            getattr(self, name).add_class(f"dsl-{name}")
        choice = W.HBox([self.source, self.layer], layout={"flex_flow": "row wrap"})
        self.box = W.VBox([choice, self.status, self.text, self.load], layout={"min_width": "0"})
        self.source.observe(self._size, "value")
        self._size()
        self.loaded, self.prompt, self.tokens, self.end, self.drawn = (None, None, None), "", [], "ready", 0.0
        self.layer.observe(lambda _: self.draw(), "value")

    def _size(self, _=None) -> None:
        """An equal share of the line, or no more than the choice needs while nothing is chosen."""
        self.box.layout.flex = "1 1 0" if self.source.value else "0 1 auto"

    def begin(self, prompt: str, stop: threading.Event, sampling: dict) -> None:
        """Load what is chosen and start. Raises CheckpointError, ValueError."""
        self.prompt, self.tokens, self.end, self.load.value = prompt, [], "loading", ""
        self.draw()
        source = self.source.value
        if not source:
            raise ValueError("there is no checkpoint yet: train one in notebook 03")
        if self.loaded[0] != source:
            self.loaded = (source, *hub.load(source))
        _, model, tokenizer = self.loaded
        self.layers = [block.layer_index for block in model.model.moe_blocks]
        options = [(f"layer {layer}", row) for row, layer in enumerate(self.layers)]
        if [*self.layer.options] != options:
            self.layer.options, self.layer.value = options, 0 if options else None
            self.layer.layout.display = None if options else "none"
        self.stream, self.end, self.start = generate(model, tokenizer, prompt, stop=stop, **sampling), "running", None

    def advance(self) -> bool:
        """One token more; whether there was one."""
        self.start = self.start or time.perf_counter()
        token = next(self.stream, None)
        if token is None:
            return False
        self.tokens.append(token)
        self.last = time.perf_counter()
        if time.perf_counter() - self.drawn > PAUSE + len(self.tokens) / 2000:
            self.draw()
        return True

    def draw(self) -> None:
        tokens, self.drawn = [*self.tokens], time.perf_counter()
        self.text.value = text_html(self.prompt, tokens, self.layer.value or 0)
        said = [self.end]
        if tokens:
            self.load.value = load_html(tokens, self.layers, self.loaded[1].config.num_experts)
            speed = len(tokens) / max(self.last - self.start, 1e-9)
            said += [f"{len(tokens)} tokens", f"{speed:.0f} tokens/s", f"state {tokens[-1].state_bytes:,} bytes"]
        self.status.value = escape(", ".join(said))


class Playground:
    """The widget. `generate()` and `stop()` are what the buttons do; `join()` waits and returns the texts."""

    def __init__(self, source: str | None = "demo", beside: str | None = None, prompt: str = "Return a new"):
        options = places()
        chosen = [self._find(options, name) for name in (source, beside)]
        wide = {"style": {"description_width": "110px"}, "layout": {"width": "330px"}}
        self.prompt = W.Textarea(value=prompt, description="Prompt", layout={"width": "98%", "height": "60px"})
        self.temperature = W.FloatSlider(value=0.8, min=0, max=2, step=0.05, description="Temperature", **wide)
        self.top_k = W.IntSlider(value=0, min=0, max=200, description="Top-k (0: all)", **wide)
        self.top_p = W.FloatSlider(value=1, min=0.05, max=1, step=0.05, description="Top-p", **wide)
        self.penalty = W.FloatSlider(value=1, min=1, max=2, step=0.05, description="Repetition", **wide)
        self.length = W.IntSlider(value=100, min=1, max=1000, description="Tokens", **wide)
        self.seed = W.BoundedIntText(value=0, min=0, max=2**53, description="Seed", **wide)
        self.go = W.Button(description="Generate", button_style="primary")
        self.halt = W.Button(description="Stop", button_style="danger", disabled=True)
        self.panels = [Panel(options, chosen[0] or None), Panel([("nothing", ""), *options], chosen[1], "Beside")]
        for name in ("prompt", "temperature", "top_k", "top_p", "penalty", "length", "seed", "go", "halt"):
            getattr(self, name).add_class(f"dsl-{name.replace('_', '-')}")
        controls = [self.temperature, self.top_k, self.top_p, self.penalty, self.length, self.seed]
        sides = W.HBox([panel.box for panel in self.panels])
        rows = [self.prompt, W.HBox(controls, layout={"flex_flow": "row wrap"}), W.HBox([self.go, self.halt]), sides]
        self.box = W.VBox(rows)
        self._stop, self._thread, self._lock = threading.Event(), None, threading.Lock()
        self.go.on_click(self.generate)
        self.halt.on_click(self.stop)

    @staticmethod
    def _find(options: list[tuple[str, str]], name: str | None) -> str:
        """The option of a run (its newest step) or of a step folder; anything else becomes an option of its own."""
        place = settings.find_run(name) if name else None
        steps = checkpoint.steps(place) if place else []
        folder = str(checkpoint.step_dir(place, steps[-1])) if steps else str(place or name or "")
        if folder and folder not in [value for _, value in options]:
            options.append((name, folder))
        return folder

    def _repr_mimebundle_(self, **options):
        return self.box._repr_mimebundle_(**options)

    def generate(self, _=None) -> None:
        """Start, unless it is running."""
        with self._lock:  # two clicks may come before the button is grey, and from two threads
            if self._thread is not None and self._thread.is_alive():
                return
            self._stop.clear()
            self.go.disabled, self.halt.disabled = True, False
            sampling = {"temperature": self.temperature.value, "top_p": self.top_p.value, "seed": self.seed.value}
            sampling |= {"top_k": self.top_k.value or None, "repetition_penalty": self.penalty.value}
            sampling |= {"max_new_tokens": self.length.value}
            self._thread = threading.Thread(target=self._run, args=(self.prompt.value, sampling), daemon=True)
            self._thread.start()

    def stop(self, _=None) -> None:
        """End after the token that is being made."""
        self._stop.set()

    def join(self, seconds: float | None = None) -> list[str]:
        """The new texts of both sides, when they have ended."""
        if self._thread is not None:
            self._thread.join(seconds)
        return ["".join(token.text for token in panel.tokens) for panel in self.panels if panel.source.value]

    def _run(self, prompt: str, sampling: dict) -> None:
        going = [panel for i, panel in enumerate(self.panels) if i == 0 or panel.source.value]
        try:
            for panel in going:
                self._guard(panel, lambda panel=panel: panel.begin(prompt, self._stop, sampling))
            while going := [panel for panel in going if panel.end == "running"]:
                for panel in going:  # a token each, in turn
                    if not self._guard(panel, panel.advance) and panel.end == "running":
                        panel.end = "stopped" if self._stop.is_set() else "done"
                        self._guard(panel, panel.draw)
        finally:
            self.halt.disabled, self.go.disabled = True, False

    @staticmethod
    def _guard(panel: Panel, step):
        try:
            return step()
        except Exception as error:  # a thread's errors are seen by nobody but here
            panel.end = f"error: {error}" if isinstance(error, ValueError | RuntimeError) else f"error: {error!r}"
            panel.status.value = escape(panel.end)
