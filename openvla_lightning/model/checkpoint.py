"""The documented entry to `openvla_lightning.checkpoint`: `python -m openvla_lightning.model.checkpoint export`.

Like `VLA.from_pretrained`, it is part of the public interface and calls a package above the model.
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import torch

from openvla_lightning.checkpoint.format import CheckpointError
from openvla_lightning.checkpoint.load import load_checkpoint, load_vla, load_weights
from openvla_lightning.model.hub import check_source

__all__ = ["CheckpointError", "check_source", "load_checkpoint", "load_vla", "load_weights"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of `python -m openvla_lightning.model.checkpoint export`."""
    from openvla_lightning.checkpoint.export import export

    parser = argparse.ArgumentParser("python -m openvla_lightning.model.checkpoint")
    command = parser.add_subparsers(required=True, metavar="export").add_parser(
        "export", help="write a run in the released layout, its adapter merged"
    )
    command.add_argument("source", help="folder of a run, its .ckpt, or any other model that can be loaded")
    command.add_argument("folder", type=Path, help="folder to write")
    command.add_argument("--base", help="where the base of an adapter is now, if it has moved")
    command.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: as the base is stored")
    command.add_argument("--layout", choices=["released", "cogact"], default="released", help="default: released")
    command.add_argument("--overwrite", action="store_true", help="replace the folder if it exists")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    try:
        folder = export(options.source, options.folder, options.base, dtype, options.overwrite, layout=options.layout)
    except (ValueError, OSError) as error:  # a CheckpointError, or a model that the layout has no place for
        raise SystemExit(f"error: {error}") from None
    print(f"written to {folder}")


if __name__ == "__main__":
    main()
