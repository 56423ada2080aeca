"""Trainings over several processes, forked from one that has everything imported: `python training_world.py FOLDER`."""

import gc
import os
import random
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import peft.tuners.lora  # noqa: F401  what adapters import late
from hydra import compose, initialize_config_dir

import openvla_lightning.run.fit
from openvla_lightning.checkpoint.newest import newest_checkpoint

CONF = str(Path(__file__).parents[1] / "conf")
# Batch normalisation makes numbers depend on how a batch is shared out: a tower without it.
TOWER = ["model/vision_backbone=tiny_fused", "~model.vision_backbone.towers.stem"]
QUICK = ["trainer.log_every_n_steps=1", "data.num_workers=0"]
QUICK += [f"~callbacks.{name}" for name in ("learning_curve", "costs", "samples")]  # tests of their own
SMALL = ["+debug=tiny", *TOWER, *QUICK, "data.global_batch_size=8", "save_every=4", "trainer.gradient_clip_val=0.1"]
DDP = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
FSDP = ["trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=2"]
EXACT = "trainer.strategy.param_dtype=float32"


def fork(folder: Path, world: int, *overrides: str) -> list[int]:
    """Processes that train into `folder`, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    gc.freeze()  # else each fork looks through all that was imported
    return [process for rank in range(world) if (process := os.fork()) or train(folder, rank, world, port, overrides)]


def train(folder: Path, rank: int, world: int, port: str, overrides: tuple[str, ...]) -> int:
    """Train as process `rank`; never returns."""
    log = os.open(f"{folder}.{rank}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if world > 1:
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "GROUP_RANK": 0}
        os.environ.update({name: str(value) for name, value in ranks.items()})
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, TORCHELASTIC_RUN_ID="test")
    code = 1
    try:
        with initialize_config_dir(CONF, version_base="1.3"):
            own = [f"paths.output_dir={folder}", f"paths.log_dir={folder.parent.parent}"]
            openvla_lightning.run.fit.fit(compose("train", [*own, f"run_name={folder.parent.name}", *overrides]))
        code = 0
    except SystemExit as error:
        print(error)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(code)


def run(folder: Path, world: int, *overrides: str) -> None:
    """Train to the end."""
    started = time.monotonic()
    folder.parent.mkdir(exist_ok=True)
    processes = fork(folder, world, *overrides)
    codes = [os.waitpid(process, 0)[1] for process in processes]
    print(f"{folder.parent.name}/{folder.name}: {time.monotonic() - started:.1f} s", flush=True)
    if any(codes):
        sys.exit(Path(f"{folder}.0.log").read_text()[-6000:])


def kill(folder: Path, world: int, *overrides: str) -> None:
    """Train until some time after the first checkpoint, then no more."""
    folder.parent.mkdir(exist_ok=True)
    processes = fork(folder, world, *overrides)
    while newest_checkpoint(folder) is None:
        if any(os.waitpid(process, os.WNOHANG)[0] for process in processes):
            sys.exit(Path(f"{folder}.0.log").read_text()[-6000:])
        time.sleep(0.01)
    time.sleep(random.uniform(0, 1.0))
    for process in processes:
        os.kill(process, signal.SIGKILL)
    for process in processes:
        os.waitpid(process, 0)


def main(root: Path) -> None:
    """Everything that test_parallel.py looks at."""
    run(root / "one" / "run", 1, *SMALL)
    run(root / "accumulated" / "run", 1, *SMALL, "batch_size_per_device=2")
    for name, strategy in (("ddp", DDP), ("fsdp", [*FSDP, EXACT])):
        run(root / name / "run", 2, *SMALL, *strategy)
        kill(root / f"{name}_killed" / "run", 2, *SMALL, *strategy, "callbacks.checkpoint.asynchronous=true")
        run(root / f"{name}_killed" / "run", 2, *SMALL, *strategy, "ckpt_path=last")
    halfway = f"ckpt_path={root}/fsdp/run/checkpoints/step_000008.ckpt"
    run(root / "alone" / "run", 1, *SMALL, *FSDP, EXACT, "trainer.devices=1", halfway)
    recipe = ["+experiment=oxe_full", "+debug=tiny", *QUICK, *FSDP, "trainer.max_steps=6"]
    recipe += ["save_every=2", "trainer.val_check_interval=3", "callbacks.checkpoint.keep=1"]
    run(root / "recipe" / "run", 2, *recipe, "callbacks.checkpoint.asynchronous=true", "trainer.strategy.replicas=2")
    adapter = ["strategy=lora", "rank=4", f"model.init_from={root}/one/run", "trainer.max_steps=4"]
    run(root / "adapter" / "run", 2, *SMALL, *FSDP, EXACT, *adapter)
    run(root / "adapter_alone" / "run", 1, *SMALL, *adapter)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
