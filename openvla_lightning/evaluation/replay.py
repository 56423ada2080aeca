"""Replays recorded actions in the simulator, to check a dataset's actions, pictures and units."""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from openvla_lightning.actions import ActionTokenizer
from openvla_lightning.env.recorded import RecordedEpisode, Replay, Replayed, drive
from openvla_lightning.evaluation.open_loop import Agreement, StageError
from openvla_lightning.report.page import write_page
from openvla_lightning.report.tables import markdown, say, table
from openvla_lightning.runtime.progress import track
from openvla_lightning.statistics import DatasetStatistics

SAME_MOTION = 1e-4
"""Tolerance in metres, radians and gripper opening."""
SAME_PICTURE = 4.0
"""Tolerated mean difference in grey levels of 255; JPEG changes a picture by about one."""
THROUGH_TOKENS = 0.8
"""Share of episodes that must succeed with actions rounded to tokens; rounding errors add up without correction."""
SHOWN = 4
"""Number of episodes in the picture."""


def check_replay(env: Replay, folder: str | Path, console: Console | None = None) -> dict[str, float]:
    """Replay recorded episodes in their world; write `replay.md` and `replay.png` into `folder`.

    Each is replayed twice: with the executed actions, which must reproduce every picture, and with these
    actions normalised, converted to tokens and back, which is the best that any policy could do.

    Returns:
        `success` and `success_through_tokens`, shares of episodes.

    Raises:
        StageError: a stage differs; the message names the first one.
        ValueError: the dataset cannot be replayed.
    """
    env.check()
    console = console or Console()
    env.source.prepare()
    statistics = env.source.statistics
    pairs: list[tuple[RecordedEpisode, Replayed]] = []
    through_tokens = []
    with closing(env.world()) as world:
        for episode in track(env.episodes(), "replaying", env.num_episodes, "episodes", console=console):
            pairs.append((episode, drive(world, episode, episode.executed)))
            through_tokens.append(drive(world, episode, as_tokens(episode.executed, statistics, env.num_bins)).success)
    stages = _stages(pairs, through_tokens)
    _write(stages, pairs, env, Path(folder), console)
    if wrong := next((stage for stage in stages if not stage.ok), None):
        raise StageError(f"the replay differs from the record in: {wrong.name} ({wrong.seen}); see {folder}/replay.md")
    success = float(np.mean([replayed.success for _, replayed in pairs]))
    return {"success": success, "success_through_tokens": float(np.mean(through_tokens))}


def as_tokens(actions: NDArray[np.float64], statistics: DatasetStatistics, num_bins: int = 256) -> NDArray[np.float64]:
    """Actions [T, D] after normalisation, rounding to one of `num_bins` bins, and conversion back."""
    tokenizer = ActionTokenizer(bins=num_bins)
    ids = tokenizer.encode(statistics.normalise(actions.astype(np.float32)))
    return statistics.unnormalise(tokenizer.decode(ids))


def _stages(pairs: Sequence[tuple[RecordedEpisode, Replayed]], through_tokens: Sequence[bool]) -> list[Agreement]:
    lengths = sum(len(recorded.images) == len(replayed.images) for recorded, replayed in pairs)
    first = max(_levels(recorded.images[0], replayed.images[0]) for recorded, replayed in pairs)
    motion = max(_furthest(recorded, replayed) for recorded, replayed in pairs)
    pictures = max(
        max(_levels(a, b) for a, b in zip(recorded.images, replayed.images, strict=False))
        for recorded, replayed in pairs
    )
    succeeded, count = sum(replayed.success for _, replayed in pairs), len(pairs)
    rounded = sum(through_tokens)
    return [
        Agreement("first picture", first < SAME_PICTURE, f"at most {first:.2f} levels apart"),
        Agreement("motion", motion < SAME_MOTION, f"at most {motion:.2g} apart (m, rad, opening)"),
        Agreement("pictures", pictures < SAME_PICTURE, f"at most {pictures:.2f} levels apart"),
        Agreement("length", lengths == count, f"{lengths} of {count} episodes end when they did"),
        Agreement("success", succeeded == count, f"{succeeded} of {count} episodes"),
        Agreement("success through tokens", rounded >= THROUGH_TOKENS * count, f"{rounded} of {count} episodes"),
    ]


def _levels(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    if a.shape != b.shape:
        return float("inf")
    return float(np.abs(a.astype(np.float32) - b).mean())


def _furthest(recorded: RecordedEpisode, replayed: Replayed) -> float:
    both = min(len(recorded.proprio), len(replayed.proprio))
    return float(np.abs(recorded.proprio[:both] - replayed.proprio[:both]).max())


def _write(
    stages: Sequence[Agreement],
    pairs: Sequence[tuple[RecordedEpisode, Replayed]],
    env: Replay,
    folder: Path,
    console: Console,
) -> None:
    rows = [["stage", "agrees", "seen"], *([stage.name, "yes" if stage.ok else "NO", stage.seen] for stage in stages)]
    title = f"Replay of {env.dataset}"
    console.print(table(rows, title))
    folder.mkdir(parents=True, exist_ok=True)
    draw(pairs[:SHOWN], folder / "replay.png")
    lines = [f"# {title}", "", f"{len(pairs)} episodes of its split `{env.split}`.", "", markdown(rows), ""]
    page = write_page([*lines, "![Episodes as recorded and as replayed](replay.png)"], folder / "replay.md")
    say(console, f"written to {page}")


def draw(pairs: Sequence[tuple[RecordedEpisode, Replayed]], path: Path) -> None:
    """First, middle and last picture of each episode, as recorded and as replayed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.8 * len(pairs)), layout="constrained")
    grid = figure.subplots(len(pairs), 6, squeeze=False)
    for row, (recorded, replayed) in zip(grid, pairs, strict=True):
        for place, share in enumerate((0.0, 0.5, 1.0)):
            for column, images in ((place, recorded.images), (place + 3, replayed.images)):
                row[column].imshow(images[round(share * (len(images) - 1))])
                row[column].set_axis_off()
        row[0].set_title(f"recorded: {recorded.task}", fontsize=7, loc="left")
        row[3].set_title("replayed", fontsize=7, loc="left")
    figure.savefig(path, dpi=110)
