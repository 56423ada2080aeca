"""What the released OpenVLA-OFT code computed on tiny checkpoints it wrote (folder `oft` of OPENVLA_GOLDEN)."""

import json
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from openvla_lightning.action_head.diffusion import DiffusionHead
from openvla_lightning.action_head.regression import L1Head
from openvla_lightning.checkpoint.load import load_vla
from openvla_lightning.model import VLA
from openvla_lightning.model.parallel_decoding import BLANK
from openvla_lightning.types import IGNORE_INDEX, Batch


def cases() -> list[Any]:
    """Folders of all variants, `SET/VARIANT`; a parameter that skips where there are none."""
    root = Path(os.environ.get("OPENVLA_GOLDEN") or "nowhere", "oft")
    found = sorted(path.parent for path in root.glob("*/*/golden.npz"))
    if not found:
        return [pytest.param(None, marks=pytest.mark.skip("OPENVLA_GOLDEN holds no numbers of OpenVLA-OFT"))]
    return [pytest.param(path, id=f"{path.parent.name}/{path.name}") for path in found]


class Case:
    """One variant: its checkpoint, its arrays, and what the released scripts were told on the command line."""

    def __init__(self, path: Path) -> None:
        self.path, self.folder = path, path / "checkpoint"
        self.meta: dict[str, Any] = json.loads((path / "oft_meta.json").read_text())
        self.arrays: dict[str, Any] = dict(np.load(path / "golden.npz"))

    def __getitem__(self, name: str) -> Tensor:
        return torch.from_numpy(np.asarray(self.arrays[name]))

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def has(self, start: str) -> bool:
        """Whether there are arrays whose name begins so."""
        return any(name.startswith(start) for name in self.arrays)

    @property
    def places(self) -> int:
        """Numbers in a chunk."""
        return self.meta["chunk"] * self.meta["action_dim"]

    @property
    def kind(self) -> str:
        """`l1`, `diffusion`, or `tokens` where there is no head."""
        return self.meta["head"] if self.meta["head"] in ("l1", "diffusion") else "tokens"

    def head(self, **options: Any) -> L1Head:
        """The continuous head."""
        if self.kind == "l1":
            return L1Head(self.meta["chunk"], self.meta["action_dim"])
        levels = self.meta["num_diffusion_steps_train"]
        return DiffusionHead(self.meta["chunk"], self.meta["action_dim"], levels, **{"steps": levels, **options})

    @cached_property
    def vla(self) -> VLA:
        """The model, for whoever changes nothing of it."""
        return self.load()

    def load(self, merge: bool = True) -> VLA:
        """A model of one's own."""
        return load_vla(self.folder, dtype=torch.float32, merge=merge).train()  # FiLM sees padding there

    @property
    def batch(self) -> Batch:
        """The training batch, as its released collator made it; the places are those of the actions and no others."""
        labels = self["labels"]
        first = (labels != IGNORE_INDEX).int().argmax(1)
        places = first[:, None] - 1 + torch.arange(self.places)
        return Batch(
            pixel_values=self["pixel_values"],
            input_ids=self["input_ids"],
            attention_mask=self["attention_mask"],
            labels=labels,
            actions=self["actions"],
            places=places,
            proprio=self["proprio"] if self.meta["proprio"] else None,
            padded=torch.zeros(self["actions"].shape[:2], dtype=torch.bool),
            dataset_names=[self.meta["unnorm_key"]] * len(labels),
            numbers=list(range(len(labels))),
        )

    def request(self, sample: int, eos: int = 2, space: int = 29871) -> Batch:
        """One sample as it is asked for when acting: prompt, blank places, end."""
        prompt = self[f"predict/{sample}/prompt_ids"].tolist()
        prompt = prompt if prompt[-1] == space else [*prompt, space]
        ids = torch.tensor([[*prompt, *[BLANK] * self.places, eos]])
        proprio = None
        if self.meta["proprio"]:
            proprio = self[f"predict/{sample}/proprio_normalized"][None].float()
        return Batch(
            dataset_names=[self.meta["unnorm_key"]],
            numbers=[sample],
            pixel_values=self["pixel_values"][sample : sample + 1],
            input_ids=ids,
            attention_mask=torch.ones_like(ids, dtype=torch.bool),
            labels=torch.full_like(ids, IGNORE_INDEX),
            actions=self["actions"][sample : sample + 1],
            places=len(prompt) - 1 + torch.arange(self.places)[None],
            proprio=proprio,
            padded=None,
        )


def close(actual: Tensor, expected: Any, atol: float, rtol: float = 0) -> None:
    """Equal within `atol`, compared in float64."""
    torch.testing.assert_close(actual.detach().double(), torch.as_tensor(expected).double(), atol=atol, rtol=rtol)
