"""`openvla fit-fast`: from the actions of a mixture to a tokenizer that a head takes."""

import subprocess
import sys
from pathlib import Path

import pytest

from openvla_lightning.action_head.fast import FastHead
from openvla_lightning.action_head.fast_tokenizer import FastTokenizer

ROOT = Path(__file__).parents[1]


def fit(root: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "openvla_lightning.cli", "fit-fast", f"paths.log_dir={root}"]
    given = ["data/source=synthetic", "data.action_chunk=4", "chunks=300", *overrides]
    return subprocess.run([*command, *given], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_a_tokenizer_is_fitted_told_about_and_taken_by_a_head(tmp_path: Path) -> None:
    done = fit(tmp_path, "vocab_size=300")
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.rglob("tokenizer")
    tokenizer = FastTokenizer.read(folder)
    assert tokenizer.vocab_size <= 300
    assert f"written to {folder}" in done.stdout
    assert "ids, mean" in done.stdout
    head = FastHead(str(folder), vocab_size=768, action_chunk=4)
    assert head.first_id == 768 - tokenizer.vocab_size
    assert FastHead(**head.config).config == head.config, "a checkpoint needs no folder"


@pytest.mark.slow
def test_too_few_ids_are_refused_with_the_way_out(tmp_path: Path) -> None:
    done = fit(tmp_path, "vocab_size=8")
    assert done.returncode == 1
    assert "larger vocab_size or a smaller scale" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
