"""Where steps come from: RLDS and LeRobot folders, or random ones. tfds, pyarrow and av live here and nowhere else."""

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from openvla_lightning.data.images import ImageMode, Pixels
    from openvla_lightning.data.oxe.spec import DatasetSpec
    from openvla_lightning.data.source.index import Index
    from openvla_lightning.statistics import DatasetStatistics


class Source(Protocol):
    """One dataset. A class that reads one derives from this and has to give what is not worked out here."""

    name: str

    @property
    def spec(self) -> "DatasetSpec":
        """What is known of it."""

    @property
    def index(self) -> "Index":
        """Every step but its pixels."""

    @property
    def statistics(self) -> "DatasetStatistics":
        """Of every split's actions and proprioception, as released."""

    @property
    def remarks(self) -> tuple[str, ...]:
        """What the data report should say of the files besides; each a sentence without a full stop."""
        return ()

    def where(self, step: int) -> str:
        """Where a step of the index lies, in words: trajectory, place in it, file."""
        return self.index.where(step)

    def missing(self) -> str | None:
        """What is missing and where to get it; None when all is there. Takes milliseconds."""

    def check(self) -> None:
        """Raise ValueError if the description names what the files do not hold. Takes milliseconds."""
        return

    def prepare(self) -> None:
        """Do once, on one process, what takes time."""

    def measure(self, steps: "NDArray[np.int32]") -> "DatasetStatistics":
        """Of the given steps alone."""

    def encoded(self, role: str, step: int) -> bytes | None:
        """The stored bytes of the image of a camera role at a step of the index.

        None where none are stored, or the image is a frame of a video.
        """

    def pixels(self, role: str, step: int) -> "Pixels | None":
        """The image of a camera role at a step of the index as recorded, uint8 [H, W, 3]; None for none."""
        from openvla_lightning.data.images import decode

        encoded = self.encoded(role, step)
        return None if encoded is None else decode(encoded)

    def image(self, role: str, step: int, size: int, mode: "ImageMode" = "released") -> "Pixels | None":
        """The image of a camera role at a step of the index, uint8 [size, size, 3]; None for none."""


class SourceFactory(Protocol):
    """What a DataModule is given: builds the source of each dataset in its mixture."""

    def __call__(self, *, name: str, spec: "DatasetSpec | None") -> Source:
        """Build the source of dataset `name`; a `spec` describes a user's own."""
