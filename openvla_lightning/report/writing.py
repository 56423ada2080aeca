"""Results as something to look at: a table on the screen, `report.md`, the same as `report.html`, a bar chart.

`python -m openvla_lightning.report runs/demo` compares every results.json below a folder: a row per policy, a column
per set of tasks, and which differences are more than chance.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.console import Console

from openvla_lightning.report.chart import draw_chart
from openvla_lightning.report.comparison import SIGNIFICANT, compare_all, power, task_mean
from openvla_lightning.report.held_out import CAVEAT, offline_lines, offline_rows
from openvla_lightning.report.page import RUN_PAGE, escape, write_page
from openvla_lightning.report.paper import SUCCESS
from openvla_lightning.report.results import Results, SuccessRate, acting_rate, find_results, success_rate
from openvla_lightning.report.tables import Rows, markdown, table

CHART_NAME = "success.png"
ACTIONS = "actions per second"


def task_rows(results: Results) -> Rows:
    """Header and one row per task, per family and overall: successes, rate, 95 % interval, mean length."""
    groups = [(f"  {name}", rate) for name, rate in results.tasks.items()]
    groups += list(results.families.items()) if len(results.families) > 1 else []
    columns: dict[str, Callable[[SuccessRate], str]] = {
        "successes": _successes,
        "rate": _rate,
        "interval": _interval,
        "steps": lambda rate: f"{rate.mean_length:.1f}" if rate.episodes else "-",
    }
    if any(episode.progress not in (0, 1) for episode in results.episodes):
        columns["progress"] = lambda rate: f"{100 * rate.progress:.0f} %" if rate.episodes else "-"
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


Groups = Mapping[str, Mapping[str, Sequence[Results]]]
"""Task set -> policy -> its evaluations, one per seed."""


def comparison_rows(groups: Groups) -> Rows:
    """Header and one row per policy, one column per task set, in order of first appearance; then the paper's.

    The last column is what `acting_rate` gives, where it was measured.
    """
    rows: dict[str, dict[str, str]] = {}
    every: dict[str, list[Results]] = {}
    for column, policies in groups.items():
        for name, results in policies.items():
            rows.setdefault(name, {})[f"{column} tasks"] = _cell(results)
            every.setdefault(name, []).extend(results)
    rates = {name: rate for name, results in every.items() if (rate := acting_rate(results))}
    for name, rate in rates.items():
        rows[name][ACTIONS] = f"{rate:,.0f}"
    for column in groups:
        for name, published in SUCCESS.get(column, {}).items():
            rows.setdefault(name, {})[f"{column} tasks"] = published
    columns = [*(f"{column} tasks" for column in groups), *([ACTIONS] if rates else [])]
    return [["policy", *columns]] + [[name, *(cells.get(c, "-") for c in columns)] for name, cells in rows.items()]


def _cell(results: Sequence[Results]) -> str:
    interrupted = "" if all(result.complete for result in results) else " interrupted"
    if len(results) == 1:
        return f"{results[0].overall}{interrupted}"
    mean, (low, high) = task_mean(results)
    return f"{100 * mean:.0f} % ({100 * low:.0f}-{100 * high:.0f}), {len(results)} seeds{interrupted}"


def difference_rows(policies: Mapping[str, Sequence[Results]]) -> Rows:
    """Header and one row per pair of policies that met the same initial states."""
    rows = [["difference", "points", "interval", "only the one / the other", "pairs", "p", "more than chance"]]
    for found in compare_all(policies):
        low, high = found.interval
        rows.append(
            [
                f"{found.second} less {found.first}",
                f"{100 * found.difference:+.1f}",
                f"{100 * low:+.0f} to {100 * high:+.0f}",
                f"{found.only_second} / {found.only_first}",
                str(found.pairs),
                "< 0.001" if found.p_value < 0.001 else f"{found.p_value:.3f}",
                "yes" if found.significant else "no",
            ]
        )
    return rows


def write_report(results: Results, folder: str | Path, console: Console | None = None) -> Path:
    """Write results.json, report.md, report.html and, for rollouts, a bar chart into `folder`; print the table.

    Returns:
        Path of report.md.
    """
    folder = Path(folder)
    results.save(folder)
    rows = offline_rows(results.offline) if results.offline else task_rows(results)
    title = f"{results.row} in {results.env}" + ("" if results.complete else " (interrupted)")
    lines = [f"# {title[0].upper()}{title[1:]}", "", markdown(rows), ""]
    if results.offline:
        lines += [f"{results.offline['steps']} held-out steps. {CAVEAT}", "", *offline_lines(results.offline)]
    if results.episodes:
        bars = {name: {results.row: rate} for name, rate in _bars(results).items()}
        draw_chart(bars, folder / CHART_NAME, title)
        lines += [
            "Success rates with their Wilson 95 % intervals; steps of an episode on average.",
            _mean_line(results),
            *(f"{name}: {rate}." for name, rate in SUCCESS.get(results.task_set, {}).items()),
            "",
            f"![Success rates]({CHART_NAME})",
            "",
        ]
    videos = [episode for episode in results.episodes if episode.video]
    if videos:
        lines += ["## Videos", ""]
        lines += [
            f"- [{'success' if e.success else 'failure'}: {escape(e.instruction)}]({e.video}) ({e.task})"
            for e in videos
        ]
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
    console = console or Console()
    console.print(table(rows, title))
    if results.offline:
        console.print(CAVEAT)
    return write_page(lines, folder / RUN_PAGE)


def _mean_line(results: Results) -> str:
    if not results.overall.episodes:
        return "Every episode ended in an error."
    mean, (low, high) = task_mean([results])
    return f"Mean over tasks {100 * mean:.1f} % ({100 * low:.0f}-{100 * high:.0f} %, tasks and scenes drawn anew)."


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
    """Put several evaluations side by side: print a table, write report.md, report.html and a bar chart.

    Args:
        paths: results.json files, or folders that are searched for them.
        folder: where to write; by default the first of `paths` that is a folder.

    Returns:
        Path of report.md.

    Raises:
        FileNotFoundError: when there are no results.
        ValueError: when two results are for the same policy, instructions, tasks and seed, none is of rollouts, or
            one is a shard that was not merged.
    """
    sources = {path: Results.load(path) for path in find_results(paths)}
    merged = {path.parent for path, result in sources.items() if result.shard is None}
    results = {
        path: result
        for path, result in sources.items()
        if result.episodes and not (result.shard and path.parent.parent in merged)
    }
    if parts := [path for path, result in results.items() if result.shard]:
        whole = parts[0].parent.parent
        raise ValueError(
            f"{parts[0]} is one shard of an evaluation: python -m openvla_lightning.report {whole} --merge"
        )
    if not results:
        raise ValueError(f"none of {', '.join(map(str, sources))} holds rollouts; only success rates are compared")
    folder = Path(folder) if folder else next((Path(p) for p in paths if Path(p).is_dir()), Path())
    groups = _grouped(results)
    rows = comparison_rows(groups)
    bars = {
        f"{column} tasks": {
            name: success_rate(e for r in found for e in r.episodes) for name, found in policies.items()
        }
        for column, policies in groups.items()
    }
    draw_chart(bars, folder / CHART_NAME, "Success rate")

    lines = ["# Success rates", "", markdown(rows), ""]
    lines += ["Wilson 95 % intervals in brackets; over several seeds, of the mean over tasks by bootstrap."]
    if ACTIONS in rows[0]:
        lines += ["Actions per second are those of all robots of a batch, in the time in which the policy worked."]
    lines += [""]
    for column, policies in groups.items():
        differences = difference_rows(policies)
        if len(differences) > 1:
            lines += [f"## Differences on {column} tasks", "", markdown(differences), "", _explained(differences), ""]
    lines += [f"![Success rates]({CHART_NAME})", "", "## Evaluations", ""]
    for path, result in results.items():
        lines.append(
            f"- {result.row}, {result.task_set} tasks, seed {result.seed}: {result.overall.episodes} episodes, `{path}`"
        )
        lines += [f"  - {note}" for note in result.notes]
    (console or Console()).print(table(rows, "Success rate and its 95 % interval"))
    return write_page(lines, folder / RUN_PAGE)


def _grouped(results: Mapping[Path, Results]) -> dict[str, dict[str, list[Results]]]:
    groups: dict[str, dict[str, list[Results]]] = {}
    seen: dict[tuple[str, str, int], Path] = {}
    for path, result in results.items():
        place = result.row, result.task_set, result.seed
        if clash := seen.get(place):
            raise ValueError(
                f"{clash} and {path} are both {result.row!r} on {result.task_set} tasks with seed {result.seed}: give "
                "one another `label`, `task_set` or `seed` when evaluating, or name the files to compare"
            )
        seen[place] = path
        groups.setdefault(result.task_set, {}).setdefault(result.row, []).append(result)
    return groups


def _explained(differences: Rows) -> str:
    pairs = min(int(row[4]) for row in differences[1:])
    return (
        "Paired by initial state. Intervals: bootstrap over tasks and scenes; p: McNemar's exact test, corrected for "
        f"the number of comparisons (Holm); more than chance below {SIGNIFICANT}. Between 55 % and 70 %, {pairs} pairs "
        f"find the difference in {100 * power(0.55, 0.70, pairs):.0f} % of cases."
    )
