"""Predictions on held-out demonstrations: token accuracy, L1, and calibration."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console

from openvla_lightning.actions import differences, dimension_names
from openvla_lightning.env.base import RequestError
from openvla_lightning.env.recorded import Offline
from openvla_lightning.evaluation.confusion import Confusion
from openvla_lightning.evaluation.control import Actor
from openvla_lightning.policy import Policy
from openvla_lightning.runtime.progress import Bar
from openvla_lightning.statistics import DatasetStatistics
from openvla_lightning.types import Step

CALIBRATION_BINS = 5
METRICS = ("token_accuracy", "l1", "l1_executed")


def score_offline(policy: Actor, env: Offline, console: Console | None = None) -> dict[str, Any]:
    """Token accuracy, L1 and calibration on held-out steps, by dataset.

    `token_accuracy` (for a head that chooses among ids) and `l1` are as in training, under the true past, in normalised
    units. `l1_executed` is the error of the actions that the policy decodes by itself, in the dataset's units.

    Returns:
        `steps`, `token_accuracy` and `l1` over all steps; `datasets`: name -> the same, also by action dimension, by
        task (its instruction), by entropy (`calibration`), and with other tasks' instructions (`confusion`).

    Raises:
        TypeError: `policy` is no `Policy`.
        ValueError: when nothing is held out.
    """
    if not isinstance(policy, Policy):
        raise TypeError(f"env=offline looks into the model, so it needs a Policy, not {type(policy).__name__}")
    batches, statistics, names = env.open(**policy.reads)
    parts_by_name: dict[str, list[dict[str, np.ndarray]]] = {name: [] for name in names}
    words: dict[str, list[str]] = {name: [] for name in names}
    confusions = {name: Confusion() for name in names}
    with Bar("predicting held-out steps", env.num_steps * len(names), console=console) as bar:
        for steps in batches:
            name = steps[0].dataset_name
            parts_by_name[name].append(_score(policy, steps, statistics[name]))
            words[name] += [step.observation.instruction for step in steps]
            confusions[name].add(steps)
            bar.advance(len(steps))
        bar.end()  # a split may hold fewer steps
    datasets = {
        name: _summarise({key: np.concatenate([part[key] for part in parts]) for key in parts[0]}, words[name])
        | {"confusion": confusions[name].measure(policy)}
        for name, parts in parts_by_name.items()
        if parts
    }
    if not datasets:
        raise RequestError("there are no held-out steps to predict: the dataset has no `val` split, or an empty one")
    weights = [scores["steps"] for scores in datasets.values()]
    pooled = {
        metric: float(np.average([scores[metric] for scores in datasets.values()], weights=weights))
        for metric in ("token_accuracy", "l1")
        if all(metric in scores for scores in datasets.values())
    }
    return {"steps": sum(weights), **pooled, "datasets": datasets}


def _score(policy: Policy, steps: Sequence[Step], statistics: DatasetStatistics) -> dict[str, np.ndarray]:
    """Each metric per choice or number [B, N], or [B, D] for executed actions; without choices, only `l1`s."""
    prediction, dataset = policy.predict(steps), steps[0].dataset_name
    key = dataset if dataset in policy.norm_stats else None  # a state is normalised as in training, where it was learnt
    own, method = policy.scale(key)
    acted = policy.act_chunk([step.observation for step in steps], key)[:, 0]
    moved = [
        differences(row, own.relative_to, step.observation.proprio) for row, step in zip(acted, steps, strict=True)
    ]
    executed = own.normalise(np.stack(moved), method=method)
    first = np.stack([step.action[0] for step in steps]).astype(np.float64)
    both = statistics.unnormalise(np.stack([executed, first]), method=method)
    metrics = {"token_accuracy": prediction.correct, "l1": prediction.error, "entropy": prediction.entropy}
    scores = {name: values.float().cpu().numpy() for name, values in metrics.items() if values is not None}
    return scores | {"l1_executed": np.abs(both[0] - both[1])}


def _summarise(scores: Mapping[str, np.ndarray], words: Sequence[str]) -> dict[str, Any]:
    tasks = np.array(words)
    chosen = {task: tasks == task for task in np.unique(tasks)}
    pooled = [name for name in ("token_accuracy", "l1") if name in scores]
    by_task = {
        str(task): {"steps": int(rows.sum()), **{name: float(scores[name][rows].mean()) for name in pooled}}
        for task, rows in chosen.items()
    }
    worst = "token_accuracy" if "token_accuracy" in scores else "l1"
    sign = 1 if worst == "token_accuracy" else -1
    summary = {
        "steps": len(tasks),
        **{name: float(scores[name].mean()) for name in pooled},
        "dimensions": _by_dimension(scores),
        "tasks": dict(sorted(by_task.items(), key=lambda item: sign * item[1][worst])),
    }
    if "entropy" not in scores or scores["entropy"].shape != scores["l1"].shape:
        return summary
    entropy, correct, error = (scores[name].ravel() for name in ("entropy", "token_accuracy", "l1"))
    return summary | {"calibration": calibration(entropy, correct > 0.5, error)}


def _by_dimension(scores: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Means for each dimension of an action; accuracy only if every number is a choice."""
    dim = scores["l1_executed"].shape[1]
    apart = [name for name in METRICS if name in scores and scores[name].shape[1] in (scores["l1"].shape[1], dim)]
    means = {name: scores[name].reshape(-1, dim).mean(axis=0) for name in apart}
    return {
        name: {metric: float(values[index]) for metric, values in means.items()}
        for index, name in enumerate(dimension_names(dim))
    }


def calibration(entropy: np.ndarray, correct: np.ndarray, error: np.ndarray) -> dict[str, Any]:
    """Whether entropy predicts error.

    Args:
        entropy, correct, error: values of each token, [N].

    Returns:
        `auroc`: how often a wrong token has a higher entropy than a right one (0.5: entropy has no information; None
        without wrong or without right tokens); `bins`: with equal numbers of tokens, in order of rising entropy.
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
