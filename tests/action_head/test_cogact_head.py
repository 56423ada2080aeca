"""CogACT's head against the released policy's numbers: cognition, loss, actions in the robot's units."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_cogact_network import Numbers, close, network
from torch import Tensor

from openvla_lightning.action_head.cogact import CogACTHead
from openvla_lightning.statistics import DatasetStatistics

pytestmark = pytest.mark.golden


def worlds(golden: Path) -> list[tuple[Numbers, Any]]:
    """The released policies, and what stands for a VLA: its head's network, and the hidden states that it saw."""
    found = []
    for path in sorted((golden / "heads" / "cogact").rglob("policy.npz")):
        numbers = Numbers(path)
        width = numbers["forward/hidden"].shape[-1]
        (folder,) = [
            folder.parent
            for folder in path.parent.rglob("action_model.safetensors")
            if network(folder.parent).z_embedder.uncondition.shape[-1] == width
        ]
        found.append((numbers, network(folder)))
    assert found
    return found


def seeing(net: Any, hidden: Tensor, patches: int) -> Any:
    def states(inputs: Any) -> Tensor:
        return hidden[torch.arange(len(hidden))[:, None], patches + inputs.places]

    return SimpleNamespace(action_head=net, states=states, training=False)


def head_of(net: Any, **options: Any) -> CogACTHead:
    return CogACTHead(net.horizon, net.action_dim, repeats=4, **options)


def inputs(mask: Tensor, **more: Any) -> Any:
    """As the processor makes them: the end token is the last of each row, and `places` are where it is predicted."""
    from openvla_lightning.types import Batch

    places = (mask.sum(1) - 2)[:, None]
    blank = torch.zeros_like(mask)
    given = {"labels": blank, "actions": torch.zeros(len(mask), 0, 0), **more}
    return Batch(pixel_values=blank, input_ids=blank, attention_mask=mask.bool(), places=places, **given)


def test_loss(golden: Path) -> None:
    for numbers, net in worlds(golden):
        vla = seeing(net, numbers["forward/hidden"], int(numbers["forward/num_patches"]))
        head, batch = head_of(net), inputs(numbers["forward/attention_mask"], actions=numbers["forward/actions"])
        cognition = head.cognition(vla, batch)
        close(cognition, numbers["forward/cognition"], 0)
        times = len(numbers["forward/noise"]) // len(batch)
        close(cognition.repeat(times, 1, 1), numbers["forward/z_repeated"], 0)
        close(batch.actions.repeat(times, 1, 1), numbers["forward/actions_repeated"], 0)
        noise, timestep = numbers["forward/noise"], numbers["forward/timestep"]
        loss, _ = head.denoising_loss(vla, batch, cognition, noise, timestep, None)
        close(loss, numbers["forward/loss"], 1e-6)


@torch.inference_mode()
def test_actions(golden: Path) -> None:
    for numbers, net in worlds(golden):
        hidden = numbers["predict/hidden"]
        head, mask = head_of(net), torch.ones(hidden.shape[:2], dtype=torch.long)
        vla = seeing(net, hidden, 0)
        cognition = head.cognition(vla, inputs(mask))
        low, high = (numbers[f"predict/{name}"].numpy() for name in ("q01", "q99"))
        zeros = np.zeros_like(low)
        action = {"q01": low, "q99": high, "min": low, "max": high, "mean": zeros, "std": zeros + 1}
        action["mask"] = np.arange(len(low)) < len(low) - 1
        entry = {"action": {name: values.tolist() for name, values in action.items()}}
        statistics = DatasetStatistics.from_dict({**entry, "num_transitions": 1, "num_trajectories": 1})
        for name in (n.removesuffix("/actions") for n in numbers.files if n.endswith("/actions") and "_cfg" in n):
            kind, guidance = name.rpartition("/")[2].split("_cfg")
            steps = int(kind.removeprefix("ddim")) if kind.startswith("ddim") else None
            draws = None if steps else numbers[f"{name}/step_noise"]
            head = head if steps else head_of(net, train_steps=len(draws))
            found = head.sample(vla, cognition, numbers[f"{name}/noise"], steps, float(guidance), draws)
            within = 1e-5 if steps else 1e-2  # the chain of all steps is badly conditioned, as README.md says
            actions = statistics.unnormalise(found[0].double().numpy())
            np.testing.assert_allclose(actions, numbers[f"{name}/actions"].numpy(), atol=within * (high - low).max())
            assert set(np.unique(actions[:, -1])) <= {0.0, 1.0}
