"""A dataset of one's own, as docs/data.md tells to add it: one YAML, no code of ours touched."""

import re
import shutil
import textwrap
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from hydra import compose, initialize_config_dir

from openvla_lightning.config import CONF
from openvla_lightning.data import VLADataModule
from openvla_lightning.data.source.rlds import RLDS

PAGE = Path(__file__).parents[2] / "docs" / "data.md"


def test_the_page_on_your_own_dataset_is_true(tmp_path: Path) -> None:
    page = PAGE.read_text()
    code, config = (textwrap.dedent(re.search(rf"```{kind}\n(.*?)```", page, re.S)[1]) for kind in ("python", "yaml"))  # type: ignore[index]
    said: dict[str, Any] = {"__name__": "page"}
    exec(code, said)
    random = np.random.default_rng(0)

    def episode(split: str, index: int) -> dict[str, Any]:
        observation = {"image": random.integers(0, 255, (256, 256, 3), np.uint8), "state": np.zeros(8, np.float32)}
        step = {"observation": observation, "language_instruction": "tidy up"}
        actions = np.hstack([random.normal(size=(9, 6)), np.ones((9, 1))]).astype(np.float32)
        return {"steps": [step | {"action": action} for action in actions]}

    written = re.search(r'write_rlds\("data/(\S+)", FEATURES', code)
    assert written
    said["write_rlds"](tmp_path / written[1], said["FEATURES"], {"train": 3, "val": 1}, episode, workers=0)
    data = yaml.safe_load(config)["data"]
    datamodule = VLADataModule(partial(RLDS, tmp_path), data["mix"], list, 32, 8, datasets=data["datasets"])
    datamodule.setup()
    assert {
        split: len(steps["my_robot"]) for split, steps in (("train", datamodule.train), ("val", datamodule.val))
    } == {
        "train": 27,
        "val": 9,
    }
    (step,) = datamodule.train_dataloader().dataset[[5]]
    assert step.instruction == "tidy up"
    assert step.action.shape == (1, 7)


def test_bridge_as_somebodys_own_dataset_is_one_file(golden: Path, tmp_path: Path) -> None:
    from openvla_lightning.run import data_report

    shutil.copytree(golden / "data" / "bridge_sample" / "bridge_dataset", tmp_path / "my_bridge")
    mine = {"cameras": {"primary": "image_0"}, "state": ["state"], "encoding": "eef_pos", "control_hz": 5}
    mixes = tmp_path / "conf" / "data" / "mix"
    mixes.mkdir(parents=True)
    config = {"data": {"mix": {"my_bridge": 1.0}, "datasets": {"my_bridge": mine}}}
    (mixes / "mine.yaml").write_text(f"# @package _global_\n{yaml.safe_dump(config)}")
    paths = [f"paths.data_dir={tmp_path}", f"paths.output_dir={tmp_path}/out", "run_name=mine"]
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose("data_report", [f"hydra.searchpath=[file://{tmp_path}/conf]", "data/mix=mine", *paths])
    data_report(cfg)
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| my_bridge | 50 | 500 | 5 |" in report
    assert "25 of 25 held-out trajectories are also trained on" in report
