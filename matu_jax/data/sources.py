"""What a source of raw images hands to preparation, be it image folders or TFDS."""

from typing import NamedTuple, Protocol

from PIL import Image

__all__ = ["Examples", "Source"]


class Examples(Protocol):
    """One split, in an order that never changes; read at random."""

    def __len__(self) -> int:
        """Number of examples."""
        ...

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """Reads an image, RGB and upright, and its label.

        Raises:
            ValueError: For an image that cannot be read, naming its file or place.
        """
        ...


class Source(NamedTuple):
    """A dataset as it is found.

    Attributes:
        version: What changes whenever the data does: a version number, or a hash of the listing.
        class_names: One readable name per label, in the order of the labels.
        train: The official training split, or a seeded part where there is none.
        test: The official test split, or a seeded part where there is none.
        split_origin: "official", or in words how the splits were made.
    """

    version: str
    class_names: tuple[str, ...]
    train: Examples
    test: Examples
    split_origin: str
