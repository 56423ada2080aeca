"""Checks of the data before training, so that no sample fails when it is drawn."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

from openvla_lightning.data.filters import FilterReport, unused_splits
from openvla_lightning.data.round_trip import LOOKED_AT, RoundTrip, refusal, said_of
from openvla_lightning.data.source import Source
from openvla_lightning.data.steps import DatasetSteps, felt_columns

log = logging.getLogger(__name__)

BadInstructions = Literal["skip", "error"]
LISTED = 3
MUCH = 0.2
"""Share of the actions in chunks that lie past the end of a trajectory, above which a warning is given."""


class MissingDataError(FileNotFoundError):
    """Datasets of the mixture are not on disk."""


class DataError(ValueError):
    """Data cannot be trained on; the message says which and why. It is shown without a traceback."""


@contextmanager
def data_errors() -> Iterator[None]:
    """Turn errors of the data, or of the disk that holds them, into a DataError.

    Raises:
        MissingDataError: a dataset, or an image that it names, is not there.
        DataError: a file is damaged, a description does not fit, datasets cannot be trained on together, no step of
            one is left, a policy cannot represent its actions, or the disk is full.
    """
    try:
        yield
    except MissingDataError:
        raise
    except FileNotFoundError as error:
        raise MissingDataError(str(error)) from error
    except (ValueError, OSError) as error:
        raise DataError(str(error)) from error


def check_choices(**choices: tuple[str, Sequence[str]]) -> None:
    """Raise ValueError for an option of the DataModule whose value is not among its choices."""
    for name, (chosen, known) in choices.items():
        if chosen not in known:
            raise ValueError(f"data.{name}={chosen}: choose {', '.join(known)}")


def check_ranges(
    window_gb: float | None, val_fraction: float, image_size: int, action_chunk: int, limit_val_samples: int | None
) -> None:
    """Raise ValueError for a number outside the range of its option."""
    if limit_val_samples is not None and limit_val_samples < 0:
        raise ValueError(f"data.limit_val_samples={limit_val_samples}: a number of samples, or null for all")
    if window_gb is not None and not window_gb > 0:
        raise ValueError(f"data.window_gb={window_gb}: gigabytes above 0, or null to shuffle the whole dataset")
    if not 0 <= val_fraction < 1:
        raise ValueError(f"data.val_fraction={val_fraction}: a share of the trajectories, 0 <= val_fraction < 1")
    if image_size < 1:
        raise ValueError(f"data.image_size={image_size}: must be at least 1")
    if action_chunk < 1:
        raise ValueError(f"data.action_chunk={action_chunk}: at least the action of the step itself, 1")


def check_sources(sources: Mapping[str, Source], cameras: Sequence[str]) -> None:
    """Check in milliseconds whether the datasets and the fields that their descriptions name are there.

    Raises:
        MissingDataError: names every missing dataset and where to get it.
        ValueError: a dataset lacks the first camera, all datasets lack another camera, or a description names a field
            that the files do not have.
    """
    if problems := [problem for source in sources.values() if (problem := source.missing())]:
        raise MissingDataError(
            "\n    ".join(
                [
                    f"{len(problems)} of the mixture's {len(sources)} datasets are not there. Point "
                    "paths.data_dir=... or OPENVLA_LIGHTNING_DATA to where they are, or get them:",
                    *problems,
                ]
            )
        )
    for name, source in sources.items():
        known = source.spec.cameras
        nobodys = [role for role in cameras if not any(role in other.spec.cameras for other in sources.values())]
        if absent := nobodys or [role for role in cameras[:1] if role not in known]:
            raise ValueError(f"{name} has no camera {', '.join(absent)}; it has {', '.join(known)}")
        source.check()


def say_black(sources: Mapping[str, Source], cameras: Sequence[str]) -> None:
    """Warn of cameras that a dataset lacks."""
    for name, source in sources.items():
        has = {role for role, place in source.spec.cameras.items() if place is not None}
        if len(cameras) > 1 and (absent := [role for role in cameras if role not in has]):
            log.warning(f"{name} has no camera {', '.join(absent)}: its pictures are black")


def proprio_width(sources: Mapping[str, Source]) -> int:
    """P, the width of the proprioception in every dataset.

    Raises:
        ValueError: a dataset has none, or widths differ.
    """
    dims = {name: len(felt_columns(source)) for name, source in sources.items()}
    if absent := [name for name, dim in dims.items() if not dim]:
        raise ValueError(f"data.proprio=true: no proprioception is read from {', '.join(absent)} (its `state`)")
    if len(set(dims.values())) > 1:
        raise ValueError(f"one model cannot be told proprioception of different dimensions: {dims}")
    return next(iter(dims.values()))


def refused_instructions(
    source: Source, refuses: Callable[[str, int], str | None], dim: int, bad_instructions: BadInstructions
) -> list[int]:
    """Places, in the index's list, of the instructions that the model cannot take.

    Args:
        source: the dataset.
        refuses: instruction, dimensions of the actions -> why the model cannot take it; None if it can.
        dim: dimensions of the dataset's actions.
        bad_instructions: `skip` warns, `error` raises.

    Raises:
        ValueError: there are some, and `bad_instructions` is `error`; the message has the first ones and the reasons.
    """
    words = source.index.instructions
    reasons = {i: why for i, text in enumerate(words) if text.strip() and (why := refuses(text, dim))}
    if reasons:
        listed = "".join(f"\n    {words[i][:60]!r}: {why}" for i, why in list(reasons.items())[:LISTED])
        problem = f"{source.name}: {len(reasons):,} of {len(words):,} instructions cannot be given to the model"
        if bad_instructions == "error":
            raise ValueError(f"{problem}; data.bad_instructions=skip leaves their steps out:{listed}")
        log.warning(f"{problem}, and their steps are left out:{listed}")
    return list(reasons)


def say(steps: DatasetSteps, report: FilterReport, share: float, trip: RoundTrip) -> None:
    """Log which steps of a dataset are served or left out, and which actions a policy cannot reproduce."""
    source = steps.source
    name, left_out = source.name, report.first_steps + report.zero_actions + report.noops
    log.info(
        f"{name}: {report.kept:,} steps to train on ({share:.1%} of the samples); left out "
        f"{left_out:,} no-ops and {report.unlabelled:,} of {report.trajectories:,} trajectories (no words)"
    )
    if report.wordless:
        log.warning(f"{name}: {report.wordless:,} steps are left out because nothing is said at them")
    if unused := unused_splits(source.index):
        listed = ", ".join(f"{split} ({steps:,} steps)" for split, steps in unused.items())
        log.info(f"{name}: splits that are neither trained on nor held out: {listed}")
    if said := said_of(name, trip):
        log.warning(said)
    if steps.chunk_end == "neutral" and (beyond := steps.share_past_the_end(LOOKED_AT)) > MUCH:
        log.warning(
            f"{name}: {beyond:.0%} of the actions in chunks of {steps.action_chunk} lie past the end of their "
            "trajectory, where the model learns to stand still; data.chunk_end=mask leaves them out of the loss"
        )
    if trip.clipped:
        log.info(f"{name}: extremes are clipped, as released: {', '.join(trip.clipped)}")


def refuse_empty(
    train: Mapping[str, DatasetSteps], val: Mapping[str, DatasetSteps], reports: Mapping[str, FilterReport]
) -> None:
    """Check that every dataset has steps to train on; warn if it has none for validation.

    Raises:
        ValueError: no step of a dataset is left; the message says which filters removed them, and where it lies.
    """
    problems = []
    for name, steps in train.items():
        if len(steps):
            if not len(val[name]):
                log.info(f"{name}: nothing is held out, so that no validation speaks of it (data.val_fraction)")
            continue
        report = reports[name]
        taken = {
            "with nothing said": report.steps - report.kept if report.unlabelled == report.trajectories else 0,
            "with nothing said at them": report.wordless,
            "whose words the model cannot be given": report.refused,
            "first of their trajectory": report.first_steps,
            "standing still (data.noop_filter=none keeps them)": report.noops + report.zero_actions,
            "too near the end for a chunk (data.chunk_end)": report.kept,
        }
        left = ", ".join(f"{count:,} {why}" for why, count in taken.items() if count) or "none was there"
        place = getattr(steps.source, "folder", None) or getattr(steps.source, "root", "")
        problems.append(
            f"nothing to train on in {name} ({place}): no step is left after filters and split, of {report.steps:,} in "
            f"{report.trajectories:,} trajectories of training: {left}"
        )
    if problems:
        raise ValueError("\n    ".join(problems))


def refuse_actions(trips: Mapping[str, RoundTrip]) -> None:
    """Raise ValueError, with two solutions, for datasets whose actions lie outside the range of a policy."""
    if problems := [problem for name, trip in trips.items() if (problem := refusal(name, trip))]:
        raise ValueError("\n    ".join(problems))
