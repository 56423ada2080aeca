"""Remarks on a dataset, to check before training on it."""

from collections.abc import Iterator, Sequence

from openvla_lightning.data.report.facts import Facts
from openvla_lightning.data.report.motion import Dimension

FEW_TRAJECTORIES, FEW_STEPS = 10, 1000
MANY_IDLE = 0.1
"""Share of the training steps; policies that learn from idle steps freeze (paper, appendix C)."""
MANY_FIRST_IDLE = 0.5
HARDLY_CHANGING = 0.95
MANY_AT_BOUNDS = 0.15
FAR_OUT = 10.0
ONLY_NOISE = 0.03
"""A dimension with a smaller share of its siblings' range (x, y, z; roll, pitch, yaw) is taken for noise."""
MANY_LEFT_OUT = 0.25
SIBLINGS = (("x", "y", "z"), ("roll", "pitch", "yaw"))
NOT_BINARY = 0.05
HALF_OPEN = (
    "neither normalised nor binary (a gripper that only opens and closes: round it to 0 and 1 before you write the "
    "dataset; one that holds half-open, or no gripper: say mask: true for it), share of values between"
)
WITHOUT_WORDS = 0.05
COPIES = 0.01
WITHOUT_IMAGE = 0.01


def remarks(facts: Facts) -> list[str]:
    """One sentence for everything that should be checked; empty if the dataset is ready."""
    if not facts.filters.kept:
        return ["nothing to train on: no step is left after split and filters"]
    return [
        *_about_reading(facts),
        *_about_size(facts),
        *_about_idling(facts),
        *_about_dimensions(facts.dimensions),
        *_about_words(facts),
        *_about_copies(facts),
        *_about_images(facts),
    ]


def verdict(facts: Facts) -> str:
    """`ready`, or the remarks."""
    return "; ".join(remarks(facts)) or "ready"


def _about_reading(facts: Facts) -> Iterator[str]:
    if facts.skipped:
        yield f"trajectories left out, as they could not be read: {len(facts.skipped):,}"
    yield from facts.remarks


def _about_size(facts: Facts) -> Iterator[str]:
    if facts.filters.trajectories < FEW_TRAJECTORIES or facts.filters.kept < FEW_STEPS:
        yield f"tiny: {facts.filters.trajectories:,} trajectories, {facts.filters.kept:,} steps to train on"


def _about_idling(facts: Facts) -> Iterator[str]:
    idle, filters = facts.idle, facts.filters
    left_out = filters.first_steps + filters.zero_actions + filters.noops
    if left_out > MANY_LEFT_OUT * (left_out + filters.kept):
        share = f"{left_out / (left_out + filters.kept):.0%}"
        yield f"{share} of the steps are left out as standing still: is noop_threshold in the units of the actions?"
    if idle.trained > MANY_IDLE:
        how = "data.noop_filter=near_zero leaves them out" if idle.given else "a `noop_threshold` lets them be left out"
        yield f"{idle.trained:.0%} of the steps trained on stand still: {how}"
    if idle.trained_first > MANY_FIRST_IDLE:
        share = f"{idle.trained_first:.0%} of the trajectories"
        yield f"{share} begin with a step that stands still: data.noop_filter=first_step leaves it out"


def _about_dimensions(dimensions: Sequence[Dimension]) -> Iterator[str]:
    found: dict[str, list[str]] = {}
    for d in dimensions:
        for problem, detail in _about_dimension(d):
            found.setdefault(problem, []).append(f"{d.name}{detail}")
    for problem, places in found.items():
        yield f"{problem}: {', '.join(places)}"
    ranges = {d.name: d.q99 - d.q01 for d in dimensions if d.normalised and not d.constant}
    for family in SIBLINGS:
        widest = max((ranges.get(name, 0.0) for name in family), default=0.0)
        noisy = [name for name in family if 0 < ranges.get(name, 0.0) < ONLY_NOISE * widest]
        if noisy:
            yield (
                f"hardly moving beside {', '.join(n for n in family if n not in noisy)}, so that noise is blown up to "
                f"-1..1 and learnt: {', '.join(noisy)} (set it to 0 in a `transform` if the robot does not move so)"
            )


def _about_dimension(d: Dimension) -> Iterator[tuple[str, str]]:
    if d.constant:
        yield "never changing, so normalised to 0", ""
    elif d.usually > HARDLY_CHANGING and d.normalised:
        yield "hardly ever changing", f" ({d.usually:.1%} are {d.usual:.3g})"
    elif d.normalised and d.at_bounds > MANY_AT_BOUNDS:
        yield "saturated, share of values that become -1 or 1", f" {d.at_bounds:.0%}"
    if d.normalised and d.reach > FAR_OUT:
        yield "outliers, in widths of the usual range", f" {d.reach:.0f}"
    if not d.normalised and not d.constant:
        if 1 - d.binary > NOT_BINARY:
            yield HALF_OPEN, f" {1 - d.binary:.0%}"
        if d.low < -1 or d.high > 1:
            yield "not normalised and outside of -1..1, which is all that tokens can say", f" {d.low:.3g}..{d.high:.3g}"


def _about_words(facts: Facts) -> Iterator[str]:
    if not facts.words.distinct:
        yield "no step has words"
    elif (silent := 1 - facts.words.trajectories) > WITHOUT_WORDS:
        yield f"{silent:.0%} of the trajectories have no words: they are left out"
    if ending := facts.words.ending:
        yield (
            f"{len(ending):,} of {facts.words.distinct:,} instructions end in . ? or !, as {ending[0][:60]!r}, and the "
            "prompt sets a question mark behind: write commands ('put the cup on the plate')"
        )


def _about_copies(facts: Facts) -> Iterator[str]:
    copies = facts.duplicates
    if copies.copies > COPIES * copies.trained:
        yield f"{copies.copies:,} of {copies.trained:,} trajectories repeat the actions of another one"
    if copies.leaked:
        yield f"{copies.leaked:,} of {copies.held_out:,} held-out trajectories are also trained on"


def _about_images(facts: Facts) -> Iterator[str]:
    for camera in facts.cameras:
        if camera.key is not None and camera.missing > WITHOUT_IMAGE:
            yield f"{camera.missing:.0%} of the steps have no {camera.role} image: they are black"
