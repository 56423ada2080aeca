"""An evaluation in shards, killed twice, is the evaluation that was never interrupted."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from expert_world import ExpertDriven
from test_scoring import QUIET, Colourblind, play
from toy_world import Blind, Walker

from openvla_lightning.env.base import RequestError
from openvla_lightning.evaluation.scoring import evaluate
from openvla_lightning.report.__main__ import main as report
from openvla_lightning.report.results import Results
from openvla_lightning.report.shards import EvaluationShard, ShardError, merge
from openvla_lightning.report.writing import compare
from openvla_lightning.runtime.progress import Bar

KILLED = """
import functools, os, signal, sys
if __name__ == "__main__":  # a worker imports this file
    sys.path[:0] = [sys.argv[1], os.path.dirname(sys.argv[1])]
    from test_evaluation_shards import Ask, tabletop
    class Killed(Ask):
        def act(self, image, instruction):
            if self.calls == 8:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().act(image, instruction)
    tabletop(sys.argv[2], Killed(), shard=sys.argv[3])
"""


class Ask:
    """Leaves the choice to the world's expert, and counts how often it was asked."""

    provenance = {"sha256": "expert"}  # noqa: RUF012

    def __init__(self):
        self.calls = 0

    def act(self, image, instruction):
        self.calls += 1
        return np.zeros((len(image), 7))


def tabletop(folder, policy, **options):
    given = {"tasks": ["lift"], "episodes_per_task": 2, "num_envs": 2, "num_workers": 1, "save_videos": 1}
    return evaluate(policy, ExpertDriven, folder, console=QUIET, self_test=False, **{**given, **options})


def told(results: Results) -> dict:
    """All of it but how long it took, and which episodes were filmed."""
    content = dataclasses.asdict(results)
    for episode in content["episodes"]:
        episode.pop("video")
    return {name: value for name, value in content.items() if name != "timing"}


@pytest.mark.slow
def test_two_shards_that_were_killed_are_one_evaluation(tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    here = str(Path(__file__).parent)
    whole = tabletop(tmp_path / "whole", Ask())
    for shard in ("1/2", "2/2"):
        command = [sys.executable, script, here, str(tmp_path / "parts"), shard]
        assert subprocess.run(command).returncode == -9
        part = tabletop(tmp_path / "parts", Ask(), shard=shard)
        assert part.complete
        assert part.shard == shard
    merged = Results.load(tmp_path / "parts")  # written by the shard that ended last
    assert told(merged) == told(whole)
    assert merged.overall.successes > 0
    for episode in merged.episodes:
        assert episode.video is None or (tmp_path / "parts" / episode.video).is_file()
    assert (tmp_path / "parts" / "report.md").is_file()


def test_results_say_where_the_time_went(tmp_path):
    found = play(tmp_path, Walker())
    shares = {name: found.timing[f"{name}_share"] for name in ("policy", "waiting", "simulator")}
    assert all(0 <= share <= 1 for share in shares.values())
    assert shares["policy"] + shares["waiting"] <= 1.001
    assert found.timing["episodes_per_hour"] > 0
    assert "episodes per hour" in (tmp_path / "report.md").read_text()


def test_episodes_of_an_earlier_call_do_not_count_for_the_rate(tmp_path, monkeypatch):
    began = []

    class Noted(Bar):
        def restart(self, label, total, done=0):
            began.append((total, done))
            super().restart(label, total, done)

    monkeypatch.setattr("openvla_lightning.evaluation.session.Bar", Noted)
    play(tmp_path, episodes_per_task=1)
    assert began[-1] == (4, 0)
    play(tmp_path, episodes_per_task=2)
    assert began[-1] == (8, 4)


def test_a_shard_alone_is_no_result_to_compare(tmp_path):
    play(tmp_path / "mine", shard="1/3")
    with pytest.raises(ShardError, match=r"shard 2/3 is not finished; eval.shard=2/3 paths.output_dir="):
        merge(tmp_path / "mine")
    with pytest.raises(ValueError, match=r"is one shard of an evaluation: .*--merge"):
        compare([tmp_path], console=QUIET)
    play(tmp_path / "mine", shard="2/3")
    play(tmp_path / "mine", shard="3/3")
    compare([tmp_path], console=QUIET)  # the whole, each of its episodes once
    assert "12 episodes" in (tmp_path / "report.md").read_text()


def test_shards_are_merged_where_they_were_brought_together(tmp_path, capsys):
    for machine, shard in (("a", "1/2"), ("b", "2/2")):
        play(tmp_path / machine, shard=shard)
    assert not (tmp_path / "a" / "results.json").exists()
    (tmp_path / "b" / "shard_2_of_2").rename(tmp_path / "a" / "shard_2_of_2")
    report([str(tmp_path / "a"), "--merge"])
    assert told(Results.load(tmp_path / "a")) == told(play(tmp_path / "whole"))


def test_shards_of_different_evaluations_are_not_merged(tmp_path):
    play(tmp_path, shard="1/2")
    play(tmp_path, Colourblind(), shard="2/2")
    with pytest.raises(ShardError, match="checkpoint's sha256, checkpoint's unnorm_key differ"):
        merge(tmp_path)
    assert not (tmp_path / "results.json").exists()
    (tmp_path / "shard_1_of_3").mkdir()
    with pytest.raises(ShardError, match=r"in \[2, 3\] parts"):
        merge(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shard": "0/2"}, "give k/n"),
        ({"shard": "3"}, "give k/n"),
        ({"shard": "1/2", "episodes_per_task": "auto"}, "whose number is fixed"),
        ({"shard": "1/2", "control": "realtime"}, "give eval.latency"),
    ],
)
def test_what_cannot_be_split_is_refused(tmp_path, options, message):
    with pytest.raises(RequestError, match=message):
        play(tmp_path, **options)


def test_a_part_without_an_episode_is_refused(tmp_path):
    """It would leave no results, and the others could never be merged."""
    with pytest.raises(RequestError, match=r"eval\.shard=5/5 has nothing to play, of 4 episodes: .*as many parts"):
        play(tmp_path, shard="5/5", episodes_per_task=1)


class Chunks(Walker):
    """Two actions at a time."""

    def act_chunk(self, observations):
        actions = self.act(
            [seen.images["primary"] for seen in observations], [seen.instruction for seen in observations]
        )
        return np.stack([actions, actions], 1)


@pytest.mark.parametrize("films", [0, 1])
def test_what_nobody_sees_need_not_be_drawn(tmp_path, films):
    seen = play(tmp_path / "all", Chunks(), save_videos=films)
    unseen = play(tmp_path / "some", Chunks(), world=Blind, save_videos=films)
    assert seen.episodes == unseen.episodes


def test_a_shard_knows_its_episodes_and_its_folder():
    parts = [EvaluationShard.parse(f"{k}/3") for k in (1, 2, 3)]
    assert all(sum(part.takes(number) for part in parts) == 1 for number in range(30))
    assert parts[1].folder("x") == Path("x/shard_2_of_3")
    assert str(parts[0]) == "1/3"
