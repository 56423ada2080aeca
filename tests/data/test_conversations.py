"""LLaVA's JSON layout -> batches of the VLM stage."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from openvla_lightning.action_head import TokenHead
from openvla_lightning.data import ConversationDataModule
from openvla_lightning.data.conversation_datamodule import ConversationOrder
from openvla_lightning.data.source.conversations import QUESTION, Conversations
from openvla_lightning.data.source.synthetic import INSTRUCTIONS, Synthetic
from openvla_lightning.processor import ChatProcessor
from openvla_lightning.types import IGNORE_INDEX, Batch, Conversation

PROCESSOR = ChatProcessor(
    TokenHead(vocab_size=768), tokenizer="tiny", image_size=32, means=[[0.5] * 3], stds=[[0.5] * 3], max_length=64
)


def said(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(texts)]


@pytest.fixture
def llava(tmp_path: Path) -> Path:
    """Nine conversations; every third is text alone."""
    entries: list[dict[str, Any]] = []
    for number in range(9):
        turns = said("<image>\nWhat is this?", f"a red cube {number}", "And the colour?", "red")
        entries.append({"id": str(number), "conversations": turns})
        if number % 3:
            Image.new("RGB", (40 + number, 30), (number, 0, 0)).save(tmp_path / f"{number}.png")
            entries[-1]["image"] = f"{number}.png"
    (tmp_path / "chat.json").write_text(json.dumps(entries))
    return tmp_path


def module(folder: Path, **options: Any) -> ConversationDataModule:
    made = ConversationDataModule(
        source=lambda name: Conversations(name, folder / "chat.json", folder),
        collate=options.pop("collate", list),
        image_size=32,
        global_batch_size=2,
        num_workers=0,
        **{"val_fraction": 0.0, **options},
    )
    made.prepare_data()
    made.setup()
    return made


def test_an_epoch_has_every_conversation_and_batches_of_one_kind(llava: Path) -> None:
    batches: list[list[Conversation]] = list(module(llava).train_dataloader())
    assert {turn[1] for batch in batches for c in batch for turn in c.turns[:1]} == {
        f"a red cube {n}" for n in range(9)
    }
    assert all(len({c.image is None for c in batch}) == 1 for batch in batches)
    first = next(c for batch in batches for c in batch if c.image is not None)
    assert first.image is not None
    assert first.image.shape == (30, 40 + int(first.turns[0][1][-1]), 3)
    assert first.turns[0][0] == "What is this?"


@settings(max_examples=25)
@given(st.integers(1, 40), st.integers(0, 40), st.integers(1, 8), st.integers(0, 99))
def test_order_is_a_new_permutation_each_epoch_and_any_slice_is_the_same(a: int, b: int, size: int, seed: int) -> None:
    groups = [np.arange(a), np.arange(a, a + b)]
    order = ConversationOrder(groups, size, seed)
    numbers = np.arange(2 * order.samples)
    places = order(numbers)
    assert (np.concatenate([order(np.array([n])) for n in numbers]) == places).all()
    for epoch in np.split(places, 2):
        assert set(epoch) == set(range(a + b))
        kinds = (epoch >= a).reshape(-1, size)
        assert (kinds == kinds[:, :1]).all()
        assert len(epoch) < a + b + 2 * size


def test_it_resumes_at_the_next_sample(llava: Path) -> None:
    whole = list(module(llava).train_dataloader())
    late = module(llava)
    late.load_state_dict({"samples_served": 4, "seed": 7})
    rest = list(late.train_dataloader())
    assert [[c.number for c in batch] for batch in rest] == [[c.number for c in batch] for batch in whole[2:]]
    assert [c.turns for batch in rest for c in batch] == [c.turns for batch in whole[2:] for c in batch]


def test_held_out_conversations_are_not_trained_on(llava: Path) -> None:
    data = module(llava, val_fraction=0.5)
    training = {c.turns for batch in data.train_dataloader() for c in batch}
    held_out = [c.turns for batch in data.val_dataloader() for c in batch]
    assert held_out
    assert not training & set(held_out)


def test_a_batch_teaches_the_answers_and_their_ends_alone(llava: Path) -> None:
    batches: list[Batch] = list(module(llava, collate=PROCESSOR.collate).train_dataloader())
    for batch in batches:
        for ids, labels, mask in zip(batch.input_ids, batch.labels, batch.attention_mask, strict=True):
            learnt = labels[labels != IGNORE_INDEX].tolist()
            ends = [place for place, token in enumerate(learnt) if token == PROCESSOR.eos_token_id]
            assert len(ends) == 2
            assert PROCESSOR.tokenizer.decode(learnt[: ends[0]]).strip().startswith("a red cube")
            assert PROCESSOR.tokenizer.decode(learnt[ends[0] + 1 : ends[1]]).strip() == "red"
            assert (ids[labels != IGNORE_INDEX] == labels[labels != IGNORE_INDEX]).all()
            text = PROCESSOR.tokenizer.decode(ids[mask], skip_special_tokens=True)
            assert text.count("in :") == text.count("out :") == 2
            assert ids[0] == PROCESSOR.tokenizer.bos_token_id
    assert {len(batch.pixel_values) for batch in batches} == {0, 2}


def test_a_long_conversation_is_cut() -> None:
    batch = PROCESSOR.collate([Conversation(None, (("red " * 100, "blue"),), "set")])
    assert batch.input_ids.shape == (1, 64)


def test_kinds_cannot_share_a_batch() -> None:
    pair = [Conversation(None, (("a", "b"),), "set"), Conversation(np.zeros((8, 8, 3), np.uint8), (("a", "b"),), "set")]
    with pytest.raises(ValueError, match="share a batch"):
        PROCESSOR.collate(pair)


def test_robot_demonstrations_become_captions() -> None:
    data = ConversationDataModule(lambda name: Synthetic(name), list, 48, 4, "bridge_orig", num_workers=0)  # type: ignore[arg-type]
    data.prepare_data()
    data.setup()
    conversation = next(iter(data.train_dataloader()))[0]
    assert conversation.image.shape == (48, 48, 3)
    assert conversation.turns[0][0] == QUESTION
    assert conversation.turns[0][1] in INSTRUCTIONS
    assert conversation.dataset_name == "bridge_orig"


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "no list"),
        ({"id": 1}, "no list"),
        ([{"conversations": said("only a question")}], "entry 0: .*pairs"),
        ([{"conversations": said("a", "b")}, {"conversations": said("a", "b")[::-1]}], "entry 1, turn 0: .*human"),
        ([{"conversations": [{"from": "human"}, {"from": "gpt"}]}], "turn 0"),
        ([{"conversations": said("a", "b"), "image": ["1.png", "2.png"]}], "entry 0: `image` must be .* one image"),
    ],
)
def test_an_entry_that_is_no_conversation_is_named(tmp_path: Path, entries: Any, message: str) -> None:
    (tmp_path / "chat.json").write_text(json.dumps(entries))
    with pytest.raises(ValueError, match=message):
        module(tmp_path)


def test_images_are_decoded_as_everywhere_else(tmp_path: Path) -> None:
    """Sixteen bits of grey are no white, and what cannot be read is named."""
    grey = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "grey.png").read_bytes()[:50])
    entries = [{"conversations": said("a", "b"), "image": name} for name in ("grey.png", "cut.png", None)]
    (tmp_path / "chat.json").write_text(json.dumps(entries))
    source = Conversations("set", tmp_path / "chat.json", tmp_path)
    assert source.with_image.tolist() == [True, True, False]
    image = source.read(0, 0).image
    assert image is not None
    np.testing.assert_array_equal(image[..., 0], grey >> 8)
    with pytest.raises(ValueError, match=r"cut\.png is no image that can be read"):
        source.read(1, 1)


def test_what_is_missing_is_said_before_training(llava: Path, tmp_path: Path) -> None:
    assert "llava_v1_5_mix665k" in str(Conversations("set", tmp_path / "no.json", tmp_path).missing())
    (llava / "1.png").unlink()
    with pytest.raises(FileNotFoundError, match="image_root"):
        module(llava)
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 7121920\n"
    for written, reason in ((b"{", "Expecting"), ('["ü"]'.encode("latin-1"), "utf-8"), (pointer, "`git lfs pull`")):
        (llava / "chat.json").write_bytes(written)
        with pytest.raises(ValueError, match=rf"chat\.json is not JSON: .*{reason}"):
            module(llava)
