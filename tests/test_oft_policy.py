"""A released OpenVLA-OFT folder as a policy: pictures, words and states in, the released code's actions out."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oft_world import Case, cases

from openvla_lightning import Policy
from openvla_lightning.action_head import diffusion
from openvla_lightning.checkpoint.export import export
from openvla_lightning.checkpoint.format import CheckpointError
from openvla_lightning.types import Observation

pytestmark = pytest.mark.golden


@pytest.fixture(scope="module", params=cases())
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def opened(case: Case, folder: Path | None = None, **options: Any) -> Policy:
    cameras = [str(name) for name in case.arrays["camera_names"]]
    chunk = case.meta["chunk"] if case.kind == "tokens" else None
    told = {"cameras": cameras, "action_chunk": chunk} if folder is None else {}
    return Policy.from_pretrained(folder or case.folder, device="cpu", **told, **options)


def observation(case: Case, sample: int) -> Observation:
    views = dict(zip(map(str, case.arrays["camera_names"]), case.arrays["image"][sample], strict=True))
    return Observation(views, str(case.arrays["instruction"][sample]), case.arrays["raw_proprio"][sample])


def same(policy: Policy, ours: np.ndarray, theirs: np.ndarray, atol: float = 1e-4) -> None:
    """Equal within `atol` in normalised units."""
    statistics, method = policy.statistics, policy.normalisation
    low, high = (statistics.action[name] for name in {"quantile": ("q01", "q99"), "minmax": ("min", "max")}[method])
    scale = np.where(statistics.mask, np.maximum((high - low) / 2, 1e-6), 1)
    np.testing.assert_allclose(ours / scale, theirs / scale, atol=atol, rtol=0)


def answers(case: Case, start: str) -> list[int]:
    return sorted(int(name.split("/")[1]) for name in case.arrays if re.fullmatch(rf"{start}/\d+/actions", name))


@pytest.mark.parametrize("start", ["predict", "predict_crop", "predict_10steps"])
def test_actions(case: Case, start: str, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = answers(case, start)
    if not samples:
        pytest.skip("not in this variant")
    options: dict[str, Any] = {"center_crop": True} if start == "predict_crop" else {}
    if case.kind == "diffusion":
        options["options"] = {"steps": len(case.arrays[f"{start}/0/timesteps"])}
    policy = opened(case, **options)
    for sample in samples:
        if case.kind == "diffusion":
            noise = case[f"{start}/{sample}/noise"]
            monkeypatch.setattr(diffusion, "start_noise", lambda *_, noise=noise: noise)
        (ours,) = policy.act_chunk([observation(case, sample)])
        same(policy, ours, case.arrays[f"{start}/{sample}/actions"], 1e-3 if case.kind == "diffusion" else 1e-4)


def test_a_batch_of_prompts_of_different_length_is_what_each_is_alone(case: Case) -> None:
    """The released code takes one request at a time."""
    policy = opened(case)
    every = [observation(case, sample) for sample in range(len(case.arrays["image"]))]
    together = policy.act_chunk(every)
    for row, seen in enumerate(every):
        again = opened(case) if case.kind == "diffusion" else policy
        same(policy, again.act_chunk([seen])[0], together[row], 1e-3 if case.kind == "diffusion" else 1e-4)


def test_what_is_missing_is_said(case: Case) -> None:
    policy = opened(case)
    seen = observation(case, 0)
    *others, last = seen.images
    fewer = {view: seen.images[view] for view in others} or {"another": seen.images[last]}
    with pytest.raises(ValueError, match=rf"there is no image {last}"):
        policy.act_chunk([Observation(fewer, seen.instruction, seen.proprio)])
    if case.meta["proprio"]:
        with pytest.raises(ValueError, match="there is no proprio"):
            policy.act_chunk([Observation(seen.images, seen.instruction)])
        with pytest.raises(ValueError, match="proprio dimensions"):
            policy.act_chunk([Observation(seen.images, seen.instruction, np.zeros(3, np.float32))])


def test_our_export_says_what_the_folder_did_not(case: Case, tmp_path: Path) -> None:
    """Loaded, exported and loaded again, with nothing told the second time."""
    policy = opened(case)
    policy.vla.save_pretrained(tmp_path / "again", policy.processor)
    again = opened(case, tmp_path / "again")
    assert again.processor.config["cameras"] == policy.processor.config["cameras"]
    assert again.processor.action_head.config == policy.processor.action_head.config
    if case.kind != "diffusion":
        same(policy, again.act_chunk([observation(case, 0)]), policy.act_chunk([observation(case, 0)]))
    if case.kind != "tokens":
        export(case.folder, tmp_path / "exported")
        assert {path.name for path in (tmp_path / "exported").glob("*.pt")} == {
            p.name for p in case.folder.glob("*.pt")
        }


def test_a_chunk_of_unknown_length_is_asked_for(case: Case, tmp_path: Path) -> None:
    if case.kind == "tokens" or case.meta["proprio"]:
        pytest.skip("the other variants say it")
    import json
    import shutil

    folder = tmp_path / "five"
    shutil.copytree(case.folder, folder)
    (head,) = folder.glob("action_head--*")
    content = torch.load(head, weights_only=True)
    dim = case.vla.llm.dim
    content["module.model.fc2.weight"], content["module.model.fc2.bias"] = torch.zeros(5, dim), torch.zeros(5)
    content["module.model.fc1.weight"] = torch.zeros(dim, 5 * dim)
    content["module.model.layer_norm1.weight"] = content["module.model.layer_norm1.bias"] = torch.ones(5 * dim)
    torch.save(content, head)
    stats = json.loads((folder / "dataset_statistics.json").read_text())
    for entry in stats.values():
        entry["action"] = {name: values[:5] for name, values in entry["action"].items()}
    (folder / "dataset_statistics.json").write_text(json.dumps(stats))
    with pytest.raises(CheckpointError, match="pass action_chunk=8"):
        Policy.from_pretrained(folder, device="cpu")
    policy = Policy.from_pretrained(folder, device="cpu", action_chunk=3)
    seen = observation(case, 0)
    (image,) = seen.images.values()
    assert policy.act_chunk([Observation({"primary": image}, "go")]).shape == (1, 3, 5)
