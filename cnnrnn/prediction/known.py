"""What a caller knows of the labels of images, by name: one list for all, or one an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

Names: TypeAlias = Sequence[str] | Sequence[Sequence[str]]
"""Label names: of all images, or a list for each."""


@dataclass(frozen=True)
class Known:
    """Labels that are known to be present, or absent, of images in order.

    Args:
        labels: the model's, in path order.
        most: how many labels can be present: the longest path.
        present: names; none by default.
        absent: names; none by default.
        limit: what messages say of `most`, and how there can be more.

    Raises:
        TypeError: what is given is no list of names.
    """

    labels: tuple[str, ...]
    most: int
    present: Names = ()
    absent: Names = ()
    limit: tuple[str, str] = ("the longest path holds", "search.max_labels allows longer ones")

    def __post_init__(self) -> None:
        """Tell a list for all images from a list for each."""
        for name, names in (("known", self.present), ("absent", self.absent)):
            if isinstance(names, str) or not isinstance(names, Sequence):
                raise TypeError(
                    f"{name} must be a list of label names, or such a list for each image, got "
                    f"{names!r:.80}"
                )
            strings = sum(isinstance(item, str) for item in names)
            if 0 < strings < len(names):
                raise TypeError(f"{name} mixes label names and lists of them, got {names!r:.80}")
            lists = [names] if strings else names
            for item in lists:
                if (
                    isinstance(item, str)
                    or not isinstance(item, Sequence)
                    or not all(isinstance(label, str) for label in item)
                ):
                    raise TypeError(
                        f"{name} must hold lists of label names, got {item!r:.80} among them"
                    )
        self.evidence([0], ["0"], shared_only=True)  # names that are wrong are wrong at once

    def __bool__(self) -> bool:
        """Whether anything was given."""
        return bool(self.present) or bool(self.absent)

    def evidence(
        self, images: Sequence[int], sources: Sequence[str], shared_only: bool = False
    ) -> Tensor | None:
        """Return what is known of images by their positions: [n, L] int8, or None where nothing is.

        Args:
            images: [n] positions among all images.
            sources: [n] what messages call them.
            shared_only: leave out the lists that are those of one image.

        Raises:
            ValueError: a name is no label, is both present and absent, more labels are present than
                a path can hold, or there is no list for an image.
        """
        if not self:
            return None
        rows = torch.zeros(len(images), len(self.labels), dtype=torch.int8)
        position = {label: i for i, label in enumerate(self.labels)}
        for row, image, source in zip(rows, images, sources, strict=True):
            for name, names, value in (("known", self.present, 1), ("absent", self.absent, -1)):
                if shared_only and _is_per_image(names):
                    continue
                for label in _of_image(name, names, image):
                    if label not in position:
                        raise ValueError(
                            f"{name} must hold labels of the model, got {label!r} for image "
                            f"{source}"
                        )
                    if row[position[label]] == -value:
                        raise ValueError(
                            f"{label!r} is both known to be present and absent for image {source}"
                        )
                    row[position[label]] = value
            present = int((row == 1).sum())
            if present > self.most:
                raise ValueError(
                    f"image {source} has {present} labels known to be present, more than "
                    f"{self.limit[0]} ({self.most}); {self.limit[1]}"
                )
        return rows

    def require_all_used(self, images: int) -> None:
        """Raise a ValueError where there were lists for more images than these."""
        for name, names in (("known", self.present), ("absent", self.absent)):
            if _is_per_image(names) and len(names) != images:
                raise ValueError(
                    f"{name} must have one list per image, got {len(names)} lists for {images} "
                    "images"
                )


def names_with(names: Names, more: Sequence[str]) -> Names:
    """Return names with more of all images."""
    per_image = [[*_of_image("names", names, i), *more] for i in range(len(names))]
    return per_image if _is_per_image(names) else [*_of_image("names", names, 0), *more]


def _is_per_image(names: Names) -> bool:
    return len(names) > 0 and not isinstance(names[0], str)


def _of_image(name: str, names: Names, image: int) -> Sequence[str]:
    if not _is_per_image(names):
        return [label for label in names if isinstance(label, str)]
    if image >= len(names):
        raise ValueError(
            f"{name} must have one list per image, got {len(names)} lists and an image {image}"
        )
    return names[image]
