"""Commands that need a plugin of Hydra, and whether it is there."""

import importlib.util

import pytest

PLUGINS = {
    "launcher=slurm": "hydra_submitit_launcher",
    "launcher=gpus": "hydra_joblib_launcher",
    "sweep=search": "hydra_optuna_sweeper",
}


def skip_without_plugin(arguments: str) -> None:
    """Skip the test of a command whose plugin is not installed."""
    for option, plugin in PLUGINS.items():
        if option in arguments and importlib.util.find_spec(f"hydra_plugins.{plugin}") is None:
            pytest.skip(f"{plugin} is not installed")
