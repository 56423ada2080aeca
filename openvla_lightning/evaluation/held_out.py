"""Predicting held-out demonstrations: token accuracy, L1, and whether the policy knows when it is wrong."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

from openvla_lightning.actions import dimension_names
from openvla_lightning.env.recorded import Offline
from openvla_lightning.evaluation.confusion import Confusion
from openvla_lightning.evaluation.control import Actor
from openvla_lightning.evaluation.teacher_forced import predict
from openvla_lightning.policy import Policy
from openvla_lightning.statistics import DatasetStatistics
from openvla_lightning.types import Step

CALIBRATION_BINS = 5
METRICS = ("token_accuracy", "l1", "l1_executed")


def score_offline(policy: Actor, env: Offline, console: Console | None = None) -> dict[str, Any]:
    """Token accuracy, L1 and calibration on held-out steps, by dataset.

    `token_accuracy` and `l1` are as in training: each token predicted from the true ones before it, in normalised
    units. `l1_executed` compares what the policy would do, decoded on its own, in the dataset's units.

    Returns:
        `steps`, `token_accuracy` and `l1` over all; `datasets`: name -> the same, and by action dimension, by task (its
        instruction), by how undecided the policy was (`calibration`), and when told other tasks' words (`confusion`).

    Raises:
        TypeError: for anything but a `Policy`.
        ValueError: when nothing is held out.
    """
    if not isinstance(policy, Policy):
        raise TypeError(f"env=offline looks into the model, so it needs a Policy, not {type(policy).__name__}")
    batches, statistics, names = env.open(policy.processor.transform.image_size, policy.normalisation)
    found: dict[str, list[dict[str, np.ndarray]]] = {name: [] for name in names}
    words: dict[str, list[str]] = {name: [] for name in names}
    confusions = {name: Confusion() for name in names}
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=console) as progress:
        bar = progress.add_task("predicting held-out steps", total=env.num_steps * len(names))
        for steps in batches:
            name = steps[0].dataset_name
            found[name].append(_score(policy, steps, statistics[name]))
            words[name] += [step.instruction for step in steps]
            confusions[name].add(steps)
            progress.update(bar, advance=len(steps))
        progress.update(bar, total=progress.tasks[bar].completed)
    datasets = {
        name: _summarise({key: np.concatenate([part[key] for part in parts]) for key in parts[0]}, words[name])
        | {"confusion": confusions[name].measure(policy)}
        for name, parts in found.items()
        if parts
    }
    if not datasets:
        raise ValueError("there are no held-out steps to predict: the dataset has no `val` split, or an empty one")
    weights = [scores["steps"] for scores in datasets.values()]
    pooled = {
        metric: float(np.average([scores[metric] for scores in datasets.values()], weights=weights))
        for metric in ("token_accuracy", "l1")
    }
    return {"steps": sum(weights), **pooled, "datasets": datasets}


def _score(policy: Policy, steps: Sequence[Step], statistics: DatasetStatistics) -> dict[str, np.ndarray]:
    """Each metric [B * T, D], but [B, D] for what is executed."""
    head, method = policy.processor.action_head, policy.normalisation
    output, batch = predict(policy, steps)
    with torch.inference_mode():
        correct, error = head.score(output, batch)
        entropy = head.entropy(output, batch)
    images = [step.images[policy.processor.camera] for step in steps]
    told = policy.statistics.normalise(policy.act(images, [step.instruction for step in steps]), method=method)
    both = statistics.unnormalise(np.stack([told, batch.actions[:, 0].double().cpu().numpy()]), method=method)
    tokens = {"token_accuracy": correct, "l1": error, "entropy": entropy}
    dim = batch.actions.shape[-1]
    return {name: values.float().cpu().numpy().reshape(-1, dim) for name, values in tokens.items()} | {
        "l1_executed": np.abs(both[0] - both[1])
    }


def _summarise(scores: Mapping[str, np.ndarray], words: Sequence[str]) -> dict[str, Any]:
    means = {name: scores[name].mean(axis=0) for name in METRICS}
    names = dimension_names(len(means["l1"]))
    tasks = np.array(words)
    chunk = len(scores["l1"]) // len(tasks)
    by_task = {
        str(task): {
            "steps": int((tasks == task).sum()),
            **{name: float(scores[name][np.repeat(tasks == task, chunk)].mean()) for name in ("token_accuracy", "l1")},
        }
        for task in np.unique(tasks)
    }
    return {
        "steps": len(tasks),
        "token_accuracy": float(means["token_accuracy"].mean()),
        "l1": float(means["l1"].mean()),
        "dimensions": {
            name: {metric: float(values[index]) for metric, values in means.items()} for index, name in enumerate(names)
        },
        "tasks": dict(sorted(by_task.items(), key=lambda item: item[1]["token_accuracy"])),
        "calibration": calibration(
            scores["entropy"].ravel(), scores["token_accuracy"].ravel() > 0.5, scores["l1"].ravel()
        ),
    }


def calibration(entropy: np.ndarray, correct: np.ndarray, error: np.ndarray) -> dict[str, Any]:
    """Whether entropy predicts error.

    Args:
        entropy, correct, error: of each token, [N].

    Returns:
        `auroc`: how often a wrong token was predicted with more entropy than a right one (0.5: entropy tells nothing;
        None without wrong or without right ones); `bins`: equally many tokens each, from the most decided.
    """
    parts = np.array_split(np.argsort(entropy, kind="stable"), min(CALIBRATION_BINS, len(entropy)))
    bins = [
        {"entropy": float(entropy[p].mean()), "token_accuracy": float(correct[p].mean()), "l1": float(error[p].mean())}
        for p in parts
    ]
    right, wrong = np.sort(entropy[correct]), entropy[~correct]
    auroc = None
    if len(right) and len(wrong):
        below = (np.searchsorted(right, wrong, "left") + np.searchsorted(right, wrong, "right")) / 2
        auroc = float(below.mean() / len(right))
    return {"auroc": auroc, "bins": bins}
