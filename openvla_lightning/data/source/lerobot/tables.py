"""Parquet tables and statistics in LeRobot's layout."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from openvla_lightning.data.images import Pixels
from openvla_lightning.runtime.files import written_whole

QUANTILES = {"q01": 0.01, "q10": 0.1, "q50": 0.5, "q90": 0.9, "q99": 0.99}
PICTURES_MEASURED = 100
"""Pictures that are measured per episode at most, evenly spread, as in the lerobot library."""
NOT_MEASURED = ("string",)


def write_table(path: Path, columns: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    """Write columns (pyarrow arrays) to a parquet file atomically."""
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table(dict(columns))
    if metadata:
        table = table.replace_schema_metadata(dict(metadata))
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as beside:
        pyarrow.parquet.write_table(table, beside)


def column(values: NDArray[Any]) -> Any:
    """Values [T, D] as lists of D, or as plain numbers if D is 1, as the library stores them."""
    import pyarrow

    if values.dtype.kind in "OUS":
        return pyarrow.array(values.ravel().tolist(), pyarrow.string())
    flat = pyarrow.array(np.ascontiguousarray(values).ravel())
    width = int(np.prod(values.shape[1:], dtype=np.int64))
    return flat if values.ndim == 1 or width == 1 else pyarrow.FixedSizeListArray.from_arrays(flat, width)


def pictures(encoded: Sequence[bytes]) -> Any:
    """Encoded pictures as the library stores them in parquet."""
    import pyarrow

    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    return pyarrow.array([{"bytes": one, "path": f"frame-{i:06d}.png"} for i, one in enumerate(encoded)], kind)


def huggingface(dtypes: Mapping[str, tuple[str, int]]) -> dict[str, str]:
    """The metadata that the library `datasets` needs in a file, from column -> (dtype, width)."""
    features: dict[str, Any] = {}
    for name, (dtype, width) in dtypes.items():
        value = {"dtype": dtype, "_type": "Value"}
        features[name] = {"_type": "Image"} if dtype == "image" else value
        if dtype != "image" and width > 1:
            features[name] = {"feature": value, "length": width, "_type": "List"}
    return {"huggingface": json.dumps({"info": {"features": features}})}


def write_tasks(path: Path, tasks: Sequence[str]) -> None:
    """Write `meta/tasks.parquet`, where the text is the index of a pandas table."""
    import pyarrow

    described = {
        "index_columns": ["task"],
        "column_indexes": [
            {"name": None, "field_name": None, "pandas_type": "unicode", "numpy_type": "object",
             "metadata": {"encoding": "UTF-8"}}
        ],
        "columns": [
            {"name": "task_index", "field_name": "task_index", "pandas_type": "int64", "numpy_type": "int64",
             "metadata": None},
            {"name": "task", "field_name": "task", "pandas_type": "unicode", "numpy_type": "object", "metadata": None},
        ],
        "attributes": {},
        "creator": {"library": "pyarrow", "version": pyarrow.__version__},
        "pandas_version": "2.2.3",
    }  # fmt: skip
    columns = {"task_index": pyarrow.array(range(len(tasks)), pyarrow.int64()), "task": pyarrow.array(tasks)}
    write_table(path, columns, {"pandas": json.dumps(described)})


def measure(values: NDArray[Any]) -> dict[str, list[Any]]:
    """Exact statistics of a column [T, D]."""
    numbers = values.reshape(len(values), -1).astype(np.float64)
    found: dict[str, Any] = {
        "min": numbers.min(axis=0).tolist(),
        "max": numbers.max(axis=0).tolist(),
        "mean": numbers.mean(axis=0).tolist(),
        "std": numbers.std(axis=0).tolist(),
        "count": [len(numbers)],
    }
    return found | {name: np.quantile(numbers, q, axis=0).tolist() for name, q in QUANTILES.items()}


def measure_pictures(shown: Sequence[Pixels]) -> dict[str, Any]:
    """Statistics per colour [3, 1, 1], in 0..1, of uint8 [H, W, 3] pictures, from a sample of pictures and pixels."""
    chosen = np.linspace(0, len(shown) - 1, min(len(shown), PICTURES_MEASURED)).round().astype(int)
    pixels = np.concatenate([shown[i][::2, ::2].reshape(-1, 3) for i in chosen.tolist()]) / 255.0
    found = {
        "min": pixels.min(axis=0), "max": pixels.max(axis=0), "mean": pixels.mean(axis=0), "std": pixels.std(axis=0),
    } | {name: np.quantile(pixels, q, axis=0) for name, q in QUANTILES.items()}  # fmt: skip
    return {name: value.reshape(3, 1, 1).tolist() for name, value in found.items()} | {"count": [len(chosen)]}


def pool_pictures(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Statistics of pictures over episodes: mean and std of the union, extremes, and averages of the quantiles."""
    counts = np.array([part["count"][0] for part in parts], np.float64)
    share = (counts / counts.sum()).reshape(-1, 1, 1, 1)
    arrays = {name: np.array([part[name] for part in parts]) for name in ("min", "max", "mean", "std", *QUANTILES)}
    mean = (share * arrays["mean"]).sum(axis=0)
    variance = (share * (arrays["std"] ** 2 + (arrays["mean"] - mean) ** 2)).sum(axis=0)
    found = {"min": arrays["min"].min(axis=0), "max": arrays["max"].max(axis=0), "mean": mean, "std": np.sqrt(variance)}
    found |= {name: (share * arrays[name]).sum(axis=0) for name in QUANTILES}
    return {name: value.tolist() for name, value in found.items()} | {"count": [int(counts.sum())]}
