"""Comparison of a run with a known learning curve of the same recipe."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only

from openvla_lightning.report.training_log import read_log
from openvla_lightning.runtime.files import write_json

log = logging.getLogger(__name__)
CURVES = Path(__file__).parent / "curves"
"""One JSON file for each recipe of the embedded world: command, hardware, the recipe's settings, and its curve."""
SAME = (
    *("model.vision_backbone.towers", "model.vision_backbone.image_size", "model.llm.architecture"),
    *("data.mix", "data.global_batch_size", "data.noop_filter", "data.filter_noops", "data.normalisation"),
    *("data.augment", "action_head.num_bins", "strategy.parts", "strategy.rank", "strategy.alpha"),
    *("strategy.use_rslora", "optim.lr", "optim.weight_decay", "optim.schedule", "trainer.max_steps"),
)
"""Settings that define a recipe: two runs with equal ones should learn alike."""
SLACK = {"val/action_accuracy": -0.03, "val/l1": 0.03}
"""Differences that may be chance, by metric; the sign is the direction of worse."""


class ExpectedCurve(Callback):
    """At each validation, logs the value that this recipe reached there before, and warns if this run is worse.

    Args:
        folder: folder of known curves; recipes without one are not compared.
    """

    def __init__(self, folder: str | Path = CURVES) -> None:
        self.folder = Path(folder)
        self.curve: Mapping[str, Mapping[str, float]] = {}

    @rank_zero_only
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Find the curve of this recipe."""
        recipe = what_makes(pl_module.hparams)
        known = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(self.folder.glob("*.json"))]
        self.curve = next((entry["curve"] for entry in known if entry["recipe"] == recipe), {})

    @rank_zero_only
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compare this validation with the known curve."""
        step = str(trainer.global_step)
        for metric, slack in SLACK.items():
            expected, measured = self.curve.get(metric, {}).get(step), trainer.callback_metrics.get(metric)
            if expected is None or measured is None:
                continue
            text = f"step {step}: {metric} {float(measured):.3f}, expected {expected:.3f}"
            if (float(measured) - expected - slack) * slack > 0:
                log.warning(
                    f"{text}. This recipe learnt faster before: look at the data (python -m "
                    "openvla_lightning.data.report) and at what changed since"
                )
            else:
                log.info(text)


def what_makes(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a resolved config that define its recipe, by dotted name; missing ones are None."""
    settings: dict[str, Any] = {"starts from other weights": bool(recipe.get("model", {}).get("init_from"))}
    for name in SAME:
        node: Any = recipe
        for key in name.split("."):
            node = node.get(key) if isinstance(node, Mapping) else None
        settings[name] = node
    return settings


def remember(run: Path, path: Path, command: str, hardware: str) -> None:
    """Write the curve of a finished run, from its CSV log and newest checkpoint, as a known curve."""
    import torch

    checkpoint = max((run / "checkpoints").glob("step_*.ckpt"))
    recipe = torch.load(checkpoint, weights_only=True, mmap=True)["hyper_parameters"]
    rows = [row for row in read_log(run) if row.get("val/action_accuracy")]
    curve = {metric: {str(int(row["step"]) + 1): round(float(row[metric]), 4) for row in rows} for metric in SLACK}
    facts = {"command": command, "hardware": hardware, "recipe": what_makes(recipe), "curve": curve}
    write_json(path, facts)
