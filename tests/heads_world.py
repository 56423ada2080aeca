"""Trainings of every action head, forked from one process as in training_world.py: `python heads_world.py FOLDER`."""

import sys
from pathlib import Path

from training_world import DDP, EXACT, FSDP, SMALL, kill, run

CHUNK = ["data.action_chunk=4", "trainer.max_steps=8", "trainer.val_check_interval=4", "save_every=2"]
HEADS = {
    "fast": ["action_head=fast"],
    "flow": ["action_head=flow", "action_head.width=32", "action_head.depth=2"],
    "insulated": ["action_head=flow", "action_head.width=32", "action_head.depth=2", "insulate=true"],
    "l1": ["action_head=l1", "model.film=masked"],
    "diffusion": ["action_head=diffusion", "action_head.steps=5"],
    "parallel": ["action_head.parallel=true"],
    "cogact": ["action_head=cogact", "action_head.hidden=32", "action_head.depth=2"],
}
"""Name -> overrides of train.py, with networks of a few thousand parameters."""


def main(root: Path) -> None:
    """Everything that test_heads.py looks at."""
    for name, head in HEADS.items():
        own = [*SMALL, *CHUNK, *head]
        run(root / name / "run", 1, *own)
        kill(root / f"{name}_killed" / "run", 1, *own)
        run(root / f"{name}_killed" / "run", 1, *own, "ckpt_path=last")
        adapter = ["strategy=lora", "rank=4", f"model.init_from={root}/{name}/run", "trainer.max_steps=4"]
        run(root / f"{name}_lora" / "run", 1, *own, *adapter)
        run(root / f"{name}_ddp" / "run", 2, *own, *DDP, "save_every=8")  # of these, only the curve is looked at
        run(root / f"{name}_fsdp" / "run", 2, *own, *FSDP, EXACT, "save_every=8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
