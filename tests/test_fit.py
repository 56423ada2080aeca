"""What a training refuses at its start, in a line, and what it does without."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from openvla_lightning.config import CONF
from openvla_lightning.run.fit import fit


def train(folder: Path, *overrides: str, script: str = "train") -> None:
    small = ["+debug=tiny", "data.num_workers=0", "trainer.max_steps=2", "trainer.val_check_interval=2"]
    with initialize_config_dir(CONF, version_base="1.3"):
        fit(compose(script, [*small, f"paths.output_dir={folder}", *overrides]))


def test_a_training_without_a_logger_trains(tmp_path: Path) -> None:
    train(tmp_path, "logger=none")
    assert list(tmp_path.glob("checkpoints/*.ckpt"))
    assert not (tmp_path / "metrics.csv").exists()


def test_a_number_that_is_not_logged_cannot_stop_a_training(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"monitor=val/acc is not logged .* val/action_accuracy, .*val/loss"):
        train(tmp_path, "callbacks=early_stop", "callbacks.early_stop.monitor=val/acc")


@pytest.mark.parametrize("devices", ["-1", "[0]"])
def test_a_choice_of_gpus_on_a_cpu_is_refused(tmp_path: Path, devices: str) -> None:
    with pytest.raises(SystemExit, match=r"chooses among GPUs, and this run is on a CPU: .* trainer\.devices=1"):
        train(tmp_path, "trainer.accelerator=cpu", f"trainer.devices={devices}")


def test_what_is_quantised_is_refused_to_learn_before_weights_are_loaded(tmp_path: Path) -> None:
    quantised = ["strategy=qlora", "rank=2", "model.init_from=null"]
    with pytest.raises(SystemExit, match=r"projector\.\S+, projector\.\S+ are quantised .* quantisation\.keep"):
        train(tmp_path, *quantised, "strategy.also_train=[projector]", script="finetune")
