"""The latency benchmark: every stage is there, and what it compares acts alike."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from openvla_lightning.bench_latency import (
    HEADER,
    INSTRUCTION,
    MODELS,
    STAGES,
    bound,
    main,
    random_policy,
    released_way,
    stored,
)
from openvla_lightning.cost.cards import CARDS
from openvla_lightning.model import VLA
from openvla_lightning.quantisation import Quantisation

CPU = torch.device("cpu")


def test_it_measures_every_stage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", "tiny", "--device", "cpu", "--repeats", "3", "--card", "H200", "--out", str(tmp_path)]
    whole, eight = main([*arguments, "--cpu-time", "--quantisation", "none", "int8", "fp8"])
    for row in (whole, eight):
        assert set(row.stages) == set(STAGES)
        assert all(len(times) == 3 and min(times) > 0 for times in [row.actions, row.baseline, *row.stages.values()])
        assert len(row.cells()) == len(HEADER)
        assert row.bound is not None
    assert eight.bound < whole.bound
    assert eight.memory < whole.memory
    printed = capsys.readouterr().out
    assert "left out: quantisation=fp8 needs" in printed
    assert "tiny, float32: the released way gives the same action" in printed
    assert "| tiny, int8 |" in (tmp_path / "latency.md").read_text()
    assert (tmp_path / "latency.png").stat().st_size > 5000


def test_quantised_weights_of_another_dtype_act() -> None:
    """The tower's buffers were float32 beside bfloat16 weights."""
    policy = random_policy(MODELS["tiny"], CPU, torch.bfloat16, Quantisation(8))
    assert policy.act(np.zeros((96, 96, 3), np.uint8), INSTRUCTION).shape == (7,)


def test_the_released_way_acts_alike_with_two_towers() -> None:
    config = copy.deepcopy(MODELS["mid"])
    for spec in config["vision_backbone"]["towers"].values():
        spec |= {"embed_dim": 48, "depth": 3, "num_heads": 4}
    config["vision_backbone"]["image_size"] = 56
    small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config["llm"]["architecture"] |= small
    policy = random_policy(config, CPU, torch.float32, None)
    pictures = np.random.default_rng(0).integers(0, 256, (3, 80, 60, 3), dtype=np.uint8)
    act = released_way(policy)
    for picture in pictures:
        np.testing.assert_array_equal(policy.act(picture, INSTRUCTION), act(picture, INSTRUCTION))


def test_the_bound_of_the_full_model() -> None:
    """Reading 13.2 GB seven times takes an H200 19.3 ms; multiplying adds a little."""
    with torch.device("meta"):
        vla = VLA.from_config(MODELS["openvla_7b"]).to(torch.bfloat16)
    assert sum(p.numel() for p in vla.parameters()) == 7_541_237_184
    assert stored(vla) == 2 * 7_541_237_184

    h200 = next(known for known in CARDS if known.name == "H200")
    assert 0.0193 < bound(vla, h200, 280, 7) < 0.0225


def test_a_card_that_is_not_known_is_refused_with_those_that_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--model", "tiny", "--card", "H300"])
    assert "--card H300 is not known; known: GH200, H200," in capsys.readouterr().err
