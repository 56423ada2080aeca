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
from numpy.typing import NDArray

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
    """Draw a row per sample: image, prompt, and demonstrated and predicted actions in each dimension over time.

    The dimensions of a row share one pair of axes, side by side, because axes are what takes matplotlib's time.
    """
    from matplotlib.figure import Figure

    most = max(sample.demonstrated.shape[1] for sample in samples)
    ranges = [_range(samples, dimension) for dimension in range(most)]  # one for all samples: small errors look small
    height = 1.75 * len(samples) + 1.0
    figure = Figure(figsize=(3.2 + 1.15 * most, height))
    grid = figure.add_gridspec(len(samples), 2, width_ratios=[2.4, most])
    grid.update(left=0.01, right=0.99, bottom=0.75 / height, top=1 - 0.55 / height, wspace=0.02, hspace=0.4)
    for row, sample in enumerate(samples):
        axes = figure.add_subplot(grid[row, 0])
        axes.imshow(sample.image)
        axes.set_axis_off()
        lines = [*wrap(_instruction(sample.prompt), 40), f"{sample.dataset}, L1 {sample.l1:.3f}"]
        axes.set_title("\n".join(lines), fontsize=7, loc="left")
        axes = figure.add_subplot(grid[row, 1])
        width = len(sample.demonstrated) + 1
        for actions, style, color in ((sample.demonstrated, "o-", "0.6"), (sample.predicted, "x-", "C0")):
            axes.plot(*_side_by_side(actions, ranges, width), style, color=color, markersize=4)
        axes.set(xlim=(-1, most * width - 1), ylim=(0, 1), yticks=[])
        axes.set_xticks([dimension * width - 1 for dimension in range(1, most)], labels=[])
        axes.grid(axis="x", color="0.8")
        axes.tick_params(length=0)
        if row in (0, len(samples) - 1):
            for dimension, (low, high) in enumerate(ranges):
                name, place = f"dimension {dimension}\n{low:.2g} to {high:.2g}", (dimension + 0.5) / most
                side, y = ("bottom", 1.02) if row == 0 else ("top", -0.03)
                axes.text(place, y, name, ha="center", va=side, transform=axes.transAxes, fontsize=6)
    axes.legend(["demonstrated", "predicted"], loc="upper right", bbox_to_anchor=(1, -0.22), ncols=2, fontsize=8)
    figure.savefig(picture, dpi=110)


def _side_by_side(
    actions: NDArray[np.floating], ranges: Sequence[tuple[float, float]], width: int
) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """The line [D x width] of a chunk [T, D]: one dimension after the other, scaled to its range, with gaps."""
    dimensions = actions.shape[1]
    low, high = np.array(ranges[:dimensions]).T
    scaled = np.full((dimensions, width), np.nan)
    scaled[:, : len(actions)] = ((actions - low) / (high - low)).T
    return np.arange(dimensions * width), scaled.ravel()
