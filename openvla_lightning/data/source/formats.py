"""The reader of each dataset of a mixture, by how the dataset is stored."""

from pathlib import Path
from typing import Any

from openvla_lightning.data.oxe.catalogue import dataset_spec
from openvla_lightning.data.oxe.spec import DatasetSpec
from openvla_lightning.data.source import Source
from openvla_lightning.data.source.faults import BadTrajectories
from openvla_lightning.data.source.rlds import RLDS


def stored(
    root: str | Path,
    name: str,
    spec: DatasetSpec | None = None,
    workers: int | None = None,
    bad_trajectories: BadTrajectories = "error",
    check_images: bool = False,
    cache_dir: str | Path | None = None,
    cache_gb: float = 50.0,
) -> Source:
    """The dataset `name`: RLDS below `root`, or what its description says of `format`, `path` and `hub`.

    The arguments are those of `RLDS`; `LeRobot` takes the same.

    Raises:
        ValueError: an argument makes no sense.
    """
    described = spec or dataset_spec(name)
    options: dict[str, Any] = {"workers": workers, "bad_trajectories": bad_trajectories, "check_images": check_images}
    options |= {"cache_dir": cache_dir, "cache_gb": cache_gb}
    if described.format == "lerobot":
        from openvla_lightning.data.source.lerobot import LeRobot  # pyarrow is not needed by those who have none

        return LeRobot(root, name, spec, **options)
    return RLDS(root, name, spec, **options)
