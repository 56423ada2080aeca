"""Pictures -> MP4, as LeRobot writes it: every second frame is a key frame, so any frame needs at most two packets."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np

from openvla_lightning.data.images import Pixels

Codec = Literal["h264", "av1"]
OPTIONS: dict[str, tuple[str, dict[str, str]]] = {
    "h264": ("libx264", {"crf": "30", "preset": "medium"}),
    "av1": ("libsvtav1", {"crf": "30", "preset": "12"}),
}
MOST_CRF = {"h264": 51, "av1": 63}


@dataclass(frozen=True)
class Encoding:
    """Settings of video encoding.

    Attributes:
        codec: `h264`, which decodes fastest, or `av1`, LeRobot's own default, which is smaller.
        key_every: frames from one key frame to the next. With 2, a random frame costs at most two.
        crf: 0 (lossless, for h264) .. 51, for av1 63; lower is better and larger.

    Raises:
        ValueError: a number is outside its range.
    """

    codec: Codec = "h264"
    key_every: int = 2
    crf: int = 30

    def __post_init__(self) -> None:
        most = MOST_CRF[self.codec]
        if self.key_every < 1 or not 0 <= self.crf <= most:
            raise ValueError(f"key_every={self.key_every} must be at least 1, and crf={self.crf} lie in 0..{most}")


class VideoWriter:
    """One MP4 file: frames of one camera, episode after episode, shown at exactly n / fps seconds.

    Args:
        path: the file.
        fps: frames per second.
        encoding: settings of the encoder.

    Raises:
        ValueError: a picture's sides are odd, or differ from those of earlier pictures.
    """

    def __init__(self, path: Path, fps: float, encoding: Encoding) -> None:
        import av

        os.environ.setdefault("SVT_LOG", "1")  # errors only: the AV1 encoder logs its settings for every file
        self.path, self.encoding, self.frames = path, encoding, 0
        self.rate = Fraction(fps).limit_denominator(1001)
        self.container: Any = av.open(str(path), "w", format="mp4")
        self.stream: Any = None

    def __enter__(self) -> "VideoWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.container.close()

    def add(self, episode: Iterable[Pixels]) -> None:
        """Append an episode: uint8 [H, W, 3] each. Its first frame becomes a key frame."""
        import av

        for number, pixels in enumerate(episode):
            height, width = pixels.shape[:2]
            if self.stream is None:
                self._begin(height, width)
            elif (height, width) != (self.stream.height, self.stream.width):
                raise ValueError(
                    f"{self.path.parent}: a picture is {height} x {width}, the ones before {self.stream.height} x "
                    f"{self.stream.width}"
                )
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts, frame.time_base = self.frames, 1 / self.rate
            if number == 0:
                frame.pict_type = av.video.frame.PictureType.I
            self.container.mux(self.stream.encode(frame))
            self.frames += 1

    def finish(self) -> None:
        """Write the frames that the encoder still holds."""
        if self.stream is not None:
            self.container.mux(self.stream.encode(None))

    def _begin(self, height: int, width: int) -> None:
        if height % 2 or width % 2:
            raise ValueError(
                f"{self.path.parent}: pictures of {height} x {width} have an odd side, which videos cannot: store them "
                "as pictures (--pictures png)"
            )
        name, options = OPTIONS[self.encoding.codec]
        options = options | {"g": str(self.encoding.key_every), "crf": str(self.encoding.crf)}
        self.stream = self.container.add_stream(name, rate=self.rate, options=options)
        self.stream.height, self.stream.width, self.stream.pix_fmt = height, width, "yuv420p"
        self.stream.time_base = 1 / self.rate
        self.stream.codec_context.time_base = 1 / self.rate
        self.stream.codec_context.thread_count = 1
