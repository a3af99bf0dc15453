"""Labels in files beside the pictures: lines of text, or keywords (`dc:subject`) in XMP.

An XMP file that exists is other programs' work: ratings, edits, captions. Only the bytes of its
keywords change; see `cnnrnn.deployment.xmp`.
"""

from __future__ import annotations

import codecs
import os
import re
import stat
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Literal, get_args

from cnnrnn.data.dataset import DataError
from cnnrnn.data.files import read_bytes, reason, short
from cnnrnn.deployment.xmp import NEW_XMP, Refused, label_key, parsed
from cnnrnn.machine.files import write_whole

Kind = Literal["txt", "xmp"]
Existing = Literal["skip", "append", "replace"]
Outcome = Literal["written", "unchanged", "skipped"]

MAX_BYTES = 1 << 24
"""Largest sidecar that is read or written; the largest that programs write have a few MB."""
_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_LINE_BREAK = re.compile("[\n\v\f\r\x1c-\x1e\x85\u2028\u2029]")  # those of str.splitlines
_NEW_LINE = re.compile(r"\r\n|\n|\r")


def sidecar_path(image: str | Path, kind: Kind) -> Path:
    """Return the sidecar of a picture: the one that is there, or the one to make.

    Programs name them in two ways. Adobe's, Capture One and trainers of captions replace the
    suffix (`IMG.xmp`, `IMG.txt`); darktable and digiKam add to it (`IMG.jpg.xmp`); Immich and
    PhotoPrism read both. Where one of the two exists, it is taken. Where none does, XMP is
    `IMG.jpg.xmp`, which no other picture has, and text is `IMG.txt`, which trainers look for.

    Pictures that share a stem, such as the two of RAW and JPEG, share `IMG.xmp` and `IMG.txt`:
    with "append" it collects the labels of both, with "replace" it has those of the last.

    Raises:
        DataError: both exist.
        ValueError: the picture has a sidecar's suffix.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, got {kind!r}")
    image = Path(image)
    if image.suffix.lower() == f".{kind}":
        raise ValueError(f"a picture must not have the suffix of its sidecar, got {image}")
    added = image.with_name(f"{image.name}.{kind}")
    replaced = image.with_name(f"{image.stem}.{kind}")
    found: list[tuple[Path, os.stat_result]] = []
    for path in dict.fromkeys(
        name.with_suffix(suffix)
        for name in (added, replaced)
        for suffix in (f".{kind}", f".{kind.upper()}")
    ):
        status = _status(path)
        # A file system without case has one file under two names.
        if status is not None and not any(
            path.stem == other.stem and os.path.samestat(status, of_other)
            for other, of_other in found
        ):
            found.append((path, status))
    if len(found) > 1:
        raise DataError(
            f"{image} must have one sidecar, found {found[0][0].name} and {found[1][0].name}: "
            "merge them, or move one away"
        )
    return found[0][0] if found else added if kind == "xmp" else replaced


def write_sidecar(
    image: str | Path,
    labels: Sequence[str],
    *,
    kind: Kind,
    existing: Existing = "append",
    exclude: Collection[str] = (),
) -> Outcome:
    """Write labels beside a picture, which itself is neither read nor written.

    Labels are the same if they are so without space around them and composed (Unicode's NFC); case
    counts. A label is written once. Without labels no file is made.

    Text is UTF-8 with one label a line, as a label may have a comma; a byte order mark and the line
    endings of an existing file stay. In XMP the labels are the keywords, `dc:subject`: those that
    stay keep their bytes and their order, new ones follow; every byte outside is as it was.
    Keywords in other fields, such as `lr:hierarchicalSubject` and `digiKam:TagsList`, do not
    change.

    The file is replaced atomically and keeps its permission bits; a hard link to it keeps the old
    content. A symbolic link is an error: it would be replaced by a file, or lead out of the folder.

    Args:
        image: the picture, whose sidecar is `sidecar_path(image, kind)`.
        labels: what to write.
        kind: "txt" or "xmp".
        existing: what to do with labels that are there: "append" keeps them and adds those that are
            missing, "replace" leaves exactly `labels`, "skip" changes nothing in a text file that
            exists and in an XMP file that has keywords. XMP without keywords gets the labels.
        exclude: labels not to write; where they are in the file already, "append" keeps them.

    Returns:
        "written"; "unchanged" where the file said so already, it is not written then; "skipped".

    Raises:
        DataError: the sidecar is broken, in another encoding, has a DOCTYPE, is larger than
            `MAX_BYTES`, no file of its own, or has keywords in a form that XMP does not know.
        ValueError: a label is blank or cannot be written, or an argument is none of its choices.
        OSError: it cannot be written, or changed meanwhile; what was there still is.
    """
    if existing not in get_args(Existing):
        raise ValueError(
            f"existing must be one of {', '.join(get_args(Existing))}, got {existing!r}"
        )
    file = sidecar_path(image, kind)
    wanted = _wanted(labels, exclude, kind)
    status = _status(file)
    if status is None:
        if not wanted:
            return "unchanged"
        data = b"" if kind == "txt" else NEW_XMP
    else:
        if existing == "skip" and kind == "txt":
            return "skipped"
        data = _read(file, status)
    replace = existing == "replace"
    try:
        if kind == "txt":
            new = _with_lines(data, wanted, replace)
        else:
            packet = parsed(data)
            if existing == "skip" and packet.keywords():
                return "skipped"
            new = packet.with_keywords(wanted, replace)
        if new == data:
            return "unchanged"
        if len(new) > MAX_BYTES:
            raise Refused(f"must be at most {MAX_BYTES} bytes, got {len(new)} with the labels")
    except Refused as error:
        raise DataError(f"{file} {error}") from error
    _write(file, new, status)
    return "written"


def _status(file: Path) -> os.stat_result | None:
    try:
        return os.lstat(file)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _read(file: Path, status: os.stat_result) -> bytes:
    if stat.S_ISLNK(status.st_mode):
        raise DataError(f"{file} must be a file of its own, found a symbolic link")
    if status.st_size > MAX_BYTES:
        raise DataError(
            f"{file} must be a sidecar of at most {MAX_BYTES} bytes, got {status.st_size}"
        )
    return read_bytes(file)


def _write(file: Path, data: bytes, status: os.stat_result | None) -> None:
    if status is not None:
        with open(file, "r+b"):  # a rename would not ask whether the file may be written
            pass

    def write(partial: Path) -> None:
        partial.write_bytes(data)
        if _changed(status, _status(file)):
            raise OSError(f"{file} was changed by another program while labels were added to it")

    write_whole(file, write, mode=None if status is None else stat.S_IMODE(status.st_mode))


def _changed(before: os.stat_result | None, now: os.stat_result | None) -> bool:
    if before is None or now is None:
        return before is not now
    return not os.path.samestat(before, now) or (before.st_mtime_ns, before.st_size) != (
        now.st_mtime_ns,
        now.st_size,
    )


def _wanted(labels: Iterable[str], exclude: Iterable[str], kind: Kind) -> dict[str, str]:
    """Return the labels to write by their keys, checked and each once."""
    without = {label_key(label) for label in exclude}
    wanted: dict[str, str] = {}
    for label in labels:
        if not label.strip():
            raise ValueError(f"a label must not be blank, got {label!r}")
        bad = _NO_XML.search(label)
        if bad is not None:
            raise ValueError(
                f"a label in a sidecar must be text that XML 1.0 can hold, got {short(label)} with "
                f"U+{ord(bad[0]):04X}"
            )
        if kind == "txt" and _LINE_BREAK.search(label):
            raise ValueError(f"a label in a text file must be one line, got {short(label)}")
        if label_key(label) not in without:
            wanted.setdefault(label_key(label), label)
    return wanted


def _with_lines(data: bytes, wanted: dict[str, str], replace: bool) -> bytes:
    """Return a text file with labels."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Refused(f"must be UTF-8 text, got {reason(error)}") from error
    if "\0" in text:
        raise Refused("must be UTF-8 text, got NUL bytes")
    there = [label_key(line) for line in _NEW_LINE.split(text) if line.strip()]
    first = _NEW_LINE.search(text)
    new_line = "\r\n" if first is not None and first[0] == "\r\n" else "\n"
    if replace:
        if there == list(wanted):
            return data
        mark = codecs.BOM_UTF8 if data.startswith(codecs.BOM_UTF8) else b""
        return mark + "".join(label + new_line for label in wanted.values()).encode()
    distinct = set(there)
    missing = [label for key, label in wanted.items() if key not in distinct]
    if not missing:
        return data
    ends = not text or text[-1] in "\r\n"
    return data + (("" if ends else new_line) + "".join(m + new_line for m in missing)).encode()
