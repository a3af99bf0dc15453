"""Labels in files beside the pictures: lines of text, or keywords (`dc:subject`) in XMP.

An XMP file that exists is other programs' work: ratings, edits, captions. Only the bytes of its
keywords change. A parser finds where they are, and text is spliced in there; nothing is written
anew from a tree, which would lose comments, prefixes, quotes and line endings.
"""

from __future__ import annotations

import codecs
import os
import re
import stat
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args
from xml.parsers import expat

from cnnrnn.data.dataset import DataError
from cnnrnn.data.files import read_bytes, reason, short
from cnnrnn.machine.files import write_whole

Kind = Literal["txt", "xmp"]
Existing = Literal["skip", "append", "replace"]
Outcome = Literal["written", "unchanged", "skipped"]

MAX_BYTES = 1 << 24
"""Largest sidecar that is read or written; the largest that programs write have a few MB."""
MAX_DEPTH = 200
"""Most elements inside one another; XMP needs about ten."""
MAX_ELEMENTS = 100_000
"""Most elements of a file; one with thousands of edits and masks has a tenth."""

_RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
_DC = "http://purl.org/dc/elements/1.1/"
_XML = "http://www.w3.org/XML/1998/namespace"
_MAX_SPACE = 1000  # characters of an indentation that is imitated
_PART = "\x1f"  # between the parts of expat's names: no XML file can hold it
_LISTS = ("Bag", "Seq", "Alt")
_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_LINE_BREAK = re.compile("[\n\v\f\r\x1c-\x1e\x85\u2028\u2029]")  # those of str.splitlines
_NEW_LINE = re.compile(r"\r\n|\n|\r")
_ATTRIBUTE = re.compile(r"""\s+([^\s=/>"']+)\s*=\s*("[^"]*"|'[^']*')""")
_ESCAPES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "\t": "&#9;", "\n": "&#10;", "\r": "&#13;"}
_NEW_XMP = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>\n'
    '<x:xmpmeta xmlns:x="adobe:ns:meta/">\n'
    f' <rdf:RDF xmlns:rdf="{_RDF}">\n'
    f'  <rdf:Description rdf:about="" xmlns:dc="{_DC}"/>\n'
    " </rdf:RDF>\n"
    "</x:xmpmeta>\n"
    '<?xpacket end="w"?>\n'
).encode()


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
        data = b"" if kind == "txt" else _NEW_XMP
    else:
        if existing == "skip" and kind == "txt":
            return "skipped"
        data = _read(file, status)
    replace = existing == "replace"
    try:
        if kind == "txt":
            new = _with_lines(data, wanted, replace)
        else:
            packet = _parsed(data)
            if existing == "skip" and packet.keywords():
                return "skipped"
            new = packet.with_keywords(wanted, replace)
        if new == data:
            return "unchanged"
        if len(new) > MAX_BYTES:
            raise _Refused(f"must be at most {MAX_BYTES} bytes, got {len(new)} with the labels")
    except _Refused as error:
        raise DataError(f"{file} {error}") from error
    _write(file, new, status)
    return "written"


class _Refused(Exception):
    """What is wrong with a sidecar, as the rest of a sentence that begins with its name."""


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


def _key(label: str) -> str:
    """Return what is equal for labels that are the same."""
    return unicodedata.normalize("NFC", label.strip())


def _wanted(labels: Iterable[str], exclude: Iterable[str], kind: Kind) -> dict[str, str]:
    """Return the labels to write by their keys, checked and each once."""
    without = {_key(label) for label in exclude}
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
        if _key(label) not in without:
            wanted.setdefault(_key(label), label)
    return wanted


def _with_lines(data: bytes, wanted: dict[str, str], replace: bool) -> bytes:
    """Return a text file with labels."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise _Refused(f"must be UTF-8 text, got {reason(error)}") from error
    if "\0" in text:
        raise _Refused("must be UTF-8 text, got NUL bytes")
    there = [_key(line) for line in _NEW_LINE.split(text) if line.strip()]
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


@dataclass(slots=True, eq=False)
class _Element:
    """An element of an XMP file, with the bytes where its tags are.

    Attributes:
        uri, local, prefix: its name; the prefix is empty in the default namespace.
        attributes: values by (namespace, name).
        part: what it is: the file's "root", "rdf:RDF", a "description" in it, a "property" of
            this, or "keywords", what is inside the property `dc:subject` and itself.
        start, inner, close, end: where its start tag begins and ends, and its end tag; `close` and
            `end` of an empty-element tag are `inner`.
        rdf, dc: a prefix of these namespaces that it has, None where it has none.
        inline: the name of a description's attribute `dc:subject`, as its tag has it.
        has_dc: a description has properties of that namespace.
        last: the last property of a description.
        text, children: the content of keywords.
    """

    uri: str
    local: str
    prefix: str
    attributes: dict[tuple[str, str], str]
    part: str
    start: int
    inner: int = -1
    close: int = -1
    end: int = -1
    rdf: str | None = None
    dc: str | None = None
    inline: str | None = None
    has_dc: bool = False
    last: _Element | None = None
    text: list[str] = field(default_factory=list)
    children: list[_Element] = field(default_factory=list)

    def is_rdf(self, *names: str) -> bool:
        return self.uri == _RDF and self.local in names

    @property
    def name(self) -> str:
        """The name as its tags have it."""
        return _name(self.prefix, self.local)

    @property
    def value(self) -> str:
        return "".join(self.text)


def _name(prefix: str, local: str) -> str:
    return f"{prefix}:{local}" if prefix else local


class _Reader:
    """Finds `dc:subject` in XMP with expat, and keeps no more of the file than that needs."""

    def __init__(self) -> None:
        self.rdfs: list[_Element] = []
        self.descriptions: list[_Element] = []
        self.subjects: list[_Element] = []
        self._count = 0
        self._open: list[_Element | None] = []
        self._opened: _Element | None = None  # whose start tag ends where the next event begins
        self._closed: _Element | None = None  # whose end tag does
        self._prefixes: dict[str, list[str]] = {}  # to the namespaces it stands for, innermost last
        self._standing: dict[str, dict[str, None]] = {_RDF: {}, _DC: {}}  # prefixes, by namespace
        parser = expat.ParserCreate(namespace_separator=_PART)
        parser.namespace_prefixes = True
        parser.XmlDeclHandler = self._declaration
        parser.StartDoctypeDeclHandler = self._doctype
        parser.StartNamespaceDeclHandler = self._declare
        parser.EndNamespaceDeclHandler = self._forget
        parser.StartElementHandler = self._start
        parser.EndElementHandler = self._end
        # With text, which is asked for after each tag, these are all that can follow a tag: the end
        # of none is missed.
        parser.CommentHandler = parser.StartCdataSectionHandler = self._other
        parser.EndCdataSectionHandler = parser.ProcessingInstructionHandler = self._other
        self._parser = parser

    def read(self, data: bytes) -> None:
        try:
            self._parser.Parse(data, True)
        except (expat.ExpatError, ValueError, LookupError) as error:
            raise _Refused(f"must be valid XML, got {reason(error)}") from error

    def _declaration(self, version: str, encoding: str | None, standalone: int) -> None:
        if encoding and encoding.lower() not in ("utf-8", "utf-16", "utf-16le", "utf-16be"):
            raise _Refused(f"must be UTF-8 or UTF-16, got the encoding {short(encoding)}")

    def _doctype(self, *_: object) -> None:
        raise _Refused("must be plain XML, got a DOCTYPE")

    def _declare(self, prefix: str | None, uri: str | None) -> None:
        self._prefixes.setdefault(prefix or "", []).append(uri or "")
        self._note(prefix or "")

    def _forget(self, prefix: str | None) -> None:
        self._prefixes[prefix or ""].pop()
        self._note(prefix or "")

    def _note(self, prefix: str) -> None:
        """Keep the prefixes of a namespace, so that none is searched for among many."""
        for uri, standing in self._standing.items():
            if self._prefixes[prefix][-1:] == [uri]:
                standing[prefix] = None
            else:
                standing.pop(prefix, None)

    def _prefix(self, uri: str, usual: str) -> str | None:
        standing = self._standing[uri]
        return usual if usual in standing else next(iter(standing), None)

    def _here(self) -> int:
        at = self._parser.CurrentByteIndex
        if self._opened is not None:
            self._opened.inner, self._opened = at, None
        if self._closed is not None:
            self._closed.end, self._closed = at, None
        return at

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        at = self._here()
        if len(self._open) >= MAX_DEPTH:
            raise _Refused(f"must be XMP of at most {MAX_DEPTH} elements inside one another")
        self._count += 1
        if self._count > MAX_ELEMENTS:
            raise _Refused(f"must be XMP of at most {MAX_ELEMENTS} elements")
        parent = self._open[-1] if self._open else None
        uri, local, prefix = _parts(name)
        part = self._part(parent, uri, local)
        element = None
        if part:
            values = {_parts(key)[:2]: value for key, value in attributes.items()}
            element = _Element(uri, local, prefix, values, part, at)
            element.rdf, element.dc = self._prefix(_RDF, "rdf"), self._prefix(_DC, "dc")
            if part == "description":
                names = [_parts(key) for key in attributes]
                element.has_dc = any(name[0] == _DC for name in names)
                element.inline = next(
                    (_name(p, name) for u, name, p in names if (u, name) == (_DC, "subject")), None
                )
            self._keep(element, parent)
        self._open.append(element)
        self._opened = element
        self._parser.CharacterDataHandler = self._text

    def _part(self, parent: _Element | None, uri: str, local: str) -> str:
        if len(self._open) < 2 and (uri, local) == (_RDF, "RDF"):
            return "rdf:RDF"
        if not self._open:
            return "root"
        within = "" if parent is None else parent.part
        if within == "rdf:RDF":
            return "description" if (uri, local) == (_RDF, "Description") else ""
        if within == "description":
            return "keywords" if (uri, local) == (_DC, "subject") else "property"
        return "keywords" if within == "keywords" else ""

    def _keep(self, element: _Element, parent: _Element | None) -> None:
        if element.part == "rdf:RDF":
            self.rdfs.append(element)
        elif element.part == "description":
            self.descriptions.append(element)
        elif parent is not None and parent.part == "description":
            parent.last = element
            parent.has_dc |= element.uri == _DC
            if element.part == "keywords":
                self.subjects.append(element)
        elif parent is not None and element.part == "keywords":
            parent.children.append(element)

    def _end(self, name: str) -> None:
        at = self._here()
        element = self._open.pop()
        if element is not None:
            element.close = at
        self._closed = element
        self._parser.CharacterDataHandler = self._text

    def _text(self, text: str) -> None:
        self._here()
        element = self._open[-1]
        if element is not None and element.part == "keywords":
            element.text.append(text)
        else:  # the first text after a tag says where that ends; there may be millions more
            self._parser.CharacterDataHandler = None

    def _other(self, *_: object) -> None:
        self._here()


def _parts(name: str) -> tuple[str, str, str]:
    """Return namespace, name and prefix of what expat calls an element or an attribute."""
    parts = name.split(_PART)
    if len(parts) == 1:
        return "", name, ""
    return parts[0], parts[1], parts[2] if len(parts) > 2 else ""


def _parsed(data: bytes) -> _Packet:
    reader = _Reader()
    reader.read(data)
    if len(reader.rdfs) != 1:
        count = len(reader.rdfs) or "none"
        raise _Refused(f"must be XMP with one rdf:RDF at its top, found {count}")
    things = {
        about.strip()
        for description in reader.descriptions
        for key in ((_RDF, "about"), ("", "about"))
        if (about := description.attributes.get(key, "")).strip()
    }
    if len(things) > 1:
        raise _Refused(f"must describe one picture, got {len(things)} values of rdf:about")
    inline = [description for description in reader.descriptions if description.inline]
    if len(inline) + len(reader.subjects) > 1:
        raise _Refused(
            f"must have one dc:subject, found {len(inline) + len(reader.subjects)}, of which "
            "programs read one or the other"
        )
    if inline:
        return _Packet(data, reader, inline[0], None, None)
    if not reader.subjects:
        return _Packet(data, reader, None, None, None)
    holder = _holder(reader.subjects[0])
    return _Packet(data, reader, None, holder, _list(holder))


def _holder(subject: _Element) -> _Element:
    """Return the element with the list: dc:subject, or its rdf:value where it has qualifiers."""
    holder, names = subject, [child.name for child in subject.children]
    qualified = subject.attributes.get((_RDF, "parseType")) == "Resource"
    inner = subject
    if not qualified and len(names) == 1 and subject.children[0].is_rdf("Description"):
        qualified, inner = True, subject.children[0]
    if qualified:
        values = [child for child in inner.children if child.is_rdf("value")]
        if len(values) != 1:
            raise _not_known(f"{len(values)} rdf:value")
        (holder,) = values
    strange = [name for uri, name in holder.attributes if uri != _XML]
    if strange:
        raise _not_known(f"the attribute {short(strange[0])}")
    return holder


def _list(holder: _Element) -> _Element | None:
    """Return the list in an element, None where it has text or nothing."""
    if not holder.children:
        return None
    if len(holder.children) > 1 or not holder.children[0].is_rdf(*_LISTS):
        raise _not_known(short(holder.children[-1].name))
    (bag,) = holder.children
    if holder.value.strip() or bag.value.strip():
        raise _not_known("text beside the list")
    strange = [name for uri, name in bag.attributes if uri != _XML]
    strange += [child.name for child in bag.children if not child.is_rdf("li")]
    if strange:
        raise _not_known(f"{short(strange[0])} in it")
    return bag


def _not_known(found: str) -> _Refused:
    return _Refused(f"must have dc:subject as text or as one list of rdf:li, got {found}")


def _keyword(item: _Element) -> str:
    """Return the keyword of a list's element, empty where it has none."""
    inner = item
    if len(item.children) == 1 and item.children[0].is_rdf("Description"):
        inner = item.children[0]
    for child in inner.children:
        if child.is_rdf("value"):
            return child.value
    if inner.children:
        return ""
    return inner.attributes.get((_RDF, "value"), inner.value)


Edit = tuple[int, int, str]  # bytes from, bytes to, the text to be there


class _Packet:
    """An XMP file and where its keywords are.

    Args:
        data: the whole file.
        reader: what was found in it.
        inline: the description that has the keyword as an attribute.
        holder: the element that has the keywords as a list, as text, or that is empty.
        bag: the list.
    """

    def __init__(
        self,
        data: bytes,
        reader: _Reader,
        inline: _Element | None,
        holder: _Element | None,
        bag: _Element | None,
    ) -> None:
        self._data = data
        (self._rdf,) = reader.rdfs
        self._descriptions = reader.descriptions
        self._inline, self._holder, self._bag = inline, holder, bag
        # As the parser decides: the file may begin with space, and without a byte order mark.
        if data.startswith(codecs.BOM_UTF16_LE) or data[1:2] == b"\0":
            self._encoding = "utf-16-le"
        elif data.startswith(codecs.BOM_UTF16_BE) or data[:1] == b"\0":
            self._encoding = "utf-16-be"
        else:
            self._encoding = "utf-8"
        self._width = len(" ".encode(self._encoding))

    def keywords(self) -> list[str]:
        """Return the keywords in their order, without blank ones."""
        if self._inline is not None:
            found = [self._inline.attributes[_DC, "subject"]]
        elif self._bag is not None:
            found = [_keyword(item) for item in self._bag.children]
        else:
            found = [] if self._holder is None else [self._holder.value]
        return [keyword for keyword in found if keyword.strip()]

    def with_keywords(self, wanted: dict[str, str], replace: bool) -> bytes:
        """Return the file with these keywords: added, or exactly these."""
        there = [_key(keyword) for keyword in self.keywords()]
        distinct = dict.fromkeys(there)
        kept = [key for key in distinct if key in wanted] if replace else there
        missing = [label for key, label in wanted.items() if key not in distinct]
        if kept == there and not missing:
            return self._data
        new = self._spliced(self._edits(wanted, missing, replace))
        found = [_key(keyword) for keyword in _parsed(new).keywords()]
        assert found == kept + [_key(label) for label in missing], "the splice went wrong"
        return new

    def _edits(self, wanted: dict[str, str], missing: list[str], replace: bool) -> list[Edit]:
        if self._bag is not None:
            return self._edits_of_list(self._bag, wanted, missing, replace)
        labels = [keyword for keyword in self.keywords() if not replace or _key(keyword) in wanted]
        labels += missing
        if self._holder is not None:
            return [self._list_in(self._holder, labels)]
        if self._inline is None:
            return [self._new_subject(labels)]
        start, end = self._attribute(self._inline)
        rest = [self._in_description(self._inline, labels)] if labels else []
        return [(start, end, ""), *rest]

    def _edits_of_list(
        self, bag: _Element, wanted: dict[str, str], missing: list[str], replace: bool
    ) -> list[Edit]:
        edits: list[Edit] = []
        seen: set[str] = set()
        for item in bag.children if replace else ():
            key = _key(_keyword(item))
            if key not in wanted or key in seen:
                edits.append((self._before_space(item.start), item.end, ""))
            seen.add(key)
        if missing and bag.children:
            last = bag.children[-1]
            lead = self._lead(last.start) or self._space(last.start)
            edits.append((last.end, last.end, self._items(missing, lead, bag.prefix)))
        elif missing:
            outer = self._lead(bag.start)
            lead = outer and outer + self._step(bag)
            items = self._items(missing, lead, bag.prefix)
            edits.append(self._filled(bag, items, outer))
        return edits

    def _list_in(self, holder: _Element, labels: list[str]) -> Edit:
        """Return the edit that gives an element a list, in place of its text."""
        if not labels:
            return holder.inner, holder.close, ""
        if holder.rdf is None:
            raise _not_known("no prefix of RDF in it")
        outer = self._lead(holder.start)
        step = self._step(holder)
        content = self._bag_of(labels, outer and outer + step, holder.rdf, step)
        if holder.value.strip():
            return holder.inner, holder.close, content + outer
        return self._filled(holder, content, outer)

    def _new_subject(self, labels: list[str]) -> Edit:
        """Return the edit that adds dc:subject, where the other properties of its kind are."""
        if not self._descriptions:
            return self._new_description(labels)
        likeliest = min(self._descriptions, key=lambda d: (not d.has_dc, d.dc is None))
        return self._in_description(likeliest, labels)

    def _in_description(self, description: _Element, labels: list[str]) -> Edit:
        outer = self._lead(description.start)
        step = self._step(description)
        if description.last is not None:
            lead = self._lead(description.last.start)
            at = description.last.end
            return at, at, self._subject(labels, description.dc, description.prefix, lead, step)
        lead = outer and outer + step
        content = self._subject(labels, description.dc, description.prefix, lead, step)
        return self._filled(description, content, outer)

    def _new_description(self, labels: list[str]) -> Edit:
        outer = self._lead(self._rdf.start)
        step = self._step(self._rdf)
        lead = outer and outer + step
        prefix = self._rdf.prefix
        declared = "" if prefix else f' xmlns:rdf="{_RDF}"'  # an attribute needs a prefix
        dc = self._rdf.dc if prefix else None  # which the declaration may take away
        name = _name(prefix or "rdf", "Description")
        about = _name(prefix or "rdf", "about")
        subject = self._subject(labels, dc, prefix or "rdf", lead and lead + step, step)
        content = f'{lead}<{name}{declared} {about}="">{subject}{lead}</{name}>'
        return self._filled(self._rdf, content, outer)

    def _filled(self, element: _Element, content: str, outer: str) -> Edit:
        """Return the edit that puts content into an element that has none, or but space."""
        if element.close > element.inner:
            return element.inner, element.inner, content
        slash = element.inner - 2 * self._width
        if self._data[slash : element.inner] == "/>".encode(self._encoding):
            return slash, element.inner, f">{content}{outer}</{element.name}>"
        return element.inner, element.inner, content + outer

    def _subject(self, labels: list[str], dc: str | None, rdf: str, lead: str, step: str) -> str:
        """Return `dc:subject` as text, which declares its prefix where there is none."""
        declared = ""
        if dc is None:
            dc = "dc" if rdf != "dc" else "dcelements"  # it may stand for another outside
            declared = f' xmlns:{dc}="{_DC}"'
        name = _name(dc, "subject")
        bag = self._bag_of(labels, lead and lead + step, rdf, step)
        return f"{lead}<{name}{declared}>{bag}{lead}</{name}>"

    def _bag_of(self, labels: list[str], lead: str, rdf: str, step: str) -> str:
        name = _name(rdf, "Bag")
        return f"{lead}<{name}>{self._items(labels, lead and lead + step, rdf)}{lead}</{name}>"

    def _items(self, labels: Iterable[str], lead: str, rdf: str) -> str:
        name = _name(rdf, "li")
        return "".join(f"{lead}<{name}>{_escaped(label)}</{name}>" for label in labels)

    def _attribute(self, description: _Element) -> tuple[int, int]:
        """Return where the attribute `dc:subject` of a description is, with the space before."""
        tag = self._text(description.start, description.inner)
        found = None
        at = len(f"<{description.name}")
        while found is None or found[1] != description.inline:
            found = _ATTRIBUTE.match(tag, at)
            assert found is not None, "the parser found the attribute"
            at = found.end()
        before, whole = (len(tag[:end].encode(self._encoding)) for end in found.span())
        return description.start + before, description.start + whole

    def _text(self, start: int, end: int) -> str:
        return self._data[start:end].decode(self._encoding)

    def _before_space(self, at: int) -> int:
        """Return where the space before a tag begins, or the last part of much space."""
        spaces = {space.encode(self._encoding) for space in " \t\r\n"}
        least = at - _MAX_SPACE * self._width
        while at > least and self._data[max(0, at - self._width) : at] in spaces:
            at -= self._width
        return at

    def _space(self, at: int) -> str:
        return self._text(self._before_space(at), at)

    def _lead(self, at: int) -> str:
        """Return the line break and the space before a tag, empty where it begins no line."""
        found = re.search(r"(\r\n|\n|\r)[ \t]*\Z", self._space(at))
        return "" if found is None else found[0]

    def _step(self, outer: _Element) -> str:
        """Return by how much the content of an element is indented more than itself."""
        inner = outer.children[0] if outer.children else outer.last
        pairs = [(outer, inner)] if inner is not None else []
        pairs += [(d, d.last) for d in self._descriptions[:1] if d.last is not None]
        pairs += [(self._rdf, d) for d in self._descriptions[:1]]
        for above, below in pairs:
            first, second = self._lead(above.start), self._lead(below.start)
            if first and second.startswith(first) and len(second) > len(first):
                return second[len(first) :]
        return " "

    def _spliced(self, edits: list[Edit]) -> bytes:
        pieces: list[bytes] = []
        done = 0
        for start, end, text in sorted(edits):
            pieces += [self._data[done:start], text.encode(self._encoding)]
            done = end
        return b"".join(pieces) + self._data[done:]


def _escaped(label: str) -> str:
    return "".join(_ESCAPES.get(character, character) for character in label)
