"""From files to batches: the same batches every time, whatever serves them, also after a restart."""

import logging
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import toy_rlds

from openvla_lightning.data import MissingDataError, VLADataModule
from openvla_lightning.data.source.rlds import RLDS
from openvla_lightning.data.source.synthetic import Synthetic
from openvla_lightning.types import Step

AUGMENT = {"random_brightness": [0.2], "random_hue": [0.05]}
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def random_data(**options: Any) -> VLADataModule:
    defaults: dict[str, Any] = {"mix": {"kuka": 1.0, "bridge_orig": 0.5}, "collate": list, "num_workers": 0}
    defaults |= {"image_size": 16, "global_batch_size": 8}
    return VLADataModule(partial(Synthetic, num_steps=64, image_size=16), **defaults | options)


def toy(root: Path, **options: Any) -> VLADataModule:
    defaults: dict[str, Any] = {
        "mix": {"toy": 1.0},
        "collate": list,
        "num_workers": 0,
        "datasets": {"toy": toy_rlds.SPEC},
    }
    defaults |= {"image_size": toy_rlds.SIZE, "global_batch_size": 4}
    return VLADataModule(partial(RLDS, root), **defaults | options)


def opened(data: VLADataModule) -> VLADataModule:
    data.prepare_data()
    data.setup("fit")
    return data


def same(one: list[list[Step]], two: list[list[Step]]) -> bool:
    def plain(batches: list[list[Step]]) -> list[Any]:
        return [
            [(s.dataset_name, s.instruction, s.action.tobytes(), *(i.tobytes() for i in s.images.values())) for s in b]
            for b in batches
        ]

    return plain(one) == plain(two)


def test_steps_arrive_whole(toy_root: Path) -> None:
    data = opened(toy(toy_root, cameras=["primary", "wrist", "secondary"], image_size=24))
    steps = [step for batch in data.train_dataloader() for step in batch]
    statistics = data.statistics["toy"]
    meant = [
        (
            step["language_instruction"],
            statistics.normalise(step["action"]).tolist(),
            step["observation"]["image"][0, 0],
        )
        for number in range(toy_rlds.TRAIN)
        for step in toy_rlds.episode("train", number)["steps"]
    ]
    for step in steps:
        assert step.action.shape == (1, 7)
        assert {role: image.shape for role, image in step.images.items()} == dict.fromkeys(
            ("primary", "wrist", "secondary"), (24, 24, 3)
        )
        assert not step.images["secondary"].any()
        shade = step.images["primary"][12, 12].astype(int)
        assert any(
            words == step.instruction and action == step.action[0].tolist() and np.abs(pixel - shade).max() <= 2
            for words, action, pixel in meant
        )
    report = data.filter_report["toy"]
    assert len(steps) == report.kept - report.kept % 4
    assert len({step.action.tobytes() for step in steps}) == len(steps)


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(toy_root: Path, workers: int) -> None:
    alone = list(opened(toy(toy_root, augment=AUGMENT)).train_dataloader())
    together = list(opened(toy(toy_root, augment=AUGMENT, num_workers=workers)).train_dataloader())
    assert same(alone, together)
    assert not same(alone, list(opened(toy(toy_root, augment=AUGMENT, seed=8)).train_dataloader()))
    assert not same(alone, list(opened(toy(toy_root)).train_dataloader()))


def test_validation_is_every_held_out_step_once_unaugmented(toy_root: Path) -> None:
    data = opened(toy(toy_root, augment=AUGMENT, global_batch_size=5))
    steps = [step for batch in data.val_dataloader() for step in batch]
    expected = sum(5 + number % 5 - 2 for number in range(toy_rlds.VAL))
    assert len(steps) == len({step.action.tobytes() for step in steps}) == expected
    assert same(list(data.val_dataloader()), list(opened(toy(toy_root, global_batch_size=5)).val_dataloader()))
    limited = opened(toy(toy_root, global_batch_size=5, limit_val_samples=7)).val_dataloader()
    assert sum(map(len, limited)) == 7
    assert not list(opened(random_data(mix={"kuka": 1.0}, val_fraction=0.0)).val_dataloader())[8:]


@pytest.mark.parametrize("normalisation", ["quantile", "minmax", "meanstd"])
def test_actions_are_normalised_by_the_datasets_own_statistics(toy_root: Path, normalisation) -> None:
    data = opened(toy(toy_root, normalisation=normalisation, filter_noops=False))
    raw = [s["action"] for n in range(toy_rlds.TRAIN) for s in toy_rlds.episode("train", n)["steps"]]
    for batch in data.train_dataloader():
        for step in batch:
            back = data.statistics["toy"].unnormalise(step.action[0], normalisation)
            inside = (np.abs(step.action[0]) < 0.999) & ([True] * 6 + [False])  # the gripper never moves: 0
            assert min(np.abs(back - action)[inside].max(initial=0) for action in raw) < 1e-4


class Recorder(L.LightningModule):
    """Remembers which steps it was trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.seen = torch.nn.Linear(1, 1), []

    def training_step(self, batch: list[Step], batch_idx: int) -> torch.Tensor:
        self.seen.append([step.action.tobytes() for step in batch])
        return self.layer(torch.ones(1, 1)).sum()

    def validation_step(self, batch: list[Step], batch_idx: int) -> None:
        assert batch

    def transfer_batch_to_device(self, batch: list[Step], device: torch.device, dataloader_idx: int) -> list[Step]:
        return batch

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


class StopAfter(L.Callback):
    """Ends training early, as if it had been killed there."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        trainer.should_stop = trainer.global_step >= self.steps


def train(
    steps: int, save: Path, resume: Path | None = None, accumulate: int = 1, stop: int | None = None, **options: Any
) -> list[Any]:
    trainer = L.Trainer(
        callbacks=[StopAfter(stop or steps)],
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        val_check_interval=5,
        check_val_every_n_epoch=None,
        accumulate_grad_batches=accumulate,
        overfit_batches=options.pop("overfit_batches", 0),
    )
    module = Recorder()
    trainer.fit(module, random_data(**options), ckpt_path=str(resume) if resume else None)
    trainer.save_checkpoint(save)
    return module.seen


@pytest.mark.parametrize(("stop", "workers"), [(1, 2), (7, 0), (11, 1), (12, 0), (13, 0), (25, 0)])
def test_training_resumes_at_the_very_next_batch(tmp_path: Path, stop: int, workers: int) -> None:
    whole = train(30, tmp_path / "whole.ckpt")
    assert {len(batch) for batch in whole} == {8}
    first = train(stop, tmp_path / "part.ckpt", num_workers=workers)
    rest = train(30, tmp_path / "rest.ckpt", resume=tmp_path / "part.ckpt", num_workers=workers)
    assert first + rest == whole


def test_resuming_with_accumulation_and_after_an_accumulated_step(tmp_path: Path) -> None:
    whole = train(12, tmp_path / "whole.ckpt", accumulate=2)
    assert {len(batch) for batch in whole} == {4}
    first = train(5, tmp_path / "part.ckpt", accumulate=2)
    assert first + train(12, tmp_path / "rest.ckpt", resume=tmp_path / "part.ckpt", accumulate=2) == whole


def test_overfitting_sees_one_batch_over_and_over(tmp_path: Path) -> None:
    seen = train(5, tmp_path / "x.ckpt", overfit_batches=1)
    assert len(seen) == 5
    assert all(batch == seen[0] for batch in seen)


def test_a_curriculum_changes_the_mixture_at_its_step_also_after_a_restart(tmp_path: Path) -> None:
    options = {"mix": {"kuka": 1.0}, "curriculum": [{"after": 0.5, "mix": {"kuka": 0.0, "bridge_orig": 1.0}}]}
    whole = train(10, tmp_path / "whole.ckpt", **options)
    kuka, bridge = (
        {step.action.tobytes() for batch in opened(random_data(mix={n: 1.0})).train_dataloader() for step in batch}
        for n in ("kuka", "bridge_orig")
    )
    assert all({*batch} <= kuka for batch in whole[:5])
    assert all({*batch} <= bridge for batch in whole[5:])
    first = train(10, tmp_path / "part.ckpt", stop=3, **options)
    assert first + train(10, tmp_path / "rest.ckpt", resume=tmp_path / "part.ckpt", **options) == whole


def test_cameras_that_change_places_do_so_in_half_of_the_samples(toy_root: Path) -> None:
    spec = toy_rlds.SPEC | {"swap": ["primary", "wrist"]}
    options = {"datasets": {"toy": spec}, "cameras": ["primary", "wrist"], "global_batch_size": 1}
    plain = [
        batch[0] for batch in opened(toy(toy_root, **options | {"datasets": {"toy": toy_rlds.SPEC}})).train_dataloader()
    ]
    swapped = [batch[0] for batch in opened(toy(toy_root, **options)).train_dataloader()]
    changed = [
        not np.array_equal(a.images["primary"], b.images["primary"]) for a, b in zip(plain, swapped, strict=True)
    ]
    assert 0.3 < np.mean(changed) < 0.7
    for a, b in zip(plain, swapped, strict=True):
        assert {i.tobytes() for i in a.images.values()} == {i.tobytes() for i in b.images.values()}
    held_out = opened(toy(toy_root, **options)).val_dataloader()
    assert same(
        list(held_out), list(opened(toy(toy_root, **options | {"datasets": {"toy": toy_rlds.SPEC}})).val_dataloader())
    )


def test_statistics_of_what_is_trained_on(toy_root: Path) -> None:
    released, own = opened(toy(toy_root)), opened(toy(toy_root, statistics="train"))
    kept = own.train["toy"].steps
    assert own.statistics["toy"].num_transitions == len(kept) < released.statistics["toy"].num_transitions
    action = own.sources["toy"].index.action[kept]
    np.testing.assert_allclose(own.statistics["toy"].action["q01"], np.quantile(action, 0.01, axis=0), rtol=1e-6)
    assert own.val["toy"].statistics is own.statistics["toy"]


def test_a_windowed_order_serves_everything_once_shard_by_shard(toy_root: Path) -> None:
    data = opened(toy(toy_root, window_gb=1e-9, global_batch_size=1))
    steps = data.train["toy"]
    list(data.train_dataloader())
    _, positions = data.order(np.arange(len(steps)))
    assert sorted(positions) == list(range(len(steps)))
    files = data.sources["toy"].index.images["primary"][steps.steps[positions]][:, 0]
    assert (np.diff(files) != 0).sum() == len(set(files.tolist())) - 1


def test_another_seed_after_resuming_is_said(caplog: pytest.LogCaptureFixture) -> None:
    state = random_data().state_dict()
    with caplog.at_level(logging.WARNING):
        random_data(seed=8, mix={"kuka": 1.0}).load_state_dict(state)
    assert "data.seed and data.mix changed" in caplog.text


def test_served_shares_follow_weight_times_size(toy_root: Path) -> None:
    data = opened(random_data(mix={"kuka": 1.0, "bridge_orig": 3.0}, global_batch_size=16))
    names = [step.dataset_name for batch in data.train_dataloader() for step in batch]
    assert names.count("bridge_orig") / len(names) == pytest.approx(0.75, abs=0.1)
    # one pass over the dataset of weight 1, as released
    assert data.epoch_samples == 64 * 4


def test_missing_data_is_one_error_in_milliseconds(tmp_path: Path) -> None:
    mix = {"bridge_orig": 1.0, "libero_10_no_noops": 1.0, "tabletop_pretrain": 1.0}
    data = VLADataModule(partial(RLDS, tmp_path), mix, list, 224, 16)
    assert data.missing() == list(mix)
    with pytest.raises(MissingDataError) as error:
        data.check()
    for words in (
        *mix,
        "OPENVLA_LIGHTNING_DATA",
        "rail.eecs.berkeley.edu",
        "python -m openvla_lightning.demonstrations",
    ):
        assert words in str(error.value)
    with pytest.raises(MissingDataError):
        data.setup()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mix": {"bridge_orgi": 1.0}}, "did you mean 'bridge_orig'"),
        ({"mix": {"kuka": 0.0}}, "mixture is empty"),
        ({"curriculum": [{"after": 5, "mix": {"kukka": 1.0}}]}, "did you mean 'kuka'"),
        ({"mix": {"kuka": 1.0, "roboset": 1.0}}, "different action encodings: eef_pos: kuka; joint_pos: roboset"),
        ({"noop_filter": "zero"}, "choose none, released, first_step, near_zero"),
        ({"statistics": "own"}, "choose released, train"),
        ({"images": "quick"}, "choose released, fast"),
        ({"window_gb": 0}, "window_gb=0"),
        ({"normalisation": "quantiles"}, "choose quantile, minmax, meanstd"),
        ({"val_fraction": 1.0}, "share of the trajectories"),
        ({"global_batch_size": 0}, "must be at least 1"),
        ({"action_chunk": 0}, "action_chunk=0"),
        ({"augment": {"random_blur": [1]}}, "unknown operation 'random_blur'"),
        ({"datasets": {"mine": {"camera": 1}}}, "unknown camera"),
    ],
)
def test_wrong_arguments_are_errors_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        random_data(**options)


def test_cameras_and_dimensions_that_do_not_fit(toy_root: Path) -> None:
    with pytest.raises(ValueError, match="toy has no camera left; it has primary, wrist"):
        toy(toy_root, cameras=["left"]).check()

    def mixed(name: str, spec: Any) -> Synthetic:
        return Synthetic(name, action_dim=7 if name == "kuka" else 14)

    data = VLADataModule(mixed, {"kuka": 1.0, "bridge_orig": 1.0}, list, 16, 8)
    with pytest.raises(ValueError, match=r"different dimensions: \{'kuka': 7, 'bridge_orig': 14\}"):
        data.setup()
