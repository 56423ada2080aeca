"""Conversations beside robots' steps: the same ones again, whoever asks, and they are learnt."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from serving import opened, random_data

from openvla_lightning.data.cotraining import CoTraining
from openvla_lightning.data.source.conversations import Conversations


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve conversations in LLaVA's layout, every third without an image."""
    root = tmp_path_factory.mktemp("chat")
    random, entries = np.random.default_rng(0), []
    for number in range(12):
        entry = {
            "id": str(number),
            "conversations": [
                {"from": "human", "value": "What colour is the block?"},
                {"from": "gpt", "value": "red" if number % 2 else "blue"},
            ],
        }
        if number % 3:
            Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(root / f"{number}.png")
            entry["image"] = f"{number}.png"
        entries.append(entry)
    (root / "chat.json").write_text(json.dumps(entries))
    return root


def cotraining(root: Path, share: float = 0.25) -> CoTraining:
    def source(name: str) -> Conversations:
        return Conversations(name=name, path=root / "chat.json", image_root=root)

    return CoTraining(source, share, seed=3)


def test_what_comes_beside_steps_follows_from_their_numbers(chat: Path) -> None:
    one, other = cotraining(chat), cotraining(chat)
    kinds, seen = set(), set()
    for start in range(0, 400, 8):
        numbers = list(range(start, start + 8))
        found = one.beside(numbers)
        assert len(found) == 2
        assert [c.turns for c in other.beside(numbers)] == [c.turns for c in found]
        assert len({c.image is None for c in found}) == 1, "a batch of words is all about images, or all about none"
        kinds |= {c.image is None for c in found}
        seen |= {(c.image is None, None if c.image is None else int(c.image.sum())) for c in found}
    assert kinds == {True, False}
    assert len(seen) == 9, "every picture comes, and text alone"
    assert len(one.beside([5])) == 1, "each batch has some, so that all processes do the same"
    with pytest.raises(ValueError, match="above 0"):
        cotraining(chat, 0)


def test_all_processes_are_shown_images_or_none_is(chat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sharded model would wait for ever, if some processes gathered its vision backbone and others did not."""
    source = partial(Conversations, path=chat / "chat.json", image_root=chat)
    kinds = []
    for rank in range(3):
        data = opened(random_data(conversations={"source": source, "share": 0.5}, global_batch_size=6))
        monkeypatch.setattr(data, "_world", lambda rank=rank: (3, rank))
        (words,) = data.cotraining
        batches = [[step.number for step in batch] for batch in data.train_dataloader()]
        assert batches[1][0] == 6 + rank
        kinds.append([words.beside(numbers)[0].image is None for numbers in batches])
    assert kinds[0] == kinds[1] == kinds[2]
    assert set(kinds[0]) == {True, False}


@pytest.mark.slow
def test_a_model_that_learns_to_act_learns_the_words_too(chat: Path, tmp_path: Path) -> None:
    from hydra import compose, initialize_config_dir

    from openvla_lightning.config import CONF
    from openvla_lightning.model import VLA
    from openvla_lightning.policy import Policy
    from openvla_lightning.processor.chat import ChatProcessor
    from openvla_lightning.run.fit import fit

    beside = ["data/conversations=llava", f"data.conversations.source.path={chat}/chat.json"]
    beside += [f"data.conversations.source.image_root={chat}", "data.conversations.share=1.0"]
    short = ["+debug=tiny", "trainer.max_steps=30", "trainer.val_check_interval=30", "data.num_workers=0"]
    short += ["data.global_batch_size=8", "optim.lr=3e-3", "~callbacks.learning_curve"]
    losses = {}
    for name, more in {"alone": [], "beside": beside}.items():
        with initialize_config_dir(CONF, version_base="1.3"):
            own = [f"paths.output_dir={tmp_path}/{name}", f"paths.log_dir={tmp_path}"]
            fit(compose("train", [*short, *own, *more]))
        policy = Policy.from_pretrained(tmp_path / name, device="cpu", dtype="float32")
        reader = ChatProcessor.from_config(policy.processor.config)
        words = cotraining(chat, 1.0).beside(list(range(8)))
        batch = reader.normalise(reader.collate(words))
        vla: VLA = policy.vla
        with torch.inference_mode():
            pixels = batch.pixel_values if len(batch.pixel_values) else None
            output = vla(pixel_values=pixels, input_ids=batch.input_ids, labels=batch.labels)
        losses[name] = float(output.loss)
    assert losses["beside"] < 0.5 * losses["alone"]
