"""A training whose output is a file says how far it is, and what each validation found."""

import re
from pathlib import Path

import warm_scripts


def test_a_log_has_lines_from_the_first_steps_to_the_last(tmp_path: Path) -> None:
    small = ["+debug=tiny", f"paths.log_dir={tmp_path}/runs", "trainer.max_steps=40", "trainer.val_check_interval=20"]
    small += ["trainer.limit_val_batches=1", "data.num_workers=0", "~callbacks.learning_curve", "data/source=synthetic"]
    said = warm_scripts.finish("train.py", tmp_path / "log", *small, "data/mix=bridge", "trainer.log_every_n_steps=1")
    lines = re.findall(r"^training: .*", said, re.M)
    assert 2 <= len(lines) <= 20, "one for every 5 %, but not two in a second"
    first = r"training: \d+ of 40 steps \(\d+%\), \S+ steps/s, \d:\d\d:\d\d left, loss \d+\.\d+  accuracy \d\.\d+"
    assert re.match(first, lines[0])
    assert lines[-1].startswith("training: 40 of 40 steps (100%)")
    assert re.findall(r"^step (\d+): held out .*accuracy \d\.\d+.*L1 \d", said, re.M) == ["20", "40"]
    (log,) = (tmp_path / "runs").rglob("train.log")
    assert len(re.findall(r"^training: ", log.read_text(), re.M)) == len(lines)
