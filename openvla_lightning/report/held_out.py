"""Tables of what was predicted on held-out steps."""

from collections.abc import Mapping
from typing import Any

from openvla_lightning.report.page import escape
from openvla_lightning.report.tables import Rows, markdown

CAVEAT = (
    "Offline scores are a poor predictor of success: errors add up in closed loop, and two policies with equal token "
    "accuracy may differ by tens of points. Compare policies by rollouts."
)
MOST_TASKS = 30


def offline_rows(offline: Mapping[str, Any]) -> Rows:
    """Header and one row per dataset and action dimension, and their means."""
    rows = [["dimension", "token accuracy", "L1 (normalised)", "L1 as executed"]]
    several = len(offline["datasets"]) > 1
    for dataset, scores in offline["datasets"].items():
        for name, values in scores["dimensions"].items():
            executed = f"{values['l1_executed']:.4g}"
            rows.append([f"  {name}" if several else name, *_scores(values), executed])
        if several:
            rows.append([dataset, *_scores(scores), ""])
    return _filled([*rows, ["all", *_scores(offline), ""]])


def offline_lines(offline: Mapping[str, Any]) -> list[str]:
    """Markdown: calibration and the hardest tasks of each dataset."""
    lines = []
    for dataset, scores in offline["datasets"].items():
        lines += _calibration_lines(dataset, scores.get("calibration"))
        tasks = list(scores["tasks"].items())
        rows = [["instruction", "steps", "token accuracy", "L1 (normalised)"]]
        rows += [[escape(task), str(values["steps"]), *_scores(values)] for task, values in tasks[:MOST_TASKS]]
        lines += [f"## {escape(dataset)}: by task, the hardest first", "", markdown(_filled(rows)), ""]
        if len(tasks) > MOST_TASKS:
            lines += [f"and {len(tasks) - MOST_TASKS} more in results.json.", ""]
        lines += _confusion_lines(dataset, scores.get("confusion"))
    return lines


def _calibration_lines(dataset: str, calibration: Mapping[str, Any] | None) -> list[str]:
    """Nothing for a head that does not say how sure it is."""
    if calibration is None:
        return []
    rows = [["entropy of the prediction (nats)", "token accuracy", "L1 (normalised)"]]
    rows += [[f"{part['entropy']:.2f}", *_scores(part)] for part in calibration["bins"]]
    lines = [f"## {escape(dataset)}: does it know when it is wrong?", "", markdown(rows), ""]
    if (auroc := calibration["auroc"]) is None:
        return lines
    text = f"A wrong token was predicted with more entropy than a right one in {100 * auroc:.0f} % of pairs "
    return [*lines, text + "(50 %: entropy tells nothing).", ""]


def _confusion_lines(dataset: str, confusion: Mapping[str, Any] | None) -> list[str]:
    if confusion is None:
        return []
    columns = [f"told {number}" for number in range(1, len(confusion["tasks"]) + 1)]
    rows = [["steps of", *columns]]
    for place, (task, errors) in enumerate(zip(confusion["tasks"], confusion["l1"], strict=True)):
        cells = [f"**{error:.4f}**" if error == min(errors) else f"{error:.4f}" for error in errors]
        rows.append([f"{place + 1}. {escape(task)}", *cells])
    text = (
        "L1 (normalised) on the steps of each task when the policy is told each task's words; the smallest of a row in "
        f"bold. A policy that listens has them on the diagonal, or where the words mean the same: on the diagonal in "
        f"{100 * confusion['own_is_best']:.0f} % of rows."
    )
    return [f"## {escape(dataset)}: does it listen?", "", markdown(rows), "", text, ""]


def _filled(rows: Rows) -> Rows:
    """The table without a column that is empty in every row: a head that chooses no ids has no accuracy."""
    kept = [any(cells) for cells in zip(*rows[1:], strict=True)]
    return [[cell for cell, keep in zip(row, kept, strict=True) if keep] for row in rows]


def _scores(values: Mapping[str, float]) -> list[str]:
    accuracy = values.get("token_accuracy")
    return ["" if accuracy is None else f"{100 * accuracy:.1f} %", f"{values['l1']:.4f}"]
