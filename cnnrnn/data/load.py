"""`load_dataset`: the data set that a spec names."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cnnrnn.config import (
    MAX_PIXELS,
    HuggingFaceOptions,
    JsonLinesOptions,
    NusWideOptions,
    OnBadImage,
    SvmlightOptions,
    TableOptions,
    VocOptions,
    require_max_pixels,
)
from cnnrnn.data.dataset import DataError, Dataset
from cnnrnn.data.files import Problems

_OPTIONS: dict[str, Any] = {
    "coco": None, "voc": VocOptions, "nuswide": NusWideOptions, "csv": TableOptions,
    "folder": None, "jsonl": JsonLinesOptions, "hf": HuggingFaceOptions, "scenes": None,
    "features": SvmlightOptions,
}  # fmt: skip
KINDS = (
    "coco:ROOT, coco:FILE.json (with images=FOLDER), voc:ROOT, nuswide:ROOT, csv:FILE, "
    "folder:ROOT, jsonl:FILE, hf:PATH_OR_NAME, scenes:ROOT, features:FILE"
)
_WITH_IMAGE_FOLDER = ("coco", "voc", "nuswide", "csv", "jsonl")

_log = logging.getLogger(__name__)


def load_dataset(
    spec: str,
    *,
    images: str | Path | None = None,
    on_bad_image: OnBadImage = "error",
    follow_links: bool = False,
    max_pixels: int = MAX_PIXELS,
    problems: Problems | None = None,
) -> Dataset:
    """Read the dataset that a spec names.

    Args:
        spec: `coco:ROOT`, `coco:FILE.json`, `voc:ROOT`, `nuswide:ROOT`, `csv:FILE`, `csv:FOLDER`,
            `folder:ROOT`, `jsonl:FILE`, `hf:PATH_OR_NAME`, `scenes:ROOT`, `features:FILE` or
            `features:FOLDER`. A missing scenes folder is generated first. Options follow a comma,
            as in `csv:FILE,labels=tags,delimiter=space` (`TableOptions`), `voc:ROOT,labels=FILE`
            (`VocOptions`), `nuswide:ROOT,labels=tags` (`NusWideOptions`),
            `jsonl:FILE,images=FOLDER` (`JsonLinesOptions`), `hf:NAME,labels=objects`
            (`HuggingFaceOptions`) and `features:FILE.svm,vocabulary=FILE,features=500,first=1`
            (`SvmlightOptions`).
        images: image folder of a `coco:`, `voc:`, `nuswide:`, `csv:` or `jsonl:` source.
        on_bad_image: `error` stops at a missing image or a folder of images that cannot be listed,
            `skip` leaves it out with a warning.
        follow_links: links to pictures and folders may lead out of the image folder.
        max_pixels: images of more pixels cannot be read, see `Predictor.predict`.
        problems: collects what is wrong with the source; without it the first problem is raised.

    Returns:
        The dataset with all its splits.

    Raises:
        DataError: the spec names no known kind of source, or its data is wrong.
        ModuleNotFoundError: the source needs an extra that is not installed.
    """
    if on_bad_image not in ("error", "skip"):
        raise ValueError(f"on_bad_image must be one of error, skip, got {on_bad_image!r}")
    kind, _, location = spec.partition(":")
    if kind not in _OPTIONS or not location or "\0" in location:
        raise DataError(f"data must be one of {KINDS}, got {spec!r}")
    if images is not None and kind not in _WITH_IMAGE_FOLDER:
        raise DataError(
            f"images is only for {', '.join(_WITH_IMAGE_FOLDER)} sources, got {spec!r} and "
            f"images={str(images)!r}"
        )
    require_max_pixels(max_pixels)
    dataset = _read(spec, kind, location, images, on_bad_image, follow_links, problems)
    if max_pixels != dataset.max_pixels:
        dataset = dataset.with_changes(max_pixels=max_pixels)
    return dataset


def _read(
    spec: str,
    kind: str,
    location: str,
    images: str | Path | None,
    on_bad_image: OnBadImage,
    follow_links: bool,
    problems: Problems | None,
) -> Dataset:
    location, words = _split_options(kind, location)
    options = _options(kind, spec, words)
    path = Path(location).expanduser()
    images = None if images is None else Path(images).expanduser()
    if kind == "features":
        from cnnrnn.data.sources.npz import load_features

        return load_features(path, options, problems=problems)
    if kind == "hf":
        from cnnrnn.data.sources.huggingface import load_huggingface

        return load_huggingface(location, options, problems=problems)
    common: dict[str, Any] = {
        "on_bad_image": on_bad_image, "follow_links": follow_links, "problems": problems,
    }  # fmt: skip
    if kind == "folder":
        from cnnrnn.data.sources.folder import load_folder

        return load_folder(path, **common)
    if kind == "voc":
        from cnnrnn.data.sources.voc import load_voc

        return load_voc(path, images, options, **common)
    if kind == "jsonl":
        from cnnrnn.data.sources.json_lines import load_json_lines

        return load_json_lines(path, images, options, **common)
    if kind == "nuswide":
        from cnnrnn.data.sources.nuswide import load_nuswide

        return load_nuswide(path, images, options, **common)
    if kind == "csv":
        from cnnrnn.data.sources.table import load_table

        return load_table(path, images, options, **common)

    from cnnrnn.data.sources.coco import load_coco

    if kind == "coco":
        return load_coco(path, images, **common)
    if not path.exists():
        _generate_scenes(path)
    return load_coco(path, **common).with_changes(source=f"scenes:{path}")


def _split_options(kind: str, location: str) -> tuple[str, dict[str, str]]:
    """Split `PATH,name=value,...` at the commas before a name, unless there is such a path."""
    path, *words = re.split(r",(?=[a-z_]+=)", location)
    if words and Path(location).expanduser().exists():
        return location, {}
    kept = _OPTIONS[kind]
    known = [] if kept is None else [field.name for field in dataclasses.fields(kept)]
    options: dict[str, str] = {}
    for word in words:
        name, _, value = word.partition("=")
        if not known:
            raise DataError(f"{kind} has no options, got {name!r} in {kind}:{location}")
        if name not in known:
            raise DataError(f"an option of {kind} must be one of {', '.join(known)}, got {name!r}")
        if name in options:
            raise DataError(f"an option must be given once, got {name} twice in {location!r}")
        options[name] = value
    return path, options


def _options(kind: str, spec: str, words: Mapping[str, str]) -> Any:
    """Return the options of a kind of source; None where it has none."""
    if _OPTIONS[kind] is None:
        return None
    values: dict[str, str | int] = {**words}
    for name in [name for name in ("features", "first") if name in words]:
        if not re.fullmatch("[0-9]{1,18}", words[name]):
            raise DataError(f"{spec}: {name} must be a whole number, got {words[name]!r}")
        values[name] = int(words[name])
    try:
        return _OPTIONS[kind](**values)
    except ValueError as error:
        raise DataError(f"{spec}: {error}") from error


def _generate_scenes(root: Path) -> None:
    from cnnrnn.data.sources.scenes import write_scenes

    _log.info("generating the scenes data set in %s", root)
    try:
        write_scenes(root)
    except OSError:
        if not (root / "annotations").is_dir():  # else another process finished it first
            raise
