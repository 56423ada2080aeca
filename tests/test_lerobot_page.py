"""What docs/lerobot.md has a reader do, on a small dataset."""

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from openvla_lightning.config import validate
from openvla_lightning.data.report.facts import selections
from openvla_lightning.data.report.pages import write_report
from openvla_lightning.data.source.lerobot.__main__ import main

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests" / "data"))
import toy_lerobot as toy  # noqa: E402

RECORDINGS = [toy.recording(number) for number in range(len(toy.LENGTHS))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.write(tmp_path_factory.mktemp("page") / "my_arm")


def served(config: Path, *overrides: str) -> Any:
    """The data of a fine-tuning, with `config` on the search path."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        words = ["data=finetune", "data/mix=my_arm", f"hydra.searchpath=[file://{config}]", *overrides]
        cfg = compose("finetune", [*words, "paths.output_dir=/tmp/out", "data.num_workers=0"])
    validate(cfg)
    data = instantiate(cfg.data, collate=list, _convert_="all")
    data.prepare_data()
    data.setup()
    return data


def test_the_description_of_the_page_is_trained_on_and_reported_on(folder: Path, tmp_path: Path) -> None:
    page = (ROOT / "docs" / "lerobot.md").read_text()
    (described,) = [one for one in re.findall(r"```yaml\n(.*?)```", page, re.S) if "conf/data/mix/my_arm.yaml" in one]
    (tmp_path / "data" / "mix").mkdir(parents=True)
    (tmp_path / "data" / "mix" / "my_arm.yaml").write_text(described.replace("/data/my_arm", str(folder)))
    more = ["data.cameras=[primary,wrist]", "data.proprio=true", "data.action_chunk=4", "data.chunk_end=mask"]
    data = served(tmp_path, *more, "data.cache=jpeg", "data.val_fraction=0.2")
    step = next(iter(data.train_dataloader()))[0]
    assert step.action.shape == (4, 7)
    assert step.observation.instruction in toy.TASKS
    assert set(step.action[:, 6]) <= {0.0, 1.0}
    assert {*step.observation.images} == {"primary", "wrist"}
    report = write_report(selections(data), tmp_path / "report", "my_arm").read_text()
    assert f"{toy.HEIGHT} x {toy.WIDTH}" in report
    assert "10 Hz" in report
    assert "tiny" in report


def test_a_draft_is_a_description(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(folder)])
    text = capsys.readouterr().out
    assert "7 episodes, 45 steps, 10 a second, LeRobot v3.0" in text
    assert "the action has 7 dimensions" in text
    (tmp_path / "data" / "mix").mkdir(parents=True)
    (tmp_path / "data" / "mix" / "my_arm.yaml").write_text(text)
    steps = served(tmp_path, "+data.datasets.my_arm.gripper={open: -1, closed: 1}").train["my_arm"]
    assert steps.source.spec.cameras == toy.CAMERAS
    states = np.concatenate([one.columns["observation.state"] for one in RECORDINGS])
    np.testing.assert_array_equal(steps.source.index.proprio, states)
    with pytest.raises(SystemExit, match="is no LeRobot dataset"):
        main([str(tmp_path)])
