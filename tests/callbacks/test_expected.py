"""A run is told what its recipe reached before, at the same step."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from openvla_lightning.callbacks.expected import CURVES, ExpectedCurve, what_makes
from openvla_lightning.config import validate

ROOT = Path(__file__).parents[2]


def recipe_of(script: str, *overrides: str) -> dict[str, Any]:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose(script, ["paths.output_dir=/tmp/out", *overrides])
    return validate(cfg)


def validate_at(callback: ExpectedCurve, recipe: dict[str, Any], step: int, **found: float) -> None:
    metrics = {name.replace("_", "/", 1): value for name, value in found.items()}
    trainer: Any = SimpleNamespace(global_step=step, callback_metrics=metrics)
    module: Any = SimpleNamespace(hparams=recipe)
    callback.on_fit_start(trainer, module)
    callback.on_validation_end(trainer, module)


@pytest.mark.parametrize("path", sorted(CURVES.glob("*.json")), ids=lambda path: path.stem)
def test_a_known_curve_is_of_the_recipe_that_its_command_runs(path: Path) -> None:
    known = json.loads(path.read_text())
    words = known["command"].split()
    assert what_makes(recipe_of(words[1].removesuffix(".py"), *words[2:])) == known["recipe"]
    assert str(known["recipe"]["trainer.max_steps"]) in known["curve"]["val/action_accuracy"]


def test_as_expected_is_said_and_behind_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    curve = json.loads((CURVES / "tabletop_pretrain.json").read_text())["curve"]
    expected = {name: curve[name]["1000"] for name in curve}
    with caplog.at_level(logging.INFO):
        validate_at(ExpectedCurve(), recipe_of("train"), 1000, val_action_accuracy=expected["val/action_accuracy"])
    assert f"expected {expected['val/action_accuracy']:.3f}" in caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    caplog.clear()
    behind = {"val_action_accuracy": expected["val/action_accuracy"] - 0.1, "val_l1": expected["val/l1"] + 0.1}
    validate_at(ExpectedCurve(), recipe_of("train"), 1000, **behind)
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    caplog.clear()
    validate_at(ExpectedCurve(), recipe_of("train"), 1000, val_action_accuracy=0.99, val_l1=0.01)  # ahead is no fault
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    "overrides", [("optim.lr=1e-3",), ("data.normalisation=minmax",), ("model.init_from=x",), ("+debug=tiny",)]
)
def test_another_recipe_is_left_alone(overrides: tuple[str, ...], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        validate_at(ExpectedCurve(), recipe_of("train", *overrides), 1000, val_action_accuracy=0.0)
    assert not caplog.text
