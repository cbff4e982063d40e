"""Time, cost and efficiency of a run over numbers of GPUs, as a picture."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from pipeline.plan.scaling import Scaling

# Okabe and Ito's colours, which colour-blind readers can tell apart.
_BLUE, _ORANGE, _GREEN = "#0065a3", "#c2540a", "#007a58"
_DAY = 24.0


def write_scaling_picture(scaling: Scaling, path: Path) -> None:
    """Writes the curves to a file; PNG, SVG or PDF by its ending.

    Raises:
        OSError: The file cannot be written.
        ValueError: Its ending names no format.
    """
    figure = Figure(figsize=(9.0, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    gpus = [layout.num_gpus for layout in scaling.layouts]
    days = [layout.hours / _DAY for layout in scaling.layouts]
    left.loglog(gpus, days, "o-", color=_BLUE, base=2, label="with this network")
    if gpus:
        ideal = [days[0] * gpus[0] / number for number in gpus]
        left.loglog(gpus, ideal, ":", color="grey", base=2, label="if nothing were lost")
    left.set_ylabel("days to finish")
    left.yaxis.set_major_formatter(FuncFormatter(lambda value, _place: f"{value:g}"))
    left.legend(frameon=False)
    shares = (
        ("efficiency", [layout.efficiency for layout in scaling.layouts], _BLUE, "o-"),
        ("goodput", [layout.goodput for layout in scaling.layouts], _GREEN, "s--"),
        ("MFU", [layout.mfu for layout in scaling.layouts], _ORANGE, "^-."),
    )
    for name, values, colour, style in shares:
        right.semilogx(gpus, values, style, color=colour, base=2, label=name)
    right.set_ylim(0.0, 1.1)
    right.yaxis.set_major_formatter(FuncFormatter(lambda value, _place: f"{value:.0%}"))
    right.legend(frameon=False)
    for axes in (left, right):
        _plain(axes)
    title = f"{scaling.name} on {scaling.cluster.name}: reckoned, not measured"
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=160)


def _plain(axes: Axes) -> None:
    axes.set_xlabel("GPUs")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _place: f"{value:,.0f}"))
    axes.grid(visible=True, linewidth=0.4, alpha=0.5)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
