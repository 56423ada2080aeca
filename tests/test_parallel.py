"""Training on several processes is the same training: real gloo processes, real kills."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning import Trainer
from lightning.pytorch.strategies import DDPStrategy

from openvla_lightning.checkpoint.newest import newest_checkpoint
from openvla_lightning.checkpoint.sharded import is_sharded
from openvla_lightning.checkpoint.training import contents
from openvla_lightning.model import VLA
from openvla_lightning.model.checkpoint import main as checkpoint_tool
from openvla_lightning.module import VLAModule
from openvla_lightning.optim import AdamW
from openvla_lightning.parallel import FSDP, accumulate
from openvla_lightning.policy import Policy
from openvla_lightning.quantisation import Quantisation
from openvla_lightning.strategy import LoRA, Strategy, TrainOnly

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All trainings of training_world.py, in one go: it imports everything once."""
    root = tmp_path_factory.mktemp("world")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests" / "training_world.py"), str(root)]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return root


def curve(folder: Path, metric: str = "train/loss") -> dict[int, float]:
    with (folder / "metrics.csv").open(newline="") as file:
        return {int(row["step"]): float(row[metric]) for row in csv.DictReader(file) if row.get(metric)}


def weights(path: Path) -> dict[str, torch.Tensor]:
    return contents(path)["state_dict"]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["accumulated", "ddp", "fsdp"])
def test_twenty_steps_are_the_same_however_the_batch_is_shared_out(world: Path, name: str) -> None:
    expected = curve(world / "one/run")
    assert list(expected) == list(range(20)), "max_steps stops it, and the log has each optimiser step once"
    assert curve(world / name / "run") == pytest.approx(expected, abs=1e-5)
    for metric in ("train/l1", "train/action_accuracy", "val/loss", "val/l1", "val/action_accuracy"):
        assert curve(world / name / "run", metric) == pytest.approx(curve(world / "one/run", metric), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_killed_and_resumed_on_several_processes_the_curve_is_the_uninterrupted_one(world: Path, name: str) -> None:
    expected, found = curve(world / name / "run"), curve(world / f"{name}_killed" / "run")
    assert len(set(expected) - set(found)) <= 1, "the kill may have come between a checkpoint and its line"
    assert found == pytest.approx({step: expected[step] for step in found}, abs=1e-5)
    last = "run/checkpoints/step_000020.ckpt"
    again = weights(world / f"{name}_killed" / last)
    for key, value in weights(world / name / last).items():
        torch.testing.assert_close(again[key], value, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_sharded_run_goes_on_on_another_number_of_processes(world: Path) -> None:
    expected, found = curve(world / "fsdp/run"), curve(world / "alone/run")
    assert list(found) == list(range(8, 20))
    assert found == pytest.approx({step: expected[step] for step in found}, abs=1e-5)


@pytest.mark.slow
def test_a_sharded_checkpoint_acts_and_exports(world: Path, tmp_path: Path) -> None:
    path = world / "fsdp/run/checkpoints/step_000020.ckpt"
    assert is_sharded(path)
    own, whole = VLA.from_pretrained(path).state_dict(), VLA.from_pretrained(world / "one/run").state_dict()
    for key, value in whole.items():
        torch.testing.assert_close(own[key], value, rtol=1e-3, atol=1e-4)
    checkpoint_tool(["export", str(path), str(tmp_path / "exported")])
    exported = VLA.from_pretrained(tmp_path / "exported").state_dict()
    for key, value in own.items():
        torch.testing.assert_close(exported[key], value)


@pytest.mark.slow
def test_the_paper_s_recipe_runs_sharded_through_curriculum_validation_checkpoint_and_export(
    world: Path, tmp_path: Path
) -> None:
    run = world / "recipe/run"
    assert list(curve(run)) == list(range(6))
    assert list(curve(run, "val/loss")) == [2, 5]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_000006.ckpt"]
    stages = contents(newest_checkpoint(run), weights=False)["VLADataModule"]["curriculum"]
    assert len(stages) == 2, "DROID leaves on the way"
    checkpoint_tool(["export", str(run), str(tmp_path / "exported")])
    policy = Policy.from_pretrained(tmp_path / "exported", "bridge_orig", device="cpu")
    assert np.isfinite(policy.act(np.zeros((96, 96, 3), np.uint8), "push")).all()


@pytest.mark.slow
def test_adapters_learn_the_same_on_shards_and_their_checkpoint_holds_them_alone(world: Path) -> None:
    assert curve(world / "adapter/run") == pytest.approx(curve(world / "adapter_alone/run"), abs=1e-5)
    last = "run/checkpoints/step_000004.ckpt"
    sharded, plain = weights(world / "adapter" / last), weights(world / "adapter_alone" / last)
    assert set(sharded) == set(plain)
    assert all(".lora_" in key or "running_" in key or "num_batches" in key for key in sharded)
    merged = VLA.from_pretrained(world / "adapter" / last).state_dict()
    for key, value in VLA.from_pretrained(world / "adapter_alone" / last).state_dict().items():
        torch.testing.assert_close(merged[key], value, rtol=1e-3, atol=1e-4)


def trainer(world: int, accumulated: int = 1) -> Trainer:
    found = Trainer(
        accelerator="cpu",
        devices=world,
        accumulate_grad_batches=accumulated,
        val_check_interval=100,
        logger=False,
        enable_checkpointing=False,
    )
    assert found.world_size == world
    return found


def test_accumulation_makes_up_the_global_batch() -> None:
    found = trainer(2)
    accumulate(found, 64, 8)
    assert found.accumulate_grad_batches == 4
    assert found.val_check_interval == 400, "counted in batches by Lightning, in steps by us"
    untouched = trainer(2, 3)
    accumulate(untouched, 64, None)
    assert untouched.accumulate_grad_batches == 3


@pytest.mark.parametrize(
    ("batch", "per_device", "asked", "message"),
    [
        (63, 8, 1, "cannot be shared by 2 devices; 62 or 64 can"),
        (1, 1, 1, "cannot be shared by 2 devices; 2 can"),
        (24, 5, 1, "these do: 1, 2, 3, 4, 6, 12"),
        (24, 0, 1, "these do: 1, 2, 3, 4, 6, 12"),
        (24, 6, 3, "say different things"),
    ],
)
def test_batches_that_do_not_divide_name_those_that_do(batch: int, per_device: int, asked: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        accumulate(trainer(2, asked), batch, per_device)


@pytest.mark.parametrize(
    ("optim", "quantisation", "strategy", "message"),
    [
        (AdamW(1e-3, kind="adamw_8bit"), None, TrainOnly(["llm"]), "adamw_8bit cannot be sharded"),
        (AdamW(1e-3), Quantisation(4), LoRA(4), "quantised weights cannot be sharded"),
    ],
)
def test_what_cannot_be_sharded_is_said_at_once(
    optim: AdamW, quantisation: Quantisation | None, strategy: Strategy, message: str
) -> None:
    module = VLAModule(VLA, strategy, optim, None, None, quantisation=quantisation)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        module.check(FSDP(wrap=[]))
    module.check(DDPStrategy())
