"""Sends training steps through the code that acts, and compares pictures, text, decoding and units with training."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from openvla_lightning.actions import absolute, differences
from openvla_lightning.checkpoint.newest import STEP
from openvla_lightning.env.base import RequestError, refusing
from openvla_lightning.env.recorded import TrainingSteps
from openvla_lightning.policy import Policy
from openvla_lightning.processor import Processor
from openvla_lightning.report.page import write_page
from openvla_lightning.report.tables import Rows, markdown, say, table
from openvla_lightning.report.training_log import read_log
from openvla_lightning.runtime.progress import Bar
from openvla_lightning.statistics import DatasetStatistics
from openvla_lightning.types import IGNORE_INDEX, Inputs, Prediction, Step

log = logging.getLogger(__name__)
SAME_PIXELS = 0.05
"""Tolerance of normalised pixels: about two of 255 levels."""
SAME_ACTIONS = 1e-4
"""Tolerance of normalised actions; a bin is 0.008 wide."""
SAME_TOKENS = 0.98
"""Share of tokens that must agree if only rounding may differ."""
LOGGED = 20
"""Number of last lines of the training log that are averaged."""


class StageError(ValueError):
    """Acting differs from training; the message names the stage and the difference."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """One stage from picture to action: its name, whether it agrees with training, and the findings."""

    name: str
    ok: bool
    seen: str


def check_open_loop(
    policy: Policy | Callable[[], Policy], env: TrainingSteps, folder: str | Path, console: Console | None = None
) -> dict[str, float]:
    """Compare acting with training on training steps; write `open_loop.md` into `folder`.

    Args:
        policy: the policy, or a callable that loads it, which is called after the data was found.
        env: the steps, without augmentation.
        folder: folder of the report.

    Returns:
        `token_accuracy` (for a head with choices) and `l1` (normalised units) as in training, and `l1_acting`, the
        error of the policy's own actions.

    Raises:
        StageError: a stage differs; the message names the first one.
        ValueError: when there are no steps.
    """
    env.check()
    with refusing():
        policy = policy if isinstance(policy, Policy) else policy()
    batches, statistics, datasets = env.open(**policy.reads)
    parts: list[dict[str, np.ndarray]] = []
    names: list[str] = []
    with Bar("comparing acting with training", env.num_steps * len(datasets), console=console) as bar:
        for steps in batches:
            parts.append(_compare(policy, steps, statistics[steps[0].dataset_name]))
            names += [step.dataset_name for step in steps]
            bar.advance(len(steps))
        bar.end()  # a dataset may hold fewer steps
    if not parts:
        raise RequestError("there are no training steps to look at")
    comparisons = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    measured: list[str] = ["token_accuracy", "l1", "l1_acting"]
    values = {name: float(comparisons[name].mean()) for name in measured if name in comparisons}
    stages = _stages(comparisons, policy, values.get("token_accuracy"), sorted(set(names)))
    rows = [["stage", "agrees", "seen"], *([stage.name, "yes" if stage.ok else "NO", stage.seen] for stage in stages)]
    _write(rows, values, len(names), Path(folder), console or Console())
    if wrong := next((stage for stage in stages if not stage.ok), None):
        raise StageError(f"acting differs from training in: {wrong.name} ({wrong.seen}); see {folder}/open_loop.md")
    return values


@torch.inference_mode()
def _compare(policy: Policy, steps: Sequence[Step], statistics: DatasetStatistics) -> dict[str, np.ndarray]:
    """Each comparison for each step, [B]."""
    processor, head = policy.processor, policy.processor.action_head
    whole = Processor.from_config({**processor.config, "crop_area": None})  # in training, only the augmentation crops
    batch = whole.collate(list(steps))
    observations, states = [step.observation for step in steps], [step.proprio for step in steps]
    prediction, dim = policy.predict(steps), statistics.action_dim
    shown = whole.inputs(observations, dim, states)
    lengths = [int((labels == IGNORE_INDEX).int().argmin()) or len(labels) for labels in batch.labels]
    rows = zip(shown.input_ids, batch.input_ids, lengths, strict=True)
    prompts = [torch.equal(ids[:length], trained[:length]) for ids, trained, length in rows]
    inputs = processor.inputs(observations, dim, states)
    plain = replace(policy.acting, static=False, options=None, clock=lambda stage: None)
    decoded = head.decoder(policy.vla, plain)(inputs, dim, torch.Generator().manual_seed(0)).cpu()
    acted = policy.act_chunk(observations)[:, 0]
    told = statistics.unnormalise(decoded[:, 0].double().numpy(), method=policy.normalisation)
    felt = [(statistics.relative_to, seen.proprio) for seen in observations]
    expected = np.stack([absolute(action, *state) for action, state in zip(told, felt, strict=True)])
    moved = np.stack([differences(action, *state) for action, state in zip(acted, felt, strict=True)])
    back = statistics.normalise(moved, method=policy.normalisation)
    comparisons = {
        "pixels": (_floats(whole, shown.pixel_values) - _floats(whole, batch.pixel_values))
        .abs()
        .flatten(1)
        .amax(1)
        .numpy(),
        "prompts": np.array(prompts),
        "decoding": _agreement(policy, inputs, decoded, prediction).mean(axis=1),
        "units": np.abs(expected - acted).max(axis=1) / np.abs(expected).max(axis=1).clip(1e-12),
        "l1": prediction.error.cpu().numpy().mean(axis=1),
        "l1_acting": np.abs(back - batch.actions[:, 0].numpy()).mean(axis=1),
    }
    if prediction.correct is not None:
        comparisons["token_accuracy"] = prediction.correct.cpu().numpy().mean(axis=1)
    return comparisons


def _agreement(policy: Policy, inputs: Inputs, decoded: Tensor, prediction: Prediction) -> np.ndarray:
    """Which numbers [B, T * D] of the plain decoder are as expected.

    If every number is a choice, they are compared with the prediction under the true past: up to its first mistake, a
    policy decodes the same as after the true tokens. Otherwise they are compared with the fast decoder's numbers.
    """
    plain = decoded.float().flatten(1).numpy()
    if prediction.correct is not None and prediction.correct.shape == plain.shape:
        correct = prediction.correct.cpu().numpy()
        untouched = np.hstack([np.ones((len(plain), 1), bool), correct[:, :-1].cumprod(axis=1).astype(bool)])
        return (plain == prediction.actions.float().flatten(1).cpu().numpy()) | ~untouched
    head, generator = policy.processor.action_head, torch.Generator().manual_seed(0)
    fast = head.decoder(policy.vla, replace(policy.acting, options=None))(inputs, decoded.shape[2], generator)
    return np.abs(plain - fast.float().flatten(1).cpu().numpy()) < SAME_ACTIONS


def _floats(processor: Processor, pixels: Tensor) -> Tensor:
    transform: Any = processor.transform
    return pixels if pixels.is_floating_point() else transform.normalise(pixels)


def _stages(
    comparisons: dict[str, np.ndarray], policy: Policy, accuracy: float | None, datasets: Sequence[str]
) -> list[Agreement]:
    pixels, units = float(comparisons["pixels"].max()), float(comparisons["units"].max())
    prompts, decoding = float(comparisons["prompts"].mean()), float(comparisons["decoding"].mean())
    stages = [
        Agreement("pictures", pixels < SAME_PIXELS, f"at most {pixels:.4f} apart"),
        Agreement("words", prompts == 1, f"{prompts:.1%} the same"),
        Agreement("decoding", decoding > SAME_TOKENS, f"{decoding:.1%} the same"),
        Agreement("units", units < SAME_ACTIONS, f"{policy.unnorm_key}, {units:.2g} apart"),
    ]
    logged = logged_accuracy(policy.provenance.get("path"), datasets)
    if logged is not None and accuracy is not None:
        mean, noise = logged
        noise += 3 * float(comparisons["token_accuracy"].std()) / len(comparisons["token_accuracy"]) ** 0.5
        text = f"{accuracy:.3f} now, {mean:.3f} ± {noise:.3f} then"
        # a higher accuracy is no fault: training used augmented pictures, and continued to learn
        stages.append(Agreement("training log", accuracy >= mean - noise, text))
    return stages


def logged_accuracy(path: str | None, datasets: Sequence[str]) -> tuple[float, float] | None:
    """Action-token accuracy at the end of a run's log, and three standard errors of it; None without a log.

    Args:
        path: path of the run or its checkpoint.
        datasets: the datasets; if they were not logged separately, the accuracy of the whole mixture is used.
    """
    if path is None:
        return None
    place = Path(path)
    step = STEP.fullmatch(place.name)
    last = int(step[1]) if step else None
    log_rows = read_log(place if place.is_dir() else place.parent.parent)
    rows = [row for row in log_rows if last is None or int(row["step"]) < last]
    columns = [f"train/action_accuracy/{name}" for name in datasets]
    columns = columns if rows and all(column in rows[0] for column in columns) else ["train/action_accuracy"]
    values = [float(row[column]) for row in rows for column in columns if row.get(column)][-LOGGED * len(columns) :]
    if not values:
        return None
    return float(np.mean(values)), 3 * float(np.std(values)) / len(values) ** 0.5


def _write(rows: Rows, values: dict[str, float], count: int, folder: Path, console: Console) -> None:
    console.print(table(rows, "Acting against training"))
    accuracy = f"token accuracy {values['token_accuracy']:.3f}, " if "token_accuracy" in values else ""
    text = (
        f"{count} steps of training, without augmentation: {accuracy}L1 "
        f"{values['l1']:.4f}; of the policy's own actions, as it acts, L1 {values['l1_acting']:.4f} (normalised units)."
    )
    say(console, text)
    page = write_page(["# Acting against training", "", markdown(rows), "", text, ""], folder / "open_loop.md")
    say(console, f"written to {page}")
