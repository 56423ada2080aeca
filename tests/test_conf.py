"""Every file in conf/ composes, validates, and does what its first lines say."""

import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException
from hydra_plugins_needed import skip_without_plugin
from omegaconf import DictConfig

from openvla_lightning import plugins
from openvla_lightning.checkpoint.newest import newest_checkpoint
from openvla_lightning.config import ConfigError, for_people, run_dir, validate

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"
OURS = {"action_head", "callbacks", "data", "env", "logger", "model", "optim", "policy", "processor", "quantisation"}
OURS |= {"strategy"}
APPENDED = {".", "hydra", "launcher", "experiment", "sweep", "debug", "local"}


def cfg_of(primary: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(primary, ["paths.output_dir=/tmp/out", *overrides])


def commands() -> Iterator[Any]:
    """Each `#   python train.py ...` line in conf/ as (script, arguments)."""
    for path in sorted(CONF.rglob("*.yaml")):
        for script, args in re.findall(r"^#\s+(?:torchrun \S+|python) (\w+)\.py(.*)$", path.read_text(), re.M):
            yield pytest.param(script, args, id=f"{path.relative_to(CONF)}:{args.strip()}")


def options() -> Iterator[Any]:
    """Each config group option, with a script that has the group."""
    for path in sorted(CONF.rglob("[!_]*.yaml")):
        group = path.relative_to(CONF).parent.as_posix()
        if group == "tuned" and path.stem != "none":  # chosen by model and strategy
            chosen = f"strategy={path.stem.removeprefix('tiny_')}"
            yield pytest.param("finetune", chosen, id=f"{group}={path.stem}")
        elif group == "tuned":
            yield pytest.param("finetune", "tuned=none", id="tuned=none")
        elif group.split("/")[0] not in APPENDED:
            primary = "evaluate" if group in ("env", "policy") else "train"
            yield pytest.param(primary, f"{group}={path.stem}", id=f"{group}={path.stem}")


@pytest.mark.parametrize(("script", "args"), list(commands()))
def test_command_in_a_config_header_composes(script: str, args: str) -> None:
    skip_without_plugin(args)
    words = shlex.split(args.split("  #")[0])
    words = [word for word in words if word not in ("-m", "--resolve", "--cfg", "job")]
    validate(cfg_of(script, *[re.sub(r",[^\]]*$", "", word) for word in words]))


@pytest.mark.parametrize(("primary", "choice"), list(options()))
def test_option_composes_and_fits_its_target(primary: str, choice: str) -> None:
    validate(cfg_of(primary, choice))


@pytest.mark.parametrize("group", ["experiment", "sweep", "debug", "launcher"])
def test_an_appended_file_begins_with_its_command(group: str) -> None:
    for path in (CONF / group).glob("*.yaml"):
        assert re.search(r"^#   .*python \w+\.py .*\+" + group, path.read_text(), re.M), path


def test_rank_is_an_error_without_lora() -> None:
    with pytest.raises(ConfigCompositionException, match="rank"):
        cfg_of("finetune", "strategy=full", "rank=32")


def test_the_commands_of_the_mission_mean_what_they_say() -> None:
    paper = cfg_of("train", "+experiment=oxe_full")
    assert paper.data.global_batch_size == 2048
    assert paper.optim.lr == 2e-5
    assert paper.optim.schedule == "constant"
    assert paper.trainer.devices * paper.trainer.num_nodes == 64
    assert cfg_of("finetune", "strategy=lora", "rank=16").strategy.rank == 16


def test_every_recipe_has_a_twin_for_a_laptop() -> None:
    for path in (CONF / "experiment").glob("*.yaml"):
        script = re.search(r"python (\w+)\.py", path.read_text())
        assert script is not None
        cfg = cfg_of(script[1], f"+experiment={path.stem}", "+debug=tiny")
        assert cfg.trainer.accelerator == "cpu"
        assert cfg.trainer.max_steps == 20


def test_typo_is_caught_before_anything_is_built() -> None:
    with pytest.raises(ConfigError, match="normalization"):
        validate(cfg_of("train", "+data.normalization=minmax"))


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        validate(cfg_of("train", "+data.normalization=minmax", "+optim.learning_rate=1", "logger=none"))
    assert "normalization" in str(error.value)
    assert "learning_rate" in str(error.value)


def test_missing_is_named() -> None:
    with pytest.raises(ConfigError, match=r"optim\.lr"):
        validate(cfg_of("train", "optim.lr=???"))


def test_a_target_outside_the_package_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"os\.getcwd"):
        validate(cfg_of("train", "optim._target_=os.getcwd"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.cameras=[{_target_: os.getcwd}]", r"data\.cameras\.0: os\.getcwd: the package os is not known"),
        ("optim._target_=openvla_lightning.demo.subprocess.run", r"demo\.subprocess\.run leads to subprocess"),
    ],
)
def test_no_detour_leads_outside_the_package(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(cfg_of("train", override))
    with pytest.raises(ValueError, match=r"leads to concurrent\.futures"):
        plugins.find("openvla_lightning.client.ThreadPoolExecutor")


def test_a_target_that_was_moved_is_answered_with_its_new_place() -> None:
    old = "openvla_lightning.callbacks.checkpoint.Checkpoint"
    with pytest.raises(ConfigError, match=r"checkpoint\.Checkpoint is openvla_lightning\.callbacks\.Checkpoint now"):
        validate(cfg_of("train", f"callbacks.checkpoint._target_={old}"))
    for module in plugins.MOVED.values():
        assert find_spec(module)


def test_conf_mirrors_code() -> None:
    """conf/a/b/*.yaml configures openvla_lightning.a.b (or Lightning itself)."""
    for path in CONF.rglob("*.yaml"):
        group = path.relative_to(CONF).parent.parts
        if group and group[0] in OURS:
            home = ".".join(["openvla_lightning", *group])
            for target in re.findall(r"^ *_target_: (\S+)", path.read_text(), re.M):
                assert target.startswith((home, "lightning.")), f"{path.name}: {target}"


@pytest.mark.parametrize("script", ["train.py", "finetune.py", "evaluate.py"])
def test_printing_a_config_is_instant(script: str) -> None:
    """About a second on an idle machine; the bound leaves room for a busy one, but not for importing torch."""
    started = time.perf_counter()
    command = [sys.executable, "-X", "importtime", str(ROOT / script), "--cfg", "job", "--resolve"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert "run_name" in done.stdout
    assert not re.search(r"\| +(torch|lightning|transformers)$", done.stderr, re.M)
    assert time.perf_counter() - started < 20


def test_newest_checkpoint_is_the_last_written_and_never_a_link(tmp_path: Path) -> None:
    folder = tmp_path / "train" / "a" / "checkpoints"
    folder.mkdir(parents=True)
    assert newest_checkpoint(tmp_path) is None
    for step in (100, 200):
        (folder / f"step_{step:06d}.ckpt").write_text("")
    (folder / "last.ckpt").symlink_to("step_000100.ckpt")
    assert newest_checkpoint(tmp_path) == folder / "step_000200.ckpt"
    assert run_dir(str(tmp_path), "train", "last", None) == str(folder.parent)
    assert run_dir(str(tmp_path), "train", None, "job7") == str(tmp_path / "train" / "job7")


def test_an_error_for_people_is_its_message_and_the_whole_story_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    @for_people(ConfigError)
    def run() -> None:
        raise ConfigError("no such thing")

    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    with pytest.raises(SystemExit, match=r"^error: no such thing$"):
        run()
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(ConfigError):
        run()


@pytest.mark.parametrize("module", ["serve", "data_report"])
def test_the_log_of_a_module_has_the_name_of_what_it_does(module: str) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose(module, ["paths.output_dir=/tmp/out"], return_hydra_config=True)
    assert cfg.hydra.job.name == module, "and not __main__"
