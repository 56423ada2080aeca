"""Text and pixels, as the released processor makes them."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import torch
from golden_sets import one
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from openvla_lightning import Processor
from openvla_lightning.action_head import TokenHead
from openvla_lightning.model.vision_backbone import pixel_statistics
from openvla_lightning.processor.image_transform import ImageTransform, center_crop
from openvla_lightning.processor.prompt import build_prompt
from openvla_lightning.processor.tokenizer import TINY_VOCAB_SIZE, load_tokenizer, tiny_tokenizer
from openvla_lightning.types import IGNORE_INDEX, Observation, Step

TOWERS = {"dino": "vit_large_patch14_reg4_dinov2.lvd142m", "siglip": "vit_so400m_patch14_siglip_224"}


@pytest.fixture
def processor() -> Processor:
    return Processor(TokenHead(vocab_size=TINY_VOCAB_SIZE), image_size=16, means=[[0.5] * 3], stds=[[0.5] * 3])


def step(instruction: str, value: float = 0.0) -> Step:
    seen = Observation({"primary": np.full((16, 16, 3), 128, np.uint8)}, instruction)
    return Step(seen, np.full((1, 7), value, np.float32), "toy")


def test_pixels_are_bit_equal_to_the_released_processor(golden: Path) -> None:
    expected = np.load(golden / "model" / "image_preprocess.npz")
    transform = ImageTransform(224, *pixel_statistics(TOWERS))
    images = [expected[f"image_{i}"] for i in range(3)]
    for image, resized in zip(images, expected["resized_uint8"], strict=True):
        np.testing.assert_array_equal(transform.resize(image), resized)
    pixels = transform(images)
    assert pixels.dtype == torch.float32
    assert torch.equal(pixels, torch.from_numpy(expected["pixel_values"]))
    assert torch.equal(transform([Image.fromarray(image) for image in images]), pixels)


def test_training_layout_is_the_released_collators(each_golden: Path) -> None:
    """BOS, prompt, lone space, seven ids, end token, padding: rebuilt from the golden prompts and actions."""
    arrays = np.load(one(each_golden / "model", "tiny_*") / "golden.npz")
    processor = Processor(TokenHead(), image_size=16, towers=TOWERS, pad_token_id=32000)
    prompts = {
        f"prompt {i}": arrays["input_ids"][i, : arrays["prompt_len"][i]].tolist() for i in range(len(arrays["actions"]))
    }
    processor._prompt_ids = prompts
    processor._tokenizer = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer()._tokenizer, eos_token="</s>")
    steps = [
        Step(step(name).observation, action[None].astype(np.float64), "toy")
        for name, action in zip(prompts, arrays["actions"], strict=True)
    ]
    batch = processor.collate(steps)
    width = batch.input_ids.shape[1]
    assert (arrays["attention_mask"].sum(1).max()) == width
    np.testing.assert_array_equal(batch.input_ids, arrays["input_ids"][:, :width])
    np.testing.assert_array_equal(batch.attention_mask, arrays["attention_mask"][:, :width])
    np.testing.assert_array_equal(batch.labels, arrays["labels"][:, :width])


def test_prompts_are_the_released_sentences() -> None:
    assert build_prompt("Put the Spoon down") == "In: What action should the robot take to put the spoon down?\nOut:"
    chat = build_prompt("lift it", "vicuna")
    assert chat.startswith("A chat between a curious user and an artificial intelligence assistant. ")
    assert chat.endswith("questions. USER: What action should the robot take to lift it? ASSISTANT:")
    with pytest.raises(ValueError, match="pure, vicuna"):
        build_prompt("lift it", "chat")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="empty"):
        build_prompt("  ")


def sentencepiece_like(folder: Path) -> Path:
    """A tokenizer folder that has a lone space and, like Llama's in transformers 5, adds no BOS."""
    words = ["<unk>", "<s>", "</s>", "▁", "▁in", "▁out", "▁lift"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


def test_the_lone_space_comes_with_its_attention_bit(tmp_path: Path) -> None:
    folder = sentencepiece_like(tmp_path)
    processor = Processor(TokenHead(), tokenizer=folder, image_size=16, means=[[0.5] * 3], stds=[[0.5] * 3])
    inputs = processor(np.zeros((16, 16, 3), np.uint8), "lift it")
    assert inputs["input_ids"][0, 0] == 1
    assert inputs["input_ids"][0, -1] == 3
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape
    assert inputs["attention_mask"].all()


def test_inference_prompt_is_the_beginning_of_the_training_text(processor: Processor) -> None:
    texts = ["lift the red cube", "push the yellow can to the left"]
    batch = processor.collate([step(text) for text in texts])
    inputs = processor([np.zeros((16, 16, 3), np.uint8)] * 2, texts)
    for row, length in enumerate(inputs["attention_mask"].sum(1)):
        assert torch.equal(batch.input_ids[row, :length], inputs["input_ids"][row, :length])
        assert batch.input_ids[row, length + 7] == processor.eos_token_id
        assert (batch.labels[row, :length] == IGNORE_INDEX).all()


@given(st.text(min_size=1, max_size=40).filter(lambda text: text.strip()))
@settings(max_examples=60)
def test_any_instruction_has_ids_below_the_actions(text: str) -> None:
    head = TokenHead(vocab_size=TINY_VOCAB_SIZE)
    processor = Processor(head, image_size=16, means=[[0.5] * 3], stds=[[0.5] * 3])
    ids = processor.prompt_ids(text)
    assert all(0 <= i < head.tokenizer.first_id for i in ids)


def test_common_words_are_one_id_each() -> None:
    tokenizer = tiny_tokenizer()
    text = "put the green cube on the purple plate"
    assert len(tokenizer(text, add_special_tokens=False)["input_ids"]) == len(text.split())
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_left_and_right_padding_hold_the_same_tokens(processor: Processor) -> None:
    images = [np.zeros((16, 16, 3), np.uint8)] * 2
    texts = ["stop", "push the yellow can to the left"]
    right, left = processor(images, texts), processor(images, texts, padding_side="left")
    for row in range(2):
        kept = [inputs["input_ids"][row][inputs["attention_mask"][row]] for inputs in (left, right)]
        assert torch.equal(*kept)
    assert not left["attention_mask"][0, 0]
    assert not right["attention_mask"][0, -1]


@pytest.mark.parametrize("strategy", ["resize-naive", "letterbox", "resize-crop"])
@pytest.mark.parametrize("size", [(30, 20), (20, 31), (16, 16), (7, 16)])
def test_every_strategy_gives_a_square(strategy: str, size: tuple[int, int]) -> None:
    transform = ImageTransform(16, [[0.5] * 3], [[0.5] * 3], strategy)  # type: ignore[arg-type]
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    assert transform([image]).shape == (1, 3, 16, 16)


def test_letterbox_keeps_the_aspect_ratio_and_pads_with_the_mean() -> None:
    transform = ImageTransform(32, [[0.5, 0.25, 0.75]], [[1.0] * 3], "letterbox")
    wide = np.full((16, 32, 3), 255, np.uint8)
    resized = transform.resize(wide)
    assert (resized[0] == [127, 63, 191]).all()
    assert (resized[16] == 255).all()


def test_resize_crop_takes_the_middle() -> None:
    image = np.zeros((16, 48, 3), np.uint8)
    image[:, 16:32] = 255
    resized = ImageTransform(16, [[0.5] * 3], [[0.5] * 3], "resize-crop").resize(image)
    assert (resized == 255).all()


def test_centre_crop_keeps_the_middle_and_the_size() -> None:
    ramp = torch.arange(101, dtype=torch.uint8).view(1, 1, 101, 1).expand(1, 101, 101, 3).contiguous()
    cropped = center_crop(ramp, 0.81)
    assert cropped.shape == ramp.shape
    assert cropped[0, 50, 50, 0] == 50
    assert cropped[0, 50, 0, 0] == 5
    assert cropped[0, 50, 100, 0] == 95
    assert torch.equal(center_crop(ramp, 1.0), ramp)


def test_config_round_trip(processor: Processor) -> None:
    config = json.loads(json.dumps(processor.config))
    again = Processor.from_config(config)
    assert again.config == processor.config
    assert Processor.from_config(config, crop_area=0.9).transform.crop_area == 0.9
    batch, other = (p.collate([step("lift the red cube", 0.3)]) for p in (processor, again))
    assert torch.equal(batch.input_ids, other.input_ids)
    assert torch.equal(batch.pixel_values, other.pixel_values)


def test_errors_say_what_is_wrong(processor: Processor) -> None:
    image = np.zeros((16, 16, 3), np.uint8)
    with pytest.raises(ValueError, match="2 images but 1 instructions"):
        processor([image, image], ["lift"])
    with pytest.raises(ValueError, match="uint8"):
        processor(image.astype(np.float32), "lift")
    with pytest.raises(ValueError, match="tokens of 2048"):
        processor(image, "€" * 1000)
    with pytest.raises(KeyError, match="wrist"):
        Processor.from_config(processor.config, cameras=["wrist"]).collate([step("lift")])
    with pytest.raises(FileNotFoundError, match="tokenizer"):
        Processor(TokenHead(), tokenizer="./nowhere", towers=TOWERS)(image, "lift")
    with pytest.raises(ValueError, match="either towers"):
        Processor(TokenHead())


@pytest.mark.parametrize("image", [torch.zeros(16, 16, 3, dtype=torch.uint8), [[[0, 0, 0]]], None, "image.png"])
def test_something_that_is_no_image_is_named(processor: Processor, image: Any) -> None:
    with pytest.raises(TypeError, match=rf"uint8 array \[H, W, 3\] or a PIL image, not {type(image).__name__}"):
        processor.inputs([Observation({"primary": image}, "lift")], 7)


def test_something_that_is_no_text_or_no_pictures_by_view_is_named(processor: Processor) -> None:
    image = np.zeros((16, 16, 3), np.uint8)
    for words in (None, 3, b"lift"):
        with pytest.raises(TypeError, match=f"an instruction is a text .*, not {type(words).__name__}"):
            processor.inputs([Observation({"primary": image}, words)], 7)
    for images in (image, [image]):
        with pytest.raises(TypeError, match=f"{{'primary': image, ...}} by view, not {type(images).__name__}"):
            processor.inputs([Observation(images, "lift")], 7)


def test_a_released_folder_gives_its_tokenizer_without_asking_to_run_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers reads a folder's config for its tokenizer, and then asks on the terminal about the code it names."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question was asked"))
    folder = sentencepiece_like(tmp_path)
    code = {"AutoConfig": "configuration_prismatic.OpenVLAConfig"}
    (folder / "config.json").write_text(json.dumps({"model_type": "openvla", "auto_map": code}))
    tokenizer_config = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer_config |= {"processor_class": "PrismaticProcessor", "tokenizer_class": "LlamaTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    assert load_tokenizer(folder).get_vocab()["▁"] == 3
    assert "custom code" not in capsys.readouterr().out


def test_a_sentencepiece_model_alone_gives_sentencepieces_ids(tmp_path: Path) -> None:
    model = io.BytesIO()
    text = "In: What action should the robot take to put the spoon on the towel?\nOut:"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text, "lift the red cube"] * 20),
        model_writer=model,
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    processor = Processor(TokenHead(), tokenizer=tmp_path, image_size=16, means=[[0.5] * 3], stds=[[0.5] * 3])
    pieces = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    instruction = "put the 汤匙 down"
    expected = [pieces.bos_id(), *pieces.encode(build_prompt(instruction)), pieces.piece_to_id("▁")]
    assert processor.prompt_ids(instruction) == expected
