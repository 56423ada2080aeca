"""A sweep ends in one table: real jobs, trained and evaluated by one command."""

import csv
import json
from pathlib import Path

import pytest
import torch
import warm_scripts
import yaml
from torch import nn

from openvla_lightning.model.parameters import count
from openvla_lightning.quantisation import Quantisation
from openvla_lightning.report.__main__ import main
from openvla_lightning.report.results import Episode, Results
from openvla_lightning.report.sweeps import find_runs, over_seeds, seed_rows, sweep_rows

COSTS = {
    "parameters": 1_000_000_000,
    "trainable": 20_000_000,
    "checkpoint_bytes": 81_000_000,
    "peak_memory_bytes": 12_300_000_000,
    "memory_of": "gpu",
    "step_seconds": 0.25,
    "steps": 10,
}


def write_run(folder: Path, overrides: list[str], costs: dict[str, object], successes: int | None = None) -> None:
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(overrides))
    (folder / "costs.json").write_text(json.dumps(costs))
    if successes is not None:
        episodes = [Episode("lift", "lift", n, "lift it", n < successes, 9) for n in range(10)]
        Results(label=overrides[0], env="toy", episodes=episodes).save(folder / "evaluation")
        (folder / "metrics.csv").write_text("step,val/action_accuracy\n4,0.2\n9,\n9,0.935\n")


def test_a_row_says_what_varied_and_what_it_cost(tmp_path: Path) -> None:
    write_run(tmp_path / "10", ["strategy=full", "seed=1", "run_name=x"], {**COSTS, "trainable": 10**9}, successes=7)
    write_run(tmp_path / "2", ["strategy=lora", "seed=1", "rank=8"], {**COSTS, "checkpoint_bytes": None})
    assert [run.name for run in find_runs(tmp_path)] == ["2", "10"]
    header, lora, full = sweep_rows(find_runs(tmp_path))
    assert header[:4] == ["run", "success", "in the paper (7B, Franka)", "held-out accuracy"]
    assert lora == ["strategy=lora rank=8", "-", "-", "-", "20.0 M", "2.0%", "-", "12.30 GB", "250 ms", "-"]
    success = ["70 % (40-89)", "69.7 ± 7.2", "93.5%"]
    assert full == ["strategy=full", *success, "1,000.0 M", "100.0%", "81.0 MB", "12.30 GB", "250 ms", "9"]


def test_differences_from_the_first_run_are_paired_and_marked(tmp_path: Path) -> None:
    for number, (lr, successes) in enumerate(((1, 10), (2, 9), (3, 0))):
        write_run(tmp_path / str(number), [f"optim.lr={lr}"], COSTS, successes)
    header, *rows = sweep_rows(find_runs(tmp_path))
    assert "in the paper (7B, Franka)" not in header
    place = header.index("from the first")
    assert [row[place] for row in rows] == ["-", "-10", "-100 *"]


def test_seeds_of_one_setting_are_pooled_and_paired(tmp_path: Path) -> None:
    for number, (lr, seed, successes) in enumerate(((1, 7, 9), (2, 7, 2), (1, 8, 7), (2, 8, 4), (1, 9, 8), (2, 9, 0))):
        write_run(tmp_path / str(number), [f"seed={seed}", f"optim.lr={lr}"], COSTS, successes)
    header, first, second = seed_rows(over_seeds(find_runs(tmp_path)))
    row = dict(zip(header, second, strict=True))
    assert first[:4] == ["optim.lr=1", "3", "80 % (63-90)", "70%, 90%"]
    assert [row[name] for name in header[:4]] == ["optim.lr=2", "3", "20 % (10-37)", "0%, 40%"]
    assert row["from the first"].startswith("-60 (-")
    assert row["from the first"].endswith(" *")
    main([str(tmp_path)])
    assert "| optim.lr=2 | 3 |" in (tmp_path / "sweep.md").read_text()


def test_without_several_seeds_nothing_is_pooled(tmp_path: Path) -> None:
    for number, lr in enumerate((1, 1, 2)):
        write_run(tmp_path / str(number), ["seed=7", f"optim.lr={lr}"], COSTS, 5)
    assert over_seeds(find_runs(tmp_path)) == {}


def test_actions_a_second_count_those_of_a_chunk(tmp_path: Path) -> None:
    for chunk, seconds in ((1, 0.05), (8, 0.1)):
        folder, timing = tmp_path / str(chunk), {"seconds_per_call": seconds, "actions_per_call": 8.0 * chunk}
        write_run(folder, [f"data.action_chunk={chunk}"], COSTS)
        episodes = [Episode("lift", "lift", 1, "lift it", True, 9)]
        Results(label="mine", env="toy", episodes=episodes, timing=timing).save(folder / "evaluation")
    header, *rows = sweep_rows(find_runs(tmp_path))
    told = [[row[header.index(name)] for name in ("actions", "decision")] for row in rows]
    assert told == [["160 / s", "50 ms"], ["640 / s", "100 ms"]]


def test_learning_curves_lie_over_each_other(tmp_path: Path) -> None:
    for number in range(2):
        write_run(tmp_path / str(number), [f"seed={number}"], COSTS, successes=5)
    main([str(tmp_path)])
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "curves.png" in (tmp_path / "sweep.md").read_text()


def test_the_report_writes_it_as_markdown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "0", ["strategy=full"], COSTS)
    write_run(tmp_path / "1", ["strategy=lora"], COSTS)
    main([str(tmp_path)])
    assert "| strategy=lora | - |" in (tmp_path / "sweep.md").read_text()
    assert "sweep.md" in capsys.readouterr().out
    write_run(tmp_path / "2", ["strategy=last_layer"], COSTS, successes=3)
    main([str(tmp_path)])
    assert "30 %" in (tmp_path / "sweep.md").read_text()
    assert "![Success rates](sweep_success.png)" in (tmp_path / "sweep.md").read_text()


def test_a_page_holds_runs_whose_evaluations_are_called_alike(tmp_path: Path) -> None:
    for lr in (1, 2):
        write_run(tmp_path / str(lr), [f"optim.lr={lr}"], COSTS, successes=5 + lr)
        (tmp_path / str(lr) / "report.html").touch()
        results = Results.load(tmp_path / str(lr) / "evaluation" / "results.json")
        results.label = "policy"  # as `evaluate_after` calls what differs in values alone
        results.save(tmp_path / str(lr) / "evaluation")
    main([str(tmp_path)])
    page = (tmp_path / "sweep.html").read_text()
    assert page.count("data:image/png;base64,") == 2, "success rates, and curves"
    assert '<a href="1/report.html">optim.lr=1</a>' in page
    assert not (tmp_path / "report.md").exists()
    write_run(tmp_path / "elsewhere", ["optim.lr=3"], COSTS)
    Results("other", "toy", episodes=[Episode("lift", "lift", 1, "lift", True, 9)]).save(tmp_path / "other")
    (tmp_path / "2" / "evaluation" / "results.json").unlink()
    main([str(tmp_path)])
    assert "other" in (tmp_path / "report.md").read_text(), "what no run of the sweep has is compared as ever"


def test_a_sweep_and_what_it_is_compared_with_have_pictures_of_their_own(tmp_path: Path) -> None:
    sweep, other = tmp_path / "sweep", tmp_path / "other"
    write_run(sweep / "0", ["strategy=full"], COSTS, successes=3)
    Results("other", "toy", episodes=[Episode("lift", "lift", 1, "lift", True, 9)]).save(other)
    main([str(sweep)])
    alone = (sweep / "sweep_success.png").read_bytes()
    main([str(sweep), str(other)])
    for page, picture in (("sweep.md", "sweep_success.png"), ("report.md", "success.png")):
        assert f"]({picture})" in (sweep / page).read_text()
    assert (sweep / "sweep_success.png").read_bytes() == alone
    assert (sweep / "success.png").read_bytes() != alone
    (sweep / "report.md").unlink()
    main([str(sweep), str(other / "results.json")])
    assert "other" in (sweep / "report.md").read_text(), "a file that is named is compared like a folder"


def test_runs_that_varied_the_same_are_told_apart_by_their_place(tmp_path: Path) -> None:
    for day in ("monday", "tuesday"):
        write_run(tmp_path / day / "0", ["optim.lr=1"], COSTS, successes=5)
    main([str(tmp_path)])
    assert "- 0 (monday/0): `" in (tmp_path / "sweep.md").read_text()


def test_four_bits_count_as_what_they_stand_for() -> None:
    linear = nn.Linear(128, 96)
    assert count(linear) == (128 * 96 + 96, 128 * 96 + 96)
    assert count(Quantisation(4)._quantised(linear, torch.device("cpu"))) == (128 * 96 + 96, 0)


@pytest.mark.slow
def test_a_killed_sweep_goes_on_with_what_is_missing(tmp_path: Path) -> None:
    told = ["+sweep=seeds", "+debug=tiny", f"paths.log_dir={tmp_path}", "evaluate_after=null", "trainer.max_steps=24"]
    told += ["save_every=4", "objective=train/loss", "hydra.sweeper.params.seed='7,8'"]
    second = "seeds/*/1/checkpoints/step_*.ckpt"
    warm_scripts.kill_after(lambda: [*tmp_path.glob(second)], "train.py", tmp_path / "log", *told)

    (sweep,) = (tmp_path / "seeds").iterdir()
    first = sweep / "0" / "checkpoints" / "step_000024.ckpt"
    before = first.stat().st_mtime_ns
    assert not (sweep / "1" / "finished.json").exists()
    said = warm_scripts.finish("train.py", tmp_path / "second", *told, "ckpt_path=last")
    assert list((tmp_path / "seeds").iterdir()) == [sweep]
    assert f"Done before: {sweep}/0" in said
    assert f"Resuming {sweep}/1/checkpoints/step_" in said
    assert first.stat().st_mtime_ns == before
    assert all((sweep / job / "finished.json").exists() for job in "01")
    with (sweep / "1" / "metrics.csv").open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert steps == sorted(set(steps))

    other = [*told, "hydra.sweeper.params.seed='9,8'", "ckpt_path=last"]
    assert "this is another" in warm_scripts.finish("train.py", tmp_path / "third", *other, fails=True)


@pytest.mark.slow
def test_one_command_trains_evaluates_and_compares_in_a_folder_of_any_name(tmp_path: Path) -> None:
    runs = tmp_path / "my runs (copy)" / "用户 é=,{'% [/x]#&"
    told = ["+sweep=finetune_strategies", "+debug=tiny", f"paths.log_dir={runs}", "save_every=4"]
    told += ["hydra.sweeper.params.strategy='last_layer,lora_8'", "trainer.max_steps=4", "trainer.val_check_interval=2"]
    told += ["evaluate_after.episodes_per_task=1", "+evaluate_after.tasks=[push_red_cube_left]"]
    told += ["+evaluate_after.num_envs=1", "+evaluate_after.num_workers=1"]
    warm_scripts.finish("finetune.py", tmp_path / "log", *told)
    (sweep,) = (runs / "finetune_strategies").iterdir()
    header, last_layer, lora = sweep_rows(find_runs(sweep))
    evaluated = [json.loads(path.read_text())["checkpoint"]["path"] for path in sweep.rglob("results.json")]
    assert {Path(path).name for path in evaluated} == {"step_000004.ckpt"}, "a folder's hash changes with what it holds"
    assert last_layer[0] == "strategy=last_layer"
    assert lora[0] == "strategy=lora_8"
    assert last_layer[1].startswith(("0 %", "100 %"))
    learning = header.index("trainable")
    assert int(lora[learning].replace(",", "")) < int(last_layer[learning].replace(",", ""))
