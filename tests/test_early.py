"""Values of the wrong type are told within a second, by what the annotations say; right ones never are."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from openvla_lightning.config import CONF
from openvla_lightning.run.early import _misfit, plain_values, wrong_types
from openvla_lightning.run.nowhere import not_there

ROOT = Path(__file__).parents[1]


def problems(script: str, *overrides: str) -> list[str]:
    with initialize_config_dir(CONF, version_base="1.3"):
        return wrong_types(plain_values(compose(script, [*overrides])))


@pytest.mark.parametrize(
    ("script", "override", "said"),
    [
        ("finetune", "rank=thirtytwo", "strategy.rank='thirtytwo': expected a whole number"),
        ("train", "optim.lr=abc", "optim.lr='abc': expected a number"),
        ("train", "trainer.max_steps=many", "trainer.max_steps='many': expected a whole number"),
        ("serve", "server.port=http", "server.port='http': expected a whole number"),
        ("serve", "server.deadline_ms=soon", "server.deadline_ms='soon': expected a number"),
        ("train", "data.global_batch_size=1.5", "data.global_batch_size=1.5: expected a whole number"),
        ("train", "data.mix=bridge", "data.mix='bridge': expected a dictionary"),
        ("train", "data.balance_weights=yess", "data.balance_weights='yess': expected true or false"),
        ("train", "data.cameras=primary", "data.cameras='primary': expected a list"),
        ("train", "data.statistics=mine", "data.statistics='mine': expected one of released, train"),
        ("train", "seed=-1", "seed=-1: expected a whole number from 0 to 4294967295"),
        ("evaluate", "seed=4294967296", "seed=4294967296: expected a whole number from 0 to 4294967295"),
        ("train", "save_every=-5", "save_every=-5: expected a whole number; 0 saves the last step only"),
        ("train", "batch_size_per_device=two", "batch_size_per_device='two': expected a whole number of at least 1"),
        ("train", "estimate=ja", "estimate='ja': expected true or false"),
        ("evaluate", "episodes_per_task=0", "episodes_per_task=0: expected a whole number of at least 1, or auto"),
        ("evaluate", "num_envs=many", "num_envs='many': expected a whole number of at least 1"),
        ("train", "trainer.max_steps=0", "trainer.max_steps=0: expected at least 1, or -1 for a run without an end"),
        ("train", "trainer.val_check_interval=0", "trainer.val_check_interval=0: expected more than 0"),
        ("train", "trainer.log_every_n_steps=0", "trainer.log_every_n_steps=0: expected at least 1"),
        ("train", "trainer.limit_val_batches=-1", "trainer.limit_val_batches=-1: expected at least 0"),
        (
            "train",
            "trainer.gradient_clip_val=-1",
            "trainer.gradient_clip_val=-1: expected at least 0; null clips nothing",
        ),
        ("train", "trainer.devices=0", "trainer.devices=0: expected at least 1, or auto"),
        ("train", "trainer.precision=bf16-true", "trainer.precision='bf16-true': expected one of 32-true, bf16-mixed"),
        ("train", "data.num_workers=-1", "data.num_workers=-1: expected at least 0"),
        ("train", "checkpoint_activations=yes", "checkpoint_activations='yes': expected one of none, selective, full"),
    ],
)
def test_a_value_that_does_not_fit_is_named_with_what_was_expected(script: str, override: str, said: str) -> None:
    found = problems(script, override)
    assert any(problem.startswith(said) for problem in found), found


@pytest.mark.parametrize(
    ("script", "overrides", "said"),
    [
        ("train", ["model.init_from=/nope/vla"], "model.init_from=/nope/vla: there is no file or folder"),
        ("train", ["ckpt_path=./nope.ckpt"], "ckpt_path=./nope.ckpt: there is no file or folder"),
        ("train", ["data/source=rlds", "data/mix=bridge", "paths.data_dir=/nope"], "no /nope/bridge"),
        ("evaluate", ["ckpt_path=runs/nothere"], "ckpt_path=runs/nothere: there is no file or folder"),
        ("evaluate", ["ckpt_path=/nope.ckpt"], "ckpt_path=/nope.ckpt: there is no file or folder"),
    ],
)
def test_what_is_not_there_is_named(script: str, overrides: list[str], said: str) -> None:
    with initialize_config_dir(CONF, version_base="1.3"):
        found = not_there(plain_values(compose(script, overrides)))
    assert any(said in line for line in found), found


@pytest.mark.parametrize(
    ("inside", "chosen"),
    [
        ("arm/1.0.0/dataset_info.json", "arm"),
        ("arm/1.0.0/dataset_info.json", "arm/1.0.0"),
        ("arm/dataset_info.json", "arm"),
        ("arm/meta/info.json", "arm"),
    ],
)
def test_a_dataset_in_place_of_the_folder_around_it_is_noticed(tmp_path: Path, inside: str, chosen: str) -> None:
    (tmp_path / inside).parent.mkdir(parents=True)
    (tmp_path / inside).touch()
    overrides = ["data/source=rlds", "data/mix=bridge"]
    with initialize_config_dir(CONF, version_base="1.3"):
        wrong, right = (
            not_there(plain_values(compose("train", [*overrides, f"paths.data_dir={place}"])))
            for place in (tmp_path / chosen, tmp_path)
        )
    assert f"is a dataset itself; paths.data_dir is the folder around it, paths.data_dir={tmp_path}" in wrong[0]
    assert "itself" not in right[0]


def test_what_may_be_elsewhere_is_not_missed(tmp_path: Path) -> None:
    rlds = ["data/source=rlds", "data/mix=bridge"]
    with initialize_config_dir(CONF, version_base="1.3"):
        for name in compose("train", rlds).data.mix:
            (tmp_path / str(name)).mkdir()
    hub = ["model.init_from=openvla/openvla-7b"]
    with initialize_config_dir(CONF, version_base="1.3"):
        for overrides in (
            [*rlds, f"paths.data_dir={tmp_path}"],
            [*rlds, "paths.data_dir=gs://gresearch/robotics"],
            hub,
            ["ckpt_path=last"],
            [*rlds, "estimate=true"],
        ):
            assert not_there(plain_values(compose("train", overrides))) == []


RECIPES = [path.stem for path in sorted((ROOT / "conf" / "experiment").glob("*.yaml"))]


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_recipe_is_misjudged(recipe: str) -> None:
    text = (ROOT / "conf" / "experiment" / f"{recipe}.yaml").read_text()
    assert problems("finetune" if " finetune.py" in text else "train", f"+experiment={recipe}") == []


@pytest.mark.parametrize("env", [path.stem for path in sorted((ROOT / "conf" / "env").glob("*.yaml"))])
def test_no_world_is_misjudged(env: str) -> None:
    assert problems("evaluate", f"env={env}") == []


@pytest.mark.parametrize("script", ["train", "finetune", "evaluate", "serve", "data_report"])
def test_no_default_is_misjudged(script: str) -> None:
    assert problems(script) == []


@pytest.mark.parametrize(
    ("annotation", "fits", "misfits"),
    [
        ("int | None", [3, None, 3.0], ["3", 3.5, True, [3]]),
        ("Optional[Union[int, str]]", [3, None, "3"], [[3], {}]),
        ("Literal['a', 'b']", ["a"], ["c", None]),
        ("Sequence[str]", [[], ["a"]], ["a", {}]),
        ("Mapping[str, float] | None", [{}, None], ["a", []]),
        ("'float'", [1, 1e-4], ["1e-4x", True]),
        ("Callable[[int], str]", [3, "a", None], []),
    ],
)
def test_annotations_are_understood(annotation: str, fits: list, misfits: list) -> None:
    tree = ast.parse(annotation, mode="eval").body
    assert [value for value in fits if _misfit(value, tree)] == []
    assert [value for value in misfits if not _misfit(value, tree)] == []


def test_it_is_told_before_anything_is_imported_and_no_folder_is_made(tmp_path: Path) -> None:
    command = [sys.executable, "-X", "importtime", "finetune.py", "rank=thirtytwo", f"paths.log_dir={tmp_path}/runs"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert "error: these values do not fit:\n  strategy.rank='thirtytwo': expected a whole number" in done.stderr
    assert not any(line.endswith((" torch", " lightning")) for line in done.stderr.splitlines())
    assert not (tmp_path / "runs").exists()
