"""Sources of steps: RLDS folders, LeRobot folders, or random data. Only this package uses tfds, pyarrow and av."""

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from openvla_lightning.data.images import ImageMode, Pixels
    from openvla_lightning.data.oxe.spec import DatasetSpec
    from openvla_lightning.data.source.index import Index
    from openvla_lightning.statistics import DatasetStatistics


class Source(Protocol):
    """One dataset. A reader's class derives from this and implements the methods that have no body here."""

    name: str

    @property
    def spec(self) -> "DatasetSpec":
        """The dataset's description."""

    @property
    def index(self) -> "Index":
        """All data of every step except pixels."""

    @property
    def statistics(self) -> "DatasetStatistics":
        """Statistics of actions and proprioception over all splits, as released."""

    @property
    def remarks(self) -> tuple[str, ...]:
        """Further remarks on the files for the data report; each is a sentence without a full stop."""
        return ()

    def where(self, step: int) -> str:
        """The place of a step of the index, in words: trajectory, step in it, file."""
        return self.index.where(step)

    def missing(self) -> str | None:
        """What is missing and where to get it; None if nothing is missing. Takes milliseconds."""

    def check(self) -> None:
        """Raise ValueError if the description names something that the files lack. Takes milliseconds."""
        return

    def prepare(self) -> None:
        """Do the slow preparation, once and in one process."""

    def measure(self, steps: "NDArray[np.int32]") -> "DatasetStatistics":
        """Statistics of the given steps only."""

    def encoded(self, role: str, step: int) -> bytes | None:
        """The stored bytes of the image of a camera role at a step of the index.

        None if there is no image, or it is a frame of a video.
        """

    def pixels(self, role: str, step: int) -> "Pixels | None":
        """The recorded image of a camera role at a step of the index, uint8 [H, W, 3]; None if there is none."""
        from openvla_lightning.data.images import decode

        encoded = self.encoded(role, step)
        return None if encoded is None else decode(encoded)

    def image(self, role: str, step: int, size: int, mode: "ImageMode" = "released") -> "Pixels | None":
        """The image of a camera role at a step of the index, uint8 [size, size, 3]; None if there is none."""


class SourceFactory(Protocol):
    """Builds the source of each dataset in a DataModule's mixture."""

    def __call__(self, *, name: str, spec: "DatasetSpec | None") -> Source:
        """Build the source of dataset `name`; a `spec` describes a user's own."""
