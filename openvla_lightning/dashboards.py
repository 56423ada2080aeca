"""Weights & Biases dashboards as code: training, comparing ways to fine-tune, ablations.

python -m openvla_lightning.dashboards                      # logged in: three saved views of the project
python -m openvla_lightning.dashboards --out my_folder      # the same as JSON, without an account
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openvla_lightning.runtime.extras import install
from openvla_lightning.runtime.files import write_json

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Section, Workspace

PROJECT = "openvla-lightning"
"""As in conf/logger/wandb.yaml."""
STEP = "trainer/global_step"
INSTALL = f"dashboards need a package: {install('dashboards')}"


def lines(title: str, *metrics: str, regex: str | None = None, **options: Any) -> Any:
    """A panel of curves over optimiser steps: these metrics, or all whose names match `regex`."""
    from wandb_workspaces.reports.v2 import LinePlot

    return LinePlot(title=title, x=STEP, y=list(metrics), metric_regex=regex, **options)


def bars(title: str, metric: str, by: str | None = None) -> Any:
    """A panel with the last value of each run, or the mean over runs with the same value of a config column `by`."""
    from wandb_workspaces.reports.v2 import BarPlot, Config

    return BarPlot(title=title, metrics=[metric], groupby=None if by is None else Config(by))


def against(title: str, x: str, y: str) -> Any:
    """A panel with one point per run."""
    from wandb_workspaces.reports.v2 import ScatterPlot, SummaryMetric

    return ScatterPlot(title=title, x=SummaryMetric(x), y=SummaryMetric(y), log_x=True)


def tables(*names: str) -> list[Any]:
    """A panel for each table, with the newest value of each run."""
    from wandb_workspaces.reports.v2 import WeavePanelSummaryTable

    return [WeavePanelSummaryTable(table_name=name) for name in names]


def section(name: str, *panels: Any) -> "Section":
    """A section of panels, unfolded."""
    from wandb_workspaces.workspaces import Section

    return Section(name=name, panels=list(panels), is_open=True)


def training(entity: str, project: str) -> "Workspace":
    """A view of one run or a few: whether it learns, whether it generalises, what it waits for."""
    from wandb_workspaces.workspaces import RunsetSettings, Workspace

    return Workspace(
        entity=entity,
        project=project,
        name="Training",
        sections=[
            section(
                "Learning",
                lines("Loss", "train/loss", "val/loss", smoothing_type="none"),
                lines("Action-token accuracy", "train/action_accuracy", "val/action_accuracy", range_y=(0, 1)),
                lines("L1, normalised units", "train/l1", "val/l1"),
            ),
            section("What it sees and would do", *tables("val/samples")),
            section(
                "Datasets",
                lines("Held-out accuracy", regex="val/action_accuracy/.+"),
                lines("Training accuracy", regex="train/action_accuracy/.+"),
                lines("Share of the samples", regex="mixture/served/.+"),
            ),
            section(
                "Health",
                lines("Distinct actions of demonstrated ones", "val/distinct_actions"),
                lines("Learning rate", regex="lr-.+"),
            ),
            section(
                "Throughput",
                lines("Samples per second", "throughput/samples_per_second"),
                lines("Where a step's seconds go", regex="throughput/step_seconds/.+", plot_type="stacked-area"),
                lines("Share of time without a batch", "throughput/data_wait", range_y=(0, 1)),
                lines("Model FLOPs utilisation", "throughput/mfu"),
            ),
        ],
        runset_settings=RunsetSettings(pinned_columns=columns("config:choices.model", "config:choices.data/mix")),
    )


def fine_tuning(entity: str, project: str) -> "Workspace":
    """A view of strategies side by side: the success and the costs of each."""
    from wandb_workspaces.expr import Config
    from wandb_workspaces.workspaces import RunsetSettings, Workspace

    by = "choices.strategy"
    return Workspace(
        entity=entity,
        project=project,
        name="Fine-tuning",
        sections=[
            section(
                "What it reaches",
                bars("Success rate", "eval/success", by),
                bars("Held-out action-token accuracy", "val/action_accuracy", by),
                lines("Held-out action-token accuracy", "val/action_accuracy", range_y=(0, 1)),
                lines("Held-out L1, normalised units", "val/l1"),
            ),
            section(
                "What it costs",
                bars("Parameters that learn", "costs/trainable", by),
                bars("Peak memory, bytes", "costs/peak_memory_bytes", by),
                bars("Seconds per step", "costs/step_seconds", by),
                bars("Checkpoint, bytes", "costs/checkpoint_bytes", by),
                against("Accuracy against parameters that learn", "costs/trainable", "val/action_accuracy"),
            ),
            section("Rollouts", *tables("eval/tasks", "eval/videos")),
        ],
        runset_settings=RunsetSettings(
            groupby=[Config(by)], pinned_columns=columns(f"config:{by}", "config:overrides", "summary:eval/success")
        ),
    )


def ablations(entity: str, project: str) -> "Workspace":
    """A view of runs with one override each: which overrides matter."""
    from wandb_workspaces.reports.v2 import (
        Config,
        ParallelCoordinatesPlot,
        ParallelCoordinatesPlotColumn,
        ParameterImportancePlot,
        RunComparer,
        SummaryMetric,
    )
    from wandb_workspaces.workspaces import RunsetSettings, Workspace

    varied = ("choices.model/vision_backbone", "choices.data/mix", "choices.strategy", "optim.lr", "data.noop_filter")
    axes: list[Any] = [*(Config(name) for name in varied), SummaryMetric("val/action_accuracy")]
    return Workspace(
        entity=entity,
        project=project,
        name="Ablations",
        sections=[
            section(
                "Outcome",
                bars("Success rate", "eval/success"),
                bars("Lower end of its 95 % interval", "eval/success_low"),
                bars("Upper end of its 95 % interval", "eval/success_high"),
                bars("Held-out action-token accuracy", "val/action_accuracy"),
                bars("Held-out L1, normalised units", "val/l1"),
            ),
            section(
                "What made the difference",
                ParallelCoordinatesPlot(columns=[ParallelCoordinatesPlotColumn(metric=axis) for axis in axes]),
                ParameterImportancePlot(with_respect_to="val/action_accuracy"),
                RunComparer(diff_only="split"),
            ),
            section(
                "Curves",
                lines("Loss", "train/loss"),
                lines("Held-out action-token accuracy", "val/action_accuracy", range_y=(0, 1)),
            ),
            section("Rollouts", *tables("eval/tasks", "eval/videos")),
        ],
        runset_settings=RunsetSettings(
            pinned_columns=columns("config:overrides", "summary:eval/success", "summary:val/action_accuracy")
        ),
    )


DASHBOARDS: dict[str, Callable[[str, str], "Workspace"]] = {
    "training": training,
    "fine_tuning": fine_tuning,
    "ablations": ablations,
}


def columns(*names: str) -> list[str]:
    """Columns of the list of runs, the run's name first."""
    return ["run:displayName", *names]


def spec(workspace: "Workspace") -> dict[str, Any]:
    """The view as W&B stores it, as plain data."""
    view = workspace._to_model()  # the library has no public way to look at a view before it is saved
    return {"name": view.display_name, "project": view.project} | json.loads(
        view.spec.model_dump_json(by_alias=True, exclude_none=True)
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of `python -m openvla_lightning.dashboards`."""
    parser = argparse.ArgumentParser("python -m openvla_lightning.dashboards", description=__doc__.split("\n")[0])
    parser.add_argument("--project", default=PROJECT, help=f"W&B project (default: {PROJECT})")
    parser.add_argument("--entity", help="user or team (default: that of whoever is logged in)")
    parser.add_argument("--out", type=Path, help="folder to write JSON into, and save nothing in W&B")
    options = parser.parse_args(arguments)
    import wandb

    try:
        import wandb_workspaces  # noqa: F401
    except ModuleNotFoundError:
        parser.error(INSTALL)
    if options.out is None and not wandb.login(prompt=False, verify=False):
        options.out = Path("runs/dashboards")
        print("Nobody is logged in to W&B (wandb login), so nothing is saved there.")
    entity: str = options.entity or (None if options.out else wandb.Api().default_entity) or ""
    for name, build in DASHBOARDS.items():
        workspace = build(entity, options.project)
        if options.out is None:
            print(f"{name}: {workspace.save().url}")
            continue
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / f"{name}.json"
        write_json(path, spec(workspace))
        print(f"written to {path}")


if __name__ == "__main__":
    main()
