"""What the DataModule's options do to the steps that are served."""

from pathlib import Path

import numpy as np
import toy_rlds
from serving import opened, random_data, same, toy, train


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
        not np.array_equal(a.observation.images["primary"], b.observation.images["primary"])
        for a, b in zip(plain, swapped, strict=True)
    ]
    assert 0.3 < np.mean(changed) < 0.7
    for a, b in zip(plain, swapped, strict=True):
        assert {i.tobytes() for i in a.observation.images.values()} == {
            i.tobytes() for i in b.observation.images.values()
        }
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
