"""Formats describe themselves: read once, the newest run found by one rule, the head's bins kept through an export."""

import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata

from openvla_lightning import VLA, Policy
from openvla_lightning.action_head import ActionHead, L1Head, TokenHead
from openvla_lightning.action_head.flow import FlowHead
from openvla_lightning.checkpoint.format import CheckpointError
from openvla_lightning.checkpoint.formats import describe
from openvla_lightning.checkpoint.newest import newest_checkpoint
from openvla_lightning.checkpoint.sharded import ShardReader
from openvla_lightning.plugins import USUAL_HEAD
from openvla_lightning.plugins import describe as describe_head
from openvla_lightning.processor import Processor


def processor(vla: VLA, head: ActionHead, **settings: Any) -> Processor:
    means = [[0.5] * 3, [0.5] * 3]
    size = vla.vision_backbone.image_size
    return Processor(head, image_size=size, means=means, stds=means, max_length=64, **settings)


@pytest.mark.parametrize("bins", [256, 128])
def test_an_export_keeps_the_number_of_bins(vla: VLA, tmp_path: Path, bins: int) -> None:
    before = processor(vla, TokenHead(num_bins=bins, vocab_size=768))
    vla.save_pretrained(tmp_path, before)
    after = describe(tmp_path).check().processor
    assert after["action_head"]["num_bins"] == bins
    ids = torch.arange(768 - bins, 768)
    assert torch.equal(TokenHead(**after["action_head"]).decode(ids), before.action_head.decode(ids))


def test_another_model_in_the_same_folder_leaves_nothing_of_the_first(
    config: dict[str, Any], build: Callable[..., VLA], vla: VLA, tmp_path: Path
) -> None:
    first = L1Head(2, 7)
    build({**config, "action_head": describe_head(first, USUAL_HEAD)}).save_pretrained(tmp_path, processor(vla, first))
    assert list(tmp_path.glob("action_head--*"))
    vla.save_pretrained(tmp_path, processor(vla, TokenHead(vocab_size=768)))
    assert not list(tmp_path.glob("action_head--*"))
    assert describe(tmp_path).check().processor["action_head"]["num_bins"] == 256


def test_a_model_that_starts_from_another_head_is_exported_with_its_own(
    config: dict[str, Any], build: Callable[..., VLA], vla: VLA, tmp_path: Path
) -> None:
    first = FlowHead(2, 7, width=16, depth=1, heads=2)
    begun = {**config, "action_head": describe_head(first, USUAL_HEAD)}
    before = processor(vla, first, cameras=["primary", "wrist"])
    build(begun).save_pretrained(tmp_path / "flow", before)
    flow = VLA.from_pretrained(tmp_path / "flow")
    flow.save_pretrained(tmp_path / "again")
    assert describe(tmp_path / "again").check().processor == {
        **describe(tmp_path / "flow").check().processor,
        "action_head": before.config["action_head"],
    }
    tokens = build(config)
    tokens.about = flow.about
    tokens.save_pretrained(tmp_path / "tokens", processor(vla, TokenHead(vocab_size=768)))
    after = describe(tmp_path / "tokens").check().processor
    assert after["action_head"].get("class") is None
    assert (after["cameras"], after["max_length"]) == (["primary"], 64)


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


class ByName:
    """Pickled as Python 3.11.2 pickles a member of an enumeration: by `getattr`."""

    def __init__(self, *where: Any) -> None:
        self.where = where

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return getattr, self.where


def test_the_index_of_shards_names_members_of_enumerations_and_nothing_else(tmp_path: Path) -> None:
    index = tmp_path / ".metadata"
    index.write_bytes(pickle.dumps(Metadata({}, planner_data=ByName(_MEM_FORMAT_ENCODING, "TORCH_PRESERVE_FORMAT"))))
    assert ShardReader(tmp_path).read_metadata().planner_data is _MEM_FORMAT_ENCODING.TORCH_PRESERVE_FORMAT
    index.write_bytes(pickle.dumps(ByName(Metadata, "__init__")))
    with pytest.raises(pickle.UnpicklingError, match=r"holds no __init__ of .*Metadata"):
        ShardReader(tmp_path).read_metadata()


def test_a_folder_of_no_format_is_answered_with_what_it_could_hold(tmp_path: Path) -> None:
    """A run that wrote no checkpoint yet, and a folder `checkpoints` that was renamed."""
    with pytest.raises(CheckpointError, match=r"neither .* in checkpoints/ nor a config\.json .* holds nothing$"):
        describe(tmp_path)
    for name in ("step_000010.ckpt", "step_000020.ckpt"):
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=f"name the file, {tmp_path}/step_000020.ckpt$"):
        describe(tmp_path)


def test_a_disk_that_is_full_is_an_error_of_the_disk(vla: VLA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **options: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("openvla_lightning.checkpoint.save.save_file", full)
    with pytest.raises(OSError, match=f"{tmp_path}/model.safetensors cannot be written: .*No space left"):
        vla.save_pretrained(tmp_path, processor(vla, TokenHead(vocab_size=768)))
