"""Convert a dataset to another format.

python -m openvla_lightning.data.convert rlds-to-lerobot data/bridge_orig lerobot/bridge_orig --fps 5
python -m openvla_lightning.data.convert lerobot-to-rlds /data/my_robot data/my_robot/1.0.0
python -m openvla_lightning.data.convert hdf5-to-rlds libero_spatial data/libero_spatial/1.0.0 --turned
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from openvla_lightning.runtime.extras import install


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; an error in the arguments or the data ends it with one message."""
    from openvla_lightning.data.convert import hdf5, lerobot, rlds
    from openvla_lightning.data.source.lerobot.encoding import Encoding

    arguments = _parser().parse_args(argv)
    options = {"workers": arguments.workers}
    try:
        if arguments.command == "rlds-to-lerobot":
            found = rlds.to_lerobot(
                arguments.source,
                arguments.target,
                fps=arguments.fps,
                action=arguments.action or ("action",),
                language=arguments.language,
                pictures=arguments.pictures,
                encoding=Encoding(arguments.codec, arguments.key_every, arguments.crf),
                robot_type=arguments.robot_type,
                episodes_per_file=arguments.episodes_per_file,
                **options,
            )
        elif arguments.command == "lerobot-to-rlds":
            options |= {"episodes_per_shard": arguments.episodes_per_shard}
            found = lerobot.to_rlds(
                arguments.source, arguments.target, bad_trajectories=arguments.bad_trajectories, **options
            )
        else:
            options |= {"episodes_per_shard": arguments.episodes_per_shard}
            found = hdf5.to_rlds(
                arguments.source, arguments.target, language=arguments.language, turned=arguments.turned, **options
            )
    except ImportError as error:
        sys.exit(f"{error}: {install('hdf5')}" if error.name == "h5py" else str(error))
    except (ValueError, OSError, KeyError) as error:
        sys.exit(str(error.args[0]) if isinstance(error, KeyError) else str(error))
    print(f"{arguments.target}: {found}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    made = {}
    for name, about in (
        ("rlds-to-lerobot", "an RLDS dataset becomes a LeRobot one, v3.0"),
        ("lerobot-to-rlds", "a LeRobot dataset, v2.0 to v3.0, becomes an RLDS one"),
        ("hdf5-to-rlds", "files of robomimic, LIBERO or ALOHA become an RLDS dataset"),
    ):
        made[name] = commands.add_parser(name, help=about, description=about)
        made[name].add_argument("source", type=Path, help="what to read")
        made[name].add_argument("target", type=Path, help="folder to write, for RLDS <name>/<version>")
        made[name].add_argument("--workers", type=int, default=None, help="processes; default: one per core")
    out = made["rlds-to-lerobot"]
    out.add_argument("--fps", type=float, default=None, help="steps per second; default: what is known of the dataset")
    out.add_argument("--action", action="append", help="a path that becomes part of `action`; may be given many times")
    out.add_argument("--language", default="language_instruction", help="path of the instruction")
    out.add_argument("--pictures", choices=("video", "png"), default="video", help="png: without loss, and larger")
    out.add_argument("--codec", choices=("h264", "av1"), default="h264", help="h264 decodes fastest, av1 is smaller")
    out.add_argument("--key-every", type=int, default=2, help="frames from one key frame to the next")
    out.add_argument("--crf", type=int, default=30, help="quality of videos, 0 (best) to 51")
    out.add_argument("--robot-type", default=None, help="what LeRobot calls the robot")
    out.add_argument("--episodes-per-file", type=int, default=50)
    made["lerobot-to-rlds"].add_argument("--bad-trajectories", choices=("error", "skip"), default="error")
    for name in ("lerobot-to-rlds", "hdf5-to-rlds"):
        made[name].add_argument("--episodes-per-shard", type=int, default=64)
    made["hdf5-to-rlds"].add_argument("--language", default=None, help="what the robot was told, if no file says so")
    made["hdf5-to-rlds"].add_argument("--turned", action="store_true", help="turn pictures by 180 degrees (LIBERO)")
    return parser


if __name__ == "__main__":
    main()
