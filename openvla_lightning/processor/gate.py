"""Checks of external texts, images and states, shared by training, policies and servers.

They need no torch, and those of texts need no package at all, because indexing and the server's reader use them.
"""

import unicodedata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

CONTROL = "".join(chr(code) for code in (*range(32), *range(127, 160)))

UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp", "Zs")


def accepted(instruction: str) -> str:
    """Return an instruction in the form that training, a policy and a server use.

    Control characters at its ends, such as a newline, are dropped. All characters of natural scripts are kept,
    joiners and ideographic spaces included.

    Raises:
        TypeError: it is no text.
        ValueError: it is empty, or has control characters or halves of surrogate pairs.
    """
    if not isinstance(instruction, str):
        raise TypeError(f"an instruction is a text such as 'lift the red cube', not {type(instruction).__name__}")
    text = instruction.strip(CONTROL)
    kinds = {letter: unicodedata.category(letter) for letter in text}
    if strange := sorted(letter for letter, kind in kinds.items() if kind in ("Cc", "Cs")):
        what = "control characters or halves of characters"
        raise ValueError(f"the instruction holds {what} ({''.join(strange)!a}): {text[:60]!a}")
    if all(kind in UNSEEN for kind in kinds.values()):
        raise ValueError("the instruction is empty: say what the robot should do, for example 'lift the red cube'")
    return text


def as_rgb(image: "Image.Image") -> "Image.Image":
    """An image of any mode as RGB, 8 bits per channel. For 16-bit grey, the upper 8 bits are kept, as in TensorFlow.

    Raises:
        ValueError: it has no pixels, or floating-point values.
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


def finite_state(state: Any) -> "NDArray[np.float64]":
    """A robot's proprioceptive state [P] as numbers.

    Raises:
        ValueError: it is no row of finite numbers. An action for such a state means nothing.
    """
    import numpy as np

    try:
        numbers = np.asarray(state, np.float64)
    except (TypeError, ValueError):
        numbers = np.array(np.nan)
    if numbers.ndim != 1 or not np.isfinite(numbers).all():
        raise ValueError(f"a robot's state (proprio) is one row of finite numbers, not {state!s:.80}")
    return numbers
