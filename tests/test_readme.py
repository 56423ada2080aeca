"""Every command a page shows exists, and every page a page points to is there."""

import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from openvla_lightning.config import validate

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "data" / "README.md"]


def commands(pattern: str) -> Iterator[Any]:
    """Matches of `pattern` in the fenced blocks and inline code of all pages."""
    for page in PAGES:
        text = page.read_text()
        code = re.findall(r"```(?:bash|sh|console)\n(.*?)```", text, re.S) + re.findall(r"`([^`\n]+)`", text)
        for line in "\n".join(code).replace("\\\n", " ").splitlines():
            if match := re.match(r"(?:\$ )?(?:[A-Z_]+=\S+ )*" + pattern, line.strip()):
                yield pytest.param(match, id=f"{page.relative_to(ROOT)}: {line.strip()}")


@pytest.mark.parametrize("match", commands(r"(?:\S*python|torchrun \S+) (train|finetune|evaluate)\.py(.*)$"))
def test_a_script_command_composes(match: re.Match[str]) -> None:
    words = shlex.split(match[2], comments=True)
    words = [w for w in words if w not in ("-m", "--resolve", "--cfg", "job", "--help") and "..." not in w]
    if any("launcher=" in word for word in words):
        pytest.skip("the launcher is a plugin that is not installed")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        overrides = [re.sub(r"=([^\[{(]*?),.*", r"=\1", word) for word in words]
        validate(compose(match[1], ["paths.output_dir=/tmp/out", *overrides]))


@pytest.mark.parametrize("match", commands(r"make (\w+)"))
def test_a_make_target_exists(match: re.Match[str]) -> None:
    assert re.search(rf"^{match[1]}:", (ROOT / "Makefile").read_text(), re.M)


@pytest.mark.parametrize("match", commands(r"\S*python3? -m (openvla_lightning[\w.]*)"))
def test_a_module_command_exists(match: re.Match[str]) -> None:
    spec = importlib.util.find_spec(match[1])
    if spec is not None and spec.submodule_search_locations:  # a package runs its `__main__`
        spec = importlib.util.find_spec(f"{match[1]}.__main__")
    assert spec is not None
    assert spec.origin is not None
    assert "__main__" in Path(spec.origin).read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    assert not [t for t in targets if "://" not in t and not (page.parent / t).exists()]


def test_the_readme_sets_everything_up_in_two_commands() -> None:
    text = (ROOT / "README.md").read_text()
    assert "make demo" in text
    assert "make test" in text
