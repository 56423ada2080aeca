"""An evaluation that stops when it is decided: earlier, and never by what happens to end first."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from toy_world import ToyWorld, Walker

from openvla_lightning.evaluation.plan import Plan
from openvla_lightning.evaluation.scoring import evaluate
from openvla_lightning.evaluation.stopping import Decided, shuffled
from openvla_lightning.report.results import Episode, Results

QUIET = Console(quiet=True)
OPTIONS: dict[str, Any] = {"num_envs": 4, "num_workers": 1, "save_videos": 0, "console": QUIET, "self_test": False}


class Colourblind(Walker):
    """Takes red for green."""

    def act(self, image, instruction):
        return super().act(image, [words.replace("red", "green") for words in instruction])


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("theirs")
    evaluate(Walker, ToyWorld, folder, episodes_per_task=30, label="walker", **OPTIONS)
    return folder


def test_it_ends_when_one_is_better_and_says_so(theirs: Path, tmp_path: Path) -> None:
    found = evaluate(
        Colourblind, ToyWorld, tmp_path, episodes_per_task=30, stop="decided", against=theirs, label="blind", **OPTIONS
    )
    assert found.complete
    assert found.verdict is not None
    assert found.verdict["decision"] == "first"
    assert found.verdict["against"] == "walker"
    assert found.verdict["pairs"] <= len(found.episodes) < found.verdict["planned"] == 120
    assert Results.load(tmp_path) == found
    # going on in the same folder plays nothing more
    again = evaluate(
        Colourblind, ToyWorld, tmp_path, episodes_per_task=30, stop="decided", against=theirs, label="blind", **OPTIONS
    )
    assert again.episodes == found.episodes


def test_being_as_good_is_a_decision_where_a_margin_says_so(theirs: Path, tmp_path: Path) -> None:
    told = {"episodes_per_task": 30, "stop": "decided", "against": theirs, **OPTIONS}
    found = evaluate(Walker, ToyWorld, tmp_path / "margin", margin=0.3, **told)
    assert found.verdict is not None
    assert found.verdict["decision"] == "same"
    assert len(found.episodes) < 120
    everything = evaluate(Walker, ToyWorld, tmp_path / "none", **told)
    assert everything.verdict is not None
    assert everything.verdict["decision"] is None
    assert len(everything.episodes) == 120


def test_scenes_are_looked_at_in_their_planned_order(theirs: Path) -> None:
    decided = Decided(theirs)
    tasks = ToyWorld().tasks
    plans = shuffled([Plan(tasks[e.task], e.seed) for e in decided.other.episodes], seed=3)
    assert plans != shuffled(plans, seed=3)

    def episode(plan: Plan, success: bool) -> Episode:
        return Episode(plan.task.name, plan.task.family, plan.seed, "", success, 5)

    # failures that ended first, out of order, say nothing while the first scene is still being played
    early = {number: episode(plan, False) for number, plan in enumerate(plans) if number > 0}
    assert not decided.reached(plans, early)
    assert decided.verdict(plans, early).pairs == 0
    assert decided.reached(plans, {0: episode(plans[0], True), **early})
    # an episode that ended in an error is no outcome
    broken = {number: replace(found, error="the simulator died") for number, found in early.items()}
    assert not Decided(theirs).reached(plans, {0: episode(plans[0], False), **broken})


def test_what_cannot_be_compared_is_told(theirs: Path, tmp_path: Path) -> None:
    told: dict[str, Any] = {"episodes_per_task": 2, **OPTIONS}
    with pytest.raises(ValueError, match="give both"):
        evaluate(Walker, ToyWorld, tmp_path, stop="decided", **told)
    with pytest.raises(ValueError, match="choose never or decided"):
        evaluate(Walker, ToyWorld, tmp_path, stop="soon", **told)
    (tmp_path / "empty").mkdir()
    for other in ("nothing", "empty"):
        with pytest.raises(ValueError, match=f"eval.against=.*/{other}: there are no results"):
            evaluate(Walker, ToyWorld, tmp_path, stop="decided", against=tmp_path / other, **told)
    with pytest.raises(ValueError, match="evaluate with its seed, 0"):
        evaluate(Walker, ToyWorld, tmp_path, stop="decided", against=theirs, seed=9, **told)
