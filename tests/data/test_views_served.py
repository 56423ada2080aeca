"""Several cameras, earlier pictures and proprioception, as they are served."""

import logging
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import toy_rlds
from serving import opened, random_data, toy

from openvla_lightning.data.augment import Augmentation
from openvla_lightning.types import Batch, Step, camera_of, views_of

OTHER = {"cameras": {"primary": "image"}, "state": ["state"], "noop_threshold": 1e-3}


@pytest.fixture(scope="module")
def two_root(toy_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data directory with the toy dataset twice, under two names."""
    root = tmp_path_factory.mktemp("two")
    for name in ("toy", "other"):
        shutil.copytree(toy_root / "toy", root / name)
    return root


def served(data: Any) -> list[Step]:
    """The held-out steps, in the order of their trajectory."""
    return [step for batch in opened(data).val_dataloader() for step in batch]


def test_views_are_named_and_read_back() -> None:
    assert views_of(["primary", "wrist"], 2) == ("primary", "wrist", "primary@-1", "wrist@-1")
    assert [camera_of(view) for view in ("wrist", "wrist@-3")] == [("wrist", 0), ("wrist", 3)]
    for cameras, history in ((["primary"], 0), ([], 1), (["wrist", "wrist"], 1), ("primary", 1)):
        with pytest.raises(ValueError, match=r"data\.(history|cameras)"):
            views_of(cameras, history)


def test_history_is_the_step_before_and_stops_at_the_beginning(toy_root: Path) -> None:
    data = opened(toy(toy_root, history=3, noop_filter="none", filter_noops=False))
    steps = data.train["toy"]
    index = steps.source.index
    starts = set(index.bounds.tolist())
    for position, step in enumerate(steps.steps.tolist()):
        now = [steps.image("primary", position, 32, back=back) for back in range(3)]
        begin = max(start for start in starts if start <= step)
        for back, image in enumerate(now):
            expected = steps.source.image("primary", max(begin, step - back), 32)
            np.testing.assert_array_equal(image, expected)


def test_history_and_wrist_come_as_views(toy_root: Path) -> None:
    for step in served(toy(toy_root, cameras=["primary", "wrist"], history=2)):
        assert list(step.observation.images) == ["primary", "wrist", "primary@-1", "wrist@-1"]
        assert all(image.shape == (32, 32, 3) for image in step.observation.images.values())
        assert step.observation.images["wrist@-1"].any()


def test_a_camera_that_a_dataset_lacks_is_black_and_said_once(two_root: Path, caplog: pytest.LogCaptureFixture) -> None:
    own = {"toy": toy_rlds.SPEC, "other": OTHER}
    data = toy(two_root, mix={"toy": 1.0, "other": 1.0}, datasets=own, cameras=["primary", "wrist"])
    with caplog.at_level(logging.WARNING):
        steps = served(data)
        data.check()
    black_ones = [r.getMessage() for r in caplog.records if "black" in r.getMessage()]
    assert black_ones == ["other has no camera wrist: its pictures are black"]
    black = {step.dataset_name: not step.observation.images["wrist"].any() for step in steps}
    assert black == {"toy": False, "other": True}
    for cameras in (["wrist", "primary"], ["primary", "tail"]):
        with pytest.raises(ValueError, match="has no camera"):
            toy(two_root, mix={"toy": 1.0, "other": 1.0}, datasets=own, cameras=cameras).check()


def test_proprioception_is_scaled_like_actions_in_every_dimension(toy_root: Path) -> None:
    data = opened(toy(toy_root, proprio=True))
    assert data.proprio_dim == 3  # without the column of zeros that the spec puts between
    numbers = data.statistics["toy"].proprio
    for step in (step for batch in data.val_dataloader() for step in batch):
        raw = step.observation.proprio
        assert raw is not None
        assert raw.dtype == np.float32
        span = numbers["q99"] - numbers["q01"] + 1e-8
        expected = np.clip(2 * (raw - numbers["q01"]) / span - 1, -1, 1)
        np.testing.assert_allclose(step.proprio, expected, atol=1e-5)
    assert served(toy(toy_root))[0].proprio is None


def test_proprioception_that_is_not_there_or_of_another_width_is_named(two_root: Path) -> None:
    mute = {"toy": toy_rlds.SPEC | {"state": []}}
    with pytest.raises(ValueError, match=r"no proprioception is read from toy"):
        opened(toy(two_root, datasets=mute, proprio=True))
    own = {"toy": toy_rlds.SPEC, "other": OTHER | {"state": ["state", "state"]}}
    with pytest.raises(ValueError, match=r"different dimensions: {'toy': 3, 'other': 6}"):
        opened(toy(two_root, mix={"toy": 1.0, "other": 1.0}, datasets=own, proprio=True))


def test_cameras_are_augmented_apart_and_their_earlier_pictures_alike() -> None:
    """One view is augmented as it always was."""
    crop = {"random_resized_crop": {"scale": [0.5, 0.9], "ratio": [1.0, 1.0]}, "random_brightness": [0.2]}
    data = random_data(augment=crop, cameras=["primary", "wrist"], history=2)
    data.trainer = SimpleNamespace(training=True)
    image = torch.randint(0, 256, (3, 3, 8, 8), dtype=torch.uint8)
    ids = torch.zeros(3, 1, dtype=torch.long)
    batch = Batch(
        pixel_values=image.repeat(1, 4, 1, 1),
        input_ids=ids,
        attention_mask=ids == 0,
        places=ids,
        labels=ids,
        actions=torch.zeros(3, 1, 7),
        numbers=[5, 6, 7],
    )
    primary, wrist, *earlier = data.on_after_batch_transfer(batch, 0).pixel_values.split(3, dim=1)
    assert not torch.equal(primary, wrist)
    assert torch.equal(primary, earlier[0])
    assert torch.equal(wrist, earlier[1])
    augmentation = Augmentation(crop)
    alone = augmentation(image, torch.from_numpy(augmentation.draws(data.seed, batch.numbers)))
    assert torch.equal(primary, alone)
