"""Predicting held-out demonstrations: token accuracy, L1, and whether the policy knows when it is wrong."""

from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress

from openvla_lightning.actions import dimension_names
from openvla_lightning.control import Actor
from openvla_lightning.env.offline import Offline
from openvla_lightning.policy import Policy


def score_offline(policy: Actor, env: Offline, console: Console | None = None) -> dict[str, Any]:
    """Token accuracy and L1 per action dimension on held-out steps.

    `token_accuracy` and `l1` are as in training: each token predicted from the true ones before it, in normalised
    units. `l1_executed` compares what the policy would do, decoded on its own, in the dataset's units.

    Raises:
        TypeError: for anything but a `Policy`.
    """
    if not isinstance(policy, Policy):
        raise TypeError(f"env=offline looks into the model, so it needs a Policy, not {type(policy).__name__}")
    head, camera = policy.processor.action_head, policy.processor.camera
    batches, statistics = env.open(policy.processor.transform.image_size, policy.normalisation)
    scores: dict[str, list[np.ndarray]] = {"token_accuracy": [], "l1": [], "l1_executed": []}
    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=console) as progress:
        bar = progress.add_task("predicting held-out steps", total=env.num_steps)
        for steps in batches:
            batch = policy.processor.collate(steps).to(policy.device)
            with torch.inference_mode():
                output = policy.vla(
                    pixel_values=batch.pixel_values.to(policy.dtype),
                    input_ids=batch.input_ids,
                    attention_mask=batch.attention_mask,
                )
                correct, error = head.score(output, batch)
            dim = batch.actions.shape[-1]
            scores["token_accuracy"].append(correct.float().cpu().numpy().reshape(-1, dim))
            scores["l1"].append(error.float().cpu().numpy().reshape(-1, dim))
            done = statistics.unnormalise(batch.actions[:, 0].double().cpu().numpy(), method=policy.normalisation)
            told = policy.act([step.images[camera] for step in steps], [step.instruction for step in steps])
            scores["l1_executed"].append(np.abs(told - done))
            dataset = steps[0].dataset_name
            progress.update(bar, advance=len(steps))
        progress.update(bar, total=progress.tasks[bar].completed)
    if not scores["l1"]:
        raise ValueError("there are no held-out steps to predict: the dataset has no `val` split, or an empty one")
    means = {name: np.concatenate(values).mean(axis=0) for name, values in scores.items()}
    names = dimension_names(len(means["l1"]))
    return {
        "dataset": dataset,
        "steps": int(sum(map(len, scores["l1_executed"]))),
        "token_accuracy": float(means["token_accuracy"].mean()),
        "l1": float(means["l1"].mean()),
        "dimensions": {
            name: {metric: float(values[index]) for metric, values in means.items()} for index, name in enumerate(names)
        },
    }
