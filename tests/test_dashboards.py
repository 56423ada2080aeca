"""Dashboards without an account: what they would show is logged by real runs."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wandb_records as records

from openvla_lightning.dashboards import DASHBOARDS, PROJECT, main, spec
from openvla_lightning.evaluation.video import write_video
from openvla_lightning.logger import WandbLogger, log_results
from openvla_lightning.report.results import Episode, Results

CONF = Path(__file__).parents[1] / "conf"


def panels(content: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for section in content["section"]["panelBankConfig"]["sections"]:
        assert section["panels"], f"{section['name']} is empty"
        yield from section["panels"]


def metrics(panel: dict[str, Any]) -> set[str]:
    """Names of what a panel shows; of patterns, the pattern."""
    config = panel["config"]
    match panel["viewType"]:
        case "Run History Line Plot":
            return {config["xAxis"], *config["metrics"], *filter(None, [config.get("metricRegex")])}
        case "Bar Chart":
            return set(config["metrics"])
        case "Scatter Plot":
            return {config[axis].removeprefix("summary:") for axis in ("xAxis", "yAxis")}
        case "Parallel Coordinates Plot":
            names = [column["accessor"] for column in config["columns"]]
            return {name.removeprefix("summary:") for name in names if name.startswith("summary:")}
        case "Parameter Importance":
            return {config["targetKey"]}
        case "Weave":
            return {config["panel2Config"]["exp"]["fromOp"]["inputs"]["key"]["val"]}
        case "Run Comparer":
            return set()
    raise AssertionError(f"what does a {panel['viewType']} show?")


def columns(node: Any) -> Iterator[str]:
    """Config columns that a spec names anywhere, dotted."""
    if isinstance(node, dict):
        for key, child in node.items():
            yield from columns(key)
            yield from columns(child)
        if node.get("section") == "config":
            yield node["name"].replace(".value.", ".")
    elif isinstance(node, list):
        for child in node:
            yield from columns(child)
    elif isinstance(node, str) and (node.startswith("config:") or ".value." in node):
        yield node.removeprefix("config:").replace(".value.", ".")


@pytest.fixture(scope="module")
def specs() -> dict[str, dict[str, Any]]:
    return {name: spec(build("someone", PROJECT)) for name, build in DASHBOARDS.items()}


def test_specs_are_written_when_nobody_is_logged_in(
    tmp_path: Path, no_account: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    main([])
    assert "Nobody is logged in" in capsys.readouterr().out
    written = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "runs" / "dashboards").iterdir()}
    assert set(written) == {"training", "fine_tuning", "ablations"}
    assert {content["name"] for content in written.values()} == {"Training", "Fine-tuning", "Ablations"}
    assert all(content["project"] == PROJECT for content in written.values())
    assert all(len(list(panels(content))) > 5 for content in written.values())


def test_dashboards_look_where_runs_are_logged() -> None:
    assert f"project: {PROJECT}\n" in (CONF / "logger" / "wandb.yaml").read_text()


@pytest.mark.slow
def test_every_metric_and_column_shown_is_logged(
    wandb_run: Path, specs: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    write_video(tmp_path / "a.mp4", [np.zeros((16, 16, 3), np.uint8)] * 3, "lift", success=True)
    episodes = [Episode("lift", "lift", 0, "lift", True, 3, video="a.mp4", progress=1.0)]
    found = Results("mine", "tabletop", episodes=episodes, checkpoint={"path": str(wandb_run / "checkpoints" / "x")})
    log_results(WandbLogger(str(tmp_path), PROJECT, "evaluate"), found, tmp_path)

    read = [records.records(folder) for run in (wandb_run, tmp_path) for folder in records.attempts(run)]
    logged = {name for of_run in read for row in (*records.history(of_run), records.summary(of_run)) for name in row}
    logged |= {
        name for run in (wandb_run, tmp_path) for folder in records.attempts(run) for name, _ in records.tables(folder)
    }
    shown = {name for content in specs.values() for panel in panels(content) for name in metrics(panel)}
    patterns = {name for name in shown if name.endswith(".+")}
    assert not shown - patterns - logged
    assert not [pattern for pattern in patterns if not any(re.fullmatch(pattern, name) for name in logged)]

    config = records.config(read[1])
    for path in {path for content in specs.values() for path in columns(content)}:
        node: Any = config
        for key in path.split("."):
            assert key in node, f"{path} is no config column"
            node = node[key]
