"""Cameras, history, proprioception and chunks are one override each: they train, are kept, act and are predicted."""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from rich.console import Console

from openvla_lightning.config import CONF
from openvla_lightning.env.recorded import Offline
from openvla_lightning.evaluation.held_out import score_offline
from openvla_lightning.policy import Policy
from openvla_lightning.run.fit import fit
from openvla_lightning.types import Observation

QUICK = ["+debug=tiny", "trainer.max_steps=2", "trainer.val_check_interval=2", "save_every=2", "data.num_workers=0"]
QUICK += ["callbacks=none", "+callbacks.checkpoint._target_=openvla_lightning.callbacks.Checkpoint", "logger=none"]
QUICK += ["+callbacks.checkpoint.every_n_train_steps=2", "data.augment=null"]


def trained(folder: Path, *overrides: str) -> tuple[Policy, Any]:
    with initialize_config_dir(CONF, version_base="1.3"):
        own = [f"paths.output_dir={folder}", f"+callbacks.checkpoint.dirpath={folder}/checkpoints"]
        cfg = compose("train", [*own, *QUICK, *overrides])
        fit(cfg)
        return Policy.from_pretrained(folder, device="cpu"), cfg


@pytest.mark.parametrize(
    ("overrides", "views", "proprio", "chunk"),
    [
        (["data.cameras=[primary,wrist]"], ["primary", "wrist"], False, 1),
        (["data.history=2"], ["primary", "primary@-1"], False, 1),
        (["data.proprio=true"], ["primary"], True, 1),
        (["data.action_chunk=3", "data.chunk_end=mask"], ["primary"], False, 3),
        (
            ["data.cameras=[primary,wrist]", "data.history=2", "data.proprio=true", "data.action_chunk=2"],
            ["primary", "wrist", "primary@-1", "wrist@-1"],
            True,
            2,
        ),
    ],
    ids=["cameras", "history", "proprio", "chunk", "all"],
)
def test_an_override_trains_and_acts(
    tmp_path: Path, overrides: list[str], views: list[str], proprio: bool, chunk: int
) -> None:
    policy, cfg = trained(tmp_path, *overrides)
    assert list(policy.processor.views) == views
    assert hasattr(policy.vla, "proprio_projector") == proprio
    picture = np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)
    seen = Observation(dict.fromkeys(views, picture), "lift it", np.ones(7, np.float32) if proprio else None)
    actions = policy.act_chunk([seen, seen])
    assert actions.shape == (2, chunk, 7)
    assert np.isfinite(actions).all()
    data = functools.partial(instantiate(cfg.data, _partial_=True, _convert_="all"), num_workers=0)
    scores = score_offline(policy, Offline(data, num_steps=4), Console(quiet=True))
    assert scores["steps"] == 4
    assert np.isfinite(scores["l1"])
