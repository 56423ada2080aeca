"""Packages beside this one: which are found, and what a mistake in them is answered with."""

import sys
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from openvla_lightning import plugins
from openvla_lightning.action_head import TokenHead
from openvla_lightning.config import CONF
from openvla_lightning.plugins import USUAL_HEAD
from openvla_lightning.strategy import USUAL


@pytest.fixture
def labs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two packages of one name, and nothing known yet."""
    monkeypatch.setenv(plugins.VARIABLE, "")  # so that what a test adds is taken away again
    monkeypatch.setattr(sys, "path", [*sys.path])
    for place in ("first", "second"):
        (tmp_path / place / "lab_x" / "conf").mkdir(parents=True)
        (tmp_path / place / "lab_x" / "__init__.py").touch()
    return tmp_path


def test_another_package_of_the_same_name_is_not_taken_for_the_one_that_is_named(
    labs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sys.path.append(str(labs / "first"))  # as the folder that a command is typed in
    named = str(labs / "second/lab_x")
    with pytest.raises(ValueError, match=f"plugins: {named} is not what Python imports .*{labs}/first/lab_x: rename"):
        plugins.add([named])
    plugins.add([str(labs / "first/lab_x")])
    assert list(plugins.config_folders()) == [("lab_x", labs / "first/lab_x/conf")]
    monkeypatch.setenv(plugins.VARIABLE, named)
    with pytest.raises(ValueError, match=f"{plugins.VARIABLE}: {named} is not what Python imports"):
        plugins.add([])


def test_the_folder_of_a_project_is_answered_with_its_package(labs: Path) -> None:
    (labs / "lab_y/lab_y").mkdir(parents=True)
    for file in ("pyproject.toml", "lab_y/__init__.py"):
        (labs / "lab_y" / file).touch()
    with pytest.raises(ValueError, match=rf"plugins=\[{labs}/lab_y/lab_y\]"):
        plugins.add([str(labs / "lab_y")])
    sys.path.append(str(labs))  # as the folder that a command is typed in: Python takes the project for a package
    with pytest.raises(ValueError, match=rf"plugins: lab_y is the folder of a project; .*\[{labs}/lab_y/lab_y\]"):
        plugins.add(["lab_y"])
    sys.path.remove(str(labs))
    plugins.add([str(labs / "lab_y/lab_y")])


@pytest.mark.parametrize("name", ["/nowhere/lab", "no_such_lab", "no-such-lab", "{labs}/part.py", "."])
def test_what_is_no_package_is_said_wherever_it_is_named(
    labs: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (labs / "part.py").touch()
    name = name.format(labs=labs)
    with pytest.raises(ValueError, match=f"plugins: there is no package '{name}'"):
        plugins.add([name])
    monkeypatch.setenv(plugins.VARIABLE, name)
    assert not list(plugins.config_folders())
    with pytest.raises(ValueError, match=f"{plugins.VARIABLE}: there is no package '{name}'"):
        plugins.add([])


class Careless(TokenHead):
    """A head whose `config` is not what its constructor took."""

    def __init__(self, share: Any = 0.1, told: Any = None, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.share, self.told = share, told or {}

    @property
    def config(self) -> dict[str, Any]:
        return {**super().config, **self.told}


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (
            {"share": np.float64(0.5)},
            r"Careless\.config holds share=0\.5 \(float64\), and checkpoints keep only numbers",
        ),
        ({"share": Path("a")}, r"holds share=a \(PosixPath\)"),
        ({"share": [{"a": MappingProxyType({})}]}, r"holds share="),
        ({"share": 0.5, "size": 3}, r"does not take these arguments: .*'size'"),
        ({}, r"Careless\.config lacks share"),
    ],
)
def test_a_head_that_no_checkpoint_could_bring_back_is_refused(
    monkeypatch: pytest.MonkeyPatch, told: dict[str, Any], message: str
) -> None:
    monkeypatch.setenv(plugins.VARIABLE, __name__)
    with pytest.raises(ValueError, match=message):
        plugins.check_kept(Careless(share=0.5, told=told), USUAL_HEAD, {"share": 0.5, "_target_": "Careless"})


def test_a_head_that_says_what_it_took_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plugins.VARIABLE, __name__)
    plugins.check_kept(Careless(), USUAL_HEAD, {"share": 0.1})
    told = {"share": 0.5}
    plugins.check_kept(Careless(share=0.5, told=told), USUAL_HEAD, told)


@pytest.mark.parametrize("group", ["action_head", "strategy"])
def test_our_own_parts_are_kept_with_any_option(group: str) -> None:
    with initialize_config_dir(CONF, version_base="1.3"):
        for path in sorted(Path(CONF, group).glob("*.yaml")):
            cfg = compose("finetune", [f"{group}={path.stem}", "data.action_chunk=8", "paths.output_dir=/tmp/out"])
            given = OmegaConf.to_container(cfg[group], resolve=True)
            part = instantiate(cfg[group], _convert_="all")
            plugins.check_kept(part, USUAL if group == "strategy" else USUAL_HEAD, given)
