"""TensorBoard event files in the run's folder."""

from importlib.util import find_spec

from lightning.pytorch.loggers import TensorBoardLogger as LightningTensorBoardLogger

from openvla_lightning.runtime.extras import install


class TensorBoardLogger(LightningTensorBoardLogger):
    """Writes `<save_dir>/tensorboard`; a resumed run adds a file, and TensorBoard shows one continuous curve.

    Args:
        save_dir: the run's folder.

    Raises:
        ModuleNotFoundError: without the package `tensorboard`.
    """

    def __init__(self, save_dir: str) -> None:
        if find_spec("tensorboard") is None:
            raise ModuleNotFoundError(f"logger=tensorboard needs a package: {install('tensorboard')}")
        super().__init__(save_dir, name="", version="tensorboard", default_hp_metric=False)
