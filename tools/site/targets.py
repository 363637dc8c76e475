"""The plots of docs/conventions.md: the target of each convention by `lsce_spec`, for light and dark pages."""

import io

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lsce_spec import CONVENTIONS, Convention, smoothing_weights

CLASSES, LABEL, LARGEST, SMOOTHING = 5, 3, 1, 0.2
# Text and lines, and the colours of the label, of the other classes, and of the largest logit.
INK = {"light": "#24292f", "dark": "#d6dbe1"}
COLOURS = {"light": ("#0b63b5", "#8c959f", "#bc4c00"), "dark": ("#6cb6ff", "#909dab", "#f69d50")}
SHARED = {"svg.fonttype": "path", "svg.hashsalt": "lsce", "font.size": 11, "axes.spines.top": False}
FIGURES = {
    "targets": f"Targets of {CLASSES} classes, each a bar; the convention decides where the smoothing goes.",
    "on_off": "Target at the label and elsewhere against the smoothing, one plot for each convention.",
}


def pictures() -> dict[str, bytes]:
    """Return the plots as SVG files, by name: `targets-light.svg` and so on."""
    drawn = {}
    for theme, ink in INK.items():
        colours = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), ink)
        with rc_context({**SHARED, **colours, "axes.spines.right": False}):
            for name, draw in (("targets", _draw_target), ("on_off", _draw_on_off)):
                figure = Figure(figsize=(6.4, 5), layout="constrained")
                axes = figure.subplots(2, 2, sharex=True, sharey=True)
                for one, convention in zip(axes.flat, CONVENTIONS.values(), strict=True):
                    draw(one, convention, COLOURS[theme])
                    one.set_title(convention.name, family="monospace")
                _finish(name, figure, axes)
                buffer = io.BytesIO()
                figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
                drawn[f"{name}-{theme}.svg"] = buffer.getvalue()
    return drawn


def markdown() -> str:
    """Return the plots as the page shows them, with their captions."""
    parts = [
        f"The target of label {LABEL} among {CLASSES} classes, smoothing {SMOOTHING:g}, where class {LARGEST} has the "
        "largest logit:",
        _image("targets"),
        f"The target at the label (`on`) and elsewhere (`off`) as the smoothing grows, of {CLASSES} classes:",
        _image("on_off"),
    ]
    return "\n\n".join(parts) + "\n"


def _image(name: str) -> str:
    directives = (
        f":::{{image}} /images/{name}-{theme}.svg\n:alt: {FIGURES[name]}\n:class: only-{theme}\n:align: center\n:::"
        for theme in INK
    )
    return "\n\n".join(directives)


def target(convention: Convention, smoothing: float) -> np.ndarray:
    """Return the target of the label, with what the convention adds at the largest logit."""
    on, off = smoothing_weights(convention, smoothing, CLASSES)
    values = np.full(CLASSES, off)
    values[LABEL] = on
    if convention.at_max is not None:
        values[LARGEST] += convention.at_max(smoothing, CLASSES)
    return values


def _draw_target(axes: Axes, convention: Convention, colours: tuple[str, str, str]) -> None:
    values = target(convention, SMOOTHING)
    of_largest = colours[2] if convention.at_max is not None else colours[1]
    bars = [{LABEL: colours[0], LARGEST: of_largest}.get(k, colours[1]) for k in range(CLASSES)]
    axes.bar(range(CLASSES), values, color=bars)
    for k, value in enumerate(values):
        axes.annotate(f"{value:g}", (k, max(value, 0)), (0, 2), textcoords="offset points", ha="center", size=9)
    axes.axhline(0, color=colours[1], linewidth=0.8)


def _draw_on_off(axes: Axes, convention: Convention, colours: tuple[str, str, str]) -> None:
    smoothings = np.linspace(0, 1, 201)
    values = np.array([target(convention, float(smoothing)) for smoothing in smoothings])
    axes.plot(smoothings, values[:, LABEL], color=colours[0], label="on")
    axes.plot(smoothings, values[:, 0], color=colours[1], label="off")
    if convention.at_max is not None:
        axes.plot(smoothings, values[:, LARGEST], color=colours[2], linestyle="--", label="at the largest logit")
    axes.axhline(0, color=colours[1], linewidth=0.4)
    axes.legend(frameon=False, fontsize=9)


def _finish(name: str, figure: Figure, axes: np.ndarray) -> None:
    if name == "targets":
        axes[0, 0].set(ylim=(-0.3, 1.25), xticks=range(CLASSES))
    figure.supxlabel("class" if name == "targets" else "smoothing e", size=11)
    figure.supylabel("target", size=11)
