"""Training as users start it: processes of their own, real checkpoints, a real SIGKILL."""

import csv
import json
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import warm_scripts
from PIL import Image

from openvla_lightning.model import VLA
from openvla_lightning.policy import Policy

SMALL = ["+debug=tiny", "data/source=synthetic", "trainer.log_every_n_steps=1", "save_every=5"]


def finish(script: str, root: Path, *overrides: str, fails: bool = False) -> str:
    root.mkdir(exist_ok=True)
    return warm_scripts.finish(script, root / "log", f"paths.log_dir={root}", *overrides, fails=fails)


def curve(folder: Path, metric: str = "train/loss") -> dict[int, float]:
    with (folder / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get(metric)]
    steps = [int(row["step"]) for row in rows]
    assert steps == sorted(set(steps)), f"a joined curve has each step once: {steps}"
    return {int(row["step"]): float(row[metric]) for row in rows}


def only_run(root: Path) -> Path:
    (run,) = (path for path in root.iterdir() if path.is_dir())
    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of 20 steps."""
    root = tmp_path_factory.mktemp("uninterrupted")
    finish("train.py", root, *SMALL)
    return only_run(root / "train")


def test_a_run_leaves_what_the_page_says(trained: Path) -> None:
    assert sorted(p.name for p in (trained / "checkpoints").iterdir()) == [
        f"step_{s:06d}.ckpt" for s in (5, 10, 15, 20)
    ]
    assert (trained / "dataset_statistics.json").exists()
    assert (trained / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    assert (trained / ".hydra" / "overrides.yaml").exists()
    page = (trained / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == 2, "the curve and the samples are inside the page"
    assert "<code>save_every=5</code>" in page
    assert list(curve(trained)) == list(range(20))
    with (trained / "metrics.csv").open() as file:
        header = file.readline().strip().split(",")
    wanted = {
        "train/l1",
        "train/action_accuracy",
        "train/samples_per_second",
        "val/loss",
        "val/action_accuracy",
        "val/l1",
    }
    assert wanted <= set(header)
    assert any(name.startswith("train/action_accuracy/") for name in header)
    assert any(name.startswith("val/l1/") for name in header)


def test_a_checkpoint_holds_all_that_acting_needs_and_unpickles_no_class(trained: Path) -> None:
    checkpoint = torch.load(trained / "checkpoints" / "step_000020.ckpt", weights_only=True)
    ours = checkpoint["openvla_lightning"]
    made_of = {"vla", "processor", "action_head", "strategy", "quantisation", "base", "normalisation", "norm_stats"}
    assert set(ours) == {"version", *made_of}
    assert all({"q01", "q99", "mask"} <= set(stats["action"]) for stats in ours["norm_stats"].values())
    assert checkpoint["hyper_parameters"]["trainer"]["max_steps"] == 20
    assert all(name.startswith("vla.") for name in checkpoint["state_dict"])


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.4])
def test_killed_and_resumed_the_curve_joins_up(trained: Path, tmp_path: Path, delay: float) -> None:
    told = [f"paths.log_dir={tmp_path}", *SMALL, "trainer.max_steps=20"]
    warm_scripts.kill_after(lambda: [*tmp_path.rglob("step_*.ckpt")], "train.py", tmp_path / "log", *told, delay=delay)

    output = finish("train.py", tmp_path, *SMALL, "trainer.max_steps=20", "ckpt_path=last")
    assert "Resuming" in output
    resumed = only_run(tmp_path / "train")
    expected, found = curve(trained), curve(resumed)
    # A checkpoint is written before the log's line of the same step: the kill may have come between the two.
    assert len(set(expected) - set(found)) <= 1
    assert found == pytest.approx({step: expected[step] for step in found}, rel=1e-5)
    weights, again = (
        torch.load(run / "checkpoints/step_000020.ckpt", weights_only=True)["state_dict"] for run in (trained, resumed)
    )
    torch.testing.assert_close(again, weights, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_finetuning_starts_from_the_newest_run_and_keeps_its_statistics(trained: Path, tmp_path: Path) -> None:
    source = f"model.init_from={trained.parent}"
    small = ["strategy=lora", "rank=4", *SMALL, source]
    finish("finetune.py", tmp_path / "whole", *small, "trainer.max_steps=10")
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    (only_run(tmp_path / "parts/finetune") / "checkpoints/step_000010.ckpt").unlink()
    output = finish("finetune.py", tmp_path / "parts", *small, "trainer.max_steps=10", "ckpt_path=last")
    assert "Resuming" in output
    whole, parts = (only_run(tmp_path / name / "finetune") for name in ("whole", "parts"))
    base = torch.load(trained / "checkpoints" / "step_000020.ckpt", weights_only=True)
    tuned, again = (
        torch.load(run / "checkpoints" / "step_000010.ckpt", weights_only=True, mmap=True) for run in (whole, parts)
    )
    about = tuned["openvla_lightning"]
    assert set(base["openvla_lightning"]["norm_stats"]) <= set(about["norm_stats"])
    assert about["strategy"]["rank"] == 4
    assert about["base"]["path"] == str(trained / "checkpoints" / "step_000020.ckpt")
    assert all(".lora_" in key or "num_batches" in key or "running_" in key for key in tuned["state_dict"])
    assert set(again["state_dict"]) == set(tuned["state_dict"])
    for key, value in tuned["state_dict"].items():
        torch.testing.assert_close(again["state_dict"][key], value, rtol=1e-5, atol=1e-6)
    mix = {name for name, stats in about["norm_stats"].items() if stats["latest"]}
    assert mix == set(tuned["hyper_parameters"]["data"]["mix"])
    policy = Policy.from_pretrained(whole, "tabletop_finetune", device="cpu")
    assert np.isfinite(policy.act(np.zeros((96, 96, 3), np.uint8), "push")).all()


@pytest.mark.slow
def test_the_paper_s_recipe_without_data_and_weights_stops_with_one_message(tmp_path: Path) -> None:
    started = time.monotonic()
    output = finish("train.py", tmp_path, "+experiment=oxe_full", f"paths.data_dir={tmp_path}", fails=True)
    assert time.monotonic() - started < 60
    assert "Traceback" not in output
    assert "this run cannot start" in output
    assert "fractal20220817_data" in output
    assert "gsutil" in output
    assert "prism-dinosiglip-224px+7b" in output


def test_a_run_shorter_than_the_logging_interval_says_what_it_learned(tmp_path: Path) -> None:
    short = ["+debug=tiny", "trainer.max_steps=3", "trainer.log_every_n_steps=10", "objective=val/acuracy"]
    output = finish("train.py", tmp_path, *short, fails=True)
    assert "error: objective=val/acuracy was not logged by this run; choose" in output
    assert "train/loss" in output
    assert "Traceback" not in output
    run = only_run(tmp_path / "train")
    assert list(curve(run)) == [2]
    assert "(step 2)" in (run / "report.md").read_text()


def test_a_way_to_clip_that_is_not_there_is_refused(tmp_path: Path) -> None:
    output = finish("train.py", tmp_path, *SMALL, "+trainer.gradient_clip_algorithm=value", fails=True)
    assert "gradients are clipped by their norm only" in output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (
            ["strategy.parts=[llm.last_layr]"],
            "error: strategy: the model has no part 'llm.last_layr'; parts: vision_back",
        ),
        (
            ["strategy=lora", "rank=2", "strategy.targets=query"],
            "error: strategy: LoRA targets 'query' match no module",
        ),
    ],
)
def test_what_a_strategy_names_is_looked_for_before_data_are_read(tmp_path: Path, wrong: list[str], said: str) -> None:
    output = finish("train.py", tmp_path, *SMALL, *wrong, fails=True)
    assert said in output
    assert "Traceback" not in output
    assert "steps to train on" not in output


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("{env: tabletp}", "error: evaluate_after: In 'evaluate': Could not find 'env/tabletp'"),
        ("{env: {num_steps: 5}}", "error: evaluate_after.env={'num_steps': 5}: expected the name of an option"),
        ("{episodes: 5}", "error: evaluate_after: evaluate.py has no 'episodes'"),
        ("{episodes_per_task: 0}", "error: evaluate_after: these values do not fit:\n  episodes_per_task=0: expected"),
        ("tabletop", "error: evaluate_after=tabletop: expected settings of evaluate.py"),
    ],
)
def test_a_mistake_in_the_evaluation_after_a_training_is_said_before_it(tmp_path: Path, wrong: str, said: str) -> None:
    output = finish("train.py", tmp_path, *SMALL, f"evaluate_after={wrong}", fails=True)
    assert said in output
    assert "Traceback" not in output
    assert not [*tmp_path.rglob("*.ckpt")]


def test_nothing_to_resume_is_said_before_anything_is_built(tmp_path: Path) -> None:
    output = finish("train.py", tmp_path, *SMALL, "ckpt_path=last", fails=True)
    assert "no checkpoint below" in output
    assert "Traceback" not in output


@pytest.mark.slow
def test_training_stops_when_nothing_gets_better_and_keeps_the_best(tmp_path: Path) -> None:
    stop = ["callbacks=early_stop", "callbacks.early_stop.monitor=val/loss", "callbacks.early_stop.mode=min"]
    stop += ["callbacks.early_stop.patience=2", "callbacks.early_stop.min_delta=100", "trainer.val_check_interval=5"]
    finish("train.py", tmp_path, *SMALL, *stop, "trainer.max_steps=60")
    run = only_run(tmp_path / "train")
    assert max(curve(run)) == 14, "three validations of which the first is the best"
    (best,) = (run / "best").glob("step_*.ckpt")
    losses = curve(run, "val/loss")
    assert int(best.stem.removeprefix("step_")) - 1 == min(losses, key=lambda step: losses[step])
    with (run / "metrics.csv").open() as file:
        assert "val/distinct_actions" in file.readline()


@pytest.mark.slow
def test_the_vlm_stage_learns_from_conversations_and_its_weights_start_the_next(tmp_path: Path) -> None:
    entries: list[dict[str, Any]] = []
    for number, colour in enumerate(("red", "green", "blue", "yellow") * 8):
        turns = [{"from": "human", "value": "<image>\nwhat colour?"}, {"from": "gpt", "value": colour}]
        entries.append({"id": str(number), "image": f"{colour}.png", "conversations": turns})
        Image.new("RGB", (40, 30), colour).save(tmp_path / f"{colour}.png")
        entries.append({"id": f"text {number}", "conversations": [{"from": "human", "value": "go"}, turns[1]]})
    (tmp_path / "chat.json").write_text(json.dumps(entries))
    where = [
        "data/source=conversations",
        f"data.source.path={tmp_path}/chat.json",
        f"data.source.image_root={tmp_path}",
    ]
    small = ["+experiment=vlm_pretrain", "+debug=tiny", *where, "trainer.log_every_n_steps=1", "optim.lr=3e-3"]
    finish("train.py", tmp_path, *small, "trainer.max_steps=40", "data.global_batch_size=8")
    run = only_run(tmp_path / "vlm_pretrain")
    losses = list(curve(run).values())
    assert np.mean(losses[-8:]) < 0.5 * losses[0]
    assert list(curve(run, "train/token_accuracy"))
    assert list(curve(run, "val/token_accuracy"))
    stage_2 = VLA.from_pretrained(run)
    saved = torch.load(run / "checkpoints/step_000040.ckpt", weights_only=True)["state_dict"]
    torch.testing.assert_close(dict(stage_2.state_dict()), {k.removeprefix("vla."): v for k, v in saved.items()})
