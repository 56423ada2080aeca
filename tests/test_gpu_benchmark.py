"""`benchmarks/gpu.py`: what it would measure, that it fits its time, and that a failure costs only itself."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
BUDGET = 480
NAMES = [
    *("act bfloat16", "train lora", "chunk", "train full", "parity", "train qlora", "act int4_weight", "act fp8"),
    *("act int8", "act int4", "act int8_weight", "data"),
]
LINES = [
    *(f"act bfloat16, p{share}: ms" for share in (50, 95)),
    *(f"train {learn}, batch 1: samples/s" for learn in ("full", "lora", "qlora")),
    *("chunk L1: ms", "chunk L1, 16 chunks at a time: ms", "chunk tokens in parallel: ms"),
    *(f"chunk {what}: ms" for what in ("diffusion, 10 steps", "tokens one after the other, one camera")),
    *(f"golden answers, {dtype}: share of equal numbers" for dtype in ("float32", "bfloat16")),
    *(f"act {bits}, p{share}: ms" for bits in ("int8", "int4") for share in (50, 95)),
    "data: 256 px pictures/s",
]
"""What a CPU measures. Of the others torchao or a GPU is needed."""


@pytest.fixture(scope="module")
def benchmark() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        patch.delitem(sys.modules, "chunk", raising=False)  # the standard library had one
        import gpu

        yield gpu


def test_every_figure_has_a_job(benchmark: Any) -> None:
    assert [job.name for job in benchmark.jobs(benchmark.tiny())] == NAMES
    assert [job.name for job in benchmark.jobs(benchmark.whole())] == NAMES


def test_the_time_budget_of_a_dry_run(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--dry"])
    benchmark.main()
    *table, _, verdict = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]
    assert [row[0] for row in rows] == NAMES
    takes = [float(row[2]) for row in rows]
    assert [float(row[1]) for row in rows] == [sum(takes[:number]) for number in range(len(rows))]
    assert all(took < float(row[3]) for took, row in zip(takes, rows, strict=True)), "a job has time to spare"
    assert sum(takes) <= BUDGET
    assert verdict == f"{sum(takes):.0f} s of {BUDGET}: fits"


def test_a_dry_run_says_what_does_not_fit(benchmark: Any) -> None:
    job = benchmark.Job("long", lambda: iter([]), BUDGET + 1)
    assert benchmark.plan([job], BUDGET).endswith("DOES NOT FIT")


def test_a_failure_costs_only_itself(benchmark: Any) -> None:
    def fails() -> Iterator[Any]:
        yield benchmark.Figure("first", 1.0)
        raise ValueError("no more")

    def hangs() -> Iterator[Any]:
        yield benchmark.Figure("second", 2.0)
        time.sleep(60)

    def works() -> Iterator[Any]:
        yield benchmark.Figure("third: ms", 3.0, 6.0, more_is_better=False)

    found = [benchmark.run(benchmark.Job(f.__name__, f, 1), 1.0) for f in (fails, hangs, works)]
    cells = [figure.cells() for figures in found for figure in figures]
    assert cells == [
        ["first", "1", "", "", ""],
        ["fails", "", "", "", "FAILED: ValueError: no more"],
        ["second", "2", "", "", ""],
        ["hangs", "", "", "", "FAILED: stopped after 1 s"],
        ["third: ms", "3", "6", "2.00", ""],
    ]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(benchmark: Any) -> None:
    with pytest.raises(SystemExit, match="--tiny"):
        benchmark.machine(benchmark.whole())


@pytest.mark.slow
def test_the_whole_table_at_tiny_size(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "gpu.py"), "--tiny", "--out", str(tmp_path)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=290).stdout
    figures = {figure["what"]: figure for figure in json.loads((tmp_path / "gpu.json").read_text())["figures"]}
    assert not [figure for figure in figures.values() if figure["failed"]]
    assert set(LINES) <= set(figures)
    assert all(figures[what]["ours"] > 0 for what in LINES)
    lacking = {what for what in figures if what not in LINES}
    assert lacking <= {"act int4_weight: ms", "act fp8: ms", "act int8_weight: ms"} | {
        f"act int8_weight, p{share}: ms" for share in (50, 95)
    }
    assert all("needs" in figures[what]["left_out"] or figures[what]["ours"] for what in lacking)
    assert figures["golden answers, float32: share of equal numbers"]["ours"] == 1
    assert printed.endswith((tmp_path / "gpu.md").read_text() + "\n")
