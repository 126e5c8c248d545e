"""Draws figures by matplotlib, for light and for dark pages."""

import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, Optional, Union

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as MatplotlibFigure

MOST_POINTS = 500  # of a curve
MOST_COLUMNS = 200  # of a heat map
BASELINE = "#8a8a8a"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito's
HEAT = "cividis"
MOST_LINES = 12  # in a panel
_TEXT = {False: "#24292f", True: "#d7dae0"}  # on a light and on a dark page
_STYLE = {
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none"),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "axes.grid", "legend.frameon"), False),
    **{"grid.alpha": 0.25, "font.size": 10, "axes.titlesize": 11, "legend.fontsize": 9},
}
_INK = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color")

Points = Sequence[tuple[float, float]]
Colour = Union[str, tuple[float, ...]]
Names = tuple[str, Sequence[Any]]  # a label, and names of columns or rows
Panel = Callable[["Axes"], None]


@dataclass(frozen=True)
class Figure:
    """Panels side by side. The page gives more room to more columns of them."""

    name: str  # of its file
    alt: str  # what it shows, in words
    panels: Sequence[Panel]
    columns: int = 1
    height: float = 3.4  # of a panel, in inches

    def draw(self) -> "MatplotlibFigure":
        figure, axes = panels(-(-len(self.panels) // self.columns), self.columns, self.height)
        for axis, panel in zip(axes, self.panels):
            panel(axis)
        for axis in axes[len(self.panels) :]:
            axis.axis("off")
        return figure


def pyplot() -> ModuleType:
    """matplotlib.pyplot, without a display."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as module

    return module


def thinned(points: Points, most: int = MOST_POINTS) -> list[tuple[float, float]]:
    """At most so many points: means of neighbours, each at the middle of their iterations."""
    width = -(-len(points) // most) or 1
    blocks = [points[start : start + width] for start in range(0, len(points), width)]
    return [(sum(x for x, _ in block) / len(block), sum(y for _, y in block) / len(block)) for block in blocks]


def curve(axis: "Axes", points: Points, label: str, colour: Colour, dashed: bool = False, width: float = 1.4) -> None:
    """One line, with marks where points are few."""
    points = thinned(points)
    x, y = [x for x, _ in points], [y for _, y in points]
    style, marker = "--" if dashed else "-", "o" if len(points) < 20 else None
    axis.plot(x, y, style, label=label, color=colour, linewidth=width, marker=marker, markersize=3)


def finish(axis: "Axes", title: str, x: str = "iteration", legend: bool = True) -> None:
    axis.set_title(title)
    axis.set_xlabel(x)
    axis.grid(True)
    if legend and axis.get_legend_handles_labels()[0]:
        axis.legend()


def draw_curves(title: str, curves: Mapping[str, Points], baseline: Mapping[str, Points], axis: "Axes") -> None:
    """Named curves of a run in one panel; those of the baseline dashed, in the same colour."""
    for colour, (name, points) in zip(COLOURS, curves.items()):
        curve(axis, points, name, colour)
        if baseline.get(name):
            several = len(curves) > 1
            label, colour = (f"{name}, baseline", colour) if several else ("baseline", BASELINE)
            curve(axis, baseline[name], label, colour, dashed=True)
    finish(axis, title, legend=len(curves) > 1 or any(baseline.get(name) for name in curves))


def colour_of_layer(index: int, num_layers: int) -> Colour:
    """From blue, the first layer, to green; each can be told from the page, be it light or dark."""
    module = pyplot()
    first = 0.45 if module.rcParams["text.color"] == _TEXT[True] else 0.2
    return module.get_cmap("viridis")(first + 0.45 * index / max(1, num_layers - 1))


def draw_layers(title: str, layers: Mapping[str, Points], mean: Points, baseline: Points, axis: "Axes") -> None:
    """A measure of each layer as thin lines, and of all layers together as a thick one."""
    for index, (name, points) in enumerate(layers.items()):
        curve(axis, points, f"layer {name}", colour_of_layer(index, len(layers)), width=1.0)
    curve(axis, mean, "all layers", pyplot().rcParams["text.color"], width=2.0)
    if baseline:
        curve(axis, baseline, "all, baseline", BASELINE, dashed=True, width=2.0)
    finish(axis, title)


def draw_layers_as_heat(title: str, layers: Mapping[str, Points], axis: "Axes") -> None:
    """A measure of each layer, a row, over iterations."""
    iterations = thinned_columns(sorted({x for points in layers.values() for x, _ in points}))
    values = [dict(points) for points in layers.values()]
    table = [[of_layer.get(x, float("nan")) for x in iterations] for of_layer in values]
    draw_heat(title, table, ("iteration", iterations), ("layer", list(layers)), axis)


def thinned_columns(columns: Sequence[Any]) -> Sequence[Any]:
    """Every n-th, so that a heat map gets no more than can be seen."""
    return columns[:: -(-len(columns) // MOST_COLUMNS) or 1]


def draw_heat(
    title: str, table: Any, x: Names, y: Names, axis: "Axes", vmin: Optional[float] = None, vmax: Optional[float] = None
) -> None:
    """A table of numbers as colours, with names at some of the ticks."""
    image = axis.imshow(table, aspect="auto", cmap=HEAT, interpolation="nearest", vmin=vmin, vmax=vmax)
    axis.figure.colorbar(image, ax=axis)
    for set_ticks, (_, names), most in ((axis.set_xticks, x, 8), (axis.set_yticks, y, 12)):
        step = -(-len(names) // most)
        set_ticks(range(0, len(names), step), [str(name) for name in names[::step]])
    axis.set_title(title)
    axis.set_xlabel(x[0])
    axis.set_ylabel(y[0])


def panels(rows: int, columns: int, height: float = 3.4) -> tuple["MatplotlibFigure", list["Axes"]]:
    """(figure, axes in a list)."""
    size = (5.6 * columns, height * rows)
    figure, axes = pyplot().subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    return figure, list(axes.flat)


def picture(draw: Callable[[], Any], dark: bool = False) -> bytes:
    """PNG of a figure that ``draw`` makes: on white, or without a background for a dark page."""
    settings = {**_STYLE, **dict.fromkeys(_INK, _TEXT[dark])}
    with pyplot().rc_context(settings), warnings.catch_warnings():
        figure = draw()
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=110, facecolor="none" if dark else "white")
        pyplot().close(figure)
    return file.getvalue()
