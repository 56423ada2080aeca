"""`openvla fit-fast`: from the actions of a mixture to a tokenizer that a head takes."""

from pathlib import Path

import pytest
import warm_scripts

from openvla_lightning.action_head.fast import FastHead
from openvla_lightning.action_head.fast_tokenizer import FastTokenizer
from openvla_lightning.cli.commands import COMMANDS


def fit(root: Path, *overrides: str, fails: bool = False) -> str:
    given = [f"paths.log_dir={root}", "data/source=synthetic", "data.action_chunk=4", "chunks=300", *overrides]
    return warm_scripts.finish(COMMANDS["fit-fast"][0], root / "log", *given, fails=fails)


@pytest.mark.slow
def test_a_tokenizer_is_fitted_told_about_and_taken_by_a_head(tmp_path: Path) -> None:
    said = fit(tmp_path, "vocab_size=300")
    (folder,) = tmp_path.rglob("tokenizer")
    tokenizer = FastTokenizer.read(folder)
    assert tokenizer.vocab_size <= 300
    assert f"written to {folder}" in said
    assert "ids, mean" in said
    head = FastHead(str(folder), vocab_size=768, action_chunk=4)
    assert head.first_id == 768 - tokenizer.vocab_size
    assert FastHead(**head.config).config == head.config, "a checkpoint needs no folder"


@pytest.mark.slow
def test_too_few_ids_are_refused_with_the_way_out(tmp_path: Path) -> None:
    said = fit(tmp_path, "vocab_size=8", fails=True)
    assert "larger vocab_size or a smaller scale" in said
    assert "Traceback" not in said
