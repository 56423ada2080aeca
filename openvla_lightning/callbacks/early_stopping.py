"""Lightning's early stopping, which names a number that nothing logs as one mistakes it on the command line."""

import lightning as L
from lightning.pytorch.callbacks import early_stopping
from lightning.pytorch.utilities.exceptions import MisconfigurationException


class EarlyStopping(early_stopping.EarlyStopping):
    """Stops when `monitor` no longer improves. Checkpoints keep its state under Lightning's own name of the class."""

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compare with the best value so far.

        Raises:
            MisconfigurationException: `monitor` is not logged; it lists what is.
        """
        logged = trainer.callback_metrics
        if self.strict and not trainer.sanity_checking and self.monitor not in logged:
            held_out = ", ".join(sorted(name for name in logged if name.startswith("val/")))
            raise MisconfigurationException(
                f"callbacks.early_stop.monitor={self.monitor} is not logged by this run; choose one of {held_out}"
            )
        super().on_validation_end(trainer, pl_module)
