"""What robots asked a server becomes a dataset."""

import numpy as np
from serving_world import picture, start

from openvla_lightning.client import Client
from openvla_lightning.data.source.lerobot.reading import EpisodeReader


def test_questions_and_answers_become_episodes(checkpoint, tmp_path):
    limits = ["server.deadline_ms=20000", f"server.record={tmp_path / 'data'}", "server.record_fps=3"]
    running = start(checkpoint, tmp_path / "log", *limits)
    answered = []
    with Client(running.url) as robot:
        answered += [robot.act(picture(seed), "lift the can") for seed in range(3)]
        answered += [robot.act(picture(seed), "drop the can") for seed in range(3, 5)]
    running.end()
    running.process.join(60)  # it writes the dataset
    assert running.process.exitcode == 0
    reader = EpisodeReader(tmp_path / "data")
    episodes = [reader(place)[0] for place in range(len(reader.numbers))]
    assert [(len(e["action"]), e["task"][0]) for e in episodes] == [(3, "lift the can"), (2, "drop the can")]
    recorded = np.concatenate([e["action"] for e in episodes])
    assert np.allclose(recorded, np.array(answered), atol=1e-6)
    assert reader(0)[1]["observation.images.primary"](0).shape == (32, 32, 3)
