"""Frames of videos, decoded from the bytes of their packets without opening a container.

The packet table tells which packets to decode, and the decoder is flushed right after the last wanted one, so only
packets that a wanted frame needs are decoded. A decoder depends on the encoding and not on the file, so thousands of
files share one, and a process holds few decoders for any number of datasets.
"""

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence, Set
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openvla_lightning.data.images import Pixels
from openvla_lightning.data.source.faults import BadShardError
from openvla_lightning.data.source.lerobot.packets import Video, segments

DECODERS = 8
KEPT_BYTES = 64 * 2**20
"""Memory for decoded frames that were not asked for; neighbours are often needed next, for instance in a history."""
TABLES = 4096
SKIPPING = ("h264",)
"""Decoders that can skip frames which are not referenced: three times as fast if key frames are far apart. AV1's
decoder cannot, and HEVC marks some referenced frames as not referenced."""


class Frames:
    """The decoders and last decoded frames of a process, for all datasets."""

    def __init__(self) -> None:
        self.decoders: OrderedDict[tuple[str, bytes], Any] = OrderedDict()
        self.formats: dict[tuple[str, bytes], str] = {}  # of decoded frames; PyAV 17's decoders do not tell
        self.kept: OrderedDict[tuple[str, int], Any] = OrderedDict()
        self.bytes = 0
        self.converter: Any = None

    def decoder(self, video: Video) -> Any:
        """An empty decoder for the encoding of `video`."""
        import av

        key = (video.codec, video.extradata)
        if key not in self.decoders:
            while len(self.decoders) >= DECODERS:
                self.decoders.popitem(last=False)
            context: Any = av.CodecContext.create(video.codec, "r")
            context.extradata = video.extradata or None
            context.thread_count = 1  # worker processes already run in parallel
            self.decoders[key] = context
        self.decoders.move_to_end(key)
        return self.decoders[key]

    def drop(self, video: Video) -> None:
        """Remove a decoder that failed."""
        self.decoders.pop((video.codec, video.extradata), None)

    def keep(self, key: tuple[str, int], frame: Any) -> None:
        """Keep a decoded frame for a while."""
        size = sum(plane.buffer_size for plane in frame.planes)
        if key in self.kept or size > KEPT_BYTES:
            return
        self.kept[key] = frame
        self.bytes += size
        while self.bytes > KEPT_BYTES:
            _, old = self.kept.popitem(last=False)
            self.bytes -= sum(plane.buffer_size for plane in old.planes)

    def forget(self) -> None:
        """Remove the last decoded frames."""
        self.kept.clear()
        self.bytes = 0

    def pixels(self, frame: Any) -> Pixels:
        """A decoded frame as uint8 [H, W, 3], RGB."""
        if self.converter is None:
            from av.video.reformatter import VideoReformatter

            self.converter = VideoReformatter()
        return self.converter.reformat(frame, format="rgb24").to_ndarray()

    def leave(self) -> None:
        """Start empty in a forked process, without freeing the parent's decoders: their threads exist only there."""
        _OF_PARENTS.append(dict(vars(self)))
        vars(self).update(vars(Frames()))


_OF_PARENTS: list[dict[str, Any]] = []
FRAMES = Frames()
os.register_at_fork(after_in_child=FRAMES.leave)


class Film:
    """The videos of one dataset.

    Args:
        name: distinguishes this dataset's frames from others' in the same process.
        videos: the files.
        packets: int64 [P, 4], `packets.COLUMNS` of all files.
        read: file number, offset, length -> bytes.
        where: file number -> the file's name in error messages.
    """

    def __init__(
        self,
        name: str,
        videos: Sequence[Video],
        packets: NDArray[np.int64],
        read: Callable[[int, int, int], bytes],
        where: Callable[[int], str],
    ) -> None:
        self.name, self.videos, self.packets, self.read, self.where = name, videos, packets, read, where
        self._tables: OrderedDict[int, tuple[Any, ...]] = OrderedDict()

    def frame(self, file: int, offset: int) -> Pixels:
        """The frame whose packet begins at byte `offset` of a file, uint8 [H, W, 3].

        Raises:
            BadShardError: the bytes cannot be decoded.
        """
        packet = self.packet(file, offset)
        kept = FRAMES.kept.get((f"{self.name}/{file}", packet))
        return FRAMES.pixels(kept) if kept is not None else next(self._decode(file, [packet]))[1]

    def frames(self, file: int, offsets: Sequence[int]) -> Iterator[tuple[int, Pixels]]:
        """Many frames of one file, in display order: offset and uint8 [H, W, 3] of each, decoded once.

        Raises:
            BadShardError: the bytes cannot be decoded.
        """
        packets = self._table(file)[0]
        for packet, pixels in self._decode(file, [self.packet(file, offset) for offset in offsets]):
            yield int(packets[packet, 1]), pixels

    def chroma_repeated(self, file: int) -> bool:
        """Whether a file, of which a frame was decoded before, stores the chroma of 2 x 2 pixels once."""
        video = self.videos[file]
        return FRAMES.formats[video.codec, video.extradata] in ("yuv420p", "yuvj420p")

    def packet(self, file: int, offset: int) -> int:
        """The number of the packet that begins at byte `offset` of a file."""
        _, order, offsets, _ = self._table(file)
        return int(order[np.searchsorted(offsets, offset)])

    def _table(self, file: int) -> tuple[Any, ...]:
        if file not in self._tables:
            video = self.videos[file]
            packets = np.array(self.packets[video.first : video.last])
            order = np.argsort(packets[:, 1], kind="stable")
            if len(self._tables) >= TABLES:
                self._tables.popitem(last=False)
            self._tables[file] = packets, order, packets[order, 1], np.flatnonzero(packets[:, 3])
        self._tables.move_to_end(file)
        return self._tables[file]

    def _decode(self, file: int, wanted: Sequence[int]) -> Iterator[tuple[int, Pixels]]:
        import av

        packets, _, _, keys = self._table(file)
        video, asked = self.videos[file], set(wanted)
        for first, last in segments(packets, keys, wanted):
            shown = {int(packets[i, 0]): i for i in range(first, last + 1)}
            here = {i for i in asked if first <= i <= last}
            missing = set(here)
            try:
                for frame in self._run(file, first, last, here):
                    FRAMES.formats[video.codec, video.extradata] = frame.format.name
                    packet = shown.get(frame.pts)
                    if packet in missing:
                        missing.remove(packet)
                        yield packet, FRAMES.pixels(frame)
                    elif packet is not None and len(asked) == 1:
                        FRAMES.keep((f"{self.name}/{file}", packet), frame)
            except av.FFmpegError as error:
                FRAMES.drop(video)
                raise BadShardError(f"{self.where(file)}: frames {first}..{last} cannot be decoded: {error}") from None
            if missing:
                raise BadShardError(f"{self.where(file)}: decoding yields no frame {min(missing)}")

    def _run(self, file: int, first: int, last: int, wanted: Set[int]) -> Iterator[Any]:
        """Frames of packets first .. last; those that are not `wanted` come only if other frames reference them."""
        import av

        packets, video = self._table(file)[0], self.videos[file]
        decoder = FRAMES.decoder(video)
        decoder.flush_buffers()
        for number, (pts, offset, size, _) in enumerate(packets[first : last + 1].tolist(), first):
            if video.codec in SKIPPING:
                decoder.skip_frame = "DEFAULT" if number in wanted else "NONREF"
            packet = av.Packet(self.read(file, offset, size))
            packet.pts = packet.dts = pts
            yield from decoder.decode(packet)
        yield from decoder.decode(None)
        decoder.flush_buffers()
