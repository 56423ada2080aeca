"""Results as something to look at: a table on the screen, `report.md`, a bar chart.

`python -m openvla_lightning.report runs/demo` compares every results.json below a folder: a row per policy, a column
per set of tasks.
"""

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console

from openvla_lightning.results import Results, SuccessRate, find_results
from openvla_lightning.tables import Rows, markdown, table

CHART_NAME, REPORT_NAME = "success.png", "report.md"


def task_rows(results: Results) -> Rows:
    """Header and one row per task, per family and overall: successes, rate, 95 % interval, mean length."""
    groups = [(f"  {name}", rate) for name, rate in results.tasks.items()]
    groups += list(results.families.items()) if len(results.families) > 1 else []
    columns = {"successes": _successes, "rate": _rate, "interval": _interval, "steps": lambda r: f"{r.mean_length:.1f}"}
    if any(episode.progress not in (0, 1) for episode in results.episodes):
        columns["progress"] = lambda rate: f"{100 * rate.progress:.0f} %"
    if results.overall.errors:
        columns["errors"] = lambda rate: str(rate.errors)
    rows = [["task", *columns]]
    return rows + [
        [name, *(show(r) for show in columns.values())] for name, r in [*groups, ("all tasks", results.overall)]
    ]


def _successes(rate: SuccessRate) -> str:
    return f"{rate.successes} of {rate.episodes}"


def _rate(rate: SuccessRate) -> str:
    return f"{100 * rate.rate:.1f} %" if rate.episodes else "-"


def _interval(rate: SuccessRate) -> str:
    low, high = rate.interval
    return f"{100 * low:.0f}-{100 * high:.0f} %"


def offline_rows(results: Results) -> Rows:
    """Header and one row per action dimension, and their mean."""
    offline = results.offline or {}
    rows = [["dimension", "token accuracy", "L1 (normalised)", "L1 as executed"]]
    for name, values in offline["dimensions"].items():
        rows.append(
            [name, f"{100 * values['token_accuracy']:.1f} %", f"{values['l1']:.4f}", f"{values['l1_executed']:.4g}"]
        )
    return [*rows, ["all", f"{100 * offline['token_accuracy']:.1f} %", f"{offline['l1']:.4f}", ""]]


def comparison_rows(results: Sequence[Results]) -> Rows:
    """Header and one row per policy, one column per task set, in order of first appearance."""
    columns = list(dict.fromkeys(result.task_set for result in results))
    rows: dict[str, dict[str, str]] = {}
    for result in results:
        text = str(result.overall) + ("" if result.complete else " interrupted")
        rows.setdefault(result.row, {})[result.task_set] = text
    header = ["policy", *(f"{column} tasks" for column in columns)]
    return [header, *([name, *(cells.get(column, "-") for column in columns)] for name, cells in rows.items())]


def write_report(results: Results, folder: str | Path, console: Console | None = None) -> Path:
    """Write results.json, report.md and, for rollouts, a bar chart into `folder`; print the table.

    Returns:
        Path of report.md.
    """
    folder = Path(folder)
    results.save(folder)
    rows = offline_rows(results) if results.offline else task_rows(results)
    title = f"{results.row} in {results.env}" + ("" if results.complete else " (interrupted)")
    lines = [f"# {title[0].upper()}{title[1:]}", "", markdown(rows), ""]
    if results.offline:
        lines += [f"{results.offline['steps']} held-out steps of `{results.offline['dataset']}`.", ""]
    if results.episodes:
        bars = {name: {results.row: rate} for name, rate in _bars(results).items()}
        draw_chart(bars, folder / CHART_NAME, title)
        lines += [
            "Success rates with their Wilson 95 % intervals; steps of an episode on average.",
            "",
            f"![Success rates]({CHART_NAME})",
            "",
        ]
    videos = [episode for episode in results.episodes if episode.video]
    if videos:
        lines += ["## Videos", ""]
        lines += [f"- [{'success' if e.success else 'failure'}: {e.instruction}]({e.video}) ({e.task})" for e in videos]
        lines += [""]
    if results.notes:
        lines += ["## Beware", "", *(f"- {note}" for note in results.notes), ""]
    if results.self_test:
        lines += ["## The world before it", ""]
        lines += [
            f"- {'as it should' if c['ok'] else '**wrong**'}: {c['name']}, {c['seen']}" for c in results.self_test
        ]
        lines += [""]
    lines += ["## How it was made", "", *_provenance(results)]
    (console or Console()).print(table(rows, title))
    return _write(folder / REPORT_NAME, lines)


def _bars(results: Results) -> dict[str, SuccessRate]:
    return {**(results.families if len(results.families) > 1 else results.tasks), "all tasks": results.overall}


def _provenance(results: Results) -> list[str]:
    facts = {
        **results.checkpoint,
        "instructions": results.instructions,
        **results.control,
        "seed": results.seed,
        **results.timing,
        **results.versions,
    }
    return [f"- {name.replace('_', ' ')}: `{value}`" for name, value in facts.items() if value is not None]


def compare(paths: Sequence[str | Path], folder: str | Path | None = None, console: Console | None = None) -> Path:
    """Put several evaluations side by side: print a table, write report.md and a bar chart.

    Args:
        paths: results.json files, or folders that are searched for them.
        folder: where to write; by default the first of `paths` that is a folder.

    Returns:
        Path of report.md.

    Raises:
        FileNotFoundError: when there are no results.
        ValueError: when two results are for the same policy, instructions and tasks, or none is of rollouts.
    """
    sources = {path: Results.load(path) for path in find_results(paths)}
    results = {path: result for path, result in sources.items() if result.episodes}
    if not results:
        raise ValueError(f"none of {', '.join(map(str, sources))} holds rollouts; only success rates are compared")
    cells: dict[tuple[str, str], Path] = {}
    for path, result in results.items():
        if clash := cells.get((result.row, result.task_set)):
            raise ValueError(
                f"{clash} and {path} are both {result.row!r} on {result.task_set} tasks: give one another `label` or "
                "`task_set` when evaluating, or name the files to compare"
            )
        cells[result.row, result.task_set] = path
    folder = Path(folder) if folder else next((Path(p) for p in paths if Path(p).is_dir()), Path())
    rows = comparison_rows(list(results.values()))
    bars: dict[str, dict[str, SuccessRate]] = {}
    for result in results.values():
        bars.setdefault(f"{result.task_set} tasks", {})[result.row] = result.overall
    draw_chart(bars, folder / CHART_NAME, "Success rate")

    lines = ["# Success rates", "", markdown(rows), "", "Wilson 95 % intervals in brackets.", ""]
    lines += [f"![Success rates]({CHART_NAME})", "", "## Evaluations", ""]
    for path, result in results.items():
        lines.append(f"- {result.row}, {result.task_set} tasks: {result.overall.episodes} episodes, `{path}`")
    (console or Console()).print(table(rows, "Success rate and its 95 % interval"))
    return _write(folder / REPORT_NAME, lines)


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
            axes.text(place, 100 * rate.interval[1] + 1.5, f"{100 * rate.rate:.0f}", ha="center", fontsize=8)
    axes.set_xticks(range(len(bars)), list(bars), rotation=20 if len(bars) > 4 else 0)
    axes.set_ylim(0, 108)
    axes.set_yticks(range(0, 101, 20))
    axes.set_ylabel("success (%), 95 % interval")
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    if len(names) > 1:
        figure.legend(
            *axes.get_legend_handles_labels(), loc="outside lower center", ncols=min(4, len(names)), fontsize=8
        )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


def _whiskers(rates: Iterable[SuccessRate]) -> list[list[float]]:
    ends = [(100 * (rate.rate - rate.interval[0]), 100 * (rate.interval[1] - rate.rate)) for rate in rates]
    return [list(side) for side in zip(*ends, strict=True)]


def _write(path: Path, lines: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines).rstrip() + "\n")
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of `python -m openvla_lightning.report`."""
    parser = argparse.ArgumentParser("python -m openvla_lightning.report", description=compare.__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("paths", nargs="+", type=Path, help="results.json files, or folders searched for them")
    parser.add_argument("--out", type=Path, help="folder for report.md and the chart (default: the first folder named)")
    options = parser.parse_args(arguments)
    try:
        print(f"written to {compare(options.paths, options.out)}")
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
