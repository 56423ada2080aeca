"""Every ablation of the paper is one override: it fits the 7B recipe, and its twin trains on a laptop."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from openvla_lightning.config import validate
from openvla_lightning.report.paper import ABLATIONS, Ablation, ablation_rows, reported
from openvla_lightning.report.tables import markdown

ROOT = Path(__file__).parents[1]
TRAINING = [row for row in ABLATIONS if row.script != "evaluate"]
EVALUATION = [row for row in ABLATIONS if row.script == "evaluate"]


def named(row: Ablation) -> str:
    return f"{row.where} {row.override}"


def cfg_of(script: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose(script, ["paths.output_dir=/tmp/out", *overrides])


@cache
def valid(script: str, *overrides: str) -> dict[str, Any]:
    """The checked config of a command; many rows have the same base."""
    return validate(cfg_of(script, *overrides))


def test_every_row_is_one_override_and_each_is_another() -> None:
    assert all(" " not in row.override and row.override.count("=") == 1 for row in ABLATIONS)
    assert len({(row.script, row.base, row.override) for row in ABLATIONS}) == len(ABLATIONS)
    sections = {
        place for row in ABLATIONS for place in row.where.replace("Tables 2, 11", "Table 2, Table 11").split(", ")
    }
    assert sections >= {"3.3", "3.4", "App. C", "Fig. 5", *(f"Table {n}" for n in (1, 2, 7, 9, 10, 11, 12))}


@pytest.mark.parametrize("row", ABLATIONS, ids=named)
def test_it_composes_and_validates_at_full_size_and_changes_something(row: Ablation) -> None:
    base, changed = (valid(row.script, *row.base, *more) for more in ([], [row.override]))
    if row.script != "evaluate":
        assert changed["model"]["_target_"] == "openvla_lightning.model.VLA"
        assert changed["model"]["vision_backbone"]["image_size"] >= 224
    same = {"rank=32", "data/mix=libero_spatial_no_noops", "model.vision_backbone.fusion=channel"}  # the recipe's own
    assert (base == changed) == (row.override in same)


def test_one_choice_brings_along_what_it_needs() -> None:
    fused, single = (
        cfg_of("train", "+experiment=oxe_full", *more) for more in ([], ["model/vision_backbone=siglip_224"])
    )
    for cfg, towers in ((fused, 2), (single, 1)):
        assert len(cfg.model.projector.towers) == len(cfg.processor.towers) == towers
    assert cfg_of("train", "model=llava_7b").processor.prompt == "vicuna"
    assert cfg_of("train", "model=llava_7b").processor.image_size == 336
    full = cfg_of("finetune", "+experiment=libero_spatial_lora", "strategy=full")
    assert full.optim.lr == 2e-5
    assert cfg_of("finetune", "+experiment=libero_spatial_lora").optim.lr == 5e-4


def test_the_page_holds_the_table() -> None:
    assert markdown(ablation_rows()) in (ROOT / "docs" / "ablations.md").read_text()


def test_the_paper_s_number_of_a_run_is_found_by_its_overrides() -> None:
    assert reported(["strategy=sandwich"]) == "62.1 ± 7.9"
    assert reported(["strategy=lora"]) == "68.2 ± 7.5"
    assert reported(["strategy=lora", "rank=64"]) == reported(["strategy=lora_64"]) == "68.2 ± 7.8"
    assert reported(["strategy=lora_8"]) == reported(["optim.lr=1"]) == "-"


@pytest.mark.slow
@pytest.mark.parametrize("row", TRAINING, ids=named)
def test_its_twin_trains_on_a_laptop(row: Ablation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from openvla_lightning.run.fit import fit

    monkeypatch.chdir(tmp_path)
    own = [row.override] if row.twin is None else list(row.twin)
    experiment = [text for text in own if text.startswith("+experiment")]
    small = ["+debug=tiny", "callbacks=none", "logger=none", "data.num_workers=0", f"paths.output_dir={tmp_path}"]
    rest = [text for text in own if text not in experiment]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg: Any = compose(row.script, [*row.base, *experiment, *small, *rest])
    cfg.objective = "train/loss"
    assert cfg.trainer.max_steps == 20
    loss = fit(cfg)
    assert loss is not None
    assert 0 < loss < 20
