"""How text of a model looks in HTML: each expert in its colour, everything escaped. Needs no torch, no matplotlib."""

from html import escape

# Okabe and Ito's colours, pale enough to read on: an expert keeps its colour
PALETTE = ("#f5c56b", "#a9d8f2", "#7fcdb2", "#f4ec9a", "#8ab6dd", "#eda67a", "#e3b3cd", "#cccccc")


def style(expert: int) -> str:
    """The look of an expert: of the first eight from the palette, of the others from hues that never come again."""
    hue, light = 137.508 * expert % 360, (58, 74)[expert % 2]  # the golden angle
    color = PALETTE[expert] if expert < len(PALETTE) else f"hsl({hue:.0f},70%,{light}%)"
    return f"background:{color};color:#111"


def span(text: str, expert: int | None = None, title: str = "") -> str:
    """A piece of text in the colour of an expert, if it has one; `title` is shown where the mouse rests."""
    look = "" if expert is None else style(expert)
    return f"<span style='{look}' title='{escape(title)}'>{escape(text)}</span>"


def box(inside: str) -> str:
    """Spans in their lines."""
    return f"<pre style='white-space:pre-wrap;line-height:1.5;margin:0'>{inside}</pre>"
