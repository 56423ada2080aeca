"""Describe a LeRobot dataset: print its contents as a draft of a file for conf/data/mix/.

python -m openvla_lightning.data.source.lerobot /data/my_robot > conf/data/mix/my_robot.yaml
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from openvla_lightning.data.source.lerobot.description import draft
from openvla_lightning.data.source.lerobot.metadata import read_metadata


def main(argv: Sequence[str] | None = None) -> None:
    """Print the description of the dataset in a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the dataset: the folder that holds meta/info.json")
    parser.add_argument("--name", default=None, help="its name in a mixture; default: the folder's")
    arguments = parser.parse_args(argv)
    folder = arguments.folder.expanduser().resolve()
    try:
        print(draft(read_metadata(folder), arguments.name or folder.name), end="")
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
