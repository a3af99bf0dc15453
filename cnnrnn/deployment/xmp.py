"""XMP files: where their keywords (`dc:subject`) are, and text spliced in there.

A parser finds the bytes, and only those change: nothing is written anew from a tree, which would
lose comments, prefixes, quotes and line endings.
"""

from __future__ import annotations

import codecs
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field
from xml.parsers import expat

from cnnrnn.data.files import reason, short

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
_ATTRIBUTE = re.compile(r"""\s+([^\s=/>"']+)\s*=\s*("[^"]*"|'[^']*')""")
_ESCAPES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "\t": "&#9;", "\n": "&#10;", "\r": "&#13;"}
NEW_XMP = (
    '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>\n'
    '<x:xmpmeta xmlns:x="adobe:ns:meta/">\n'
    f' <rdf:RDF xmlns:rdf="{_RDF}">\n'
    f'  <rdf:Description rdf:about="" xmlns:dc="{_DC}"/>\n'
    " </rdf:RDF>\n"
    "</x:xmpmeta>\n"
    '<?xpacket end="w"?>\n'
).encode()


class Refused(Exception):
    """What is wrong with a sidecar, as the rest of a sentence that begins with its name."""


def label_key(label: str) -> str:
    """Return what is equal for labels that are the same."""
    return unicodedata.normalize("NFC", label.strip())


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
            raise Refused(f"must be valid XML, got {reason(error)}") from error

    def _declaration(self, version: str, encoding: str | None, standalone: int) -> None:
        if encoding and encoding.lower() not in ("utf-8", "utf-16", "utf-16le", "utf-16be"):
            raise Refused(f"must be UTF-8 or UTF-16, got the encoding {short(encoding)}")

    def _doctype(self, *_: object) -> None:
        raise Refused("must be plain XML, got a DOCTYPE")

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
            raise Refused(f"must be XMP of at most {MAX_DEPTH} elements inside one another")
        self._count += 1
        if self._count > MAX_ELEMENTS:
            raise Refused(f"must be XMP of at most {MAX_ELEMENTS} elements")
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


def parsed(data: bytes) -> Packet:
    """Read an XMP file.

    Raises:
        Refused: it is broken, or has its keywords in a form that is not known.
    """
    reader = _Reader()
    reader.read(data)
    if len(reader.rdfs) != 1:
        count = len(reader.rdfs) or "none"
        raise Refused(f"must be XMP with one rdf:RDF at its top, found {count}")
    things = {
        about.strip()
        for description in reader.descriptions
        for key in ((_RDF, "about"), ("", "about"))
        if (about := description.attributes.get(key, "")).strip()
    }
    if len(things) > 1:
        raise Refused(f"must describe one picture, got {len(things)} values of rdf:about")
    inline = [description for description in reader.descriptions if description.inline]
    if len(inline) + len(reader.subjects) > 1:
        raise Refused(
            f"must have one dc:subject, found {len(inline) + len(reader.subjects)}, of which "
            "programs read one or the other"
        )
    if inline:
        return Packet(data, reader, inline[0], None, None)
    if not reader.subjects:
        return Packet(data, reader, None, None, None)
    holder = _holder(reader.subjects[0])
    return Packet(data, reader, None, holder, _list(holder))


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


def _not_known(found: str) -> Refused:
    return Refused(f"must have dc:subject as text or as one list of rdf:li, got {found}")


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


class Packet:
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
        there = [label_key(keyword) for keyword in self.keywords()]
        distinct = dict.fromkeys(there)
        kept = [key for key in distinct if key in wanted] if replace else there
        missing = [label for key, label in wanted.items() if key not in distinct]
        if kept == there and not missing:
            return self._data
        new = self._spliced(self._edits(wanted, missing, replace))
        found = [label_key(keyword) for keyword in parsed(new).keywords()]
        assert found == kept + [label_key(label) for label in missing], "the splice went wrong"
        return new

    def _edits(self, wanted: dict[str, str], missing: list[str], replace: bool) -> list[Edit]:
        if self._bag is not None:
            return self._edits_of_list(self._bag, wanted, missing, replace)
        labels = [
            keyword for keyword in self.keywords() if not replace or label_key(keyword) in wanted
        ]
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
            key = label_key(_keyword(item))
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
