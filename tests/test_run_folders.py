"""Every run has a folder of its own or refuses; folders are found through links, and `~` is the home folder."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import warm_scripts
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from reserving import reserved_by_another

from openvla_lightning.config import CONF, expand_home
from openvla_lightning.report.sweeps import find_runs
from openvla_lightning.run.fit import fit
from openvla_lightning.run.folders import FreshFolder, claim, log_dir
from openvla_lightning.runtime import files
from openvla_lightning.runtime.files import below

ROOT = Path(__file__).parents[1]
PRINT = """
import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from openvla_lightning.config import CONF
@hydra.main(version_base="1.3", config_path=CONF, config_name="train")
def main(cfg: DictConfig) -> None:
    print(cfg.paths.output_dir, flush=True)
main()
"""
RANKS = ("RANK", "WORLD_SIZE", "SLURM_PROCID", "SLURM_NTASKS", "LOCAL_RANK", "SLURM_JOB_ID", "RUN_ID")


def start(root: Path, *words: str, **environment: str) -> subprocess.Popen[str]:
    script = root / "script.py"
    root.mkdir(parents=True, exist_ok=True)
    script.write_text(PRINT)
    outside = {key: value for key, value in os.environ.items() if key not in RANKS}
    own = {"OPENVLA_LIGHTNING_ROOT": str(root), "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    command = [sys.executable, str(script), *words]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=outside | own | environment, cwd=root, **pipes)


def folder_of(process: subprocess.Popen[str]) -> str:
    out, error = process.communicate(timeout=120)
    return Path(out.strip()).name if process.returncode == 0 else error.strip().splitlines()[-1]


def test_two_runs_of_one_slurm_job_have_two_folders(tmp_path: Path) -> None:
    folders = [folder_of(start(tmp_path, SLURM_JOB_ID="4242")) for _ in range(2)]
    assert folders == ["4242", "4242_2"]
    assert (tmp_path / "runs" / "train" / "4242_2" / ".hydra" / "overrides.yaml").exists()


@pytest.mark.parametrize("words", [[], ["-m", "seed=1,2"]])
def test_a_run_without_a_name_is_refused(tmp_path: Path, words: list[str]) -> None:
    assert folder_of(start(tmp_path, *words, "run_name=null")).startswith("error: run_name=null: a run's folder is")


@pytest.mark.parametrize("words", [[], ["-m", "seed=1,2"]])
def test_a_folder_of_runs_that_cannot_be_made_is_said(tmp_path: Path, words: list[str]) -> None:
    (tmp_path / "file").touch()
    said = folder_of(start(tmp_path, *words, f"paths.log_dir={tmp_path}/file"))
    assert said.startswith(f"error: the run's folder {tmp_path}/file/train/")
    assert said.endswith("cannot be made (Not a directory): choose another, paths.log_dir=...")


def test_the_jobs_of_a_second_sweep_are_in_its_folder(tmp_path: Path) -> None:
    """Hydra composes each job's config anew: with the first sweep's name, both would write over each other."""
    sweeps = [start(tmp_path / "it's", "-m", "seed=1,2", RUN_ID="both") for _ in range(2)]
    printed = [set(sweep.communicate(timeout=120)[0].splitlines()) for sweep in sweeps]
    log_dir = tmp_path / "it's" / "runs" / "train"
    jobs = [{str(log_dir / name / job) for job in ("0", "1")} for name in ("both", "both_2")]
    assert sorted(map(sorted, jobs)) == sorted(sorted(lines & set.union(*jobs)) for lines in printed)
    for path in set.union(*jobs):
        assert (Path(path) / ".hydra" / "overrides.yaml").exists()


def test_the_processes_of_one_run_share_its_folder_and_refuse_a_taken_one(tmp_path: Path) -> None:
    shared = {"RUN_ID": "mine", "WORLD_SIZE": "2"}
    together = [start(tmp_path, RANK=str(rank), **shared) for rank in (1, 0)]
    assert [folder_of(process) for process in together] == ["mine", "mine"]
    assert folder_of(start(tmp_path, RANK="1", **shared)) == "mine"
    assert "mine belongs to another run. Go on with it (ckpt_path=last)" in folder_of(
        start(tmp_path, RANK="0", **shared)
    )


def test_no_command_starts_with_a_warning(tmp_path: Path) -> None:
    """Hydra makes warnings of what its callbacks raise; a folder's name may speak of Hydra's own choices."""
    script = tmp_path / "report.py"
    script.write_text(PRINT.replace('config_name="train"', 'config_name="data_report"'))
    own = {"OPENVLA_LIGHTNING_ROOT": str(tmp_path), "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    names = []
    for _ in range(2):
        command = [sys.executable, str(script), "data=finetune", "data/source=synthetic", "hydra.job.chdir=false"]
        command += ["hydra.output_subdir=.hydra"]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | own | {"RUN_ID": "one"})
        assert "Warning" not in done.stderr
        names.append(Path(done.stdout.strip()).name)
    assert names == ["one", "one_2"]


def test_a_run_is_not_resumed_while_it_still_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes would remove and write over each other's checkpoints."""
    for name in RANKS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(files, "PATIENCE", 0.05)
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    (checkpoints / "step_000001.ckpt").touch()
    (checkpoints / ".step_000002.ckpt.unfinished").touch()
    with initialize_config_dir(CONF, version_base="1.3"):
        own = [f"paths.output_dir={tmp_path}", "+debug=tiny", "data/source=synthetic"]
        cfg = compose("train", [*own, f"ckpt_path={checkpoints}/step_000001.ckpt"])
    with (
        reserved_by_another(tmp_path, "training") as process,
        pytest.raises(SystemExit, match=f"process {process} on .* is training in {tmp_path}: wait"),
    ):
        fit(cfg)
    assert len(list(checkpoints.iterdir())) == 2


def test_a_run_that_goes_on_keeps_its_folder(tmp_path: Path) -> None:
    checkpoints = tmp_path / "runs" / "train" / "first" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "step_000001.ckpt").touch()
    assert folder_of(start(tmp_path, "ckpt_path=last")) == "first"


def told(root: Path, **settings: object) -> DictConfig:
    folders = {"run": {"dir": str(root / "run")}, "sweep": {"dir": str(root / "sweep")}, "overrides": {"hydra": []}}
    return OmegaConf.create({"hydra": folders, "ckpt_path": "last", **settings})


def test_last_keeps_a_folder_only_where_there_is_something_to_go_on_with(tmp_path: Path, monkeypatch) -> None:
    for name in RANKS:
        monkeypatch.delenv(name, raising=False)

    def run() -> str:
        FreshFolder().on_run_start(config := told(tmp_path))
        return Path(config.hydra.run.dir).name

    def sweep(**settings: object) -> str:
        FreshFolder().on_multirun_start(config := told(tmp_path, **settings))
        return Path(config.hydra.sweep.dir).name

    assert [run(), run()] == ["run", "run_2"]  # two evaluations of the newest checkpoint in the same second
    (tmp_path / "run" / "checkpoints").mkdir()
    (tmp_path / "run" / "checkpoints" / "step_000001.ckpt").touch()
    assert run() == "run"
    assert [sweep(), sweep()] == ["sweep", "sweep_2"]
    (tmp_path / "sweep" / "multirun.yaml").touch()
    assert sweep() == "sweep"
    assert sweep(continue_sweep=None) == "sweep_3"
    assert sweep(continue_sweep="last") == "sweep"


def test_of_many_that_start_at_once_each_has_its_own(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        claimed = [*pool.map(lambda _: claim(tmp_path / "runs" / "now"), range(24))]
    assert len(set(claimed)) == 24
    assert {path.name for path in claimed} == {"now", *(f"now_{n}" for n in range(2, 25))}


def test_a_training_does_not_write_into_a_folder_that_holds_one(tmp_path: Path) -> None:
    small = ["+debug=tiny", "trainer.max_steps=1", "trainer.val_check_interval=1", "data.num_workers=0"]
    small += [f"paths.log_dir={tmp_path}", f"paths.output_dir={tmp_path}/own", "callbacks=none"]
    warm_scripts.finish("train.py", tmp_path / "log", *small)
    process = warm_scripts.start("train.py", tmp_path / "second", *small)
    process.join(120)
    assert process.exitcode == 1
    assert "own holds another run" in (tmp_path / "second").read_text()


def test_the_home_folder_is_expanded_wherever_a_path_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("OPENVLA_LIGHTNING_ROOT", "~/vla")
    monkeypatch.setenv("OPENVLA_LIGHTNING_DATA", "~")
    assert log_dir() == tmp_path / "vla" / "runs"
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose("train", ["model.init_from='~/a b'", "+data.source.cache_dir='~/c'", "paths.output_dir=/tmp/out"])
    expand_home(cfg)
    assert cfg.paths.data_dir == str(tmp_path)
    assert cfg.model.init_from == f"{tmp_path}/a b"
    assert cfg.data.source.cache_dir == f"{tmp_path}/c"
    nested = OmegaConf.create({"a": [{"b": "~/x"}, "~user", "x~"], "c": "${a}"})
    expand_home(nested)
    assert nested.a == [{"b": f"{tmp_path}/x"}, "~user", "x~"]
    process = start(tmp_path / "elsewhere", OPENVLA_LIGHTNING_ROOT="~/vla", HOME=str(tmp_path))
    assert (tmp_path / "vla" / "runs" / "train" / folder_of(process)).is_dir()
    assert not (tmp_path / "elsewhere" / "~").exists()


def test_runs_behind_links_are_found(tmp_path: Path) -> None:
    run = tmp_path / "scratch" / "sweep" / "0"
    run.mkdir(parents=True)
    (run / "results.json").write_text("{}")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "sweep").symlink_to(tmp_path / "scratch" / "sweep")
    (tmp_path / "scratch" / "sweep" / "up").symlink_to(tmp_path / "runs")
    assert [path.parent.name for path in below(tmp_path / "runs", "results.json")] == ["0"]
    (run / "costs.json").write_text("{}")
    assert [path.name for path in find_runs(tmp_path / "runs")] == ["0"]


@pytest.mark.parametrize("name", ["My Projects (1)", "é=,%", "用户"])
def test_make_works_below_any_path(tmp_path: Path, name: str) -> None:
    there = tmp_path / name / "openvla"
    (there / ".venv" / "bin").mkdir(parents=True)
    for file in ("Makefile", "requirements.lock", "pyproject.toml"):
        (there / file).write_bytes((ROOT / file).read_bytes())
    python = there / ".venv" / "bin" / "python"
    python.write_text('#!/bin/sh\necho "called: $VIRTUAL_ENV $*"\n')
    python.chmod(0o755)
    done = subprocess.run(["make", "demo"], capture_output=True, text=True, cwd=there)
    assert done.returncode == 0, done.stderr
    assert "called:  -m openvla_lightning.demo" in done.stdout
    assert f"called: {there}/.venv -m uv pip install" in done.stdout
