"""Released OpenVLA-OFT folders: read strictly, written as they were."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oft_world import Case, cases
from safetensors.torch import load_file, save_file
from torch import Tensor

from openvla_lightning.checkpoint.export import export
from openvla_lightning.checkpoint.format import CheckpointError
from openvla_lightning.checkpoint.formats import describe
from openvla_lightning.checkpoint.load import load_vla, load_weights
from openvla_lightning.checkpoint.oft_parts import PART_FILE
from openvla_lightning.model import VLA
from openvla_lightning.processor import Processor
from openvla_lightning.strategy.lora import merge

pytestmark = pytest.mark.golden


@pytest.fixture(scope="module", params=cases())
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def tensors(folder: Path) -> dict[str, dict[str, Tensor]]:
    """File -> its tensors."""
    found = {path.name: torch.load(path, weights_only=True) for path in sorted(folder.glob("*.pt"))}
    return found | {path.name: load_file(path) for path in folder.glob("*.safetensors")}


def same(left: dict[str, dict[str, Tensor]], right: dict[str, dict[str, Tensor]]) -> None:
    assert set(left) == set(right)
    for name, file in left.items():
        assert list(file) == list(right[name]), name
        for key, tensor in file.items():
            other = right[name][key]
            assert tensor.dtype == other.dtype, key
            assert torch.equal(tensor, other), key


def test_what_the_folder_says(case: Case) -> None:
    description = describe(case.folder).check()
    assert description.vla.get("proprio_dim") == (case.meta["proprio_dim"] if case.meta["proprio"] else None)
    assert description.vla.get("film") == ("released" if case.meta["film"] else None)
    head = description.processor["action_head"]
    if case.kind == "tokens":
        assert head.get("class", "TokenHead") == "TokenHead"
        return
    assert head == {
        "class": {"l1": "L1Head", "diffusion": "DiffusionHead"}[case.kind],
        "action_chunk": case.meta["chunk"],
        "action_dim": case.meta["action_dim"],
    }
    method = {"bounds_q99": "quantile", "bounds": "minmax"}[case.meta["norm"]]
    assert {stats.get("normalisation", "quantile") for stats in description.norm_stats.values()} == {method}
    assert list(description.norm_stats) == [case.meta["unnorm_key"]]
    if case.meta["film"]:
        assert description.strategy is not None
        assert description.strategy["rank"] == case.meta["lora_rank"]
        assert description.strategy["alpha"] / description.strategy["rank"] == case.meta["lora_scaling"]


def test_round_trip_is_bit_equal(case: Case, tmp_path: Path) -> None:
    VLA.from_pretrained(case.folder).save_pretrained(tmp_path)
    same(tensors(tmp_path), tensors(case.folder))
    ours = json.loads((tmp_path / "dataset_statistics.json").read_text())
    theirs = json.loads((case.folder / "dataset_statistics.json").read_text())
    assert {name: {k: v for k, v in entry.items() if k != "normalisation"} for name, entry in ours.items()} == theirs


def test_round_trip_of_released_dtypes(case: Case, tmp_path: Path) -> None:
    """Weights in bfloat16, but projectors and FiLM in float32."""
    folder = tmp_path / "released"
    shutil.copytree(case.folder, folder)
    weights = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["torch_dtype"] = "bfloat16"
    config["text_config"]["torch_dtype"] = "bfloat16"
    (folder / "config.json").write_text(json.dumps(config))
    for path in folder.glob("*.pt"):
        if "projector" not in path.name:
            content = torch.load(path, weights_only=True)
            narrow = {k: v if ".scale." in k or ".shift." in k else v.bfloat16() for k, v in content.items()}
            torch.save(narrow, path)
    vla = VLA.from_pretrained(folder)
    with torch.no_grad():
        batch = case.batch
        zeros = torch.zeros(len(batch.input_ids), case.places, vla.llm.dim)
        extra = None
        if case.kind == "diffusion":
            extra = torch.zeros(len(batch.input_ids), 1, vla.llm.dim)
        hidden = vla.states(batch, slots=zeros, extra=extra, causal=False)
        assert hidden.dtype == torch.bfloat16
        assert hidden.isfinite().all()
    vla.save_pretrained(tmp_path / "again")
    same(tensors(tmp_path / "again"), tensors(folder))


def test_merged_towers_are_written_with_adapters_that_change_nothing(case: Case, tmp_path: Path) -> None:
    if not case.meta["film"]:
        pytest.skip("no FiLM in this variant")
    merged = load_vla(case.folder, merge=True)
    merged.save_pretrained(tmp_path)
    (file,) = tmp_path.glob("vision_backbone--*")
    (theirs,) = case.folder.glob("vision_backbone--*")
    written, released = (torch.load(path, weights_only=True) for path in (file, theirs))
    assert {k: v.shape for k, v in written.items()} == {k: v.shape for k, v in released.items()}
    again = load_vla(tmp_path, merge=True).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in merged.state_dict().items())


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


def test_every_problem_is_named(case: Case, tmp_path: Path) -> None:
    if case.kind == "tokens":
        pytest.skip("no parts in this variant")
    folder = tmp_path / "broken"
    shutil.copytree(case.folder, folder)
    files = {match.group(1): path for path in folder.iterdir() if (match := PART_FILE.fullmatch(path.name))}
    start = "module.model" if case.kind == "l1" else "module.noise_predictor.mlp_resnet"

    def damage(content: dict[str, Any]) -> None:
        del content[f"{start}.layer_norm2.weight"]
        content[f"{start}.layer_norm3.weight"] = torch.zeros(3)
        content[f"{start}.fc1.bias"] = torch.zeros(5)

    edit(files["action_head"], damage)
    with pytest.raises(CheckpointError) as caught:
        VLA.from_pretrained(folder)
    text = str(caught.value)
    assert all(name in text for name in ("layer_norm2.weight: missing", "layer_norm3.weight", "fc1.bias: is [5]")), text


def test_files_that_do_not_go_together(case: Case, tmp_path: Path) -> None:
    if case.kind == "tokens":
        pytest.skip("no parts in this variant")
    folder = tmp_path / "broken"
    shutil.copytree(case.folder, folder)
    (head,) = folder.glob("action_head--*")
    shutil.copy(head, folder / "action_head--7_checkpoint.pt")
    with pytest.raises(CheckpointError, match="several files for action_head"):
        describe(folder)
    head.unlink()
    others = [path for path in folder.glob("*.pt") if not path.name.startswith("action_head")]
    if others:
        with pytest.raises(CheckpointError, match="different steps"):
            describe(folder)
    (folder / "action_head--7_checkpoint.pt").rename(head)
    edit(head, lambda content: content.update({"module.other.weight": torch.zeros(1)}))
    with pytest.raises(CheckpointError, match=r"other.weight belongs to no known head"):
        describe(folder)


def test_a_file_that_would_run_code_is_refused(case: Case, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(case.folder, folder)
    for path in folder.glob("action_head--*"):
        path.unlink()
    torch.save({"module.model.fc1.weight": print}, folder / "action_head--5_checkpoint.pt")
    with pytest.raises(CheckpointError, match="nothing was run"):
        describe(folder)


def test_adapter_alone(case: Case, tmp_path: Path) -> None:
    """A folder as the released script leaves it without merging: the adapter, the parts, and a base elsewhere."""
    if case.meta["film"] or case.kind == "tokens":
        pytest.skip("told by the other variants")
    from openvla_lightning.strategy import LoRA

    base, folder = tmp_path / "base", tmp_path / "run"
    (folder / "lora_adapter").mkdir(parents=True)
    shutil.copytree(case.folder, base, ignore=shutil.ignore_patterns("*.pt"))
    shutil.copy(case.folder / "dataset_statistics.json", folder)
    for path in case.folder.glob("*.pt"):
        shutil.copy(path, folder)
    adapted = load_vla(base)
    LoRA(rank=4).apply(adapted)
    content = {}
    for name, tensor in adapted.state_dict().items():
        if ".lora_" in name:
            tensor.normal_(0, 0.05)
            content["base_model.model." + name.replace(".default.", ".")] = tensor.contiguous()
    content["base_model.model.language_model.lm_head.base_layer.weight"] = adapted.llm.lm_head.weight.clone()
    save_file(content, folder / "lora_adapter" / "adapter_model.safetensors")
    said = {"r": 4, "lora_alpha": 4, "base_model_name_or_path": str(base), "use_dora": False}
    (folder / "lora_adapter" / "adapter_config.json").write_text(json.dumps(said))
    loaded = load_vla(folder)
    merge(adapted)
    state = loaded.state_dict()
    for name, tensor in adapted.state_dict().items():
        torch.testing.assert_close(state[name], tensor, atol=1e-6, rtol=0, msg=name)
    whole = case.vla.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in whole.items() if name.startswith("action_head."))
    assert list(Processor.from_pretrained(folder).cameras) == describe(folder).processor["cameras"]
    export(folder, tmp_path / "exported")
    again = load_vla(tmp_path / "exported").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in state.items())
    assert {path.name for path in (tmp_path / "exported").glob("*.pt")} == {path.name for path in folder.glob("*.pt")}
    moved = tmp_path / "moved"
    base.rename(moved)
    with pytest.raises(CheckpointError, match="its base is gone"):
        load_vla(folder)
    with pytest.raises(CheckpointError, match="its base is gone"):
        Processor.from_pretrained(folder)
    assert torch.equal(load_vla(folder, base=moved).state_dict()["projector.fc1.weight"], state["projector.fc1.weight"])
    export(folder, tmp_path / "exported", base=moved, overwrite=True)


def test_adapter_alone_beside_towers_with_film(case: Case, tmp_path: Path) -> None:
    """The language model's adapter is in `lora_adapter/`, those of the towers are in the vision backbone's file."""
    if not case.meta["film"]:
        pytest.skip("no FiLM in this variant")
    base, folder = tmp_path / "base", tmp_path / "run"
    (folder / "lora_adapter").mkdir(parents=True)
    shutil.copytree(case.folder, base, ignore=shutil.ignore_patterns("*.pt"))
    for path in [case.folder / "dataset_statistics.json", *case.folder.glob("*.pt")]:
        shutil.copy(path, folder)
    layer = "language_model.model.layers.0.mlp.up_proj"
    down, up = torch.randn(32, case.vla.llm.dim), torch.randn(case.vla.state_dict()[f"{layer}.weight"].shape[0], 32)
    start = "base_model.model."
    content = {f"{start}{layer}.lora_A.weight": down, f"{start}{layer}.lora_B.weight": up}
    content[f"{start}vision_backbone.vision_backbone.featurizer.blocks.0.attn.qkv.lora_A.weight"] = torch.ones(32, 24)
    save_file(content, folder / "lora_adapter" / "adapter_model.safetensors")
    said = {"r": 32, "lora_alpha": 16, "base_model_name_or_path": str(base), "use_dora": False}
    (folder / "lora_adapter" / "adapter_config.json").write_text(json.dumps(said))
    state = load_vla(folder).state_dict()
    for name, tensor in load_vla(case.folder, merge=True).state_dict().items():
        expected = tensor + 0.5 * up @ down if name == f"{layer}.weight" else tensor
        torch.testing.assert_close(state[name], expected, atol=1e-5, rtol=0, msg=name)
    export(folder, tmp_path / "exported")
    (theirs,) = case.folder.glob("vision_backbone--*")
    same(*({path.name: torch.load(path, weights_only=True)} for path in (tmp_path / "exported" / theirs.name, theirs)))
    (folder / "lora_adapter" / "adapter_config.json").write_text(json.dumps({**said, "lora_alpha": 32}))
    with pytest.raises(CheckpointError, match="rank 32 and alpha 32 are not those of the towers' adapters"):
        load_vla(folder)


def test_training_starts_from_a_folder(case: Case) -> None:
    """Adapters that the folder keeps apart are merged on the way; so are parts that go on learning found."""
    vla = VLA.from_config(describe(case.folder).vla)
    load_weights(vla, case.folder)
    merged = load_vla(case.folder, merge=True).state_dict()
    state = vla.state_dict()
    assert set(state) == set(merged)
    assert all(torch.equal(tensor, merged[name]) for name, tensor in state.items())


def test_new_parts_begin_beside_the_weights_of_an_older_model(case: Case, tmp_path: Path) -> None:
    """From OpenVLA to OpenVLA-OFT: what the folder lacks starts at random, the rest is its own."""
    if case.kind == "tokens":
        pytest.skip("no parts in this variant")
    older = tmp_path / "openvla"
    shutil.copytree(case.folder, older, ignore=shutil.ignore_patterns("*.pt"))
    vla = VLA.from_config(describe(case.folder).vla)
    load_weights(vla, older)
    assert all(parameter.isfinite().all() for parameter in vla.parameters())
    own = VLA.from_pretrained(older).state_dict()
    state = vla.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in own.items())
    assert set(state) > set(own)
