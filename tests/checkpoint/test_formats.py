"""Formats describe themselves: read once, the newest run found by one rule, the head's bins kept through an export."""

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from openvla_lightning import VLA, Policy
from openvla_lightning.action_head import TokenHead
from openvla_lightning.checkpoint.formats import describe
from openvla_lightning.checkpoint.newest import newest_checkpoint
from openvla_lightning.processor import Processor


def processor(vla: VLA, bins: int) -> Processor:
    means = [[0.5] * 3, [0.5] * 3]
    head = TokenHead(num_bins=bins, vocab_size=768)
    return Processor(head, image_size=vla.vision_backbone.image_size, means=means, stds=means, max_length=64)


@pytest.mark.parametrize("bins", [256, 128])
def test_an_export_keeps_the_number_of_bins(vla: VLA, tmp_path: Path, bins: int) -> None:
    before = processor(vla, bins)
    vla.save_pretrained(tmp_path, before)
    after = describe(tmp_path).check().processor
    assert after["action_head"]["num_bins"] == bins
    ids = torch.arange(768 - bins, 768)
    assert torch.equal(TokenHead(**after["action_head"]).decode(ids), before.action_head.decode(ids))


def test_config_json_is_opened_once_a_load(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    real = io.open

    def counted(file: Any, *args: Any, **kwargs: Any) -> Any:
        opened.append(os.path.basename(str(file)))
        return real(file, *args, **kwargs)

    monkeypatch.setattr(io, "open", counted)  # what pathlib opens with
    policy = Policy.from_pretrained(folder, tokenizer="tiny", device="cpu")
    policy.act(np.zeros((64, 64, 3), np.uint8), "lift the cube")
    assert opened.count("config.json") == 1
    assert opened.count("dataset_statistics.json") == 1


def test_the_newest_checkpoint_is_found_at_any_depth_and_through_links(tmp_path: Path) -> None:
    runs, scratch = tmp_path / "runs", tmp_path / "scratch"
    places = [runs / "train/a/checkpoints/step_000900.ckpt", scratch / "sweep/0/checkpoints/step_000100.ckpt"]
    for age, path in enumerate(places):
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (1000 + age, 1000 + age))
    (runs / "linked").symlink_to(scratch)
    (scratch / "back").symlink_to(runs)  # a circle
    (runs / "train/a/checkpoints/last.ckpt").symlink_to(places[0])
    assert newest_checkpoint(runs) == runs / "linked/sweep/0/checkpoints/step_000100.ckpt"
    assert newest_checkpoint(tmp_path / "nowhere") is None


def test_a_sharded_checkpoint_is_one_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "run/checkpoints/step_000010.ckpt"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints/inner.ckpt").touch()
    assert newest_checkpoint(tmp_path) == folder
