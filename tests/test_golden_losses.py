"""Recipes give the losses that they gave before: every step of 20, as recorded in golden/losses.json.

`python -m pytest tests/test_golden_losses.py --rewrite-golden` runs the commands in that file and records what they
give. A commit that does so says why the losses changed.
"""

import csv
import json
import platform
import shlex
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import warm_scripts

LOSSES = Path(__file__).parent / "golden" / "losses.json"
OTHER_MACHINES = 5e-4
"""Relative difference that is allowed where the arithmetic is done by other kernels.

Measured on one CPU over the 20 steps of all recipes: 1.1e-6 between the AVX-512 and the AVX2 kernels of torch, MKL and
oneDNN, 6.2e-5 between those and the ones for any x86 processor, 3e-7 between one thread and two. Another seed moves
the first loss by 4e-3, a learning rate that is 5 % higher moves the fourth by more than 1e-3.
"""
LIBRARIES = ("torch", "torchvision", "timm", "transformers", "peft", "bitsandbytes", "numpy")

pytestmark = [pytest.mark.golden, pytest.mark.slow]


def recorded() -> dict[str, Any]:
    return json.loads(LOSSES.read_text())


def machine() -> dict[str, str]:
    """What decides about the last bits of a float: the processor, its kernels, and the libraries."""
    cpu = Path("/proc/cpuinfo")
    known = dict(line.split(":", 1) for line in cpu.read_text().splitlines() if ":" in line) if cpu.exists() else {}
    said = {name.strip(): value.strip() for name, value in known.items()}
    processor = " ".join(said[name] for name in ("vendor_id", "cpu family", "model") if name in said)
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor or platform.processor(),
        "kernels": torch.backends.cpu.get_cpu_capability(),
        **{name: version(name) for name in LIBRARIES},
    }


def run(command: str, folder: Path) -> dict[str, list[float]]:
    """Run a recipe's command; return the losses of training and validation."""
    script, *overrides = shlex.split(command)[1:]
    where = [f"paths.log_dir={folder / 'runs'}", f"paths.data_dir={folder / 'data'}", "trainer.log_every_n_steps=1"]
    warm_scripts.finish(script, folder / "log", *overrides, *where)
    (path,) = folder.rglob("metrics.csv")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows if row.get(name)] for name in ("train/loss", "val/loss")}


@pytest.mark.parametrize("recipe", recorded()["recipes"])
def test_losses_are_those_before(recipe: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Bit for bit on the kind of machine that recorded them, elsewhere to within `OTHER_MACHINES`."""
    content = recorded()
    losses = run(content["recipes"][recipe]["command"], tmp_path)
    assert len(losses["train/loss"]) == 20
    if request.config.getoption("--rewrite-golden"):
        content["recipes"][recipe].update(losses)
        LOSSES.write_text(json.dumps({"machine": machine(), "recipes": content["recipes"]}, indent=1) + "\n")
        return
    expected = {name: content["recipes"][recipe][name] for name in losses}
    if machine() == content["machine"]:
        assert losses == expected
    for name in losses:
        np.testing.assert_allclose(losses[name], expected[name], rtol=OTHER_MACHINES, atol=0)


def test_recipes_differ_from_each_other() -> None:
    """Each has losses of its own, further apart than what is allowed between machines."""
    curves = [np.array(recipe["train/loss"]) for recipe in recorded()["recipes"].values()]
    for place, curve in enumerate(curves):
        for other in curves[:place]:
            assert (np.abs(curve / other - 1) > 10 * OTHER_MACHINES).any()
