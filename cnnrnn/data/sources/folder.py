"""A folder of images per label."""

from __future__ import annotations

import filecmp
import os
import warnings
from collections.abc import Iterable
from pathlib import Path

from cnnrnn.config import OnBadImage
from cnnrnn.data.dataset import DataError, Dataset, Records, usual_split_name, usual_split_names
from cnnrnn.data.files import EmptySourceError, Problems, short
from cnnrnn.data.folders import files_below
from cnnrnn.data.images import IMAGE_SUFFIXES


def load_folder(
    root: str | Path,
    *,
    on_bad_image: OnBadImage = "error",
    follow_links: bool = False,
    problems: Problems | None = None,
) -> Dataset:
    """Read images in a folder per label.

    `ROOT/<label>/1.jpg` is in the split `all`, `ROOT/<split>/<label>/1.jpg` in a split of its own:
    where a folder of ROOT is named like a split, such as `train`, and holds folders of images. The
    same path below several labels of a split is one image with all of them.

    Args:
        root: the folder.
        on_bad_image: as for `load_dataset`.
        follow_links: as for `load_dataset`.
        problems: as for `load_dataset`, and so is what is raised.

    Returns:
        The dataset with image paths; its labels are sorted.
    """
    problems = problems or Problems()
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root} must be a folder with a folder of images per label, found none")
    names = files_below(root, IMAGE_SUFFIXES, follow_links, on_bad_image, problems)
    images = [name for name in names if _is_image(name)]
    if len(images) < len(names):
        first = next(name for name in names if not _is_image(name))
        problems.note(
            f"{root}: {len(names) - len(images):,} files are no images by their suffix, the first: "
            f"{short(first)}"
        )
    depth = 1 if _has_splits(root, images) else 0
    unlabelled = [name for name in images if name.count("/") <= depth]
    labelled = [name for name in images if name.count("/") > depth]
    if not labelled:
        raise EmptySourceError(
            f"{root} must hold images as LABEL/NAME.jpg or SPLIT/LABEL/NAME.jpg, found none"
        )
    if unlabelled:
        warnings.warn(
            f"{root}: {len(unlabelled):,} images are in no folder of a label, the first: "
            f"{short(unlabelled[0])}; they are left out",
            stacklevel=3,
        )
    records: dict[tuple[str, str], dict[str, str]] = {}  # split and path: label to image
    for name in labelled:
        parts = name.split("/", depth + 1)
        split = parts[0] if depth else "all"
        records.setdefault((split, parts[-1]), {})[parts[depth]] = name
    _warn_of_other_content(root, records.values())
    label_names = sorted({label for of_label in records.values() for label in of_label})
    index = {label: position for position, label in enumerate(label_names)}
    splits = usual_split_names(root, dict.fromkeys(split for split, _ in records))
    result = Records()
    for (split, _), of_label in records.items():
        image = root / next(iter(of_label.values()))
        result.add(splits[split], [index[label] for label in of_label], image)
    return result.dataset(f"folder:{root}", label_names)


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def _has_splits(root: Path, images: Iterable[str]) -> bool:
    """Tell whether the folders at the top are splits, not labels.

    Raises:
        DataError: it cannot be told.
    """
    with_images: set[str] = set()  # folders at the top with images of their own
    with_folders: set[str] = set()
    for name in images:
        top, *rest = name.split("/")
        if rest:
            (with_images if len(rest) == 1 else with_folders).add(top)
    splits = {top for top in with_folders if usual_split_name(top) in ("train", "val", "test")}
    if splits:
        return True
    if with_folders and not with_images:
        raise DataError(
            f"{root} must hold a folder per label, or folders train, val or test of these, got "
            f"folders in {short(min(with_folders))}, which is neither"
        )
    return False


def _warn_of_other_content(root: Path, records: Iterable[dict[str, str]]) -> None:
    """Say where images of the same name under several labels are not the same."""
    differ = []
    for of_label in records:
        first, *others = of_label.values()
        if not all(filecmp.cmp(root / first, root / other, shallow=False) for other in others):
            differ.append(first)
    filecmp.clear_cache()
    if differ:
        warnings.warn(
            f"{root}: {len(differ):,} images differ in content from those of the same name under "
            f"another label, the first: {short(differ[0])}; the first of each stands for all, so "
            "rename them if they are different pictures",
            stacklevel=4,
        )
