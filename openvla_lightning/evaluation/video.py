"""An episode as an MP4 with the camera image, the instruction under it, and a green tick or a red cross."""

import textwrap
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from openvla_lightning.runtime.files import written_whole

BACKGROUND = (24, 24, 27)
TEXT = (244, 244, 245)
SUCCESS, FAILURE = (34, 197, 94), (239, 68, 68)


def write_video(
    path: str | Path,
    frames: Sequence[np.ndarray],
    instruction: str,
    success: bool,
    fps: int = 10,
    width: int = 384,
) -> Path:
    """Encode `frames` as H.264, with a caption in the picture.

    Args:
        path: file to write; its folder is created. An existing file is replaced.
        frames: uint8 images [H, W, 3], one video frame each.
        instruction: the policy's instruction.
        success: whether the episode succeeded; all frames show it.
        fps: frames per second.
        width: of the video in pixels; smaller frames are enlarged to it, larger ones kept.

    Raises:
        ValueError: without frames.
    """
    if not len(frames):
        raise ValueError(f"no frames to write to {path}")
    height, source_width = frames[0].shape[:2]
    width = _even(max(width, source_width))
    height = _even(round(height * width / source_width))
    caption = _caption(instruction, success, width)

    path = Path(path)
    options = {"movflags": "+faststart"}
    with written_whole(path) as beside, av.open(str(beside), "w", format="mp4", options=options) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps), options={"crf": "20", "preset": "veryfast"})
        stream.width, stream.height, stream.pix_fmt = width, height + caption.height, "yuv420p"
        stream.codec_context.thread_count = 1
        canvas = Image.new("RGB", (width, height + caption.height))
        canvas.paste(caption, (0, height))
        for frame in frames:
            canvas.paste(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC))
            container.mux(stream.encode(av.VideoFrame.from_image(canvas)))
        container.mux(stream.encode())
    return path


def _caption(instruction: str, success: bool, width: int) -> Image.Image:
    size = max(12, width // 22)
    font = ImageFont.load_default(size)
    margin = size // 2
    mark_width = 2 * size
    characters = max(8, int((width - mark_width - 2 * margin) / font.getlength("n")))
    lines = textwrap.wrap(instruction, characters) or [""]
    height = _even(2 * margin + round(1.3 * size * len(lines)))

    caption = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(caption)
    draw.multiline_text((margin, margin), "\n".join(lines), TEXT, font, spacing=round(0.3 * size))
    _mark(draw, success, x=width - mark_width, y=(height - size) // 2, size=size)
    return caption


def _mark(draw: ImageDraw.ImageDraw, success: bool, x: int, y: int, size: int) -> None:
    # Drawn as lines, because the built-in font has no tick.
    stroke = max(2, size // 6)
    if success:
        tick = [(x, y + size * 0.55), (x + size * 0.35, y + size * 0.9), (x + size, y + size * 0.1)]
        draw.line(tick, SUCCESS, stroke, joint="curve")
    else:
        draw.line([(x, y), (x + size, y + size)], FAILURE, stroke)
        draw.line([(x, y + size), (x + size, y)], FAILURE, stroke)


def _even(pixels: int) -> int:
    # 4:2:0 chroma subsampling halves both sides.
    return pixels + pixels % 2
