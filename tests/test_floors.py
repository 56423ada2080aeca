"""Who may import whom: a module may import its own floor's listed neighbours and anything below."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "openvla_lightning"

CONFIGURATION = {"hydra", "omegaconf"}
TRAINING = {"lightning"}
DATA = {"tensorflow_datasets", "openvla_lightning.data"}
MODELS = {
    *("transformers", "timm", "peft", "openvla_lightning.model", "openvla_lightning.strategy"),
    *("openvla_lightning.action_head", "openvla_lightning.checkpoint.load", "openvla_lightning.checkpoint.formats"),
}
CHECKPOINTS = {"openvla_lightning.checkpoint"}
PROCESSOR = "openvla_lightning.processor"
ABOVE = {"openvla_lightning.module", "openvla_lightning.run", "openvla_lightning.callbacks", "openvla_lightning.config"}

FORBIDDEN = {
    "runtime": CONFIGURATION | TRAINING | DATA | MODELS | ABOVE | {"torch"},
    "types.py actions.py statistics.py processor/prompt.py report/tables.py report/page.py cost/cards.py": CONFIGURATION
    | TRAINING
    | DATA
    | MODELS
    | ABOVE,
    "model": CONFIGURATION | TRAINING | DATA | ABOVE | CHECKPOINTS | {"openvla_lightning.action_head", PROCESSOR},
    "action_head strategy quantisation.py optim.py": CONFIGURATION
    | TRAINING
    | DATA
    | ABOVE
    | CHECKPOINTS
    | {PROCESSOR},
    "processor": CONFIGURATION | TRAINING | DATA | ABOVE | CHECKPOINTS,
    "checkpoint": CONFIGURATION | TRAINING | DATA | ABOVE,
    "data": CONFIGURATION | MODELS | ABOVE,
    "module.py parallel.py callbacks logger": CONFIGURATION | DATA,
    "policy.py evaluation serve": CONFIGURATION | TRAINING | ABOVE,
    "report": CONFIGURATION | TRAINING | MODELS | ABOVE,
    "cost": CONFIGURATION | TRAINING | ABOVE,
    "env": CONFIGURATION
    | TRAINING
    | MODELS
    | ABOVE
    | {"tensorflow_datasets", "openvla_lightning.data.source", "openvla_lightning.data.datamodule"},
}
PUBLIC_FACES = {
    "model/vla.py": {"openvla_lightning.checkpoint.load", "openvla_lightning.checkpoint.save"},
    "processor/robot.py": {"openvla_lightning.checkpoint.formats", "openvla_lightning.checkpoint.preprocessor"},
}
"""The four calls that lead upstairs: `from_pretrained` and `save_pretrained` of `VLA` and of `Processor`."""

FACE = "model/checkpoint.py"
"""The documented door to checkpoints; nothing of the model imports it."""

DOORS = {
    *(
        "types",
        "actions",
        "statistics",
        "optim",
        "quantisation",
        "policy",
        "client",
        "module",
        "parallel",
        "config",
        "plugins",
    ),
    *("demo", "demonstrations", "libero_demonstrations", "bench_latency", "dashboards", "run", "cli"),
    *("model", "action_head", "strategy", "processor", "checkpoint", "cost", "data", "callbacks", "logger", "serve"),
    *("env", "evaluation", "report", "runtime"),
}
"""What stands at the root: words that someone types in Python, in YAML or on a command line."""

HYDRA_LIVES_IN = {"config.py", "run", "cli", "serve", "data/report"}
"""Of `serve` and `data/report` their `__main__` alone."""


def imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def files(floor: str) -> Iterator[Path]:
    for room in floor.split():
        path = PACKAGE / room
        assert path.exists(), f"the floor plan names {room}, which is not there"
        # a package's `__main__.py` is a script: it may import everything, and nothing imports it
        yield from [path] if path.is_file() else (p for p in path.rglob("*.py") if p.name != "__main__.py")


def allowed(path: Path, name: str) -> bool:
    """Whether an import is one of the public faces' lazy ones, for type checkers, or the documented door's."""
    place = path.relative_to(PACKAGE).as_posix()
    if place == "model/vla.py" and within(name, PROCESSOR):
        return True  # the type of an argument of `save_pretrained`
    return place == FACE or any(within(name, face) for face in PUBLIC_FACES.get(place, ()))


def within(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


@pytest.mark.parametrize("floor", FORBIDDEN)
def test_floor_imports_nothing_from_above(floor: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files(floor)
        for name in imports(path)
        for bad in FORBIDDEN[floor]
        if within(name, bad) and not allowed(path, name)
    ]
    assert not wrong, "\n".join(wrong)


def test_the_root_holds_doors_alone() -> None:
    found = {p.stem for p in PACKAGE.iterdir() if p.suffix == ".py" or (p.is_dir() and (p / "__init__.py").exists())}
    assert found - {"__init__"} == DOORS


def test_public_faces_are_lazy() -> None:
    for place, faces in PUBLIC_FACES.items():
        tree = ast.parse((PACKAGE / place).read_text())
        outside = [n.module for n in tree.body if isinstance(n, ast.ImportFrom) and n.module in faces]
        inside = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module in faces}
        assert not outside
        assert inside == faces, f"{place} no longer needs all of {faces}"


def test_hydra_lives_on_the_top_floor_only() -> None:
    using = [p for p in PACKAGE.rglob("*.py") if any(within(n, c) for n in imports(p) for c in CONFIGURATION)]
    homes = {(p if p.parent == PACKAGE else p.parent).relative_to(PACKAGE).as_posix() for p in using}
    assert homes == HYDRA_LIVES_IN
    assert {p.name for p in using if p.parent.name in ("serve", "report")} == {"__main__.py"}


def test_tfds_is_imported_only_where_records_are_read_and_written() -> None:
    homes = {p for p in PACKAGE.rglob("*.py") if any(within(n, "tensorflow_datasets") for n in imports(p))}
    outside = [str(p.relative_to(ROOT)) for p in homes if PACKAGE / "data" / "source" not in p.parents]
    # the demonstrations only declare what a step of theirs looks like
    assert set(outside) <= {"openvla_lightning/demonstrations.py", "openvla_lightning/libero_demonstrations.py"}


def test_nothing_imports_tensorflow() -> None:
    assert not [p for p in PACKAGE.rglob("*.py") for n in imports(p) if within(n, "tensorflow")]


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("openvla_lightning", {"torch", "lightning", "hydra"}),
        ("openvla_lightning.config", {"torch", "lightning", "transformers"}),
        ("openvla_lightning.client", {"torch", "transformers", "hydra", "fastapi"}),
        (
            "openvla_lightning.policy",  # and so the model
            {"tensorflow_datasets", "hydra", "lightning", "tensorflow", "torchmetrics", "matplotlib"}
            | {"peft", "bitsandbytes", "wandb"},
        ),
        ("openvla_lightning.run.nowhere", {"torch", "lightning", "numpy"}),
        ("openvla_lightning.data", {"transformers", "hydra", "tensorflow", "openvla_lightning.model"}),
    ],
)
def test_light_things_do_not_need_heavy_things(module: str, absent: set[str]) -> None:
    code = f"import sys, {module}; print(*sorted({absent!r} & set(sys.modules)))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert loaded.split() == []


def test_no_file_is_longer_than_three_hundred_lines() -> None:
    long = {
        str(p.relative_to(ROOT)): n
        for p in [*PACKAGE.rglob("*.py"), *(ROOT / "tests").rglob("*.py"), *ROOT.glob("*.py")]
        if (n := len(p.read_text().splitlines())) > 300 and p != PACKAGE / "data" / "oxe" / "datasets.py"
    }
    assert not long


@pytest.mark.parametrize("script", ["train.py", "finetune.py", "evaluate.py"])
def test_an_entry_script_is_one_page(script: str) -> None:
    assert len((ROOT / script).read_text().splitlines()) <= 35
