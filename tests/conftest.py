"""Fixtures that several test files share."""

import functools
import gc
import os
from collections.abc import Iterator
from pathlib import Path

import golden_sets
import hypothesis
import pytest
import torch
import torch.utils.data

pytest_plugins = ["small_vla"]
gc.disable()  # until everything is imported

hypothesis.settings.register_profile("here", deadline=None)  # a busy disk is no fault of the code
hypothesis.settings.load_profile("here")
torch.set_num_threads(1)  # tensors here are small: more threads mostly wait for each other
# Else the threads of a fork's first backward pass race to replace the pool that it has from here, which aborts it.
os.register_at_fork(after_in_child=functools.partial(torch.set_num_threads, 1))

# Loaders that are garbage after an error wait this long for each worker, which is never told; torch waits 5 seconds.
torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.5


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rewrite-golden", action="store_true", help="record what the recipes of test_golden_losses.py give now"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever asks for golden numbers is marked so."""
    for item in items:
        if {"golden", "each_golden"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.golden)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Random weights and inputs are the same in every run: else two ids that nearly tie tip a comparison one day."""
    torch.manual_seed(0)


def pytest_collection_finish() -> None:
    """What was imported stays: looking through it for garbage took a fifteenth of the time, and copied it in forks."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    """Else native modules report what is still there when the process ends."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of all golden numbers made by released code (environment variable OPENVLA_GOLDEN); skips without it."""
    folder = os.environ.get("OPENVLA_GOLDEN")
    if not folder:
        pytest.skip("OPENVLA_GOLDEN is not set, and the small set of golden numbers has none of these")
    path = Path(folder)
    if not path.is_dir():
        pytest.skip(f"OPENVLA_GOLDEN={folder} is not a folder")
    return path


@pytest.fixture(scope="session", params=golden_sets.NAMES)
def each_golden(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of golden numbers of the released code: the small set kept here, and `golden` where there is one."""
    if request.param == "whole":
        return request.getfixturevalue("golden")
    folder = tmp_path_factory.mktemp("golden")
    golden_sets.unpack(golden_sets.SMALL, folder)
    return folder


@pytest.fixture(scope="session")
def no_account(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nobody is logged in to Weights & Biases, whoever runs the tests, and its caches are apart."""
    folder = tmp_path_factory.mktemp("no_account")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_API_KEY", "WANDB_MODE"):
            patch.delenv(name, raising=False)
        for name in ("NETRC", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
            patch.setenv(name, str(folder / name.lower()))
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("WANDB_CONSOLE", "off")
        yield


@pytest.fixture(scope="session")
def wandb_run(tmp_path_factory: pytest.TempPathFactory, no_account: None) -> Path:
    """The folder of a training with `logger=wandb` that was killed after its first checkpoint, and resumed."""
    import warm_scripts

    root = tmp_path_factory.mktemp("wandb_run")
    told = [
        *("+debug=tiny", f"paths.log_dir={root}", "logger=wandb", "logger.wandb.artifacts=true"),
        *("trainer.max_steps=6", "trainer.val_check_interval=3", "trainer.log_every_n_steps=1", "save_every=2"),
        *("data/mix=bridge_rt_1", "+callbacks.throughput.peak_tflops=1"),
    ]
    warm_scripts.kill_after(lambda: [*root.rglob("step_*.ckpt")], "train.py", root / "log", *told)
    assert "Resuming" in warm_scripts.finish("train.py", root / "log", *told, "ckpt_path=last")
    (folder,) = (root / "train").iterdir()
    return folder
