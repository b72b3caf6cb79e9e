"""Time over floor against tokens, a panel for each layer, routing and way of filling L2."""

from __future__ import annotations

import math
from pathlib import Path

from moe_backend.bench.report import CACHED, Row

COLUMNS = 4
RATIOS = (0.8, 1, 1.2, 1.5, 2, 3, 4, 6, 8, 10, 15, 20, 30, 50, 100)


def lines_of(rows: list[Row]) -> dict[str, list[tuple[int, float]]]:
    """Points (tokens, time over floor) of each backend; what is wrong or missing has none."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in sorted(rows, key=lambda r: r.tokens):
        for name, us in {"moe_backend": row.ours_us, **row.rivals}.items():
            if isinstance(us, float):
                lines.setdefault(name, []).append((row.tokens, us / row.floor_us))
    return lines


def _panel(row: Row) -> str:
    held = "" if row.cache == "written" else f", {CACHED[row.cache]}"
    return f"{row.case}, {row.routing}{held}"


def plot(rows: list[Row], file: Path) -> None:
    """Write a PNG, or what else the file's name asks for; needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = list(dict.fromkeys(_panel(row) for row in rows))
    names = dict.fromkeys(name.partition(" ")[0] for row in rows for name in row.rivals)
    colours = {name: f"C{i % 10}" for i, name in enumerate(names)}
    columns = min(COLUMNS, len(panels))
    height = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(
        height, columns, figsize=(4.2 * columns, 3.4 * height + 0.5), squeeze=False
    )
    shown = {}
    for axis, panel in zip(axes.flat, panels, strict=False):
        own = [row for row in rows if _panel(row) == panel]
        for name, points in lines_of(own).items():
            ours = name == "moe_backend"
            (shown[name],) = axis.plot(
                *zip(*points, strict=True),
                marker="o",
                markersize=3,
                linewidth=2.5 if ours else 1,
                color="black" if ours else colours[name.partition(" ")[0]],
                linestyle="--" if " " in name else "-",  # of the padded layer
                zorder=3 if ours else 2,
            )
        tokens = sorted({row.tokens for row in own})
        axis.axhline(1, color="grey", linewidth=0.7)
        axis.set(xscale="log", yscale="log", title=panel)
        axis.set(xlabel="tokens", ylabel="time / floor")
        axis.set_xticks(tokens, [str(count) for count in tokens], minor=False)
        axis.set_xticks([], minor=True)
        low, high = axis.get_ylim()
        shown_ratios = [ratio for ratio in RATIOS if low <= ratio <= high]
        axis.set_yticks(shown_ratios, [f"{ratio:g}" for ratio in shown_ratios])
        axis.set_yticks([], minor=True)
        axis.tick_params(labelsize=7)
        axis.title.set_fontsize(9)
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_visible(False)
    figure.legend(shown.values(), shown.keys(), loc="lower center", ncols=6, fontsize=7)
    figure.tight_layout(rect=(0, 0.5 / (3.4 * height + 0.5), 1, 1))
    figure.savefig(file, dpi=110)
    plt.close(figure)
