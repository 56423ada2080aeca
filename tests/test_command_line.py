"""Help for the command line: complete, quick, and right about what was meant."""

import gc
import re
import runpy
import subprocess
import sys
from difflib import SequenceMatcher
from importlib import import_module
from importlib.machinery import PathFinder
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from openvla_lightning import __version__, demo
from openvla_lightning.cli.command import dotted, hints, lasting_imports
from openvla_lightning.cli.commands import main
from openvla_lightning.cli.help import (
    APPENDED,
    GROUPS,
    OWN,
    USED_MOST,
    WIDTH,
    groups,
    help_page,
    misspelt_addition,
    near,
)
from openvla_lightning.config import ConfigError, for_people, validate

ROOT = Path(__file__).parents[1]
CONF = ROOT / "conf"
SCRIPTS = ("train", "finetune", "evaluate")


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=ROOT)


def known(script: str) -> list[str]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return list(dotted(OmegaConf.to_container(compose(script), resolve=False)))


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_every_group_with_every_option(script: str) -> None:
    page = help_page(CONF, script)
    for name, options in groups(CONF, script).items():
        (line,) = re.findall(rf"^  {name} .*(?:\n    .*)*", page, re.M)
        assert set(options) <= set(re.findall(r"\w+", line.partition(": ")[2])), name
        assert (GROUPS | APPENDED)[name] in " ".join(line.split())
    assert max(map(len, page.splitlines())) <= WIDTH


def test_every_folder_of_configs_is_explained_once() -> None:
    folders = {path.parent.relative_to(CONF).as_posix() for path in CONF.rglob("*.yaml")} - {".", *OWN}
    assert folders == GROUPS.keys() | APPENDED.keys()
    assert not GROUPS.keys() & APPENDED.keys()


@pytest.mark.parametrize(
    ("script", "override"), [(script, text) for script, most in USED_MOST.items() for text in most]
)
def test_an_override_that_help_shows_composes(script: str, override: str) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        validate(compose(script, ["paths.output_dir=/tmp/out", *override.split()]))


def test_help_shows_ten_overrides_of_each_script() -> None:
    assert {script: len(most) for script, most in USED_MOST.items()} == dict.fromkeys(SCRIPTS, 10)


def test_help_is_instant() -> None:
    done = run("-X", "importtime", "train.py", "--help")
    assert done.returncode == 0
    assert done.stdout == help_page(CONF, "train")
    assert not re.search(r"\| +(torch|lightning|transformers|numpy)$", done.stderr, re.M)


def test_a_failed_import_leaves_the_collector_on() -> None:
    gc.unfreeze()  # as in a command
    with pytest.raises(ModuleNotFoundError), lasting_imports():
        import_module("openvla_lightning.nothing")
    assert gc.isenabled()
    assert (frozen := gc.get_freeze_count()) > 0
    garbage = [[] for _ in range(1000)]
    with lasting_imports():  # of the next job of a sweep
        assert gc.isenabled()
    assert gc.get_freeze_count() <= frozen, "what the last job left can be collected"
    del garbage


def test_hydras_message_is_followed_by_what_was_meant() -> None:
    done = run("train.py", "stratgy=lora", "optim.lr=1e-4")
    assert done.returncode == 1
    assert "Could not override 'stratgy'" in done.stderr
    assert done.stderr.splitlines()[-1] == "stratgy: did you mean strategy?"


@pytest.mark.parametrize(
    ("script", "overrides", "meant"),
    [
        ("train", ["optim.ler=1"], "optim.ler: did you mean optim.lr?"),
        ("train", ["strategy=full", "rank=3"], "rank: there is one only with strategy=lora"),
        ("train", ["batch_size=3"], "did you mean data.global_batch_size"),
        ("train", ["normalization=minmax"], "did you mean data.normalisation"),
        ("train", ["+experiment=oxe_ful"], "did you mean +experiment=oxe_full"),
        ("finetune", ["strategy=lorra"], "did you mean strategy=lora"),
        ("finetune", ["strategy=lora,ful"], "did you mean strategy=full?"),
        ("finetune", ["data/mx=bridge"], "did you mean data/mix?"),
        ("evaluate", ["env=libero_spacial"], "did you mean env=libero_spatial"),
        ("evaluate", ["episodes_per_tsk=3"], "did you mean episodes_per_task?"),
        ("finetune", ["data/mix=my_robot"], "with --config-dir FOLDER, as FOLDER/data/mix/my_robot.yaml"),
        ("evaluate", ["env=offline", "data/mix=my_robot"], "with --config-dir FOLDER, as FOLDER/data/mix/my_robot."),
        ("evaluate", ["env=offline", "data/mix=bridg"], "did you mean data/mix=bridge"),
    ],
)
def test_what_was_meant(script: str, overrides: list[str], meant: str) -> None:
    (hint,) = hints(script, overrides)
    assert meant in hint


def test_a_file_of_ones_own_is_a_right_name(tmp_path: Path) -> None:
    (tmp_path / "data/mix").mkdir(parents=True)
    (tmp_path / "data/mix/bridg.yaml").touch()
    (tmp_path / "data/mix/my_robot.yaml").touch()
    right = ["env=offline", "data/mix=my_robot", "data/mix=bridg"]
    assert hints("evaluate", [*right, "seed=1"], [tmp_path]) == []


def test_right_names_get_no_hint() -> None:
    right = ["strategy=lora", "rank=4", "optim.lr=1e-3", "data/mix=bridge", "+data.new=1", "~callbacks.progress"]
    assert hints("finetune", [*right, "hydra.sweep.dir=a", "trainer.max_steps=1,2", "model=glob(*)"]) == []


def test_all_wrong_names_are_reported_at_once() -> None:
    assert len(hints("train", ["stratgy=lora", "model=tinny", "optim.ler=1"])) == 3


NAMES = known("train")


@given(st.data())
def test_a_key_with_a_letter_missing_is_found(data: st.DataObject) -> None:
    key = data.draw(st.sampled_from([name for name in NAMES if len(name) > 4]))
    place = data.draw(st.integers(key.rfind(".") + 1, len(key) - 1))
    damaged = key[:place] + key[place + 1 :]
    last = damaged.rpartition(".")[2]
    if any(name.rpartition(".")[2] == last for name in NAMES):
        return  # another one's name: that is what was meant
    (found,) = near(damaged, NAMES)
    assert found in NAMES
    assert likeness(found, damaged) >= likeness(key, damaged)


def likeness(one: str, other: str) -> float:
    return SequenceMatcher(None, other, one).ratio()


@pytest.mark.parametrize(
    ("override", "meant"),
    [("+experimnt=oxe_full", "+experiment=oxe_full"), ("+debg=tiny", "+debug=tiny"), ("+modle=tiny", "model=tiny")],
)
def test_an_addition_that_nothing_would_read_is_refused(override: str, meant: str) -> None:
    message = misspelt_addition(groups(CONF, "train"), ["strategy=lora", override])
    assert message is not None
    assert message.endswith(f"did you mean {meant}?")


def test_a_second_choice_of_a_group_is_refused() -> None:
    message = misspelt_addition(groups(CONF, "train"), ["+logger=tensorboard"])
    assert message is not None
    assert message.endswith("one of logger is chosen already; logger=tensorboard replaces it")


def test_a_shrunk_training_is_not_asked_of_an_evaluation() -> None:
    message = misspelt_addition(groups(CONF, "evaluate"), ["env=offline", "+debug=tiny"])
    assert message == "+debug=tiny shrinks a training, and this command trains nothing: leave it out"


@pytest.mark.parametrize(
    "override", ["+experiment=oxe_full", "+debug=tiny", "+estimate=true", "+data.experimnt=1", "experimnt=1"]
)
def test_other_additions_are_hydras_business(override: str) -> None:
    assert misspelt_addition(groups(CONF, "train"), [override]) is None


def test_an_argument_that_nothing_takes_is_answered_with_the_one_that_was_meant() -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", ["paths.output_dir=/tmp/out", "+data.normalization=minmax"])
    with pytest.raises(ConfigError, match="did you mean 'normalisation'"):
        validate(cfg)


def test_what_a_class_says_of_a_wrong_value_is_the_message(monkeypatch: pytest.MonkeyPatch) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        data = compose("train", ["paths.output_dir=/tmp/out", "data=oxe", "+data.mix.bridge_orgi=1.0"]).data
    with (
        pytest.raises(SystemExit, match=r"^error: unknown dataset in the mixture: 'bridge_orgi'.*bridge_orig"),
        for_people(),
    ):
        instantiate(data, collate=list)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(InstantiationException), for_people():
        instantiate(data, collate=list)


def test_a_file_that_a_class_does_not_find_is_the_message() -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        head = compose(
            "train", ["action_head=fast", "action_head.tokenizer=/nowhere", "paths.output_dir=x"]
        ).action_head
    with pytest.raises(SystemExit, match=r"^error: /nowhere is no FAST tokenizer, it lacks"), for_people():
        instantiate(head)


@pytest.mark.parametrize(("words", "code"), [(["--help"], 0), (["episodes=1"], 2)])
def test_asking_what_the_demo_does_does_not_run_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], code: int
) -> None:
    monkeypatch.setattr(sys, "argv", ["openvla demo", *words])
    monkeypatch.setattr(demo, "log_dir", lambda: pytest.fail("it ran"))
    with pytest.raises(SystemExit) as end:
        demo.main()
    assert end.value.code == code
    assert "usage: openvla demo" in "".join(capsys.readouterr())


def test_a_command_that_there_is_not_is_answered_with_the_one_that_was_meant(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match=r"no command 'trian'; did you mean openvla train\?"):
        main(["trian"])
    main(["--version"])
    assert capsys.readouterr().out == f"openvla-lightning {__version__}\n"
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(SystemExit, match="the working folder was removed"):
        main(["train"])


def test_a_file_of_the_working_folder_hides_no_module(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "http.py").write_text("raise ImportError('a script of the user')")
    (tmp_path / "my_lab_here.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    monkeypatch.setattr(sys, "argv", [])
    found = []
    monkeypatch.setattr(
        runpy, "run_module", lambda *_, **__: found.extend(map(PathFinder.find_spec, ["http", "my_lab_here"]))
    )
    main(["train"])
    http, lab = found
    assert http.origin != str(tmp_path / "http.py")
    assert lab.origin == str(tmp_path / "my_lab_here.py"), "a lab's package may lie there"
