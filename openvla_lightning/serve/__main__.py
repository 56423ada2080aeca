"""Serve a policy to robots.

python -m openvla_lightning.serve                                   # the newest checkpoint, on this machine only
python -m openvla_lightning.serve ckpt_path=openvla/openvla-7b unnorm_key=bridge_orig quantisation=int4
OPENVLA_LIGHTNING_TOKEN=secret python -m openvla_lightning.serve server.host=0.0.0.0
"""

from importlib import import_module
from importlib.util import find_spec

import hydra
from omegaconf import DictConfig

from openvla_lightning.cli.command import command, lasting_imports
from openvla_lightning.config import CONF, ConfigError, expand_home, find_checkpoint, for_people, validate
from openvla_lightning.runtime.extras import install

NEEDED = ("fastapi", "json_numpy", "msgpack", "prometheus_client", "uvicorn", "websockets")


@command("serve")
@hydra.main(version_base="1.3", config_path=CONF, config_name="serve")
def main(cfg: DictConfig) -> None:
    """Serve the policy of `cfg`."""
    run(cfg)


def run(cfg: DictConfig) -> None:
    """Do the same with a config composed elsewhere; errors in it end the process with one message."""
    from hydra.utils import instantiate  # after Hydra: --help and --cfg stay instant

    from openvla_lightning.checkpoint.format import CheckpointError
    from openvla_lightning.statistics import UnknownDatasetError

    with for_people(ConfigError, CheckpointError, FileNotFoundError, UnknownDatasetError):
        if missing := [name for name in NEEDED if find_spec(name) is None]:
            raise ConfigError(f"serving needs {', '.join(missing)}: {install('serve')}")
        expand_home(cfg)
        find_checkpoint(cfg, "say which: ckpt_path=openvla/openvla-7b")
        validate(cfg)
        with lasting_imports():
            import_module("openvla_lightning.serve.server")
        instantiate(cfg.server, load=instantiate(cfg.policy, _convert_="all"), _convert_="all")


if __name__ == "__main__":
    main()
