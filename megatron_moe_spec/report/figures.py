"""Draws figures by matplotlib, for light and for dark pages."""

import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, Optional, Union

from megatron_moe_spec.report.sampling import Points, blocks, evenly, middle

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as MatplotlibFigure

MOST_POINTS = 500  # of a curve
MOST_COLUMNS = 200  # of a heat map
BASELINE = "#8a8a8a"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito's
HEAT = "cividis"
MOST_LINES = 12  # in a panel
_LIGHT, _DARK = "#24292f", "#d7dae0"  # text on a light and on a dark page
_BRIGHTER = 0.25  # of a colour map, by which the colours of layers are brighter on a dark page
_DPI = 110
_STYLE = {
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none"),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "axes.grid", "legend.frameon"), False),
    **{"grid.alpha": 0.25, "font.size": 10, "axes.titlesize": 11, "legend.fontsize": 9},
}
_INK = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color")

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
    return [(middle(block), sum(y for _, y in block) / len(block)) for block in blocks(points, most)]


def spread(points: Points, most: int = MOST_POINTS) -> list[tuple[float, float, float]]:
    """(x, smallest, largest) of what ``thinned`` takes the means of, from the first point to the last."""
    found = [(middle(block), min(y for _, y in block), max(y for _, y in block)) for block in blocks(points, most)]
    if len(found) < len(points):
        found = [(points[0][0], *found[0][1:]), *found, (points[-1][0], *found[-1][1:])]
    return found


def curve(
    axis: "Axes",
    points: Points,
    label: str,
    colour: Colour,
    dashed: bool = False,
    width: float = 1.4,
    shaded: bool = False,
) -> None:
    """One line, with marks where points are few; ``shaded``: where they are means, between the extremes, too."""
    if shaded and len(points) > MOST_POINTS:
        middles, smallest, largest = zip(*spread(points))
        axis.fill_between(middles, smallest, largest, color=colour, alpha=0.25, linewidth=0.5)
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
        curve(axis, points, name, colour, shaded=True)
        if baseline.get(name):
            several = len(curves) > 1
            label, colour = (f"{name}, baseline", colour) if several else ("baseline", BASELINE)
            curve(axis, baseline[name], label, colour, dashed=True, shaded=True)
    finish(axis, title, legend=len(curves) > 1 or any(baseline.get(name) for name in curves))


def colour_of_layer(index: int, num_layers: int) -> Colour:
    """From blue, the first layer, to green; each can be told from the page, be it light or, see ``_darken``, dark."""
    return pyplot().get_cmap("viridis")(0.2 + 0.45 * index / max(1, num_layers - 1))


def draw_layers(title: str, layers: Mapping[str, Points], mean: Points, baseline: Points, axis: "Axes") -> None:
    """A measure of each layer as thin lines, and of all layers together as a thick one."""
    for index, (name, points) in enumerate(layers.items()):
        curve(axis, points, f"layer {name}", colour_of_layer(index, len(layers)), width=1.0)
    curve(axis, mean, "all layers", _LIGHT, width=2.0)
    if baseline:
        curve(axis, baseline, "all, baseline", BASELINE, dashed=True, width=2.0)
    finish(axis, title)


def draw_layers_as_heat(title: str, layers: Mapping[str, Points], axis: "Axes") -> None:
    """A measure of each layer, a row, over iterations."""
    iterations = evenly(sorted({x for points in layers.values() for x, _ in points}), MOST_COLUMNS)
    values = [dict(points) for points in layers.values()]
    table = [[of_layer.get(x, float("nan")) for x in iterations] for of_layer in values]
    draw_heat(title, table, ("iteration", iterations), ("layer", list(layers)), axis)


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


def picture(draw: Callable[[], Any]) -> bytes:
    """PNG of a figure that ``draw`` makes, on white."""
    return pictures(draw)[0]


def pictures(draw: Callable[[], Any]) -> tuple[bytes, bytes]:
    """PNGs of a figure that ``draw`` makes: on white, and without a background for a dark page."""
    with pyplot().rc_context({**_STYLE, **dict.fromkeys(_INK, _LIGHT)}), warnings.catch_warnings():
        figure = draw()
        figure.set_dpi(_DPI)
        light = _png(figure, "white")
        # Making and laying out a figure takes longer than drawing it.
        figure.set_layout_engine("none")
        _darken(figure)
        dark = _png(figure, "none")
        pyplot().close(figure)
    return light, dark


def _png(figure: "MatplotlibFigure", background: str) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    file = io.BytesIO()
    figure.set_facecolor(background)
    FigureCanvasAgg(figure).print_png(file)  # as savefig, which draws twice
    return file.getvalue()


def _darken(figure: "MatplotlibFigure") -> None:
    """Changes what is drawn in ink, and the colours of layers, to those of a dark page."""
    from matplotlib.colors import to_rgba
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.text import Text

    of_layers = pyplot().get_cmap("viridis")
    shift = round(_BRIGHTER * of_layers.N)
    dark = {of_layers(i): of_layers(i + shift) for i in range(of_layers.N - shift)}
    dark[to_rgba(_LIGHT)] = to_rgba(_DARK)
    properties = {Text: ("color",), Line2D: ("color", "markeredgecolor", "markerfacecolor"), Patch: ("edgecolor",)}
    for kind, names in properties.items():
        for artist in figure.findobj(kind):
            for name in names:
                before = getattr(artist, f"get_{name}")()
                if (after := dark.get(to_rgba(before))) is not None:
                    getattr(artist, f"set_{name}")(after)
