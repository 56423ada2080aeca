"""What a policy did, as a LeRobot dataset that our own reader reads and a policy is trained on."""

import json

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from test_scoring import Colourblind, play
from toy_world import Walker

from openvla_lightning import Policy
from openvla_lightning.config import CONF
from openvla_lightning.data.source.lerobot.__main__ import main as draft
from openvla_lightning.data.source.lerobot.reading import EpisodeReader
from openvla_lightning.data.source.lerobot.recorder import Recorder, Taken
from openvla_lightning.env.base import RequestError
from openvla_lightning.report.results import Results
from openvla_lightning.run.fit import fit


def read(folder):
    reader = EpisodeReader(folder)
    return reader, [reader(place) for place in range(len(reader.numbers))]


def brightest(picture):
    """The one white pixel, which the codec blurs."""
    grey = picture.mean(-1, keepdims=True)
    return np.repeat(np.where(grey == grey.max(), 255, 0), 3, -1)


def test_episodes_become_a_dataset_with_failures_apart(tmp_path):
    found = play(tmp_path / "run", Colourblind(), record=tmp_path / "data")
    reader, episodes = read(tmp_path / "data")
    judged = {False: [], True: []}
    for episode in found.episodes:
        judged[episode.success].append(episode)
    assert {name: len(places) for name, places in reader.splits.items()} == {
        "train": len(judged[True]),
        "failure": len(judged[False]),
    }
    for split, success in (("train", True), ("failure", False)):
        lengths = sorted(len(episodes[place][0]["action"]) for place in reader.splits[split])
        assert lengths == sorted(episode.length for episode in judged[success])
        for place in reader.splits[split]:
            columns, _ = episodes[place]
            assert columns["next.success"].ravel().tolist() == [False] * (len(columns["action"]) - 1) + [success]
            assert columns["next.done"].ravel().tolist()[-1]
            assert len(set(columns["task"])) == 1
    info = json.loads((tmp_path / "data" / "meta" / "info.json").read_text())
    assert info["fps"] == 10


def test_each_picture_is_the_one_that_the_action_answered(tmp_path):
    play(tmp_path / "run", Walker(), record=tmp_path / "data", episodes_per_task=1)
    for columns, cameras in read(tmp_path / "data")[1]:
        walker = Walker()
        pictures = [brightest(cameras["observation.images.primary"](step)) for step in range(len(columns["action"]))]
        again = walker.act(pictures, list(columns["task"]))
        assert np.allclose(again, columns["action"], atol=1e-6)


def test_a_recording_that_was_stopped_goes_on_and_grows(tmp_path):
    class Stopped(Walker):
        def act(self, image, instruction):
            if len(self.batches) == 25:
                raise KeyboardInterrupt
            return super().act(image, instruction)

    with pytest.raises(KeyboardInterrupt):
        play(tmp_path / "run", Stopped(), record=tmp_path / "data")
    assert not (tmp_path / "data" / "meta").exists()
    before = len(Results.load(tmp_path / "run").episodes)
    assert len(list((tmp_path / "data" / "episodes").glob("*.npz"))) == before > 0
    play(tmp_path / "run", record=tmp_path / "data")
    assert len(read(tmp_path / "data")[1]) == 12
    play(tmp_path / "run", record=tmp_path / "data", episodes_per_task=4)
    assert len(read(tmp_path / "data")[1]) == 16


def test_failures_are_left_out_where_nobody_wants_them(tmp_path):
    found = play(tmp_path / "run", Colourblind(), record=tmp_path / "data", record_failures=False)
    assert len(read(tmp_path / "data")[1]) == found.overall.successes < len(found.episodes)


def test_shards_record_into_one_dataset(tmp_path):
    play(tmp_path / "run", record=tmp_path / "data", shard="1/2")
    assert not (tmp_path / "data" / "meta").exists()
    play(tmp_path / "run", record=tmp_path / "data", shard="2/2")
    assert len(read(tmp_path / "data")[1]) == 12


def test_two_cameras_and_a_state_are_recorded_to_the_last_bit_or_the_codec(tmp_path):
    random = np.random.default_rng(0)
    level = np.linspace(0, 255, 64 * 64 * 3).reshape(64, 64, 3)
    pictures = {
        name: [np.clip(level + 10 * i, 0, 255).astype(np.uint8) for i in range(5)] for name in ("primary", "wrist")
    }
    actions, state = random.normal(size=(5, 7)).astype(np.float32), random.normal(size=(5, 8)).astype(np.float32)
    recorder = Recorder(tmp_path)
    recorder.add("a", Taken(pictures, actions, "lift", 20, state))
    recorder.write(progress=False)
    reader, [(columns, cameras)] = read(tmp_path)
    assert list(reader.splits) == ["train"]
    assert np.array_equal(columns["action"], actions)
    assert np.array_equal(columns["observation.state"], state)
    assert not columns["next.success"].any()
    for name, shown in pictures.items():
        for step, picture in enumerate(shown):
            lost = np.abs(cameras[f"observation.images.{name}"](step).astype(int) - picture)
            assert lost.mean() < 6


def test_what_was_recorded_is_trained_on_and_acts(tmp_path, capsys):
    play(tmp_path / "played", Walker(), record=tmp_path / "walked")
    capsys.readouterr()
    draft([str(tmp_path / "walked")])
    (tmp_path / "conf" / "data" / "mix").mkdir(parents=True)
    (tmp_path / "conf" / "data" / "mix" / "walked.yaml").write_text(capsys.readouterr().out)
    words = ["data=finetune", "data/mix=walked", f"hydra.searchpath=[file://{tmp_path}/conf]", "model.init_from=null"]
    words += ["+debug=tiny", "data/source=rlds", "trainer.max_steps=2", "save_every=2", "data.num_workers=0"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("finetune", [*words, "strategy=full", f"paths.output_dir={tmp_path}/trained"])
    fit(cfg)
    policy = Policy.from_pretrained(tmp_path / "trained")
    episodes = read(tmp_path / "walked")[1]
    assert policy.statistics.num_transitions == sum(len(columns["action"]) for columns, _ in episodes)
    columns, cameras = episodes[0]
    picture = cameras["observation.images.primary"](0)
    assert policy.act(picture, columns["task"][0]).shape == columns["action"][0].shape


@pytest.mark.parametrize("options", [{"control": "realtime", "latency": 0.2, "rate_hz": 5}])
def test_what_cannot_be_recorded_is_refused(tmp_path, options):
    with pytest.raises(RequestError, match=r"eval\.control=blocking"):
        play(tmp_path / "run", record=tmp_path / "data", **options)


def test_a_dataset_of_somebody_else_is_not_written_over(tmp_path):
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "info.json").write_text("{}")
    with pytest.raises(RequestError, match="not recorded"):
        play(tmp_path / "run", record=tmp_path)


def test_a_folder_that_cannot_be_written_to_is_refused_before_anything_is_recorded(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"nothing can be written to .*/file/data; choose another"):
        Recorder(tmp_path / "file" / "data")
