"""Loggers, read back: what a run, a killed run and an evaluation leave in W&B, TensorBoard and CSV."""

import csv
import resource
import signal
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import wandb_records as records
from hydra.utils import instantiate
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from openvla_lightning.config import for_people
from openvla_lightning.evaluation.video import write_video
from openvla_lightning.logger import CSVLogger, TensorBoardLogger, WandbLogger, log_results
from openvla_lightning.report.results import Episode, Results


def results(folder: Path, checkpoint: Path) -> Results:
    """Two tasks, three successes in four episodes; a video of the first."""
    frames = [np.full((32, 32, 3), 40 * i, np.uint8) for i in range(5)]
    write_video(folder / "videos" / "a.mp4", frames, "lift the cube", success=True)
    episodes = [
        Episode("lift", "lift", 0, "lift the cube", True, 5, video="videos/a.mp4", progress=1.0),
        Episode("lift", "lift", 1, "lift the cube", False, 9, progress=0.5),
        Episode("push", "push", 0, "push the cube", True, 7, progress=1.0),
        Episode("push", "push", 1, "push the cube", True, 7, progress=1.0),
    ]
    return Results("mine", "tabletop", "new", episodes=episodes, checkpoint={"path": str(checkpoint)}, config={"n": 1})


@pytest.mark.slow
def test_a_killed_run_goes_on_under_its_id(wandb_run: Path) -> None:
    killed, resumed = records.attempts(wandb_run)
    first, second = records.records(killed), records.records(resumed)
    assert killed.name.split("-")[-1] == resumed.name.split("-")[-1] == records.run(second)["run_id"]
    rows = [row for row in records.history(second) if "train/loss" in row]
    begun = rows[0]["trainer/global_step"]
    assert 2 <= begun <= 5
    assert [row["trainer/global_step"] for row in rows] == list(range(begun, 6))
    assert records.of_type(second, "exit")
    assert not records.of_type(first, "exit"), "the first one was killed"


@pytest.mark.slow
def test_a_run_says_what_it_is_and_belongs_to_nobody(wandb_run: Path) -> None:
    found = records.records(records.attempts(wandb_run)[-1])
    run, config = records.run(found), records.config(found)
    assert run["run_group"] == "train"
    assert run["job_type"] == "train"
    assert run["project"] == "openvla-lightning"
    assert not run.get("entity")
    assert {"tiny", "full", "bridge_rt_1"} <= set(run["tags"])
    assert "trainer.max_steps=6" in run["display_name"]
    assert "ckpt_path" not in run["display_name"]
    assert config["choices"]["strategy"] == "full"
    assert "trainer.max_steps=6" in config["overrides"]
    assert config["trainer"]["max_steps"] == 6
    assert config["optim"]["lr"] > 0


@pytest.mark.slow
def test_metrics_and_costs_are_in_the_run_as_in_the_csv_log(wandb_run: Path) -> None:
    found = [record for attempt in records.attempts(wandb_run) for record in records.records(attempt)]
    rows = records.history(found)
    with (wandb_run / "metrics.csv").open(newline="") as file:
        logged = list(csv.DictReader(file))
    names = {name for row in rows for name in row}
    speed = {name for name in names if name.startswith("throughput/")}
    assert {"throughput/samples_per_second", "throughput/data_wait", "throughput/step_seconds/forward"} <= speed
    assert names - speed >= {name for name in logged[0] if name.replace("train/", "throughput/") not in speed} - {
        "step"
    }
    losses = {row["trainer/global_step"]: row["train/loss"] for row in rows if "train/loss" in row}
    expected = {int(row["step"]): float(row["train/loss"]) for row in logged if row["train/loss"]}
    assert {3, 4, 5} <= set(losses)  # W&B loses what it had not yet written when it was killed
    assert losses == pytest.approx({step: expected[step] for step in losses})
    assert records.summary(found)["costs/trainable"] > 0


@pytest.mark.slow
def test_samples_show_what_is_seen_asked_demonstrated_and_predicted(wandb_run: Path) -> None:
    attempt = records.attempts(wandb_run)[-1]
    name, table = list(records.tables(attempt))[-1]
    assert name == "val/samples"
    assert table["columns"] == ["image", "prompt", "dataset", "demonstrated", "predicted", "l1"]
    assert len(table["data"]) == 4, "as many as the batch has"
    for _, prompt, dataset, demonstrated, predicted, error in table["data"]:
        assert "what action should the robot take to" in prompt
        assert dataset in {"bridge_orig", "fractal20220817_data"}
        true, said = (np.fromstring(text.strip("[]"), sep=" ") for text in (demonstrated, predicted))
        assert true.shape == said.shape == (7,)
        assert 0 <= error <= 2
    (artifact,) = [a for a in records.of_type(records.records(attempt), "artifact") if a["type"] == "run_table"][-1:]
    assert any(entry["path"].endswith(".png") for entry in artifact["manifest"]["contents"])


@pytest.mark.slow
def test_checkpoints_and_statistics_are_kept_when_asked(wandb_run: Path) -> None:
    found = records.records(records.attempts(wandb_run)[-1])
    kept = [artifact for artifact in records.of_type(found, "artifact") if artifact["type"] != "run_table"]
    of_checkpoints = [set(artifact["aliases"]) for artifact in kept if artifact["type"] == "checkpoint"]
    assert {"latest", "step_000006"} in of_checkpoints
    assert {"latest", "step_000002"} not in of_checkpoints, "that of the first attempt is not its own"
    (statistics,) = [artifact for artifact in kept if artifact["type"] == "dataset_statistics"]
    (entry,) = statistics["manifest"]["contents"]
    assert entry["path"] == "dataset_statistics.json"
    assert entry["size"] == str((wandb_run / "dataset_statistics.json").stat().st_size)


@pytest.mark.slow
@pytest.mark.parametrize("named", ["checkpoints/step_000006.ckpt", "."])
def test_an_evaluation_stands_beside_its_training(named: str, wandb_run: Path, tmp_path: Path) -> None:
    checkpoint = wandb_run / named
    logger = WandbLogger(str(tmp_path), project="p", group="evaluate")
    log_results(logger, results(tmp_path, checkpoint), tmp_path)
    (attempt,) = records.attempts(tmp_path)
    found = records.records(attempt)
    run, config, (row, *_) = records.run(found), records.config(found), records.history(found)
    assert (run["run_group"], run["job_type"]) == ("train", "evaluate")
    assert run["display_name"] == "mine, new tasks"
    assert {"tiny", "full"} <= set(run["tags"])
    assert config["choices"]["strategy"] == "full"
    assert "trainer.max_steps=6" in config["overrides"]
    assert config["n"] == 1
    assert row["trainer/global_step"] == 6
    assert row["eval/success"] == 0.75
    assert row["eval/success/lift"] == 0.5
    assert row["eval/success_low"] < 0.75 < row["eval/success_high"]
    shown = dict(records.tables(attempt))
    assert [line[:3] for line in shown["eval/tasks"]["data"]] == [["lift", 1, 2], ["push", 2, 2]]
    ((task, _, success, steps, _),) = shown["eval/videos"]["data"]
    assert (task, success, steps) == ("lift", True, 5)
    assert not shown.keys() & row.keys(), "a name is of a number or of a table"
    kept = records.of_type(found, "artifact")
    assert any(e["path"].endswith(".mp4") for artifact in kept for e in artifact["manifest"]["contents"])
    assert {artifact["type"] for artifact in kept} == {"run_table"}, "nothing else unless asked"


def test_runs_of_one_process_do_not_mix(tmp_path: Path, no_account: None) -> None:
    for name, scores in {"a": 0.5, "b": 0.75}.items():
        found = Results(name, "offline", offline={"token_accuracy": scores, "l1": 0.1, "datasets": {}})
        log_results(WandbLogger(str(tmp_path / name), project="p", group="g"), found, tmp_path)
    read = [records.records(attempt) for name in "ab" for attempt in records.attempts(tmp_path / name)]
    assert len({records.run(found)["run_id"] for found in read}) == 2
    assert [records.history(found)[0]["eval/token_accuracy"] for found in read] == [0.5, 0.75]


@pytest.mark.parametrize(("variables", "mode"), [({}, "offline"), ({"WANDB_MODE": "disabled"}, None)])
def test_without_a_key_a_run_is_offline_unless_told_otherwise(
    variables: dict[str, str], mode: str | None, tmp_path: Path, no_account: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    logger = WandbLogger(str(tmp_path), project="p", group="g")
    assert logger._wandb_init["mode"] == mode
    assert logger._wandb_init["entity"] is None


@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
def test_an_evaluation_is_logged_without_an_account_too(
    kind: type[CSVLogger | TensorBoardLogger], tmp_path: Path
) -> None:
    log_results(kind(str(tmp_path)), results(tmp_path, Path("runs/train/a/checkpoints/step_000250.ckpt")), tmp_path)
    if kind is CSVLogger:
        with (tmp_path / "metrics.csv").open(newline="") as file:
            (row,) = csv.DictReader(file)
        assert (int(row["step"]), float(row["eval/success"])) == (250, 0.75)
    else:
        events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
        assert [(event.step, event.value) for event in events.Scalars("eval/success")] == [(250, 0.75)]


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_resumed_run_joins_its_csv_curve(tmp_path: Path) -> None:
    for steps, name in ((range(4), "train/loss"), (range(2, 6), "val/loss")):  # killed after step 3, resumed from 2
        logger = CSVLogger(str(tmp_path))
        for step in steps:
            logger.log_metrics({name: float(step)}, step)
    assert [(row["step"], row["train/loss"], row["val/loss"]) for row in rows(tmp_path)] == [
        ("0", "0.0", ""), ("1", "1.0", ""), ("2", "", "2.0"), ("3", "", "3.0"), ("4", "", "4.0"), ("5", "", "5.0")
    ]  # fmt: skip


def test_the_curve_of_a_run_with_nothing_left_to_train_stays(tmp_path: Path) -> None:
    CSVLogger(str(tmp_path)).log_metrics({"train/loss": 1.0}, 7)
    again = CSVLogger(str(tmp_path))
    again.log_hyperparams({"seed": 7})
    again.save()
    again.finalize("success")
    assert rows(tmp_path) == [{"step": "7", "train/loss": "1.0"}]


def test_rows_that_a_full_disk_does_not_take_wait_until_it_does(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logger = CSVLogger(str(tmp_path))
    steps = 40
    whole, before = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for step in range(steps):
            if step in (10, 30):
                resource.setrlimit(resource.RLIMIT_FSIZE, (100 if step == 10 else whole[0], whole[1]))
            logger.log_metrics({"train/loss": float(step)} | ({"val/loss": 1.0} if step == 20 else {}), step)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, whole)
        signal.signal(signal.SIGXFSZ, before)
    found = rows(tmp_path)
    assert [int(row["step"]) for row in found] == [*range(steps)]
    assert [float(row["train/loss"]) for row in found] == [*map(float, range(steps))]
    assert len([text for text in caplog.messages if "metrics.csv cannot be written" in text]) == 1


def test_what_a_step_logged_before_the_disk_was_full_is_kept(tmp_path: Path) -> None:
    """Training and validation log a row each at the same step."""
    logger = CSVLogger(str(tmp_path))
    whole, before = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        logger.log_metrics({"train/loss": 1.0, "val/loss": 2.0}, 9)
        logger.log_metrics({"train/loss": 3.0}, 10)
        resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "metrics.csv").stat().st_size + 3, whole[1]))
        logger.log_metrics({"val/loss": 4.0}, 10)
        resource.setrlimit(resource.RLIMIT_FSIZE, whole)
        logger.log_metrics({"train/loss": 5.0}, 11)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, whole)
        signal.signal(signal.SIGXFSZ, before)
    found = [(row["step"], row["train/loss"], row["val/loss"]) for row in rows(tmp_path)]
    assert found == [("9", "1.0", "2.0"), ("10", "3.0", ""), ("10", "", "4.0"), ("11", "5.0", "")]


def test_a_line_that_a_kill_cut_short_is_left_out_of_the_curve(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("a,step,z\n1.0,3,2.0\n1.")
    CSVLogger(str(tmp_path)).log_metrics({"a": 5.0}, 4)
    assert rows(tmp_path) == [{"a": "1.0", "step": "3", "z": "2.0"}, {"a": "5.0", "step": "4", "z": ""}]


def test_a_resumed_run_joins_its_tensorboard_curve(tmp_path: Path) -> None:
    for steps in (range(4), range(2, 6)):  # killed after step 3, resumed from step 2
        logger = TensorBoardLogger(str(tmp_path))
        for step in steps:
            logger.log_metrics({"train/loss": float(step)}, step)
        logger.finalize("success")
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")][-4:] == [2, 3, 4, 5]


def test_tensorboard_that_is_not_installed_says_what_to_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openvla_lightning.logger.tensorboard.find_spec", lambda name: None)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    node = {"_target_": "openvla_lightning.logger.TensorBoardLogger", "save_dir": str(tmp_path)}
    advice = r"^error: .* pip install 'openvla-lightning\[tensorboard\]', or in a checkout"
    with pytest.raises(SystemExit, match=advice), for_people():
        instantiate(node)


def test_loggers_are_lightnings_own(tmp_path: Path, no_account: None) -> None:
    loggers = [CSVLogger(str(tmp_path)), TensorBoardLogger(str(tmp_path)), WandbLogger(str(tmp_path), "p", "g")]
    assert L.Trainer(logger=loggers, accelerator="cpu", enable_checkpointing=False).loggers == loggers
