"""RLDS datasets drawn at random: features, splits, versions, stray files, damage."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import made_rlds
from random_features import Drawn, F, actions, images, language, states

NAME = "made"


def draw(root: Path, seed: int) -> Drawn:
    """Write dataset number `seed` below `root` and say what is to be expected of it."""
    rng = random.Random(seed)
    made = Drawn(root)
    image, encode = images(rng, made)
    action, act = actions(rng, made)
    words, say, once = language(rng, made)
    state, feel = states(rng, made)
    seen = {"image": image} | ({"state": state} if state is not None else {})
    step = {"observation": F.FeaturesDict(seen), "action": action}
    if words is not None and not once:
        step["language_instruction"] = words
    top = {"steps": F.Dataset(step)}
    if once:
        top["episode_metadata"] = F.FeaturesDict({"language_instruction": words})
    splits = _splits(rng, made)
    episodes: dict[str, list[dict[str, Any]]] = {}
    number = 0
    for split, count in splits.items():
        episodes[split], made.shades[split], made.words[split] = [], [], []
        for _ in range(count):
            length = rng.choice([1, 2, 3, 5, 8, 8, 12])
            shades = [30 + (37 * number + 11 * t) % 190 for t in range(length)]
            told, readable = say(rng, length)
            pictures = [encode(rng, shade) for shade in shades]
            acts, felt = act(rng, length), feel(rng, length)
            rows = []
            for t in range(length):
                row: dict[str, Any] = {"observation": {"image": pictures[t][0]}, "action": acts[t]}
                if felt is not None:
                    row["observation"]["state"] = felt[t]
                if words is not None and not once:
                    row["language_instruction"] = told[t]
                rows.append(row)
            episodes[split].append(
                {"steps": rows} | ({"episode_metadata": {"language_instruction": told[0]}} if once else {})
            )
            made.shades[split].append([known for _, known in pictures])
            made.words[split].append([readable[0]] * length if once else readable)
            number += 1
    shards = rng.choice([1, 2, 3, 64])
    folder = made_rlds.write(root, episodes, F.FeaturesDict(top), NAME, "1.0.0", episodes_per_shard=shards)
    _describe(rng, made)
    _surround(rng, made, folder)
    if rng.random() < 0.25:
        _damage(rng, made, folder)
    return made


def _splits(rng: random.Random, made: Drawn) -> dict[str, int]:
    count = rng.choice([1, 2, 5, 9, 9])
    splits = rng.choice(
        [{"train": count}] * 8
        + [{"train": count, "val": 2}, {"train": count, "validation": 1}, {"train": count, "test": 2}]
        + [{"all": count}, {"val": count}, {"train": 1, "val": 1, "Success": 2}]
    )
    made.notes.append(f"splits {splits}")
    return dict(splits)


def _describe(rng: random.Random, made: Drawn) -> None:
    """Say what it is, now and then wrongly; and choose how it is read."""
    made.spec.setdefault("cameras", {"primary": "image"})
    wrong = rng.choice([None] * 30 + ["camera", "mask", "absolute", "encoding", "language", "action", "state", "noop"])
    if wrong:
        made.notes.append(f"described with another {wrong}")
        made.spec |= {
            "camera": {"cameras": {"primary": "imgae"}},
            "mask": {"mask": [True] * 5},
            "absolute": {"absolute": [False] * 3},
            "encoding": {"encoding": "joint_pos"},
            "language": {"language": "instruction"},
            "action": {"action": "actions"},
            "state": {"state": ["joints"]},
            "noop": {"noop_threshold": 1e6},
        }[wrong]
    if rng.random() < 0.3:
        made.reader["bad_trajectories"] = "skip"
    if rng.random() < 0.4:
        made.reader["check_images"] = True
    made.options |= {
        "noop_filter": rng.choice(["near_zero", "none", "released", "first_step"]),
        "val_fraction": rng.choice([0.0, 0.05, 0.5]),
        "action_chunk": rng.choice([1, 1, 3]),
        "proprio": bool(made.spec.get("state")) and rng.random() < 0.5,
        "bad_instructions": rng.choice(["skip", "skip", "error"]),
        "images": rng.choice(["released", "fast"]),
    }
    made.notes.append(f"{made.reader} {made.options}")


def _surround(rng: random.Random, made: Drawn, folder: Path) -> None:
    """What else lies about."""
    for stray in rng.sample(["README.md", ".DS_Store", ".nfs0000001", "dataset_statistics_0123.json", "a folder"], 2):
        made.notes.append(f"stray {stray}")
        if stray == "a folder":
            (folder / "a folder").mkdir()
        else:
            (folder / stray).write_text("x")
    beside = rng.choice([None] * 4 + ["1.0.0.bak", "0.9.0", "1.0.0.incompleteABC123", "tmp"])
    if beside:
        made.notes.append(f"beside it {beside}")
        shutil.copytree(folder, folder.with_name(beside))
        for shard in folder.with_name(beside).glob("*.tfrecord*"):
            shard.write_bytes(b"old")


DAMAGE = (
    *("cut", "flip", "gone", "empty", "pointer", "folder", "link", "swapped", "twice", "gzip"),
    *("features-gone", "features", "info", "info-text", "lengths", "splits"),
)


def _damage(rng: random.Random, made: Drawn, folder: Path) -> None:
    shards = sorted(folder.glob("*.tfrecord*"))
    shard = rng.choice(shards)
    kind = rng.choice(DAMAGE)
    made.notes.append(f"damage: {kind} of {shard.name}")
    made.damaged, made.exact = shard.name, False
    content, info = shard.read_bytes(), folder / "dataset_info.json"
    if kind == "cut":
        shard.write_bytes(content[: rng.randrange(len(content))])
    elif kind == "flip":
        place = rng.randrange(len(content))
        shard.write_bytes(content[:place] + bytes([content[place] ^ (1 << rng.randrange(8))]) + content[place + 1 :])
    elif kind == "gone":
        shard.unlink()
    elif kind == "empty":
        shard.write_bytes(b"")
    elif kind == "pointer":
        shard.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 7121920\n")
    elif kind == "folder":
        shard.unlink()
        shard.mkdir()
    elif kind == "link":
        shard.unlink()
        shard.symlink_to(folder / "nowhere")
    elif kind == "features-gone":
        (folder / "features.json").unlink()
        made.damaged = "features.json"
    elif kind == "features":
        text = (folder / "features.json").read_text()
        damaged = rng.choice([text[: rng.randrange(len(text))], "[]", "{}", "null", text.replace("steps", "stops")])
        (folder / "features.json").write_text(damaged)
        made.damaged = "features.json" if "stops" not in damaged else None
    elif kind == "info":
        text = info.read_text()
        info.write_text(text[: rng.randrange(len(text))])
        made.damaged = "dataset_info.json"
    elif kind == "info-text":
        info.write_bytes(rng.choice([b"", b"[]", b"{}", b"\xff\xfe", b'{"splits": 3}', b'{"name": "made"}']))
        made.damaged = None
    elif kind in ("lengths", "splits"):
        said = json.loads(info.read_text())
        if kind == "splits":
            said["splits"] = rng.choice([[], None, [{"name": "train"}], [{}], "train"])
        else:
            said["splits"][0]["shardLengths"][0] = rng.choice(["0", "99", "x", -1, None])
        info.write_text(json.dumps(said))
        made.damaged = None
    elif kind == "swapped":
        other = rng.choice(shards)
        there = other.read_bytes()
        shard.write_bytes(there)
        other.write_bytes(content)
        made.damaged = None
    elif kind == "twice":
        shard.write_bytes(content * 2)
    elif kind == "gzip":
        import gzip

        shard.write_bytes(gzip.compress(content))
