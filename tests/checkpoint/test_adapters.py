"""A fine-tuned adapter: saved alone, found again on its base, exported whole, and never on another base."""

import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from written import same, train_a_little, write_ckpt

from openvla_lightning import VLA
from openvla_lightning.checkpoint import export as export_module
from openvla_lightning.checkpoint.export import export
from openvla_lightning.checkpoint.format import Base
from openvla_lightning.checkpoint.formats import base_at, weights_hash
from openvla_lightning.checkpoint.training import check_adapter
from openvla_lightning.model.checkpoint import CheckpointError, load_checkpoint, load_vla, load_weights, main
from openvla_lightning.policy import Policy
from openvla_lightning.strategy import LoRA, TrainOnly


@pytest.fixture
def base(folder: Path, tmp_path: Path) -> Path:
    """A released folder of its own: tests here harm it."""
    path = tmp_path / "base"
    VLA.from_pretrained(folder).save_pretrained(path)
    return path


def tune(base: Path, config: dict[str, Any], strategy: LoRA | TrainOnly) -> VLA:
    """As a fine-tuning run: build, fill, choose what learns, learn."""
    vla = VLA.from_config(config)
    load_weights(vla, base)
    strategy.apply(vla)
    train_a_little(vla, 0.1)
    return vla.eval()


@pytest.fixture
def tuned(base: Path, config: dict[str, Any]) -> VLA:
    return tune(base, config, LoRA(rank=4))


@pytest.fixture
def run(base: Path, tuned: VLA, tmp_path: Path) -> Path:
    """The folder of a run with an adapter's checkpoint."""
    write_ckpt(tmp_path / "run/checkpoints/step_000010.ckpt", tuned, LoRA(rank=4), tuned.norm_stats, base)
    return tmp_path / "run"


def logits(vla: VLA, batch: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return vla.eval()(**batch).logits


@pytest.mark.parametrize(
    "strategy",
    [
        LoRA(rank=4),
        LoRA(rank=2, use_dora=True, targets="attention"),
        LoRA(rank=2, use_rslora=True, targets="mlp", within=["llm"], also_train=["projector"]),
        LoRA(rank=2, targets=["*.layers.0.*_proj", "lm_head"]),
    ],
    ids=["released", "dora", "parts", "patterns"],
)
def test_an_adapter_and_its_base_are_the_model_that_was_trained(
    base: Path, config: dict[str, Any], batch: dict[str, Any], tmp_path: Path, strategy: LoRA
) -> None:
    live = tune(base, config, strategy)
    path = tmp_path / "last.ckpt"
    write_ckpt(path, live, strategy, live.norm_stats, base)
    assert torch.equal(logits(load_vla(path, merge=False), batch), logits(live, batch))
    merged = load_vla(path)
    torch.testing.assert_close(logits(merged, batch), logits(live, batch), atol=1e-4, rtol=1e-4)
    assert list(merged.state_dict()) == list(VLA.from_config(config).state_dict())
    assert (logits(VLA.from_pretrained(base), batch) - logits(live, batch)).abs().max() > 0.1


def test_only_what_was_learnt_is_in_the_file(run: Path, base: Path, tuned: VLA) -> None:
    state = torch.load(run / "checkpoints/step_000010.ckpt", weights_only=True)["state_dict"]
    assert {k for k in state if k.startswith("vla.")} == {
        f"vla.{n}" for n, p in tuned.named_parameters() if p.requires_grad
    }
    assert all(".lora_" in k for k in state if k.startswith("vla."))


def test_half_precision_merges_in_full(run: Path, tuned: VLA, batch: dict[str, Any]) -> None:
    half = load_vla(run, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    merged = load_vla(run)
    # one rounding, of the sum: as if the merged float32 model had been cast
    for (name, ours), theirs in zip(half.named_parameters(), merged.parameters(), strict=True):
        allowed = 2**-7 * theirs.abs() + 2**-8 * theirs.abs().max()
        assert ((ours.float() - theirs).abs() <= allowed).all(), name


def test_without_its_base_it_says_what_is_missing(run: Path, base: Path, tmp_path: Path) -> None:
    moved = base.rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=rf"its base is gone: there is no file or folder {base}(.|\n)*base="):
        load_vla(run)
    assert same(load_vla(run, base=moved), load_vla(run, base=str(moved)))
    assert Policy.from_pretrained(run, device="cpu", base=moved).unnorm_key == "toy"


def test_one_changed_number_in_the_base_is_refused(run: Path, base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    tensors["language_model.model.embed_tokens.weight"][5, 7] += 1e-3
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="other weights"):
        load_vla(run)
    with pytest.raises(CheckpointError, match="other weights"):
        load_checkpoint(run)


def test_the_hash_is_of_the_numbers_not_of_the_files(base: Path, tmp_path: Path) -> None:
    vla = VLA.from_pretrained(base)
    vla.save_pretrained(tmp_path / "shards", max_shard_size=50_000)
    write_ckpt(tmp_path / "whole.ckpt", vla, None, vla.norm_stats)
    hashes = {weights_hash(path) for path in (base, tmp_path / "shards", tmp_path / "whole.ckpt")}
    assert len(hashes) == 1
    vla.save_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    assert weights_hash(tmp_path / "half") not in hashes


def test_an_adapter_goes_on_only_where_it_belongs(run: Path, base: Path, tuned: VLA) -> None:
    checkpoint = torch.load(run / "checkpoints/step_000010.ckpt", weights_only=True)
    check_adapter(checkpoint, base_at(base), tuned)
    with pytest.raises(CheckpointError, match="random weights"):
        check_adapter(checkpoint, None, tuned)
    with pytest.raises(CheckpointError, match="this run stands on"):
        check_adapter(checkpoint, Base(str(base), "0" * 64), tuned)
    del checkpoint["state_dict"]["vla.language_model.lm_head.lora_A.default.weight"]
    with pytest.raises(CheckpointError, match=r"lm_head\.lora_A\.default\.weight: missing"):
        check_adapter(checkpoint, base_at(base), tuned)


def test_what_rewrites_its_base_is_saved_with_it() -> None:
    assert LoRA(rank=4).adapts
    assert not LoRA(rank=4, init="pissa").adapts
    assert not TrainOnly(["projector"]).adapts


def test_exported_it_gives_the_actions_of_the_live_model(run: Path, tuned: VLA, tmp_path: Path) -> None:
    main(["export", str(run), str(tmp_path / "released")])
    exported = Policy.from_pretrained(tmp_path / "released", device="cpu")
    live = Policy(tuned, exported.processor, tuned.norm_stats, device="cpu")
    rng = np.random.default_rng(0)
    pictures = list(rng.integers(0, 256, (6, 60, 70, 3), dtype=np.uint8))
    words = [f"lift object {i}" for i in range(6)]
    np.testing.assert_allclose(exported.act(pictures, words), live.act(pictures, words), rtol=0, atol=1e-5)
    inputs = exported.processor(pictures, words)
    torch.testing.assert_close(logits(exported.vla, inputs), logits(tuned, inputs), atol=1e-4, rtol=1e-4)
    assert len(np.unique(exported.act(pictures, words), axis=0)) > 1
    assert exported.provenance["unnorm_key"] == "toy"


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_an_export_keeps_the_dtype_of_the_base(run: Path, tmp_path: Path, dtype: torch.dtype | None) -> None:
    loaded = VLA.from_pretrained(export(run, tmp_path / "released", dtype=dtype, max_shard_size=60_000))
    assert {p.dtype for p in loaded.parameters()} == {dtype or torch.float32}
    expected = load_vla(run).to(dtype)
    for (name, ours), theirs in zip(loaded.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=2e-2 if dtype else 1e-5, msg=name)


def test_training_goes_on_from_what_was_exported(
    run: Path, config: dict[str, Any], batch: dict[str, Any], tmp_path: Path
) -> None:
    """Full fine-tuning from an export, LoRA on top of it, and LoRA on top of a run that was never exported."""
    released = export(run, tmp_path / "released")
    start = logits(VLA.from_pretrained(released), batch)
    for base in (released, run):
        fresh = VLA.from_config(config)
        load_weights(fresh, base)
        torch.testing.assert_close(logits(fresh, batch), start, atol=1e-4, rtol=1e-4)
        again = tune(base, config, LoRA(rank=2))
        write_ckpt(tmp_path / f"{base.name}.ckpt", again, LoRA(rank=2), again.norm_stats, base)
        loaded = load_vla(tmp_path / f"{base.name}.ckpt")
        torch.testing.assert_close(logits(loaded, batch), logits(again, batch), atol=1e-4, rtol=1e-4)
    full = tune(released, config, TrainOnly(["llm"]))
    write_ckpt(tmp_path / "full.ckpt", full, TrainOnly(["llm"]), full.norm_stats)
    assert same(load_vla(tmp_path / "full.ckpt"), full)


def test_an_existing_folder_is_replaced_only_on_request(run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "released"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    with pytest.raises(SystemExit, match="--overwrite"):
        main(["export", str(run), str(folder)])
    assert (folder / "mine.txt").exists()
    main(["export", str(run), str(folder), "--overwrite"])
    assert not (folder / "mine.txt").exists()
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_a_failed_export_leaves_nothing_to_the_next_one_of_its_process(run: Path, tmp_path: Path) -> None:
    left = tmp_path / f".released.{os.getpid()}.unfinished"
    left.mkdir()
    (left / "action_head--latest_checkpoint.pt").write_bytes(b"of another model")
    assert not list(export(run, tmp_path / "released").glob("action_head*"))
    assert not list(tmp_path.glob(".released.*"))


def test_of_two_exports_to_one_folder_the_second_replaces_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = multiprocessing.get_context("fork")
    both, clear = context.Barrier(2), export_module._clear

    def clear_together(folder: Path) -> None:
        with suppress(threading.BrokenBarrierError):  # one of them waits outside
            both.wait(1.5)
        clear(folder)

    monkeypatch.setattr(export_module, "_clear", clear_together)
    exports = [context.Process(target=export, args=(run, tmp_path / "released")) for _ in range(2)]
    for process in exports:
        process.start()
    for process in exports:
        process.join(60)
    assert sorted(process.exitcode for process in exports) == [0, 1]
    assert (tmp_path / "released" / "config.json").exists()
    assert not list(tmp_path.glob(".*"))


def test_a_model_without_a_place_in_the_layout_ends_without_a_traceback(run: Path, tmp_path: Path) -> None:
    content = torch.load(run / "checkpoints/step_000010.ckpt", weights_only=True)
    content["openvla_lightning"]["processor"]["cameras"] = ["primary", "wrist"]
    torch.save(content, path := tmp_path / "views.ckpt")
    with pytest.raises(SystemExit, match="no place for the views primary, wrist"):
        main(["export", str(path), str(tmp_path / "out")])


def test_mistakes_end_without_a_traceback(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no file or folder"):
        main(["export", str(tmp_path / "nothing"), str(tmp_path / "out")])
    assert not list(tmp_path.iterdir())


def test_killed_at_any_moment_an_export_leaves_a_whole_model_or_none(
    run: Path, base: Path, build: Callable[..., VLA], tmp_path: Path
) -> None:
    folder = tmp_path / "released"
    shards = {"max_shard_size": 20_000}
    started = time.monotonic()
    export(run, tmp_path / "finished", **shards)
    duration = time.monotonic() - started
    whole = {weights_hash(base), weights_hash(tmp_path / "finished")}
    outcomes = []
    context = multiprocessing.get_context("fork")
    for moment in np.linspace(0, 1, 12):
        if not folder.exists():
            export(base, folder)
        process = context.Process(target=export, args=(run, folder), kwargs={"overwrite": True, **shards})
        process.start()
        while process.is_alive() and not list(tmp_path.glob(".released.*.unfinished")):
            time.sleep(0.001)
        time.sleep(float(moment) * duration)
        process.kill()
        process.join()
        if folder.exists():
            assert weights_hash(folder) in whole
            VLA.from_pretrained(folder)
        outcomes.append(bool(list(tmp_path.glob(".released.*.unfinished"))))
    assert any(outcomes), "some of these kills came in the middle"
    export(run, folder, overwrite=True)
    assert weights_hash(folder) == weights_hash(tmp_path / "finished")
    assert not list(tmp_path.glob(".released.*"))
