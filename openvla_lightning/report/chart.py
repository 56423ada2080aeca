"""Success rates as bars with whiskers."""

from collections.abc import Iterable
from pathlib import Path

from openvla_lightning.report.results import SuccessRate


def draw_chart(bars: dict[str, dict[str, SuccessRate]], path: str | Path, title: str) -> Path:
    """Draw grouped bars with interval whiskers.

    Args:
        bars: group on the x axis -> name in the legend -> rate.
        path: PNG to write.
    """
    from matplotlib.figure import Figure  # not pyplot: no display, no global state

    names = list(dict.fromkeys(name for group in bars.values() for name in group))
    width = 0.8 / len(names)
    figure = Figure(
        figsize=(max(5.0, 1.5 + 0.9 * len(bars) + 0.45 * len(bars) * len(names)), 3.8), layout="constrained"
    )
    axes = figure.subplots()
    for index, name in enumerate(names):
        present = [(x, group[name]) for x, group in enumerate(bars.values()) if name in group]
        places = [x + (index - (len(names) - 1) / 2) * width for x, _ in present]
        rates = [100 * rate.rate for _, rate in present]
        whiskers = _whiskers(rate for _, rate in present)
        axes.bar(places, rates, 0.9 * width, yerr=whiskers, capsize=3, label=name, color=f"C{index}")
        for place, (_, rate) in zip(places, present, strict=True):
            number = f"{100 * rate.rate:.0f}" if rate.episodes else "-"
            axes.text(place, 100 * rate.interval[1] + 1.5, number, ha="center", fontsize=8)
    labels = _short(list(bars))
    long = len(bars) > 1 and max(map(len, labels)) > 18
    axes.set_xticks(range(len(bars)), labels, rotation=35 if long else 20 if len(bars) > 4 else 0)
    for label in axes.get_xticklabels() if long else []:
        label.set(ha="right", rotation_mode="anchor", fontsize=7)
    axes.set_ylim(0, 108)
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylabel("success (%), 95 % interval")
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    if len(names) > 1:
        beside = int(figure.get_figwidth() / (0.6 + 0.075 * max(map(len, names))))  # inches a name takes
        columns = max(1, min(4, beside, len(names)))
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=columns, fontsize=8)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


def _short(names: list[str]) -> list[str]:
    """Without the words that the first names all begin or end with; a benchmark's names are whole sentences."""
    words = [name.split("_") for name in names]
    tasks = words[:-1]  # the last one stands for all
    if len(tasks) < 2 or max(map(len, names)) < 30:
        return names
    start = _alike(tasks)
    end = _alike([task[start:][::-1] for task in tasks])
    return [" ".join(task[start : len(task) - end]) for task in tasks] + names[-1:]


def _alike(sentences: list[list[str]]) -> int:
    """How many words all begin with."""
    columns = enumerate(zip(*sentences, strict=False))
    return next((index for index, words in columns if len(set(words)) > 1), min(map(len, sentences)))


def _whiskers(rates: Iterable[SuccessRate]) -> list[list[float]]:
    ends = [(100 * (rate.rate - rate.interval[0]), 100 * (rate.interval[1] - rate.rate)) for rate in rates]
    return [list(side) for side in zip(*ends, strict=True)]
