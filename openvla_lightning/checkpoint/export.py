"""Export of training checkpoints to the released layout; adapters are merged once, on the CPU, layer by layer."""

import logging
import os
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from openvla_lightning.action_head import TokenHead
from openvla_lightning.checkpoint.cogact import save_cogact
from openvla_lightning.checkpoint.formats import describe
from openvla_lightning.checkpoint.load import load_vla
from openvla_lightning.model.vla import VLA
from openvla_lightning.processor import Processor
from openvla_lightning.quantisation import Quantisation, dequantised, is_quantised
from openvla_lightning.runtime.files import alone

log = logging.getLogger(__name__)
PROBES = 8
"""Number of pictures on which a model in 4 or 8 bits and the merged one are compared."""


def export(
    source: str | Path,
    folder: str | Path,
    base: str | Path | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    max_shard_size: int = 5 * 10**9,
    layout: str = "released",
) -> Path:
    """Write the model of `source` in the released layout; an adapter is merged into its base.

    Weights stay on disk until they are written, so memory holds one shard. After a kill, `folder` has its old contents
    or does not exist, but never holds a part of a model. While another process exports to it, the call waits.

    Args:
        source: a run or checkpoint of training, or anything else that `VLA.from_pretrained` loads.
        folder: the folder to create.
        base: present location of an adapter's base; None: its location during training.
        dtype: dtype of the written weights; None: the base's.
        overwrite: replace the whole contents of `folder`.
        max_shard_size: bytes of weights per file.
        layout: `released`, with further files for heads that it does not contain; or `cogact`, a run of CogACT's code.

    Returns:
        `folder`.

    Raises:
        CheckpointError: the source does not fit; it lists all problems.
        FileExistsError: `folder` exists and `overwrite` is False.
    """
    folder = Path(folder).expanduser().absolute()
    _check_free(folder, overwrite)
    processor = Processor.from_pretrained(source, base)
    vla = load_vla(source, guard=False, merge=False, base=base, copy=False)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with alone(folder.with_name(f".{folder.name}.lock"), f"exporting to {folder}"):
        _check_free(folder, overwrite)  # again: another export may have ended meanwhile
        _clear(folder)
        unfinished = folder.with_name(f".{folder.name}.{os.getpid()}.unfinished")
        if layout == "cogact":
            save_cogact(vla, processor, unfinished, dtype or stored_dtype(vla))
        else:
            vla.save_pretrained(unfinished, processor, max_shard_size, dtype or stored_dtype(vla))
        del vla
        if (config := trained_quantisation(source)) is not None:
            text = f"The adapter was trained on the base in {config['bits']} bits and is merged into the base itself."
            if writes_ids_after_one_picture(processor):
                text = quantisation_gap(source, unfinished, config, base).text()
            log.info(text)
            with (unfinished / "README.md").open("a", encoding="utf-8") as card:
                card.write(f"\n## Trained on a quantised base\n{text}\n")
        _swap(unfinished, folder)
    return folder


def _check_free(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not overwrite:
        raise FileExistsError(f"{folder} exists: choose another folder, or replace it with --overwrite")


@dataclass(frozen=True, slots=True)
class MergeGap:
    """Differences between a merged model and the adapter on the quantised base of its training.

    Attributes:
        weights: root mean square of the weights' quantisation error, relative to that of the weights.
        logits: mean absolute difference of the logits of action tokens.
        tokens: share of action tokens that are equal.
        actions: mean absolute difference of the actions, in normalised units (their range is 2).
        bits: bits of the quantised base.
    """

    weights: float
    logits: float
    tokens: float
    actions: float
    bits: int

    def text(self) -> str:
        """The differences in a sentence."""
        return (
            f"The adapter was trained on the base in {self.bits} bits and is merged into the base itself, whose "
            f"weights differ by {self.weights:.2%} (relative RMS). On {PROBES} pictures of noise {self.tokens:.1%} of "
            f"the action tokens are the same, logits differ by {self.logits:.4f} and actions by {self.actions:.4f} "
            "(mean absolute differences; normalised actions have a range of 2)."
        )


def trained_quantisation(source: str | Path) -> dict[str, Any] | None:
    """How an adapter's base was quantised in training; None if it was not, or `source` is no training checkpoint."""
    return describe(source).quantisation


def writes_ids_after_one_picture(processor: Processor) -> bool:
    """Whether `quantisation_gap` can measure a model with this processor."""
    head = processor.action_head
    sequential = isinstance(head, TokenHead) and not head.parallel
    return sequential and len(processor.views) == 1 and not processor.proprio


@torch.inference_mode()
def quantisation_gap(
    source: str | Path, merged: str | Path, config: dict[str, Any], base: str | Path | None = None
) -> MergeGap:
    """Compare the model of the training, with a quantised base, with the merged one.

    The model reads one picture, and its head writes ids one after the other.

    Args:
        source: checkpoint of the adapter.
        merged: folder with the merged model.
        config: `Quantisation.config` of the training.
        base: present location of the adapter's base; None: its location during training.
    """
    processor = Processor.from_pretrained(source)
    head = processor.action_head
    assert isinstance(head, TokenHead)
    noise = np.random.default_rng(0).integers(0, 256, (PROBES, 64, 64, 3), dtype=np.uint8)
    inputs = processor(list(noise), [f"pick up object {number}" for number in range(PROBES)])

    def act(vla: VLA, dim: int) -> tuple[Tensor, Tensor]:
        vla.eval()
        dtype = stored_dtype(vla)
        cast: dict[str, Any] = {**inputs, "pixel_values": inputs["pixel_values"].to(dtype)}
        return vla.generate(**cast, max_new_tokens=head.action_chunk * dim), vla(**cast).next_token_logits[:, -1]

    exact = load_vla(source, guard=False, merge=False, base=base, copy=False)
    dim = max(len(stats["action"]["q01"]) for stats in exact.norm_stats.values())
    weights = {name: module.weight for name, module in exact.named_modules() if isinstance(module, nn.Linear)}
    quantised = Quantisation(**config)(exact)
    change, size = 0.0, 0.0
    for name, module in quantised.named_modules():
        if is_quantised(module):
            change += float((dequantised(module) - weights[name].float()).square().sum())
            size += float(weights[name].float().square().sum())
    ids, logits = act(quantised, dim)
    del exact, quantised, weights
    merged_ids, merged_logits = act(load_vla(merged, guard=False), dim)
    return MergeGap(
        weights=(change / size) ** 0.5,
        logits=float((merged_logits - logits).abs().mean()),
        tokens=float((merged_ids == ids).float().mean()),
        actions=float((head.decode(merged_ids) - head.decode(ids)).abs().mean()),
        bits=config["bits"],
    )


def stored_dtype(vla: VLA) -> torch.dtype:
    """The dtype of most values of the frozen or whole model."""
    sizes: Counter[torch.dtype] = Counter()
    for name, parameter in vla.named_parameters():
        if ".lora_" not in name and parameter.is_floating_point():
            sizes[parameter.dtype] += parameter.numel()
    return sizes.most_common(1)[0][0]


def _swap(unfinished: Path, folder: Path) -> None:
    """Replace `folder` by `unfinished`, in two steps, because a folder that is not empty cannot be replaced in one."""
    old = folder.with_name(f".{folder.name}.{os.getpid()}.old")
    if folder.exists():
        folder.rename(old)
    unfinished.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _clear(folder: Path) -> None:
    """Remove the remains of killed and failed exports to `folder`."""
    for state in ("unfinished", "old"):
        for left in folder.parent.glob(f".{folder.name}.*.{state}"):
            pid = left.name.split(".")[-2]
            if pid == str(os.getpid()) or not Path(f"/proc/{pid}").exists():
                shutil.rmtree(left)
