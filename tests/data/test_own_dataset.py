"""A dataset of one's own, as docs/data.md tells to add it: one YAML, no code of ours touched."""

import shutil
from pathlib import Path

import yaml
from hydra import compose, initialize_config_dir

from openvla_lightning.config import CONF

PAGE = Path(__file__).parents[2] / "docs" / "data.md"


def test_bridge_as_somebodys_own_dataset_is_one_file(golden: Path, tmp_path: Path) -> None:
    from openvla_lightning.run.start import data_report

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
