"""The server reads texts and pictures as training reads them, in every form that clients write them in."""

import base64
import io
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from openvla_lightning.data.images import decode
from openvla_lightning.processor.gate import accepted, as_rgb
from openvla_lightning.processor.image_transform import ImageTransform
from openvla_lightning.processor.prompt import build_prompt
from openvla_lightning.serve.errors import Refused
from openvla_lightning.serve.reading import Reader

READER = Reader(lambda image: np.asarray(image), {}, 2**22)


def encoded(image: Image.Image, form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def asked(instruction: str = "x", image: str | None = None):
    image = image or base64.b64encode(encoded(Image.fromarray(noise(8, 8, 3)))).decode()
    return READER.from_json(json.dumps({"image": image, "instruction": instruction}).encode())


@given(st.text(st.characters(codec=None), max_size=40))
def test_the_server_takes_the_texts_that_training_and_policies_take(text: str) -> None:
    try:
        words = accepted(text)
    except ValueError:
        with pytest.raises(Refused, match="instruction"):
            asked(text)
    else:
        assert asked(text).observation.instruction == words
        assert build_prompt(words) == build_prompt(text)


@pytest.mark.parametrize(
    "words",
    ["拿起可乐罐", "拿起\u3000可乐罐", "مکعب را برمی\u200cدارد", "क्\u200dष उठाओ", "pick up the\u00a0can", "🤖 lift"],
)
def test_spelling_of_all_scripts_is_kept(words: str) -> None:
    assert accepted(words) == asked(words).observation.instruction == words


def test_control_characters_at_the_ends_are_dropped_and_others_refused() -> None:
    assert accepted("\tlift the can\r\n") == "lift the can"
    assert accepted(" as released ") == " as released "
    for text, reason in {"a\nb": "control", "a\x1b[2J": "control", "\ud800": "halves", "\u200b \n": "empty"}.items():
        with pytest.raises(ValueError, match=reason):
            accepted(text)


MODES = {"JPEG": ("RGB", "L", "CMYK"), "PNG": ("RGB", "RGBA", "L", "LA", "P", "1", "I;16")}


@pytest.mark.parametrize(("form", "mode"), [(form, mode) for form, modes in MODES.items() for mode in modes])
def test_an_image_is_decoded_alike_for_training_server_and_policy(form: str, mode: str) -> None:
    image = Image.fromarray(noise(40, 60, 3))
    if mode == "I;16":
        image = Image.fromarray(noise(40, 60).astype(np.uint16) * 257)
    elif mode != "RGB":
        image = image.convert(mode)
    data = encoded(image, form)
    pixels = decode(data)
    np.testing.assert_array_equal(READER._decoded(data), pixels)
    np.testing.assert_array_equal(READER._decoded(data + bytes(513)), pixels)
    if form == "PNG":
        np.testing.assert_array_equal(np.asarray(as_rgb(image)), pixels)
        transform = ImageTransform(16, [[0.5] * 3], [[0.5] * 3])
        np.testing.assert_array_equal(transform.resize(image), transform.resize(pixels))


@pytest.mark.parametrize("shape", [(0, 640, 3), (480, 0, 3), (0, 0, 3)])
def test_an_empty_frame_is_no_image(shape: tuple[int, int, int]) -> None:
    transform = ImageTransform(16, [[0.5] * 3], [[0.5] * 3])
    with pytest.raises(ValueError, match="without pixels"):
        transform.resize(np.zeros(shape, np.uint8))
    with pytest.raises(ValueError, match="without pixels"):
        as_rgb(Image.new("RGB", (0, 3)))
    with pytest.raises(ValueError, match="floating point"):
        as_rgb(Image.fromarray(np.zeros((4, 4), np.float32)))


@pytest.mark.parametrize("form", [base64.b64encode, base64.encodebytes, lambda data: base64.b64encode(data) + b"\r\n"])
@pytest.mark.parametrize("head", ["", "data:image/png;base64,"])
def test_base64_comes_in_a_line_in_lines_or_as_a_data_url(form, head: str) -> None:
    pixels = noise(40, 60, 3)
    text = head + form(encoded(Image.fromarray(pixels))).decode()
    np.testing.assert_array_equal(asked(image=text).observation.images["primary"], pixels)


@pytest.mark.parametrize("text", ["data:image/png,abc", "abc", "data:;base64,!", "iVBOR*w0KGgo="])
def test_what_is_no_base64_is_refused(text: str) -> None:
    with pytest.raises(Refused, match="image is a uint8 array"):
        asked(image=text)
