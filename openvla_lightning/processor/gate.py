"""What is taken from outside, written once: training, policies and servers accept the same texts and images.

It needs no torch, and for texts nothing at all: data are indexed, and requests read, through it.
"""

import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

CONTROL = "".join(chr(code) for code in (*range(32), *range(127, 160)))

UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp", "Zs")


def accepted(instruction: str) -> str:
    """Return an instruction as training, a policy and a server take it.

    Control characters at its ends, such as a newline, are dropped. Everything that scripts are written with is kept,
    joiners and ideographic spaces included.

    Raises:
        ValueError: it says nothing, or holds control characters or halves of surrogate pairs.
    """
    text = instruction.strip(CONTROL)
    kinds = {letter: unicodedata.category(letter) for letter in text}
    if strange := sorted(letter for letter, kind in kinds.items() if kind in ("Cc", "Cs")):
        what = "control characters or halves of characters"
        raise ValueError(f"the instruction holds {what} ({''.join(strange)!a}): {text[:60]!a}")
    if all(kind in UNSEEN for kind in kinds.values()):
        raise ValueError("the instruction is empty: say what the robot should do, for example 'lift the red cube'")
    return text


def as_rgb(image: "Image.Image") -> "Image.Image":
    """An image of any mode as RGB, 8 bits per channel. Of 16 bits of grey the upper 8 are kept, as TensorFlow does.

    Raises:
        ValueError: it has no pixels, or its values are no colours (floating point).
    """
    import numpy as np
    from PIL import Image

    if min(image.size) < 1:
        raise ValueError(f"an image without pixels: it is {image.width} x {image.height}")
    if image.mode == "F":
        raise ValueError("an image of floating point numbers has no known range: give uint8 [H, W, 3]")
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")
