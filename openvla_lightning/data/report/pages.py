"""The report as `report.md` with pictures beside it, as a single `report.html`, and as a table on the screen."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from openvla_lightning.data.report.facts import Facts, Selection, gather
from openvla_lightning.data.report.pictures import draw_actions, draw_contact_sheet, draw_lengths
from openvla_lightning.data.report.verdict import remarks, verdict
from openvla_lightning.report.page import escape, write_page
from openvla_lightning.report.tables import Rows, markdown, say, table
from openvla_lightning.runtime.progress import track

SHOWN = 20


def write_report(selections: Sequence[Selection], folder: Path, title: str, console: Console | None = None) -> Path:
    """Measure and draw datasets, write `report.md` and `report.html` into `folder`, print a table and the verdicts.

    Returns:
        Path of report.md.

    Raises:
        BadShardError: an image cannot be decoded.
    """
    console = console or Console()
    folder.mkdir(parents=True, exist_ok=True)
    every, sections = [], []
    several = len(selections) > 1
    for selection in track(selections, "looking at the data", unit="datasets", console=console, visible=several):
        draw_contact_sheet(selection.source, folder / f"{selection.source.name}_frames.jpg")
        facts = gather(selection)
        draw_actions(facts, folder / f"{facts.name}_actions.png")
        draw_lengths(facts, folder / f"{facts.name}_lengths.png")
        every.append(facts)
        sections += section(facts)
    rows = summary_rows(every)
    verdicts = [f"- **{escape(facts.name)}**: {escape(verdict(facts))}" for facts in every]
    path = write_page([f"# {title}", "", markdown(rows), "", *verdicts, "", *sections], folder / "report.md")
    console.print(table(rows, title))
    for facts in every:
        say(console, f"{facts.name}: {verdict(facts)}")
    return path


def summary_rows(every: Sequence[Facts]) -> Rows:
    """Header and one row per dataset."""
    rows = [["dataset", "trajectories", "steps", "Hz", "still", "left out", "words"]]
    for facts in every:
        rows.append(
            [
                facts.name,
                f"{facts.trajectories:,}",
                f"{facts.steps:,}",
                "-" if facts.control_hz is None else f"{facts.control_hz:g}",
                f"{facts.idle.share:.1%}",
                f"{1 - facts.filters.kept / max(1, facts.filters.steps):.1%}",
                f"{facts.words.steps:.1%}",
            ]
        )
    return rows


def section(facts: Facts) -> list[str]:
    """The section about one dataset, as lines of Markdown."""
    found = remarks(facts)
    return [
        f"## {escape(facts.name)}",
        "",
        *([f"- {escape(remark)}" for remark in found] or ["Ready."]),
        "",
        markdown(_split_rows(facts)),
        "",
        *_facts(facts),
        "",
        f"![Frames of {facts.name}]({facts.name}_frames.jpg)",
        "",
        "A row for each of a spread of trajectories: the first camera over time, then the others half-way, made square "
        "as the policy sees them. Red: the gripper's value in the action. Green: how far the action goes, full for the "
        "farthest one of these trajectories.",
        "",
        "### Actions",
        "",
        f"![Actions of {facts.name}]({facts.name}_actions.png)",
        "",
        "Of the steps trained on, counted on a logarithmic scale. Dashed: q01 and q99 of the statistics; what lies "
        "outside is clipped. The outermost bars also hold everything beyond them.",
        "",
        markdown(_dimension_rows(facts)),
        "",
        "### Lengths",
        "",
        f"![Lengths in {facts.name}]({facts.name}_lengths.png)",
        "",
        "### Words",
        "",
        markdown(_word_rows(facts)),
        "",
        "### Images",
        "",
        markdown(_camera_rows(facts)),
        "",
        *_skipped(facts),
    ]


def _split_rows(facts: Facts) -> Rows:
    rows = [["split", "trajectories", "steps", "steps in a trajectory"]]
    for name, (trajectories, steps) in facts.splits.items():
        rows.append([name, f"{trajectories:,}", f"{steps:,}", f"{steps / max(1, trajectories):.1f}"])
    return rows


def _facts(facts: Facts) -> list[str]:
    idle, filters, words, copies = facts.idle, facts.filters, facts.words, facts.duplicates
    whose = "the dataset's own" if idle.given else "1 % of its usual range, as it names no `noop_threshold`"
    return [
        f"- **Trained on:** {filters.kept:,} of {filters.steps:,} steps of the training split; {facts.share:.1%} of "
        f"the mixture's samples. Held out for validation: {facts.held_out:,}.",
        f"- **Left out:** {filters.unlabelled:,} trajectories without words; {filters.first_steps:,} first steps, "
        f"{filters.zero_actions:,} actions that are zero, {filters.noops:,} steps that stand still.",
        f"- **Control rate:** {_control_rate(facts)}.",
        f"- **Standing still:** {idle.share:.1%} of all steps, {idle.trained:.1%} of those trained on. {_runs(facts)} "
        f"{idle.first:.0%} of the trajectories begin so and {idle.last:.0%} end so. The largest norm of a change that "
        f"counts: {idle.threshold:.3g} ({whose}).",
        f"- **Clipped:** {facts.clipped:.1%} of the steps trained on have a value outside q01..q99.",
        f"- **Words:** in {words.steps:.1%} of the steps and {words.trajectories:.1%} of the trajectories. "
        f"{words.distinct:,} instructions; {words.distinct_loosely:,} without regard to case, spaces and full stops.",
        f"- **Copies:** {copies.copies:,} of {copies.trained:,} trajectories repeat the actions of another one; "
        f"{copies.leaked:,} of the {copies.held_out:,} held out are also trained on.",
        *(f"- **Files:** {escape(remark)}." for remark in facts.remarks),
    ]


def _skipped(facts: Facts) -> list[str]:
    if not facts.skipped:
        return []
    shown = [[escape(str(value)) for value in one.values()] for one in facts.skipped[:SHOWN]]
    rest = len(facts.skipped) - len(shown)
    lines = ["### Left out, as they could not be read", "", markdown([[*facts.skipped[0]], *shown]), ""]
    return lines + ([f"And {rest:,} more, listed in the index.", ""] if rest else [])


def _runs(facts: Facts) -> str:
    runs = facts.idle.runs
    if not len(runs):
        return "Never."
    return f"{len(runs):,} stretches: the median is {np.median(runs):.0f} steps long, the longest {runs.max():,}."


def _control_rate(facts: Facts) -> str:
    if facts.control_hz is None:
        return "unknown"
    hours = facts.steps / facts.control_hz / 3600
    return f"{facts.control_hz:g} Hz, which makes {hours:.2f} hours of demonstrations"


def _dimension_rows(facts: Facts) -> Rows:
    rows = [["dimension", "min", "q01", "mean", "q99", "max", "std", "clipped", "at -1 or 1", "0 or 1"]]
    for d in facts.dimensions:
        numbers = [f"{value:.3g}" for value in (d.low, d.q01, d.mean, d.q99, d.high, d.std)]
        scaled = [f"{d.outside:.1%}", f"{d.at_bounds:.1%}"] if d.normalised and not d.constant else ["-", "-"]
        rows.append([d.name, *numbers, *scaled, f"{d.binary:.0%}"])
    return rows


def _word_rows(facts: Facts) -> Rows:
    rows = [["most frequent", "trajectories", "steps"]]
    return rows + [[escape(text), f"{number:,}", f"{steps:,}"] for text, number, steps in facts.words.frequent]


def _camera_rows(facts: Facts) -> Rows:
    rows = [["camera", "key", "height x width", "missing", "KB an image", "MB"]]
    for camera in facts.cameras:
        if camera.key is None:
            rows.append([camera.role, "none, black images", "-", "-", "-", "-"])
            continue
        sizes = ", ".join(f"{height} x {width}" for height, width in camera.sizes) or "nothing is stored"
        volume = [f"{camera.mean_bytes / 1e3:.1f}", f"{camera.total_bytes / 1e6:,.1f}"]
        rows.append([camera.role, f"`{camera.key}`", sizes, f"{camera.missing:.1%}", *volume])
    return rows
