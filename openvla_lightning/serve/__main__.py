"""Serve a policy to robots.

python -m openvla_lightning.serve                                   # the newest checkpoint, on this machine only
python -m openvla_lightning.serve ckpt_path=openvla/openvla-7b unnorm_key=bridge_orig quantisation=int4
OPENVLA_LIGHTNING_TOKEN=secret python -m openvla_lightning.serve server.host=0.0.0.0
"""

import logging

import hydra
from omegaconf import DictConfig

from openvla_lightning.checkpoint.newest import newest_checkpoint
from openvla_lightning.cli.command import command
from openvla_lightning.config import CONF, ConfigError, expand_home, for_people, validate


@command("serve")
@hydra.main(version_base="1.3", config_path=CONF, config_name="serve")
def main(cfg: DictConfig) -> None:
    """Serve the policy that `cfg` describes."""
    from hydra.utils import instantiate  # after Hydra: --help and --cfg stay instant

    from openvla_lightning.checkpoint.format import CheckpointError
    from openvla_lightning.statistics import UnknownDatasetError

    with for_people(ConfigError, CheckpointError):
        expand_home(cfg)
        if cfg.ckpt_path == "last":
            newest = newest_checkpoint(cfg.paths.log_dir)
            if newest is None:
                raise ConfigError(
                    f"no checkpoint below {cfg.paths.log_dir}/ yet; say which: ckpt_path=openvla/openvla-7b"
                )
            logging.getLogger(__name__).info(f"Serving {newest}")
            cfg.ckpt_path = str(newest)
        validate(cfg)
        try:
            instantiate(cfg.server, load=instantiate(cfg.policy, _convert_="all"), _convert_="all")
        except (FileNotFoundError, UnknownDatasetError, ValueError) as error:
            raise ConfigError(str(error)) from error


if __name__ == "__main__":
    main()
