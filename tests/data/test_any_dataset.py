"""Datasets of any make: each is trained on, or answered with a message that names dataset and file, before training.

OPENVLA_HOSTILE=300 draws that many instead of thirty.
"""

import logging
import os
import re
from collections import Counter
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import random_rlds
import torch
from random_rlds import NAME, Drawn
from tiny_parts import LLAMA, TOWERS

from openvla_lightning.action_head import TokenHead
from openvla_lightning.data import VLADataModule
from openvla_lightning.data.filters import labelled, unused_splits, validation_split
from openvla_lightning.data.loader import SampleError
from openvla_lightning.data.preflight import DataError, MissingDataError
from openvla_lightning.data.source.rlds import RLDS
from openvla_lightning.model import VLA
from openvla_lightning.model.llm import CausalLM
from openvla_lightning.model.projector import MLP
from openvla_lightning.model.vision_backbone import VisionBackbone
from openvla_lightning.processor import Processor
from openvla_lightning.processor.gate import accepted
from openvla_lightning.types import Step

COUNT = int(os.environ.get("OPENVLA_HOSTILE", "30"))
SIZE = 32
OUTCOMES: Counter[str] = Counter()


class Recording(Processor):
    """Keeps the steps that it was given."""

    def collate(self, steps: Any) -> Any:
        """As ever."""
        self.given = [*getattr(self, "given", []), *steps]
        return super().collate(steps)


@cache
def model() -> VLA:
    torch.manual_seed(0)
    return VLA(
        vision_backbone=partial(VisionBackbone, towers=TOWERS, image_size=SIZE, pretrained=False),
        projector=MLP,
        llm=partial(CausalLM, name="tiny", vocab_size=768, architecture=LLAMA, pretrained=False),
    )


@pytest.mark.parametrize("seed", range(COUNT))
def test_it_trains_or_says_why_not(seed: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    made = random_rlds.draw(tmp_path, seed)
    try:
        outcome = tried(made, caplog)
    except BaseException as error:
        raise AssertionError(f"set {seed}: {'; '.join(made.notes)}\n{type(error).__name__}: {error}") from error
    OUTCOMES[outcome] += 1


def test_both_ends_are_reached() -> None:
    assert OUTCOMES["trains"] > COUNT // 10, OUTCOMES
    assert OUTCOMES["says why not"] > COUNT // 10, OUTCOMES
    print(dict(OUTCOMES))


def tried(made: Drawn, caplog: pytest.LogCaptureFixture) -> str:
    """Train as a run does: one of the two outcomes, or an error of ours."""
    head = TokenHead(vocab_size=768, action_chunk=made.options["action_chunk"])
    reads = Recording(head, tokenizer="tiny", image_size=SIZE, towers=TOWERS, proprio=made.options["proprio"])
    options = {"mix": {NAME: 1.0}, "image_size": SIZE, "global_batch_size": 4, "num_workers": 0}
    options |= {"datasets": {NAME: made.spec}, "collate": reads.collate} | made.options
    try:
        data = VLADataModule(partial(RLDS, made.root, **made.reader), **options)
        data.prepare_data()
        data.setup("fit")
        loader = data.train_dataloader()
    except (DataError, MissingDataError, ValueError) as error:
        check_message(made, error)
        return "says why not"
    if made.torn and not made.reader.get("check_images"):
        return torn(data, loader)
    trained = served(data, loader, made)
    check_accounts(data, caplog)
    if made.exact:
        check_content(made, data, reads.given, trained)
    return "trains"


def torn(data: VLADataModule, loader: Any) -> str:
    """A picture that is whole at both ends alone is met when it is drawn, unless `check_images` looked: it is named."""
    try:
        for split in (loader, data.val_dataloader()):
            for _ in split:
                pass
    except SampleError as error:
        said = str(error)
    else:
        return "trains"  # it decodes, or was left out
    assert re.search(rf"{NAME}, trajectory \d+, step \d+ of \S+", said), said
    return "a torn picture"


def check_message(made: Drawn, error: Exception) -> None:
    text = str(error)
    assert NAME in text, f"the dataset is not named: {text}"
    assert "Traceback" not in text
    assert len(text) < 1500, "that is no message for people"
    numpys = r"truth value|axis remapping|broadcast|invalid literal|NoneType|object has no attribute|not subscriptable"
    assert not re.search(numpys, text), f"a library's words: {text}"
    named = str(made.root) in text or "dataset_info.json" in text or "data." in text
    assert named, f"no file and no setting is named: {text}"


def served(data: VLADataModule, loader: Any, made: Drawn) -> int:
    """Draw every step of training and of what is held out, and learn from the first batch; how many were trained on."""
    counts, first = [], None
    for split in (loader, data.val_dataloader()):
        counts.append(0)
        for batch in split:
            assert torch.isfinite(batch.actions).all()
            first = batch if first is None else first
            counts[-1] += len(batch.numbers)
    assert first is not None
    if not made.options["proprio"]:  # this model has no place for it
        reads: Any = data.collate.__self__  # type: ignore[attr-defined]
        loss, _ = reads.action_head.loss(model(), reads.normalise(first))
        assert torch.isfinite(loss)
    return counts[0]


def check_accounts(data: VLADataModule, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever was written is served, held out, or said to be left out."""
    index, report, log = data.sources[NAME].index, data.filter_report[NAME], caplog.text
    planned = sum(sum(split.lengths) for split in _planned(data))
    assert index.num_trajectories + len(index.skipped) == planned
    if index.skipped:
        assert f"{len(index.skipped)} trajectories cannot be read and are left out" in log
    lengths = np.diff(index.bounds)
    told = lengths[~labelled(index)].sum()
    left = report.wordless + report.refused + report.first_steps + report.zero_actions + report.noops
    assert report.steps - report.kept - left <= told
    if report.unlabelled:
        assert f"{report.unlabelled} of {report.trajectories} trajectories (no words)" in log
    if report.refused:
        assert "cannot be given to the model" in log
    if report.wordless:
        assert f"{report.wordless} steps are left out because nothing is said" in log
    for split, steps in unused_splits(index).items():
        assert f"{split} ({steps} steps)" in log
    train, val = (set(part[NAME].steps.tolist()) for part in (data.train, data.val))
    assert not train & val
    assert len(data.train[NAME].whole) == report.kept


def _planned(data: VLADataModule) -> list[Any]:
    from openvla_lightning.data.source.rlds.description import read_splits

    return read_splits(data.sources[NAME].folder)  # type: ignore[attr-defined]


def check_content(made: Drawn, data: VLADataModule, given: list[Step], trained: int) -> None:
    """What was served is what was written, picture by picture and word by word."""
    index = data.sources[NAME].index
    shades = [shade for split in index.splits for trajectory in made.shades[split] for shade in trajectory]
    words = [{*told} for split in index.splits for told in made.words[split]]
    held = validation_split(index)
    assert held is None or held in made.shades
    if len(index.skipped):  # numbers of trajectories are no longer those that were written
        shades = []
    everything = {accepted(text) for told in words for text in told if _speaks(text)}
    for step in given:
        assert accepted(step.observation.instruction) in everything
    if not shades:
        return
    _, positions = data.order(np.array([step.number for step in given[:trained]]))
    for step, position in zip(given[:trained], positions.tolist(), strict=True):
        planted = shades[int(data.train[NAME].steps[position])]
        if planted is not None:
            picture = step.observation.images["primary"]
            assert abs(float(picture.mean()) - planted) < 4, (planted, picture.mean())


def _speaks(text: str) -> bool:
    try:
        return bool(accepted(text))
    except ValueError:
        return False
