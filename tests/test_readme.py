"""Every command a page shows exists, what a page has one write works, and every page a page points to is there."""

import importlib.util
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from hydra_plugins_needed import skip_without_plugin
from packaging.specifiers import SpecifierSet

from openvla_lightning import Policy, plugins
from openvla_lightning.action_head import TokenHead
from openvla_lightning.cli.commands import COMMANDS
from openvla_lightning.config import validate
from openvla_lightning.plugins import USUAL_HEAD, describe, rebuild
from openvla_lightning.run.fit import fit
from openvla_lightning.types import Observation

ROOT = Path(__file__).parents[1]
ROBOT, EXTEND = ROOT / "docs" / "finetune-your-robot.md", ROOT / "docs" / "extending.md"
LEROBOT = ROOT / "docs" / "lerobot.md"
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "data" / "README.md"]


def commands(pattern: str) -> Iterator[Any]:
    """Matches of `pattern` in the fenced blocks and inline code of all pages."""
    for page in PAGES:
        text = page.read_text()
        code = re.findall(r"```(?:bash|sh|console)\n(.*?)```", text, re.S) + re.findall(r"`([^`\n]+)`", text)
        for line in "\n".join(code).replace("\\\n", " ").splitlines():
            if match := re.match(r"(?:\$ )?(?:[A-Z_]+=\S+ )*" + pattern, line.strip()):
                yield pytest.param(match, id=f"{page.relative_to(ROOT)}: {line.strip()}")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.S)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What the pages have a reader write: a folder of YAML, and the module that one of them names."""
    folder = tmp_path_factory.mktemp("own")
    for block in (block for page in (ROBOT, EXTEND, LEROBOT) for block in blocks(page, "yaml")):
        (name,) = re.findall(r"^# conf/(\S+\.yaml)$", block, re.M)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(block)
    module = ModuleType("openvla_lightning.smooth_head")
    exec(blocks(EXTEND, "python")[0], vars(module))
    sys.modules[module.__name__] = module
    yield folder
    del sys.modules[module.__name__]


def composed(config: str, arguments: str, own: Path) -> Any:
    """The config of a command line, of several runs the first one's."""
    words = shlex.split(arguments, comments=True)
    words = [w for w in words if w not in ("-m", "--resolve", "--cfg", "job", "--help") and "..." not in w]
    overrides = [re.sub(r"=([^\[{(\"]*?),.*", r"=\1", word) for word in words]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose(config, [f"hydra.searchpath=[file://{own}]", "paths.output_dir=/tmp/out", *overrides])


@pytest.mark.parametrize("match", commands(r"(?:\S*python|torchrun \S+) (train|finetune|evaluate)\.py(.*)$"))
def test_a_script_command_composes(match: re.Match[str], own: Path) -> None:
    skip_without_plugin(match[2])
    validate(composed(match[1], match[2], own))


@pytest.mark.parametrize("match", commands(r"openvla ([\w-]+)(.*)$"))
def test_an_installed_command_exists_and_composes(
    match: re.Match[str], own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert match[1] in (*COMMANDS, "completion", "--version", "<command>")
    monkeypatch.setenv(plugins.VARIABLE, str(ROOT / "tests" / "my_lab" / "my_lab"))
    if match[1] in ("train", "finetune", "evaluate") and "--help" not in match[2]:
        skip_without_plugin(match[2])
        validate(composed(match[1], re.sub(r'"?plugins=\S+', "", match[2]), own))


@pytest.mark.parametrize("match", commands(r"make ([\w-]+)"))
def test_a_make_target_exists(match: re.Match[str]) -> None:
    assert re.search(rf"^{match[1]}:", (ROOT / "Makefile").read_text(), re.M)


@pytest.mark.parametrize("match", commands(r"\S*python3? -m (openvla_lightning[\w.]*)([^|>]*)$"))
def test_a_module_command_exists(match: re.Match[str], own: Path) -> None:
    spec = importlib.util.find_spec(match[1])
    if spec is not None and spec.submodule_search_locations:  # a package runs its `__main__`
        spec = importlib.util.find_spec(f"{match[1]}.__main__")
    assert spec is not None
    assert spec.origin is not None
    text = Path(spec.origin).read_text()
    assert "__main__" in text
    if config := re.search(r'config_name="(\w+)"', text):
        composed(config[1], match[2], own)
    else:
        assert not [word for word in shlex.split(match[2], comments=True) if word[:2] == "--" and word not in text]


def test_recordings_become_a_dataset_as_the_page_says(own: Path, tmp_path: Path) -> None:
    angles = np.radians([170, 178, -174])  # a turn by 8 degrees each
    for i in range(12):
        images = np.full((3, 48, 64, 3), 20 * i, np.uint8)
        pose = np.column_stack([np.arange(3) * (i + 1) / 100, np.zeros((3, 4)), angles])
        (tmp_path / "recordings").mkdir(exist_ok=True)
        np.savez(
            tmp_path / "recordings" / f"{i:02d}.npz", images=images, pose=pose, gripper=[1, 1, i % 2], instruction="Go"
        )
    (tmp_path / "convert.py").write_text(blocks(ROBOT, "python")[0])
    subprocess.run([sys.executable, "convert.py"], cwd=tmp_path, check=True, capture_output=True)

    cfg = composed("finetune", f"data=finetune data/mix=my_robot paths.data_dir={tmp_path}/data", own)
    datamodule = instantiate(cfg.data, collate=list, num_workers=0, _convert_="all")
    datamodule.setup("fit")
    (steps,) = datamodule.statistics.values()
    assert steps.num_transitions == 24
    assert steps.num_trajectories == 12
    np.testing.assert_allclose([steps.action["min"][5], steps.action["max"][5]], np.radians(8), rtol=1e-4)
    np.testing.assert_allclose([steps.action["min"][0], steps.action["max"][0]], [0.01, 0.12], rtol=1e-4)
    step = next(iter(datamodule.train_dataloader()))[0]
    assert step.observation.instruction == "Go"
    assert step.action.shape == (1, 7)


def test_recordings_of_two_cameras_at_a_high_rate_are_learnt_with_the_state_and_acted_on(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recordings").mkdir()
    for i in range(10):
        pose = np.column_stack([np.arange(13) * (i + 1) / 100, np.zeros((13, 5))])
        images, wrist = (np.full((13, 48, 64, 3), 10 * i + shade, np.uint8) for shade in (0, 100))
        file = tmp_path / "recordings" / f"{i:02d}.npz"
        np.savez(file, images=images, wrist_images=wrist, pose=pose, gripper=np.arange(13) % 2, instruction="Go")
    code = blocks(ROBOT, "python")[0]
    code = code.replace('{"image": "images"}', '{"image": "images", "wrist_image": "wrist_images"}')
    (tmp_path / "convert.py").write_text(code.replace("KEEP = 1", "KEEP = 3"))
    subprocess.run([sys.executable, "convert.py"], cwd=tmp_path, check=True, capture_output=True)
    monkeypatch.chdir(tmp_path)
    (command,) = re.findall(r"^python finetune\.py (.*data\.cameras.*)$", ROBOT.read_text(), re.M)
    small = "+debug=tiny data/source=rlds trainer.max_steps=1 save_every=1 data.num_workers=0"
    where = f"paths.data_dir={tmp_path}/data paths.output_dir={tmp_path}/run logger=csv"
    cfg = composed("finetune", f"{command} {small} {where} +data.datasets.my_robot.cameras.wrist=wrist_image", own)
    fit(cfg)
    policy = Policy.from_pretrained(tmp_path / "run")
    assert policy.statistics.num_transitions == 40, "every third of 13 moments makes five, and what lies between four"
    np.testing.assert_allclose(policy.statistics.action["max"][0], 0.3, rtol=1e-5)
    views = {name: np.zeros((48, 64, 3), np.uint8) for name in ("primary", "wrist")}
    assert policy.act_chunk([Observation(views, "go", np.zeros(7, np.float32))]).shape == (1, 8, 7)
    with pytest.raises(ValueError, match="proprio"):
        policy.act_chunk([Observation(views, "go")])


def test_the_head_of_the_page_differs_from_the_released_one_in_its_loss_alone(own: Path) -> None:
    cfg = composed("train", "action_head=smooth", own).action_head
    smooth, plain = instantiate(cfg), TokenHead(cfg.num_bins, cfg.vocab_size)
    targets = plain.encode(torch.rand(2, 1, 7) * 2 - 1)
    sure = torch.nn.functional.one_hot(targets, cfg.vocab_size) * 20.0
    assert plain.criterion(sure, targets) < 1e-4 < smooth.criterion(sure, targets)
    again = rebuild(describe(smooth, USUAL_HEAD), USUAL_HEAD)  # as a checkpoint does
    assert type(again).__name__ == "SmoothHead"
    assert again.smoothing == smooth.smoothing == 0.1
    smooth.smoothing = 0.0
    torch.testing.assert_close(smooth.criterion(sure, targets), plain.criterion(sure, targets))


def test_every_extra_that_is_named_can_be_installed() -> None:
    known = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    files = [path for top in ("openvla_lightning", "conf") for path in (ROOT / top).rglob("*.*")]
    texts = [path.read_text() for path in (*files, *PAGES) if path.suffix in (".py", ".yaml", ".md")]
    patterns = (r"(?:openvla[-_]lightning|-e '\.)\[(\w+)\]", r"install\([\"'](\w+)[\"']\)")
    named = {name for text in texts for pattern in patterns for name in re.findall(pattern, text)}
    assert {"serve", "hdf5", "libero"} <= named <= known


def test_every_locked_version_installs_on_the_first_release_of_every_python_that_is_named() -> None:
    about = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
    pythons = [f"{name.rpartition(' ')[2]}.0" for name in about if re.search(r":: 3\.\d+$", name)]
    assert "3.11.0" in pythons
    pinned = dict(re.findall(r"^([\w.-]+)==([\w.]+)", (ROOT / "requirements.lock").read_text(), re.M))
    here = {name: found for name in pinned if (found := installed(name)) and found.version == pinned[name]}
    needed = {name: SpecifierSet(found.metadata.get("Requires-Python") or "") for name, found in here.items()}
    assert not {name: str(allowed) for name, allowed in needed.items() if not all(map(allowed.contains, pythons))}


def installed(name: str) -> Distribution | None:
    with suppress(PackageNotFoundError):
        return distribution(name)
    return None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    assert not [t for t in targets if "://" not in t and not (page.parent / t).exists()]


def headings(page: Path) -> set[str]:
    """The anchors of a page, as GitHub makes them of its headings."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)
    words = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in re.findall(r"^#+ (.*)$", text, re.M))
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in words}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_into_a_page_name_one_of_its_headings(page: Path) -> None:
    for link, anchor in re.findall(r"\]\(([^)#:]*)#([^)]+)\)", page.read_text()):
        assert anchor in headings((page.parent / link).resolve() if link else page), f"{link}#{anchor}"


def test_the_readme_sets_everything_up_in_two_commands() -> None:
    text = (ROOT / "README.md").read_text()
    assert "make demo" in text
    assert "make test" in text


def test_the_site_builds(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="the site needs the extra `docs`")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    assert "from_pretrained" in (tmp_path / "reference.html").read_text()
    fetched = [
        tag
        for page in tmp_path.rglob("*.html")
        for tag in re.findall(r"<(?:script|link)[^>]*//[^>]*>", page.read_text())
    ]
    assert not [tag for tag in fetched if "canonical" not in tag]
