"""Samples of each validation (image, prompt, actions): a table in W&B, a picture in the run's folder."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import WandbLogger

from openvla_lightning.types import IGNORE_INDEX, Batch, Prediction

COLUMNS = ("image", "prompt", "dataset", "demonstrated", "predicted", "l1")
PICTURE = "samples.png"


@dataclass(frozen=True, slots=True)
class Sample:
    """A held-out step and its prediction.

    Attributes:
        image: uint8 array [H, V x W, 3], its views side by side.
        prompt: the model's prompt.
        dataset: the step's dataset.
        demonstrated: float32 array [T, D], in the dataset's units.
        predicted: float32 array [T, D], under the demonstrated past, in the dataset's units.
        l1: mean absolute error of the chunk, in normalised units.
    """

    image: np.ndarray
    prompt: str
    dataset: str
    demonstrated: np.ndarray
    predicted: np.ndarray
    l1: float


class Samples(Callback):
    """Shows held-out steps of each validation: the table `val/samples` in W&B, `samples.png` when training ends.

    Args:
        count: number of samples from the first held-out batch.
        dirpath: folder of the run, for the picture; None: no picture.
    """

    def __init__(self, count: int = 8, dirpath: str | None = None) -> None:
        self.count, self.dirpath = count, dirpath
        self.latest: list[Sample] = []

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the predictions of the validation step, and log them."""
        if batch_idx or dataloader_idx or trainer.sanity_checking or not batch.actions.numel():
            return
        if not trainer.is_global_zero:
            return
        self.latest = self._samples(trainer, pl_module, batch.rows(0, self.count), outputs["prediction"])
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                data = [_table_row(sample) for sample in self.latest]
                logger.log_table("val/samples", columns=list(COLUMNS), data=data, step=trainer.global_step)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the samples of the last validation."""
        if self.latest and self.dirpath is not None:
            draw(self.latest, Path(self.dirpath) / PICTURE)

    def _samples(self, trainer: L.Trainer, pl_module: Any, batch: Batch, prediction: Prediction) -> list[Sample]:
        data, tokenizer = trainer.datamodule, pl_module.processor.tokenizer  # type: ignore[attr-defined]
        true, predicted = batch.actions.cpu().numpy(), prediction.actions[: len(batch)].float().cpu().numpy()
        samples = []
        for row, name in enumerate(batch.dataset_names):
            in_prompt = batch.attention_mask[row] & (batch.labels[row] == IGNORE_INDEX)
            views = batch.pixel_values[row].unflatten(0, (-1, 3)).permute(2, 0, 3, 1).flatten(1, 2)
            statistics = data.statistics[name]
            demonstrated, said = (
                np.stack([statistics.unnormalise(action, method=data.normalisation) for action in actions[row]])
                for actions in (true, predicted)
            )
            error = float(np.abs(true[row] - predicted[row]).mean())
            prompt = tokenizer.decode(batch.input_ids[row][in_prompt], skip_special_tokens=True)
            samples.append(Sample(views.cpu().numpy(), prompt, name, demonstrated, said, error))
        return samples


def _table_row(sample: Sample) -> list[Any]:
    import wandb

    first = (np.array2string(a[0], precision=3, suppress_small=True) for a in (sample.demonstrated, sample.predicted))
    return [wandb.Image(sample.image), sample.prompt, sample.dataset, *first, sample.l1]


def _instruction(prompt: str) -> str:
    """The instruction inside the released prompt; for another prompt, all of it."""
    match = re.search(r"robot take to (.*?) ?\?", prompt)
    return match[1] if match else prompt


def _range(samples: Sequence[Sample], dimension: int) -> tuple[float, float]:
    """Range of all samples' actions in a dimension, with a margin."""
    pairs = [(s.demonstrated, s.predicted) for s in samples if s.demonstrated.shape[1] > dimension]
    values = np.concatenate([actions[:, dimension] for pair in pairs for actions in pair])
    values = values[np.isfinite(values)]
    low, high = (float(values.min()), float(values.max())) if len(values) else (-1.0, 1.0)
    margin = 0.05 * (high - low) or 0.05
    return low - margin, high + margin


def draw(samples: Sequence[Sample], picture: Path) -> None:
    """Draw a row per sample: image, prompt, and demonstrated and predicted actions in each dimension over time."""
    from matplotlib.figure import Figure

    most = max(sample.demonstrated.shape[1] for sample in samples)
    figure = Figure(figsize=(3.2 + 1.15 * most, 1.75 * len(samples)), layout="constrained")
    grid = figure.add_gridspec(len(samples), most + 1, width_ratios=[2.4, *[1] * most])
    for row, sample in enumerate(samples):
        axes = figure.add_subplot(grid[row, 0])
        axes.imshow(sample.image)
        axes.set_axis_off()
        lines = [*wrap(_instruction(sample.prompt), 40), f"{sample.dataset}, L1 {sample.l1:.3f}"]
        axes.set_title("\n".join(lines), fontsize=7, loc="left")
        chunk = range(len(sample.demonstrated))
        for dimension in range(sample.demonstrated.shape[1]):
            axes = figure.add_subplot(grid[row, dimension + 1])
            axes.plot(chunk, sample.demonstrated[:, dimension], "o-", color="0.6", markersize=4)
            axes.plot(chunk, sample.predicted[:, dimension], "x-", color="C0", markersize=4)
            axes.tick_params(labelsize=5)
            axes.set_ylim(*_range(samples, dimension))  # one scale per dimension, so small errors look small
            axes.set_xticks([])
            axes.set_title(f"{dimension}", fontsize=6)
    legend = [
        figure.axes[1].plot([], [], style, color=color, label=label)[0]
        for style, color, label in (("o-", "0.6", "demonstrated"), ("x-", "C0", "predicted"))
    ]
    figure.legend(handles=legend, loc="outside lower center", ncols=2, fontsize=8)
    figure.savefig(picture, dpi=110)
