"""The arithmetic of many GPUs."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def scale() -> ModuleType:
    """The benchmark that works the table out."""
    spec = importlib.util.spec_from_file_location("scale", ROOT / "benchmarks" / "scale.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_table_of_the_docs_is_what_the_code_gives(scale: ModuleType) -> None:
    """Up to a unit of a last digit, because versions of torch count a few operations differently."""
    counted, page = scale.table().strip(), (ROOT / "docs" / "scaling.md").read_text()
    begin = page.index(counted.splitlines()[0])
    shown = page[begin:].partition("\n\n")[0].strip()
    number = re.compile(r"\d[\d,.]*")
    assert number.sub("#", shown) == number.sub("#", counted), "run: python benchmarks/scale.py"
    found, wanted = ([float(each.replace(",", "")) for each in number.findall(text)] for text in (shown, counted))
    assert found == pytest.approx(wanted, rel=0.05), "run: python benchmarks/scale.py"


def test_what_a_step_moves(scale: ModuleType) -> None:
    one, node = scale.traffic(10**9, 1, 1, 1), scale.traffic(10**9, 8, 1, 1)
    assert (one.inside, one.between) == (0, 0)
    assert node.between == 0
    assert node.inside == pytest.approx(8e9 * 7 / 8)
    everywhere, grouped = scale.traffic(10**9, 64, 1, 1), scale.traffic(10**9, 64, 8, 1)
    assert everywhere.inside + everywhere.between == pytest.approx(8e9 * 63 / 64)
    assert grouped.inside == node.inside
    assert grouped.between == pytest.approx(8e9 / 8 * 7 / 8)
    assert grouped.between < everywhere.between / 5, "weights stay in the node"
    assert scale.traffic(10**9, 64, 8, 4).between == grouped.between, "gradients cross once a step"
