"""Choice of the reader of a dataset by its storage format."""

import inspect
from pathlib import Path
from typing import Any

from openvla_lightning.data.oxe.catalogue import dataset_spec
from openvla_lightning.data.oxe.spec import DatasetSpec
from openvla_lightning.data.source import Source
from openvla_lightning.data.source.indexed import IndexedSource
from openvla_lightning.data.source.rlds import RLDS


def stored(root: str | Path, name: str, spec: DatasetSpec | None = None, **options: Any) -> Source:
    """The dataset `name`: RLDS below `root`, or as `format`, `path` and `hub` in its description say.

    The arguments are those of `IndexedSource`.

    Raises:
        ValueError: an argument is not valid.
    """
    described = spec or dataset_spec(name)
    if described.format == "lerobot":
        from openvla_lightning.data.source.lerobot import LeRobot  # imported here, because only LeRobot needs pyarrow

        return LeRobot(root, name, spec, **options)
    return RLDS(root, name, spec, **options)


stored.__signature__ = inspect.signature(IndexedSource)  # type: ignore[attr-defined]  # checks of configs use it
