"""Statistics, results.json, report.md, charts, videos."""

import json
import re
import subprocess
import sys

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from PIL import Image
from rich.console import Console

from openvla_lightning.evaluation.video import FAILURE, SUCCESS, write_video
from openvla_lightning.report.chart import _short, draw_chart
from openvla_lightning.report.results import Episode, Results, SuccessRate, find_results, success_rate
from openvla_lightning.report.tables import markdown
from openvla_lightning.report.writing import CHART_NAME, compare, write_report


@pytest.mark.parametrize(
    ("successes", "episodes", "low", "high"),
    # Newcombe, Statistics in Medicine 17 (1998), table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval_against_published_values(successes, episodes, low, high):
    assert SuccessRate(successes, episodes).interval == pytest.approx((low, high), abs=5e-5)


counts = st.integers(1, 5000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@given(counts)
def test_wilson_interval_properties(count):
    successes, episodes = count
    rate = SuccessRate(successes, episodes)
    low, high = rate.interval
    assert 0 <= low <= rate.rate <= high <= 1
    assert low < high
    mirrored = SuccessRate(episodes - successes, episodes).interval
    assert mirrored == pytest.approx((1 - high, 1 - low))
    wide = SuccessRate(successes, episodes, confidence=0.99).interval
    assert wide[0] <= low
    assert high <= wide[1]
    more = SuccessRate(4 * successes, 4 * episodes).interval
    assert more[1] - more[0] < high - low


def test_no_episodes_is_no_knowledge():
    rate = success_rate([])
    assert rate.interval == (0.0, 1.0)
    assert str(rate) == "-"
    with pytest.raises(ValueError, match="3 of 2"):
        SuccessRate(3, 2)


def episodes(*outcomes: bool, family: str = "lift", **kwargs) -> list[Episode]:
    return [
        Episode(f"{family}_cube", family, i, f"{family} the cube", ok, 10 + i, **kwargs)
        for i, ok in enumerate(outcomes)
    ]


def results(label: str = "trained", **kwargs) -> Results:
    given = {"episodes": episodes(True, True, False) + episodes(False, family="put"), "env": "tabletop", **kwargs}
    return Results(label=label, **given)


def test_results_round_trip_and_summary(tmp_path):
    written = results(seed=3, checkpoint={"sha256": "ab"}, config={"rank": 32}, timing={"seconds": 1.5})
    path = written.save(tmp_path)
    assert Results.load(path) == Results.load(tmp_path) == written
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]
    summary = json.loads(path.read_text())["summary"]
    assert summary["overall"]["success_rate"] == written.score == 0.5
    assert summary["families"]["lift"]["mean_length"] == 11.0
    assert summary["tasks"]["put_cube"]["interval_95"] == pytest.approx([0.0, 0.793451], abs=1e-6)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"format": 99}', '{"format": 1, "label": "x", "episodes": [{}]}'])
def test_a_file_that_holds_no_results_is_named(tmp_path, content):
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"results\.json is not the results\.json of an evaluation"):
        Results.load(path)


def test_report_has_every_task_and_the_provenance(tmp_path):
    console = Console(record=True, width=120)
    shown = results(episodes=[*episodes(True, False), *episodes(True, family="put", video="videos/put.mp4")])
    shown.checkpoint = {"path": "runs/x.ckpt", "sha256": "abcd", "unnorm_key": "tabletop"}
    report = write_report(shown, tmp_path, console).read_text()
    assert "| lift_cube | 1 of 2 | 50.0 % | 9-91 % | 10.5 |" in report
    assert "| all tasks | 2 of 3 | 66.7 % |" in report
    assert "[success: put the cube](videos/put.mp4)" in report
    page = (tmp_path / "report.html").read_text()
    assert '<video controls preload="metadata" src="videos/put.mp4"></video>' in page
    assert "- sha256: `abcd`" in report
    assert "put_cube" in console.export_text()
    with Image.open(tmp_path / CHART_NAME) as chart:
        assert min(chart.size) > 300


def test_a_task_whose_episodes_all_failed_to_run_has_no_numbers(tmp_path):
    broken = episodes(False, False, family="put", error="no renderer", progress=0.3)
    write_report(results(episodes=[*episodes(True, False), *broken]), tmp_path, Console(quiet=True))
    row = next(line for line in (tmp_path / "report.md").read_text().splitlines() if line.startswith("| put_cube"))
    assert row == "| put_cube | 0 of 0 | - | 0-100 % | - | - | 2 |"
    write_report(results(episodes=broken), tmp_path, Console(quiet=True))
    page = (tmp_path / "report.md").read_text()
    assert "Every episode ended in an error." in page
    assert "nan" not in page


def test_report_of_an_interrupted_evaluation_says_so(tmp_path):
    report = write_report(results(complete=False), tmp_path, Console(quiet=True)).read_text()
    assert report.splitlines()[0] == "# Trained in tabletop (interrupted)"


def test_report_of_held_out_steps(tmp_path):
    dimension = {"token_accuracy": 0.5, "l1": 0.25, "l1_executed": 0.125}
    means = {"steps": 9, "token_accuracy": 0.5, "l1": 0.25}
    bins = [{"entropy": 0.1, **means}, {"entropy": 2.0, "token_accuracy": 0.25, "l1": 0.5}]
    scores = {**means, "dimensions": {"x": dimension}, "calibration": {"auroc": 0.75, "bins": bins}}
    offline = {**means, "datasets": {name: scores | {"tasks": {"lift | put": means}} for name in ("d", "e")}}
    found = Results("mine", "offline", offline=offline)
    assert found.score == 0.5
    report = write_report(found, tmp_path, Console(quiet=True)).read_text()
    assert "| x | 50.0 % | 0.2500 | 0.125 |" in report
    assert "| d | 50.0 % | 0.2500 |" in report
    assert "| 2.00 | 25.0 % | 0.5000 |" in report
    assert "| lift \\| put | 9 | 50.0 % | 0.2500 |" in report
    assert "more entropy than a right one in 75 % of pairs" in report
    assert "9 held-out steps. Offline scores are a poor predictor of success" in report
    assert not (tmp_path / CHART_NAME).exists()


def test_held_out_steps_of_a_head_without_ids_have_no_column_of_accuracies(tmp_path):
    means = {"steps": 9, "l1": 0.25}
    scores = {**means, "dimensions": {"x": {"l1": 0.25, "l1_executed": 0.125}}, "tasks": {"lift": means}}
    found = Results("mine", "offline", offline={**means, "datasets": {"d": scores}})
    report = write_report(found, tmp_path, Console(quiet=True)).read_text()
    assert "| dimension | L1 (normalised) | L1 as executed |" in report
    assert "| x | 0.2500 | 0.125 |" in report
    assert "| instruction | steps | L1 (normalised) |" in report
    assert "| lift | 9 | 0.2500 |" in report


def save_demo(folder):
    kinds = {"untrained": episodes(*[False] * 20), "pretrained": episodes(*[True] * 15, *[False] * 5)}
    for label, played in kinds.items():
        for task_set in ("pretraining", "new"):
            results(label, task_set=task_set, episodes=played).save(folder / label / task_set)
    shuffled = results("pretrained", task_set="pretraining", instructions="shuffled", episodes=kinds["untrained"])
    shuffled.save(folder / "shuffled")


def test_comparison_is_policies_by_task_sets(tmp_path):
    save_demo(tmp_path)
    report = compare([tmp_path / "untrained", tmp_path], tmp_path / "out", Console(quiet=True)).read_text()
    table = [line for line in report.splitlines() if line.startswith("|")]
    assert table[:5] == [
        "| policy | pretraining tasks | new tasks |",
        "| --- | ---: | ---: |",
        "| untrained | 0 % (0-16) | 0 % (0-16) |",
        "| pretrained | 75 % (53-89) | 75 % (53-89) |",
        "| pretrained, shuffled instructions | 0 % (0-16) | - |",
    ]
    assert (tmp_path / "out" / CHART_NAME).stat().st_size > 5000
    assert "| pretrained less untrained | +75.0 | +55 to +90 | 15 / 0 | 20 | < 0.001 | yes |" in report
    assert "| pretrained, shuffled instructions less untrained | +0.0 | +0 to +0 | 0 / 0 | 20 | 1.000 | no |" in report
    page = (tmp_path / "out" / "report.html").read_text()
    assert '<td style="text-align:right">75 % (53-89)</td>' in page
    assert 'src="data:image/png;base64,' in page


def test_seeds_of_one_policy_are_pooled_with_the_papers_row_beside(tmp_path):
    for seed, played in enumerate((episodes(True, True), episodes(True, False))):
        results("mine", task_set="libero_goal", seed=seed, episodes=played).save(tmp_path / str(seed))
    report = compare([tmp_path], console=Console(quiet=True)).read_text()
    assert re.search(r"\| mine \| 75 % \(\d+-\d+\), 2 seeds \|", report)
    assert "(Table 12: LoRA r=32, 3 x 500 rollouts) | 79.2 % |" in report
    one = write_report(results(task_set="libero_goal"), tmp_path / "one", Console(quiet=True)).read_text()
    assert "79.2 %" in one
    assert "Mean over tasks 33.3 %" in one


def test_comparison_has_actions_per_second_of_the_time_in_which_a_policy_worked(tmp_path):
    for label, task_set, seconds in (("fast", "a", 0.1), ("fast", "b", 0.3), ("untimed", "a", None)):
        timing = {"seconds_per_call": seconds, "actions_per_call": 16.0} if seconds else {}
        episodes = [Episode("lift", "lift", 1, "lift it", True, 9)]
        results = Results(label=label, env="toy", task_set=task_set, episodes=episodes, timing=timing)
        results.save(tmp_path / f"{label}_{task_set}")
    page = compare([tmp_path]).read_text()
    assert "| policy | a tasks | b tasks | actions per second |" in page
    assert re.search(r"\| fast \|.*\| 80 \|", page), "32 actions in 0.4 s"
    assert re.search(r"\| untimed \|.*\| - \| - \|", page)


def test_comparison_from_the_command_line(tmp_path):
    save_demo(tmp_path)
    command = [sys.executable, "-m", "openvla_lightning.report"]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "75 % (53-89)" in done.stdout
    assert (tmp_path / "report.md").exists()
    failed = subprocess.run([*command, str(tmp_path / "out")], capture_output=True, text=True)
    assert failed.returncode == 2
    assert "evaluate something first" in failed.stderr


def test_comparison_refuses_two_of_the_same(tmp_path):
    results().save(tmp_path / "a")
    results().save(tmp_path / "b")
    with pytest.raises(
        ValueError, match=r"a/results.json and .*b/results.json are both 'trained' on all tasks with seed 0"
    ):
        compare([tmp_path], console=Console(quiet=True))
    assert len(find_results([tmp_path, tmp_path / "a"])) == 2


def test_chart_draws_whiskers_to_the_interval(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    drawn = []
    original = Axes.bar

    def bar(self, *args, **kwargs):
        drawn.append((args, kwargs))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Axes, "bar", bar)
    bars = {"new": {"a": SuccessRate(7, 10)}, "old": {"a": SuccessRate(0, 10), "b": SuccessRate(10, 10)}}
    draw_chart(bars, tmp_path / "c.png", "t")
    (_, heights, *_), kwargs = drawn[0]
    below, above = kwargs["yerr"]
    for height, low, high, rate in zip(heights, below, above, (SuccessRate(7, 10), SuccessRate(0, 10)), strict=True):
        assert (height - low, height + high) == pytest.approx([100 * end for end in rate.interval])


@pytest.mark.parametrize(("success", "colour"), [(True, SUCCESS), (False, FAILURE)])
def test_video_decodes_to_its_frames_with_caption_and_mark(tmp_path, success, colour):
    shades = range(0, 240, 20)
    frames = [np.full((48, 64, 3), shade, np.uint8) for shade in shades]
    path = write_video(tmp_path / "sub" / "v.mp4", frames, "put the green cube on the purple plate", success, fps=5)
    with av.open(str(path)) as container:
        assert container.streams.video[0].average_rate == 5
        decoded = [frame.to_ndarray(format="rgb24").astype(int) for frame in container.decode(video=0)]
    assert len(decoded) == len(frames)
    picture = decoded[0][:288]
    assert picture.shape[1] == 384
    for shade, frame in zip(shades, decoded, strict=True):
        assert abs(frame[:288].mean() - shade) < 4
    caption = decoded[0][288:]
    assert (caption[:, :300].min(axis=-1) > 200).sum() > 200, "light letters"
    marked = np.abs(caption[:, 330:] - np.array(colour)).sum(axis=-1) < 60
    other = np.abs(caption[:, 330:] - np.array(FAILURE if success else SUCCESS)).sum(axis=-1) < 60
    assert marked.sum() > 10
    assert not other.any()


def test_video_handles_odd_sizes_and_long_instructions(tmp_path):
    frames = [np.zeros((101, 401, 3), np.uint8)] * 2
    path = write_video(tmp_path / "v.mp4", frames, "stack every cube " * 12, False)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.width == 402
        assert stream.height > 102 + 60
    with pytest.raises(ValueError, match="no frames"):
        write_video(tmp_path / "none.mp4", [], "lift", True)


def test_a_chart_of_long_names_shows_what_tells_them_apart():
    names = ["pick_up_the_bowl_on_the_stove_and_place_it_on_the_plate", "pick_up_the_bowl_and_place_it_on_the_plate"]
    assert _short([*names, "all tasks"]) == ["on the stove", "", "all tasks"]
    assert _short(["lift", "put", "all tasks"]) == ["lift", "put", "all tasks"]


def test_a_bar_in_a_cell_stays_in_the_cell() -> None:
    rows = [["policy", "success"], ["a|b", "1"], [r"escaped \| before", "2"]]
    page = MarkdownIt("commonmark").enable("table").render(markdown(rows))
    assert re.findall(r"<td[^>]*>(.*?)</td>", page) == ["a|b", "1", "escaped | before", "2"]
