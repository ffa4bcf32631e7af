"""The plots, as PNG. What was not measured is left out of them; the table says why."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from bench.results import Row, Samples, p90, slope

mpl.use("Agg")
_OURS, _WARM, _FLOOR, _PEERS = "#1b6ca8", "#e08e0b", "#5a5a5a", "#b5403a"


def draw(rows: Sequence[Row], directory: Path) -> list[str]:
    """Write every plot there are figures for; their names, relative to ``directory``'s parent."""
    directory.mkdir(parents=True, exist_ok=True)
    samples = {row.key: row.samples for row in rows if row.samples}
    drawn = []
    plots: dict[str, Callable[[Axes, dict[str, Samples]], bool]] = {
        "fork-by-size": _fork_by_size,
        "fork-times": _fork_times,
        "pause-by-size": _pause_by_size,
        "memory": _memory,
    }
    for name, plot in plots.items():
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        if plot(figure.subplots(), samples):
            figure.savefig(directory / f"{name}.png", dpi=120)
            drawn.append(f"{directory.name}/{name}.png")
    return drawn


def _points(
    axes: Axes, x: Sequence[float], groups: Sequence[list[float]], color: str, label: str
) -> None:
    """Medians joined by a line, whiskers up to the 90th percentile."""
    medians = [statistics.median(group) for group in groups]
    above = [max(0.0, p90(g) - m) for g, m in zip(groups, medians, strict=True)]
    axes.errorbar(
        x, medians, yerr=[[0.0] * len(above), above],
        marker="o", capsize=3, color=color, label=label,
    )  # fmt: skip


def _fork_by_size(axes: Axes, samples: dict[str, Samples]) -> bool:
    sizes = samples.get("fork-size")
    if not sizes:
        return False
    names = {0.25: "256 MiB", 1.0: "1 GiB, 200 MB used", 4.0: "4 GiB"}
    _points(
        axes,
        list(names),
        [sizes[name] for name in names.values()],
        _OURS,
        "Stillframe, cold fork over HTTP",
    )
    if floor := samples.get("cold-fork", {}).get("floor"):
        _points(axes, [1.0], [floor], _FLOOR, "floor, no control plane")
    if peers := samples.get("fork-peer", {}).get("peer fork"):
        _points(axes, [1.0], [peers], _PEERS, "peers' way: copy and restore")
    if warm := samples.get("warm-fork", {}).get("warm"):
        _points(axes, [1.0], [warm], _WARM, "Stillframe, warm fork over HTTP")
    axes.set(xscale="log", yscale="log", xlabel="guest memory (GiB)", ylabel="ms to running",
             title="Fork to running by guest size")  # fmt: skip
    axes.set_xticks(list(names), [f"{size:g}" for size in names])
    axes.xaxis.minorticks_off()
    _finish(axes)
    return True


def _fork_times(axes: Axes, samples: dict[str, Samples]) -> bool:
    series = {
        "floor": (samples.get("cold-fork", {}).get("floor"), _FLOOR),
        "cold": (samples.get("cold-fork", {}).get("cold"), _OURS),
        "warm": (samples.get("warm-fork", {}).get("warm"), _WARM),
    }
    there = [(name, sorted(values), color) for name, (values, color) in series.items() if values]
    for name, values, color in there:
        share = [index / len(values) for index in range(len(values) + 1)]
        axes.step([values[0], *values], share, where="post", color=color, label=name)
    if not there:
        return False
    axes.set(xlabel="ms to running", ylabel="share of forks", title="Distribution of fork times")
    axes.set_xlim(left=0)
    _finish(axes)
    return True


def _pause_by_size(axes: Axes, samples: dict[str, Samples]) -> bool:
    busy = samples.get("busy-pause")
    if not busy:
        return False
    sizes = [gib for gib in (1, 2, 4) if f"ours {gib} GiB: gap" in busy]
    for who, color, label in (("ours", _OURS, "Stillframe"), ("peers", _PEERS, "peers' way")):
        groups = [busy[f"{who} {gib} GiB: gap"] for gib in sizes]
        _points(axes, sizes, groups, color, label)
    axes.set(yscale="log", xlabel="guest memory (GiB)", ylabel="pause seen by the guest (ms)",
             title="Pause of a guest that rewrites memory")  # fmt: skip
    axes.set_xticks(sizes, [str(size) for size in sizes])
    _finish(axes)
    return True


def _memory(axes: Axes, samples: dict[str, Samples]) -> bool:
    memory = samples.get("fork-memory")
    if not memory:
        return False
    for key, color, label in (
        ("available with forks (MiB)", _OURS, "idle forks"),
        ("available with baseline (MiB)", _FLOOR, "the same VMMs, loaded, never run"),
    ):
        taken = [memory[key][0] - value for value in memory[key]]
        each = slope(list(enumerate(taken)))
        axes.plot(
            range(len(taken)),
            taken,
            marker="o",
            markersize=3,
            color=color,
            label=f"{label}: {each:.1f} MiB each",
        )
    axes.set(xlabel="VMs", ylabel="less available memory (MiB)", title="Memory of the host by VMs")
    _finish(axes)
    return True


def _finish(axes: Axes) -> None:
    axes.grid(visible=True, which="both", alpha=0.3)
    if axes.get_yscale() == "log":  # plain numbers instead of powers
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.yaxis.set_minor_formatter(ScalarFormatter())
    axes.legend()
