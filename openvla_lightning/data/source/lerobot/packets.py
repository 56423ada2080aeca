"""The packet table of a video: the time and the byte range of each frame, found without decoding."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from openvla_lightning.runtime.files import pointer

COLUMNS = ("pts", "offset", "size", "key")


@dataclass(frozen=True)
class Video:
    """One file, as its container describes it.

    Attributes:
        path: below the dataset.
        codec: FFmpeg's name of the decoder, for instance `h264` or `libdav1d`.
        extradata: initialisation data of the decoder.
        time_base: seconds per unit of `pts`.
        first, last: bounds of its rows in the dataset's packet table.
        size: of the file, in bytes.
        problem: why some or all of its frames cannot be read; None if all can.
    """

    path: str
    codec: str = ""
    extradata: bytes = b""
    time_base: tuple[int, int] = (1, 1)
    first: int = 0
    last: int = 0
    size: int = 0
    problem: str | None = None


def read_packets(full: Path, path: str, every_frame: bool = False) -> tuple[Video, NDArray[np.int64]]:
    """Demux one video file without decoding it.

    Every packet is compared with the file's bytes at its offset, so that it can be read from there later.

    Args:
        full: the file.
        path: its name below the dataset.
        every_frame: decode every frame, and leave out those that cannot be decoded.

    Returns:
        The file, and int64 [P, 4] with `COLUMNS` of its packets in the order of decoding; none after a damaged one.
    """
    import av

    found: list[tuple[int, int, int, int]] = []
    problem = None
    if not full.exists():
        return Video(path, problem="the file is missing"), np.zeros((0, 4), np.int64)
    size = full.stat().st_size
    if stands_for := pointer(full):
        return Video(path, size=size, problem=stands_for), np.zeros((0, 4), np.int64)
    try:
        with full.open("rb") as stored, av.open(str(full)) as container:
            if not container.streams.video:
                return Video(path, size=size, problem="it holds no video"), np.zeros((0, 4), np.int64)
            stream = container.streams.video[0]
            context, base = stream.codec_context, stream.time_base or Fraction(1, 1)
            for packet in container.demux(stream):
                if not packet.size:
                    continue
                if packet.is_corrupt:
                    problem = f"the file is cut short after {len(found)} frames"
                    break
                at = packet.pos if packet.pos is not None else size
                stored.seek(at)
                if packet.pts is None or stored.read(packet.size) != bytes(packet):
                    problem = f"packet {len(found)} is not what the file holds at its place: only MP4 is read"
                    break
                if packet.has_sidedata("new_extradata"):
                    problem = f"its encoding changes after {len(found)} frames"
                    break
                found.append((packet.pts, at, packet.size, int(packet.is_keyframe)))
            video = Video(
                path,
                context.codec.name,
                bytes(context.extradata or b""),
                (base.numerator, base.denominator),
                size=size,
                problem=problem,
            )
    except (av.FFmpegError, OSError) as error:
        return Video(path, size=size, problem=f"it cannot be opened: {error.strerror}"), np.zeros((0, 4), np.int64)
    packets = np.array(found, np.int64).reshape(-1, 4)
    if every_frame and (bad := _first_undecodable(full, packets)) is not None:
        packets = packets[:bad]
        video = replace(video, problem=f"frame {bad} cannot be decoded")
    return video, packets


def _first_undecodable(path: Path, packets: NDArray[np.int64]) -> int | None:
    import av

    decoded: list[int] = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        with suppress(av.FFmpegError):  # later frames count as lost, too
            for frame in container.decode(stream):
                decoded += [] if frame.pts is None else [frame.pts]
    missing = np.flatnonzero(~np.isin(packets[:, 0], decoded))
    return int(missing[0]) if len(missing) else None


def match(video: Video, packets: NDArray[np.int64], times: NDArray[np.float64], fps: float) -> NDArray[np.int64]:
    """Rows of `packets`, int64 [n], that hold the frames shown at `times`; -1 if there is no such frame.

    Args:
        video: the file.
        packets: int64 [P, 4], its packets.
        times: seconds in the file, float64 [n].
        fps: frames per second; a frame may be at most a quarter of a period away from its time.
    """
    if not len(packets):
        return np.full(len(times), -1, np.int64)
    order = np.argsort(packets[:, 0], kind="stable")
    shown = packets[order, 0] * (video.time_base[0] / video.time_base[1])
    after = np.clip(np.searchsorted(shown, times), 1, max(1, len(shown) - 1))
    before = after - 1
    after = np.minimum(after, len(shown) - 1)
    nearest = np.where(np.abs(shown[after] - times) < np.abs(shown[before] - times), after, before)
    close = np.abs(shown[nearest] - times) <= 0.25 / fps
    return np.where(close, order[nearest], -1)


def segments(packets: NDArray[np.int64], keys: NDArray[np.int64], wanted: Sequence[int]) -> list[tuple[int, int]]:
    """Runs of packets, first and last, that must be decoded for the frames of the packets `wanted`.

    A run begins with a key frame that is neither decoded nor shown after the wanted frame, because a frame shown before
    its key frame needs the previous key frame. Adjacent runs are joined.

    Args:
        packets: int64 [P, 4], packets of one file.
        keys: rows of key frames, ascending.
        wanted: rows of `packets`.
    """
    runs: list[tuple[int, int]] = []
    for packet in sorted(set(wanted)):
        key = int(np.searchsorted(keys, packet, side="right")) - 1
        while key > 0 and packets[keys[key], 0] > packets[packet, 0]:
            key -= 1
        start = int(keys[key]) if key >= 0 else 0
        if runs and start <= runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], packet)
        else:
            runs.append((start, packet))
    return runs
