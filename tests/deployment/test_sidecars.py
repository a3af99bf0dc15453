"""Sidecars: labels go in, every other byte of what other programs wrote stays."""

from __future__ import annotations

import os
import random
import stat
import time
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple
from xml.etree.ElementTree import Element
from xml.sax.saxutils import escape

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cnnrnn.data import DataError
from cnnrnn.deployment import sidecars, xmp
from cnnrnn.deployment.sidecars import sidecar_path, write_sidecar
from tests.data.test_mutations import EDITS, Edit, mutated
from tests.nobody import as_nobody

ElementTree = pytest.importorskip("defusedxml.ElementTree")

RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"
DC = "http://purl.org/dc/elements/1.1/"
SUBJECT = f"{{{DC}}}subject"
WORDS = [
    "cat", "dog", "sea & sky", "<none>", 'a "quoted" one', "Zürich", "日本", "𝄞 music", "a>b",
    "it's", "e\u0301te\u0301", "two  spaces", "]]>", "&amp;", "People|Anna", "100 %", "ß", "x;y",
]  # fmt: skip


# An oracle of its own: keywords, and everything else, as ElementTree reads them.


def tree_of(data: bytes) -> Element:
    return ElementTree.fromstring(data, forbid_dtd=True)


def keywords_in(data: bytes) -> list[str]:
    root = tree_of(data)
    found = []
    for description in root.iter(f"{{{RDF}}}Description"):
        if SUBJECT in description.attrib:
            found.append(description.attrib[SUBJECT])
        for subject in description.findall(SUBJECT):
            items = list(subject.iter(f"{{{RDF}}}li"))
            if not items and (subject.text or "").strip():
                found.append(subject.text or "")
            for item in items:
                value = item.find(f".//{{{RDF}}}value")
                found.append((item if value is None else value).text or "")
    return [word for word in found if word.strip()]


def others_in(data: bytes) -> object:
    """Everything but dc:subject: names, attributes, texts."""

    def walk(element: Element) -> object:
        attributes = {k: v for k, v in element.attrib.items() if k != SUBJECT}
        children = [walk(child) for child in element if child.tag != SUBJECT]
        text = (element.text or "") + "".join(child.tail or "" for child in element)
        return element.tag, attributes, "".join(text.split()), [c for c in children if c != empty]

    # What is made where there is none, and says nothing itself.
    empty = (f"{{{RDF}}}Description", {f"{{{RDF}}}about": ""}, "", [])
    return walk(tree_of(data))


def key(word: str) -> str:
    return unicodedata.normalize("NFC", word.strip())


def merged(there: list[str], labels: list[str], existing: str) -> list[str]:
    """What the keywords must be, by their keys."""
    if existing == "skip" and there:
        return [key(word) for word in there]
    new = list(dict.fromkeys(key(label) for label in labels))
    old = [key(word) for word in there]
    if existing == "replace":
        old = [word for word in dict.fromkeys(old) if word in new]
    return old + [word for word in new if word not in old]


# Sidecars as programs write them. Each is text before the place for keywords, that place, and text
# after it; where they have keywords the place is inside the list, else where they are to be.


class Style(NamedTuple):
    dc: str  # prefixes
    rdf: str
    step: str  # indentation
    quote: str
    form: str  # of the keywords
    keywords: list[str]


class Shape(NamedTuple):
    before: str
    place: str
    after: str


def packet(style: Style, content: str, padding: int = 0, toolkit: str = "") -> str:
    q = style.quote
    pad = (" " * 99 + "\n") * padding
    return (
        f"<?xpacket begin={q}\ufeff{q} id={q}W5M0MpCehiHzreSzNTczkc9d{q}?>\n"
        f"<x:xmpmeta xmlns:x={q}adobe:ns:meta/{q}{toolkit}>\n{content}</x:xmpmeta>\n"
        f"{pad}<?xpacket end={q}w{q}?>"
    )


MARK = "\0"  # around the place for keywords, in a text that is made


def subject(style: Style, level: int) -> str:
    """Lines of dc:subject in its form, indented, or only the place for it."""
    dc, rdf, lead = style.dc, style.rdf, "\n" + style.step * level
    deeper, deepest = lead + style.step, lead + 2 * style.step
    items = "".join(f"{deepest}<{rdf}:li>{escape(word)}</{rdf}:li>" for word in style.keywords)
    opened, closed = f"{lead}<{dc}:subject>", f"{lead}</{dc}:subject>"
    if style.form in ("Bag", "Seq"):
        name = f"{rdf}:{style.form}"
        return f"{opened}{deeper}<{name}>{MARK}{items}{MARK}{deeper}</{name}>{closed}"
    if style.form == "empty bag":
        return f"{opened}{deeper}<{rdf}:Bag{MARK}/>{MARK}{closed}"
    if style.form == "spaced bag":
        return f"{opened}{deeper}<{rdf}:Bag>{MARK}{MARK}{deeper}</{rdf}:Bag>{closed}"
    if style.form == "empty":
        return f"{lead}<{dc}:subject{MARK}/>{MARK}"
    if style.form == "text":
        word = escape(style.keywords[0])
        return f"{lead}<{dc}:subject>{MARK}{word}{MARK}</{dc}:subject>"
    if style.form == "one line":
        items = "".join(f"<{rdf}:li>{escape(word)}</{rdf}:li>" for word in style.keywords)
        return f"{opened}<{rdf}:Bag>{MARK}{items}{MARK}</{rdf}:Bag></{dc}:subject>"
    if style.form == "qualified":
        items = "".join(
            f'{deepest}<{rdf}:li {rdf}:parseType="Resource"><{rdf}:value>{escape(word)}'
            f'</{rdf}:value><a:sure xmlns:a="http://a/">0.5</a:sure></{rdf}:li>'
            for word in style.keywords
        )
        return f"{opened}{deeper}<{rdf}:Bag>{MARK}{items}{MARK}{deeper}</{rdf}:Bag>{closed}"
    assert style.form == "none"
    return MARK + MARK


def lightroom(style: Style) -> str:
    """Simple values as attributes of one description, lists as elements, and padding."""
    s, rdf, dc = style.step, style.rdf, style.dc
    attributes = "".join(
        f"\n{3 * s}{name}={style.quote}{value}{style.quote}"
        for name, value in (
            ("xmlns:xmp", "http://ns.adobe.com/xap/1.0/"), (f"xmlns:{dc}", DC),
            ("xmlns:crs", "http://ns.adobe.com/camera-raw-settings/1.0/"),
            ("xmlns:lr", "http://ns.adobe.com/lightroom/1.0/"),
            ("xmp:Rating", "4"), ("xmp:Label", "a &gt; b / c"), ("crs:Exposure2012", "+0.35"),
            (f"{dc}:format", "image/x-canon-cr2"),
        )
    )  # fmt: skip
    return packet(
        style,
        f'{s}<{rdf}:RDF xmlns:{rdf}="{RDF}">\n{2 * s}<{rdf}:Description {rdf}:about=""{attributes}>'
        f"\n{3 * s}<lr:hierarchicalSubject>\n{4 * s}<{rdf}:Bag>\n{5 * s}<{rdf}:li>animal|cat"
        f"</{rdf}:li>\n{4 * s}</{rdf}:Bag>\n{3 * s}</lr:hierarchicalSubject>"
        f"\n{3 * s}<!-- <dc:subject> is not here -->\n{3 * s}<crs:Look/>"
        f"{subject(style, 3)}\n{2 * s}</{rdf}:Description>\n{s}</{rdf}:RDF>\n",
        padding=20,
        toolkit=' x:xmptk="Core 7.0"',
    )


def darktable(style: Style) -> str:
    """An XML declaration, and a history whose list has no text but attributes."""
    s, rdf, dc = style.step, style.rdf, style.dc
    steps = "".join(
        f'\n{5 * s}<{rdf}:li\n{6 * s}darktable:num="{i}"\n{6 * s}darktable:params="gz02{i}=="/>'
        for i in range(3)
    )
    return (
        f'<?xml version="1.0" encoding="ENCODING"?>\n<x:xmpmeta xmlns:x="adobe:ns:meta/">\n'
        f'{s}<{rdf}:RDF xmlns:{rdf}="{RDF}">\n{2 * s}<{rdf}:Description {rdf}:about=""\n'
        f'{4 * s}xmlns:{dc}="{DC}"\n{4 * s}xmlns:darktable="http://darktable.sf.net/"\n'
        f'{3 * s}darktable:history_end="3">\n{3 * s}<darktable:history>\n{4 * s}<{rdf}:Seq>'
        f"{steps}\n{4 * s}</{rdf}:Seq>\n{3 * s}</darktable:history>{subject(style, 3)}"
        f"\n{2 * s}</{rdf}:Description>\n{s}</{rdf}:RDF>\n</x:xmpmeta>\n"
    )


def digikam(style: Style) -> str:
    """Keywords in the middle, paths of tags beside them, CDATA."""
    s, rdf, dc = style.step, style.rdf, style.dc
    tags = "".join(
        f"\n{3 * s}<{name}>\n{4 * s}<{rdf}:Seq>\n{5 * s}<{rdf}:li>Places/<![CDATA[A & B]]>"
        f"</{rdf}:li>\n{4 * s}</{rdf}:Seq>\n{3 * s}</{name}>"
        for name in ("digiKam:TagsList", "MP:LastKeywordXMP")
    )
    between = subject(style, 3)
    last = "" if style.form == "none" else f"\n{3 * s}<{dc}:title>t</{dc}:title>"
    return (
        f'<?xml version="1.0" encoding="ENCODING"?>\n<x:xmpmeta xmlns:x="adobe:ns:meta/" '
        f'x:xmptk="XMP Core 4.4.0">\n{s}<{rdf}:RDF xmlns:{rdf}="{RDF}">\n{2 * s}'
        f'<{rdf}:Description {rdf}:about="" xmlns:digiKam="http://www.digikam.org/ns/1.0/" '
        f'xmlns:{dc}="{DC}" xmlns:MP="http://ns.microsoft.com/photo/1.0/">'
        f"{tags}{between}{last}\n{2 * s}</{rdf}:Description>\n{s}</{rdf}:RDF>\n</x:xmpmeta>\n"
    )


def exiftool(style: Style) -> str:
    """Single quotes, a description for each namespace, blank lines between."""
    s, rdf, dc = style.step, style.rdf, style.dc
    found = subject(style, 2)
    own = f"\n{2 * s}<{dc}:format>image/jpeg</{dc}:format>{found}"
    return packet(
        style._replace(quote="'"),
        f"<{rdf}:RDF xmlns:{rdf}='{RDF}'>\n\n{s}<{rdf}:Description {rdf}:about=''\n"
        f"{s} xmlns:tiff='http://ns.adobe.com/tiff/1.0/'>\n{2 * s}<tiff:Model>X &lt; Y</tiff:Model>"
        f"\n{s}</{rdf}:Description>\n\n{s}<{rdf}:Description {rdf}:about=''\n{s} xmlns:{dc}='{DC}'>"
        f"{own}\n{s}</{rdf}:Description>\n\n{s}<{rdf}:Description {rdf}:about=''\n"
        f"{s} xmlns:xmp='http://ns.adobe.com/xap/1.0/'>\n{2 * s}<xmp:Rating>5</xmp:Rating>"
        f"\n{s}</{rdf}:Description>\n</{rdf}:RDF>\n",
        padding=2,
    )


def capture_one(style: Style) -> str:
    """No packet around it, attributes on the root, keywords first."""
    s, rdf, dc = style.step, style.rdf, style.dc
    rest = "" if style.form == "none" else f"\n{3 * s}<photoshop:City>Z</photoshop:City>"
    first = f"\n{3 * s}<photoshop:Urgency>1</photoshop:Urgency>" if style.form == "none" else ""
    return (
        f'<?xml version="1.0" encoding="ENCODING"?>\n<x:xmpmeta xmlns:x="adobe:ns:meta/" '
        f'x:xmptk="XMP Core 5.5.0">\n{s}<{rdf}:RDF xmlns:{rdf}="{RDF}" xmlns:{dc}="{DC}">\n{2 * s}'
        f'<{rdf}:Description {rdf}:about=""\n{4 * s}xmlns:photoshop="http://ns.adobe.com/'
        f'photoshop/1.0/">{first}{subject(style, 3)}{rest}\n{2 * s}</{rdf}:Description>\n'
        f"{s}</{rdf}:RDF>\n</x:xmpmeta>\n"
    )


def rawtherapee(style: Style) -> str:
    """Nothing but attributes: the description has no content where there are no keywords."""
    s, rdf, dc = style.step, style.rdf, style.dc
    declared = "" if style.form == "none" and style.dc == "d" else f'\n{3 * s}xmlns:{dc}="{DC}"'
    attributes = (
        f'{declared}\n{3 * s}xmlns:xmp="http://ns.adobe.com/xap/1.0/"\n{3 * s}xmp:Rating="-1"'
    )
    if style.form == "none":
        content = f"{MARK}/>{MARK}"
    else:
        content = f">{subject(style, 3)}\n{2 * s}</{rdf}:Description>"
    return packet(
        style,
        f'{s}<{rdf}:RDF xmlns:{rdf}="{RDF}">\n{2 * s}<{rdf}:Description {rdf}:about=""'
        f"{attributes}{content}\n{s}</{rdf}:RDF>\n",
    )


def photoprism(style: Style) -> str:
    """All in one line, and Dublin Core declared where it is used."""
    rdf, dc = style.rdf, style.dc
    compact = subject(style._replace(step=""), 0).replace("\n", "")
    compact = compact.replace(f"<{dc}:subject", f'<{dc}:subject xmlns:{dc}="{DC}"')
    return (
        f'<x:xmpmeta xmlns:x="adobe:ns:meta/"><{rdf}:RDF xmlns:{rdf}="{RDF}"><{rdf}:Description '
        f'{rdf}:about=""><xmp:Rating xmlns:xmp="http://ns.adobe.com/xap/1.0/">2</xmp:Rating>'
        f"{compact}</{rdf}:Description></{rdf}:RDF></x:xmpmeta>"
    )


PROGRAMS: list[Callable[[Style], str]] = [
    lightroom, darktable, digikam, exiftool, capture_one, rawtherapee, photoprism
]  # fmt: skip
FORMS = [
    "Bag", "Seq", "empty bag", "spaced bag", "empty", "text", "one line", "qualified", "none"
]  # fmt: skip


def sidecar_of(seed: int) -> tuple[bytes, bytes, bytes, Style]:
    """A sidecar as three pieces, before, at and after its keywords."""
    chance = random.Random(seed)
    form = FORMS[seed // len(PROGRAMS) % len(FORMS)]
    count = {"text": 1, "empty": 0, "empty bag": 0, "spaced bag": 0, "none": 0}.get(
        form, chance.randint(1, 5)
    )
    style = Style(
        dc=chance.choice(["dc", "dc", "d", "dublin"]),
        rdf=chance.choice(["rdf", "rdf", "r"]),
        step=chance.choice([" ", "  ", "   ", "\t"]),
        quote=chance.choice("\"'"),
        form=form,
        keywords=chance.sample(WORDS, count),
    )
    encoding = chance.choice(["utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16-le", "utf-16-be"])
    newline = chance.choice(["\n", "\n", "\r\n", "\r"])
    text = PROGRAMS[seed % len(PROGRAMS)](style)
    text = text.replace("ENCODING", "UTF-16" if "16" in encoding else "UTF-8")
    before, place, after = text.replace("\n", newline).split(MARK)
    mark = "\ufeff" if encoding != "utf-8" else ""
    plain = encoding.removesuffix("-sig")
    return (mark + before).encode(plain), place.encode(plain), after.encode(plain), style


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing wait for the disk, a thousand times."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.mark.parametrize(("existing", "files"), [("append", 1000), ("replace", 300)])
def test_a_thousand_sidecars_keep_all_else(existing, files, tmp_path, quick):
    counts: Counter[str] = Counter()
    for seed in range(files):
        before, place, after, style = sidecar_of(seed)
        old = before + place + after
        assert [key(k) for k in keywords_in(old)] == [key(k) for k in style.keywords]
        labels = random.Random(f"labels {seed}").sample(WORDS, seed % 4 + (existing == "append"))
        if seed % 5 == 0 and style.keywords:
            labels = style.keywords[::-1]
        image = tmp_path / f"{seed}.jpg"
        file = tmp_path / (f"{seed}.xmp" if seed % 2 else f"{seed}.jpg.xmp")
        file.write_bytes(old)
        os.utime(file, (1, 1))
        outcome = write_sidecar(image, labels, kind="xmp", existing=existing)
        new = file.read_bytes()
        expected = merged(style.keywords, labels, existing)
        assert [key(word) for word in keywords_in(new)] == expected, seed
        changes = [key(k) for k in style.keywords] != expected
        assert outcome == ("written" if changes else "unchanged"), seed
        counts[outcome] += 1
        assert others_in(new) == others_in(old), seed
        # Byte for byte: nothing but the place of the keywords differs.
        assert new.startswith(before) and new.endswith(after), seed
        assert len(new) >= len(before) + len(after), seed
        if existing == "append" and style.form in ("Bag", "Seq", "one line", "qualified"):
            assert new.startswith(before + place), seed
        if not changes:
            assert new == old and file.stat().st_mtime == 1, seed
        os.utime(file, (2, 2))
        assert write_sidecar(image, labels, kind="xmp", existing=existing) == "unchanged"
        assert file.read_bytes() == new and file.stat().st_mtime == 2, seed
    print(f"\n{existing}: {dict(counts)}")
    assert counts["written"] > 0.7 * files and counts["unchanged"] > 0.05 * files
    assert len(list(tmp_path.iterdir())) == files  # no picture is made, nothing partial left


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
@pytest.mark.parametrize("form", [form for form in FORMS if form != "qualified"])
def test_every_program_in_every_form_looks_as_it_would_have_written_it(program, form, tmp_path):
    """What is added has the indentation, prefixes and line ends of the file."""
    filled = "Bag" if form not in ("Seq", "one line") else form
    style = Style("dc", "rdf", "  ", '"', form, ["cat", "dog"])
    there = ["cat"] if form in ("Bag", "Seq", "text", "one line") else []
    old = program(style._replace(keywords=there)).replace(MARK, "")
    expected = program(style._replace(form=filled)).replace(MARK, "")
    if program in (digikam, capture_one, rawtherapee) and form == "none":
        # The rest of these templates depends on the form; only the list is compared.
        start, end = expected.index("<dc:subject"), expected.index("</dc:subject>")
        expected = expected[start:end]
    file = tmp_path / "a.jpg.xmp"
    for newline in ("\n", "\r\n"):
        file.write_bytes(old.replace("\n", newline).replace("ENCODING", "UTF-8").encode())
        write_sidecar(tmp_path / "a.jpg", ["cat", "dog"], kind="xmp")
        new = file.read_bytes().decode()
        assert expected.replace("\n", newline).replace("ENCODING", "UTF-8") in new


def rdf(content: str, more: str = "") -> bytes:
    return f'<rdf:RDF xmlns:rdf="{RDF}" xmlns:dc="{DC}"{more}>{content}</rdf:RDF>'.encode()


def described(content: str, attributes: str = "") -> bytes:
    return rdf(f"<rdf:Description{attributes}>{content}</rdf:Description>")


def test_the_splice_to_the_byte(tmp_path):
    """Files in one line, whose outcome is written out here."""
    bag = "<dc:subject><rdf:Bag>{}</rdf:Bag></dc:subject>"
    a = "<rdf:li>a</rdf:li>"
    cases = [
        (described(bag.format("<rdf:li>x</rdf:li>")),
         described(bag.format(f"<rdf:li>x</rdf:li>{a}"))),
        (described(""), described(bag.format(a))),
        (rdf("<rdf:Description/>"), described(bag.format(a))),
        (rdf("<rdf:Description />"), described(bag.format(a), " ")),
        (rdf(""), described(bag.format(a), ' rdf:about=""')),
        (described("", ' dc:subject="x&amp;y" dc:type = "t"'),
         described(bag.format(f"<rdf:li>x&amp;y</rdf:li>{a}"), ' dc:type = "t"')),
        (rdf("<rdf:Description dc:type='/>' dc:subject='x'/>"),
         described(bag.format(f"<rdf:li>x</rdf:li>{a}"), " dc:type='/>'")),
        (described("<dc:subject><!-- c --></dc:subject>"),
         described(f"<dc:subject><rdf:Bag>{a}</rdf:Bag><!-- c --></dc:subject>")),
        (described(bag.format("<rdf:li>x</rdf:li><!-- c --><rdf:li>y</rdf:li> <?p?>")),
         described(bag.format(f"<rdf:li>x</rdf:li><!-- c --><rdf:li>y</rdf:li>{a} <?p?>"))),
        (described(bag.format("<rdf:li>x</rdf:li> <rdf:li>y</rdf:li>")),
         described(bag.format(f"<rdf:li>x</rdf:li> <rdf:li>y</rdf:li> {a}"))),
        (described(bag.format("\n\n\n\t<rdf:li>x</rdf:li>")),
         described(bag.format(f"\n\n\n\t<rdf:li>x</rdf:li>\n\t{a}"))),
        (described("<dc:subject>x<![CDATA[<]]>&#x79;</dc:subject>"),
         described(bag.format(f"<rdf:li>x&lt;y</rdf:li>{a}"))),
        (rdf("<rdf:Description/><rdf:Description dc:type=''/><rdf:Description/>"),
         rdf(f"<rdf:Description/><rdf:Description dc:type=''>{bag.format(a)}</rdf:Description>"
             "<rdf:Description/>")),
        (f'<R:RDF xmlns:R="{RDF}" xmlns:dc="http://o/"><R:Description/></R:RDF>'.encode(),
         f'<R:RDF xmlns:R="{RDF}" xmlns:dc="http://o/"><R:Description><dc:subject xmlns:dc="{DC}">'
         "<R:Bag><R:li>a</R:li></R:Bag></dc:subject></R:Description></R:RDF>".encode()),
        (f'<dc:RDF xmlns:dc="{RDF}"><dc:Description/></dc:RDF>'.encode(),
         f'<dc:RDF xmlns:dc="{RDF}"><dc:Description><dcelements:subject xmlns:dcelements="{DC}">'
         f"<dc:Bag><dc:li>a</dc:li></dc:Bag></dcelements:subject></dc:Description></dc:RDF>"
         .encode()),
        (f'<RDF xmlns="{RDF}"><Description/></RDF>'.encode(),
         f'<RDF xmlns="{RDF}"><Description><dc:subject xmlns:dc="{DC}"><Bag><li>a</li></Bag>'
         "</dc:subject></Description></RDF>".encode()),
        (f'<RDF xmlns="{RDF}"><Description><subject xmlns="{DC}"/></Description></RDF>'.encode(),
         None),
        (rdf(f'<rdf:Description><subject xmlns="{DC}"/></rdf:Description>'),
         rdf(f'<rdf:Description><subject xmlns="{DC}"><rdf:Bag>{a}</rdf:Bag></subject>'
             "</rdf:Description>")),
        (described('<dc:subject rdf:parseType="Resource"><rdf:value><rdf:Bag/></rdf:value>'
                   "<dc:type/></dc:subject>"),
         described(f'<dc:subject rdf:parseType="Resource"><rdf:value><rdf:Bag>{a}</rdf:Bag>'
                   "</rdf:value><dc:type/></dc:subject>")),
        (f'<RDF xmlns="{RDF}" xmlns:rdf="{DC}"/>'.encode(),
         f'<RDF xmlns="{RDF}" xmlns:rdf="{DC}"><rdf:Description xmlns:rdf="{RDF}" rdf:about="">'
         f'<dc:subject xmlns:dc="{DC}"><rdf:Bag>{a}</rdf:Bag></dc:subject></rdf:Description></RDF>'
         .encode()),
        (described("", ' x:subject="other" subject="none" xmlns:x="http://x/"'),
         described(bag.format(a), ' x:subject="other" subject="none" xmlns:x="http://x/"')),
        (described("<dc:source><rdf:Description><dc:subject>not its own</dc:subject>"
                   "</rdf:Description></dc:source>"),
         described("<dc:source><rdf:Description><dc:subject>not its own</dc:subject>"
                   f"</rdf:Description></dc:source>{bag.format(a)}")),
    ]  # fmt: skip
    file = tmp_path / "p.xmp"
    for old, expected in cases:
        file.write_bytes(old)
        if expected is None:
            with pytest.raises(DataError, match="no prefix of RDF"):
                write_sidecar(tmp_path / "p.png", ["a"], kind="xmp")
            continue
        assert write_sidecar(tmp_path / "p.png", ["a"], kind="xmp") == "written"
        assert file.read_bytes() == expected
        assert write_sidecar(tmp_path / "p.png", ["a"], kind="xmp") == "unchanged"


@pytest.mark.parametrize("space", [" ", "\n", "\r\n ", "\t\n"])
def test_much_space_takes_no_time(space, tmp_path):
    file = tmp_path / "p.xmp"
    much = space * (500_000 // len(space))
    a = "<rdf:li>a</rdf:li>"
    for old, kept in (
        (described(f"<dc:subject><rdf:Bag>{a}{much}{a}</rdf:Bag></dc:subject>"), [much]),
        (described("", f" {much}dc:subject='x'{much} dc:type=''{much}"), [much, much]),
        (described(f"<dc:type/>{much}<dc:type/>"), [much]),
        (rdf(f"{much}<rdf:Description/>"), [much]),
    ):
        file.write_bytes(old)
        start = time.process_time()
        assert write_sidecar(tmp_path / "p.png", ["b", "c"], kind="xmp") == "written"
        assert time.process_time() - start < 3
        new = file.read_bytes()
        assert keywords_in(new)[-2:] == ["b", "c"] and others_in(new) == others_in(old)
        assert new.count(much.encode()) >= len(kept) and len(new) < len(old) + 10_000


def test_replacing_keeps_what_stays_and_its_order(tmp_path):
    item = '\n <rdf:li xml:lang="en">{}</rdf:li>'.format
    content = f"{item('a')}{item('b')}<!-- note -->{item('a')}{item('c')}<rdf:li/>\n"
    wanted = f"{item('a')}{item('b')}<!-- note -->\n <rdf:li>d</rdf:li>\n"
    whole = "<dc:subject><rdf:Bag>{}</rdf:Bag></dc:subject>".format
    file = tmp_path / "p.xmp"
    file.write_bytes(described(whole(content)))
    labels = ["d", "b", "a", "d"]
    image = tmp_path / "p.png"
    assert write_sidecar(image, labels, kind="xmp", existing="replace") == "written"
    # The last element is <rdf:li/> without a line of its own, so that the new one has none.
    assert file.read_bytes() == described(whole(wanted.replace("\n <rdf:li>d", "<rdf:li>d")))
    assert write_sidecar(image, [], kind="xmp", existing="replace") == "written"
    assert keywords_in(file.read_bytes()) == [] and b"<!-- note -->" in file.read_bytes()
    for form in (' dc:subject="x"', ""):
        file.write_bytes(described("" if form else "<dc:subject>x</dc:subject>", form))
        assert write_sidecar(image, [], kind="xmp", existing="replace") == "written"
        assert keywords_in(file.read_bytes()) == []


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("start", ["", "\n ", "\ufeff", "\ufeff\n"])
def test_utf_16_with_and_without_a_mark(start, encoding, tmp_path):
    file = tmp_path / "p.xmp"
    old = start + rdf("<rdf:Description/>").decode()
    file.write_bytes(old.encode(encoding))
    assert write_sidecar(tmp_path / "p.png", ["\u3c00\u3e00 𝄞"], kind="xmp") == "written"
    item = "<rdf:li>\u3c00\u3e00 𝄞</rdf:li>"
    new = described(f"<dc:subject><rdf:Bag>{item}</rdf:Bag></dc:subject>").decode()
    assert file.read_bytes().decode(encoding) == start + new


def test_skip_appends_only_where_there_are_no_keywords(tmp_path):
    image, file = tmp_path / "p.png", tmp_path / "p.png.xmp"
    assert write_sidecar(image, ["a"], kind="xmp", existing="skip") == "written"
    there = file.read_bytes()
    assert write_sidecar(image, ["b"], kind="xmp", existing="skip") == "skipped"
    assert file.read_bytes() == there
    file.write_bytes(described("<dc:subject><rdf:Bag><rdf:li> </rdf:li></rdf:Bag></dc:subject>"))
    assert write_sidecar(image, ["b"], kind="xmp", existing="skip") == "written"
    assert keywords_in(file.read_bytes()) == ["b"]
    file.write_bytes(b"<broken")
    with pytest.raises(DataError):
        write_sidecar(image, ["b"], kind="xmp", existing="skip")


def test_a_new_file_is_xmp_with_every_label(tmp_path):
    image = tmp_path / "p.tar.jpg"
    labels = [*WORDS, "\ufffd", "\U0010ffff", "tab\tand\nline\r\nends", " around ", "cat"]
    assert write_sidecar(image, labels, kind="xmp", exclude=["dog"]) == "written"
    data = (tmp_path / "p.tar.jpg.xmp").read_bytes()
    assert keywords_in(data) == [label for label in dict.fromkeys(labels) if label != "dog"]
    assert tree_of(data).tag == "{adobe:ns:meta/}xmpmeta"
    assert data.startswith('<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>\n'.encode())
    assert data.endswith(b'<?xpacket end="w"?>\n')
    assert not image.exists()


def test_without_labels_no_file_is_made(tmp_path):
    for kind in ("txt", "xmp"):
        assert write_sidecar(tmp_path / "p.jpg", ["a"], kind=kind, exclude=["a"]) == "unchanged"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["txt", "xmp"])
def test_labels_are_the_same_composed_and_trimmed(kind, tmp_path):
    image = tmp_path / "p.jpg"
    assert (
        write_sidecar(image, ["e\u0301", "\u00e9", " \u00e9 ", "E\u0301"], kind=kind) == "written"
    )
    assert write_sidecar(image, ["\u00e9"], kind=kind) == "unchanged"
    assert write_sidecar(image, ["\u00e9", "x"], kind=kind, exclude=["x "]) == "unchanged"
    text = sidecar_path(image, kind).read_text("utf-8")
    assert text.count("e\u0301") == 1 and text.count("E\u0301") == 1 and "\u00e9" not in text


@pytest.mark.parametrize(
    "bad", ["\0", "\x01", "\x0b", "\x1f", "\ud800", "\udfff", "\ufffe", "\uffff"]
)
@pytest.mark.parametrize("kind", ["txt", "xmp"])
def test_what_xml_cannot_hold_is_one_sentence(kind, bad, tmp_path):
    with pytest.raises(ValueError, match="XML 1.0 can hold") as error:
        write_sidecar(tmp_path / "p.jpg", ["fine", f"a{bad}b"], kind=kind)
    assert f"U+{ord(bad):04X}" in str(error.value) and str(error.value).isprintable()
    assert not list(tmp_path.iterdir())


def test_arguments_are_checked(tmp_path):
    image = tmp_path / "p.jpg"
    with pytest.raises(ValueError, match="blank"):
        write_sidecar(image, ["a", " "], kind="xmp")
    with pytest.raises(ValueError, match="skip, append, replace, got 'keep'"):
        write_sidecar(image, ["a"], kind="xmp", existing="keep")
    with pytest.raises(ValueError, match="txt, xmp, got 'json'"):
        write_sidecar(image, ["a"], kind="json")
    for line in ("a\nb", "a\rb", "a\u2028b", "a\x85b"):
        with pytest.raises(ValueError, match="one line"):
            write_sidecar(image, [line], kind="txt")
    for name, kind in (("p.xmp", "xmp"), ("p.XMP", "xmp"), ("p.txt", "txt")):
        (tmp_path / name).write_bytes(b"a picture")
        with pytest.raises(ValueError, match="suffix of its sidecar"):
            write_sidecar(tmp_path / name, ["a"], kind=kind)
        assert (tmp_path / name).read_bytes() == b"a picture"


def test_the_names_of_sidecars(tmp_path):
    image = tmp_path / "IMG.jpg"
    assert sidecar_path(image, "xmp").name == "IMG.jpg.xmp"
    assert sidecar_path(image, "txt").name == "IMG.txt"
    assert sidecar_path(tmp_path / "a.b.jpg", "txt").name == "a.b.txt"
    assert sidecar_path(tmp_path / "plain", "xmp").name == "plain.xmp"
    for kind in ("txt", "xmp"):
        for name in (f"IMG.{kind}", f"IMG.jpg.{kind}", f"IMG.{kind.upper()}"):
            (tmp_path / name).touch()
            assert sidecar_path(str(image), kind).name == name
            (tmp_path / name).unlink()
    (tmp_path / "IMG.xmp").touch()
    os.link(tmp_path / "IMG.xmp", tmp_path / "IMG.jpg.xmp")  # two names, and programs read both
    with pytest.raises(DataError, match=r"found IMG\.jpg\.xmp and IMG\.xmp") as error:
        write_sidecar(image, ["a"], kind="xmp")
    assert str(image) in str(error.value)


def test_lines_of_text(tmp_path):
    image, file = tmp_path / "p.jpg", tmp_path / "p.txt"
    assert write_sidecar(image, ["a, b", "日本", "a, b"], kind="txt") == "written"
    assert file.read_bytes() == "a, b\n日本\n".encode()
    cases = [
        (b"a\n", "append", b"a\nb\nc\n"), (b"a", "append", b"a\nb\nc\n"),
        (b"a\r\n# x ", "append", b"a\r\n# x \r\nb\r\nc\r\n"), (b"", "append", b"b\nc\n"),
        (b"\xef\xbb\xbf c \n\n", "append", b"\xef\xbb\xbf c \n\nb\n"),
        (b"c\nb", "append", None), (b"b\r\n c", "replace", None),
        (b"c\nb\n", "replace", b"b\nc\n"), (b"\xef\xbb\xbfa\r\n", "replace",
                                            b"\xef\xbb\xbfb\r\nc\r\n"),
    ]  # fmt: skip
    for old, existing, new in cases:
        file.write_bytes(old)
        outcome = write_sidecar(image, ["b", "c"], kind="txt", existing=existing)
        assert outcome == ("unchanged" if new is None else "written")
        assert file.read_bytes() == (old if new is None else new)
    file.write_bytes(b"")
    assert write_sidecar(image, ["b"], kind="txt", existing="skip") == "skipped"
    assert write_sidecar(image, [], kind="txt", existing="replace") == "unchanged"
    for broken in ("a\n".encode("utf-16"), "é".encode("latin-1"), b"a\0\n"):
        file.write_bytes(broken)
        with pytest.raises(DataError, match=r"p\.txt must be UTF-8 text"):
            write_sidecar(image, ["b"], kind="txt")
        assert file.read_bytes() == broken


def broken_files() -> Iterator[tuple[str, bytes, str]]:
    good = described("<dc:subject><rdf:Bag><rdf:li>a</rdf:li></rdf:Bag></dc:subject>")
    yield "empty", b"", "valid XML"
    yield "truncated", good[:-5], "valid XML"
    yield "garbage", good + b"\0\0", "valid XML"
    yield "picture", b"\xff\xd8\xff\xe0", "valid XML"
    yield "utf-32", good.decode().encode("utf-32"), "valid XML"
    yield "utf-16 in name", b'<?xml version="1.0" encoding="UTF-16"?>' + good, "valid XML"
    yield "latin", b'<?xml version="1.0" encoding="ISO-8859-1"?>' + good, "UTF-8 or UTF-16"
    yield "unknown", b'<?xml version="1.0" encoding="klingon"?>' + good, "UTF-8 or UTF-16"
    yield "broken text", good.replace(b">a<", b">\xff<"), "valid XML"
    bomb = "".join(f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">' for i in range(1, 20))
    yield "bomb", f'<!DOCTYPE x [<!ENTITY a0 "ha">{bomb}]>'.encode() + good, "DOCTYPE"
    yield "file", b'<!DOCTYPE x [<!ENTITY f SYSTEM "file:///etc/passwd">]>' + good, "DOCTYPE"
    yield "doctype", b'<!DOCTYPE x SYSTEM "http://h/x.dtd">' + good, "DOCTYPE"
    yield "entity", good.replace(b">a<", b">&f;<"), "valid XML"
    yield "deep", described("<a>" * 5000 + "</a>" * 5000), "inside one another"
    yield "deep keywords", described("<dc:subject>" + "<rdf:Bag>" * 10**6), "inside one another"
    yield "many", described("<a/>" * 200_000), "at most 100000 elements"
    yield "prefix", b"<rdf:RDF/>", "valid XML"
    yield "no rdf", b"<svg/>", "one rdf:RDF"
    yield "rdf below", b"<a><b>" + good + b"</b></a>", "one rdf:RDF"
    yield "two rdf", b"<a>" + good + good + b"</a>", "one rdf:RDF"
    description = "<rdf:Description><dc:subject>a</dc:subject></rdf:Description>"
    yield "two subjects", rdf(2 * description), "one dc:subject, found 2"
    yield "both", described("<dc:subject/>", ' dc:subject=""'), "one dc:subject, found 2"
    about = "<rdf:Description rdf:about='{}'/>"
    yield "two things", rdf(about.format("a") + about.format("b")), "rdf:about"
    for number, subject_ in enumerate((
        "<dc:subject rdf:resource='http://x/'/>",
        "<dc:subject rdf:parseType='Literal'><rdf:Bag/></dc:subject>",
        "<dc:subject rdf:parseType='Collection'/>",
        "<dc:subject rdf:parseType='Resource'/>",
        "<dc:subject><rdf:Bag/><rdf:Bag/></dc:subject>",
        "<dc:subject>text<rdf:Bag/></dc:subject>",
        "<dc:subject><rdf:Bag>text</rdf:Bag></dc:subject>",
        "<dc:subject><rdf:Bag><rdf:_1>a</rdf:_1></rdf:Bag></dc:subject>",
        "<dc:subject><rdf:Bag rdf:_1='a'/></dc:subject>",
        "<dc:subject><dc:title/></dc:subject>",
    )):  # fmt: skip
        yield f"strange {number}", described(subject_), "dc:subject as text or as one list"


@pytest.mark.parametrize(("data", "message"), [
    pytest.param(data, message, id=name) for name, data, message in broken_files()
])  # fmt: skip
@pytest.mark.parametrize("existing", ["append", "replace", "skip"])
def test_a_broken_file_is_named_and_never_overwritten(existing, data, message, tmp_path):
    file = tmp_path / "p.xmp"
    file.write_bytes(data)
    start = time.process_time()
    with pytest.raises(DataError, match=message) as error:
        write_sidecar(tmp_path / "p.jpg", ["b"], kind="xmp", existing=existing)
    assert time.process_time() - start < 5
    assert str(error.value).startswith(f"{file} must ") and "\n" not in str(error.value)
    assert file.read_bytes() == data
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("kind", ["txt", "xmp"])
def test_a_large_file_is_not_read(kind, tmp_path, monkeypatch):
    file = tmp_path / f"p.{kind}"
    with open(file, "wb") as handle:
        handle.truncate(100 << 20)
    monkeypatch.setattr(sidecars, "read_bytes", lambda _: pytest.fail("it was read"))
    with pytest.raises(DataError, match="at most 16777216 bytes, got 104857600"):
        write_sidecar(tmp_path / "p.jpg", ["b"], kind=kind)
    assert file.stat().st_size == 100 << 20


def test_a_file_does_not_grow_beyond_what_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(sidecars, "MAX_BYTES", 1000)
    image = tmp_path / "p.jpg"
    assert write_sidecar(image, ["a"], kind="txt") == "written"
    with pytest.raises(DataError, match="with the labels"):
        write_sidecar(image, ["b" * 1000], kind="txt")
    assert (tmp_path / "p.txt").read_bytes() == b"a\n"


@pytest.mark.parametrize("kind", ["txt", "xmp"])
@pytest.mark.parametrize("existing", ["append", "replace"])
def test_only_a_file_of_its_own_is_a_sidecar(kind, existing, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    image, file = folder / "p.jpg", folder / f"p.jpg.{kind}"
    image.write_bytes(b"a picture")
    elsewhere = tmp_path / "elsewhere"
    for target in (elsewhere, image, folder / "missing"):
        elsewhere.write_bytes(described("") if kind == "xmp" else b"x\n")
        there = elsewhere.read_bytes()
        file.symlink_to(target)
        with pytest.raises(DataError, match="symbolic link"):
            write_sidecar(image, ["a"], kind=kind, existing=existing)
        assert file.is_symlink() and elsewhere.read_bytes() == there
        assert image.read_bytes() == b"a picture" and not (folder / "missing").exists()
        file.unlink()
    file.mkdir()
    with pytest.raises(DataError, match="found a folder"):
        write_sidecar(image, ["a"], kind=kind, existing=existing)
    file.rmdir()
    os.mkfifo(file)
    with pytest.raises(DataError, match="not a file"):
        write_sidecar(image, ["a"], kind=kind, existing=existing)


@pytest.mark.parametrize("kind", ["txt", "xmp"])
def test_permission_bits_stay(kind, tmp_path):
    image = tmp_path / "p.jpg"
    before = os.umask(0o027)
    try:
        write_sidecar(image, ["a"], kind=kind)
    finally:
        os.umask(before)
    file = sidecar_path(image, kind)
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    for mode in (0o600, 0o664, 0o666):
        file.chmod(mode)
        assert write_sidecar(image, [f"new {mode}"], kind=kind) == "written"
        assert stat.S_IMODE(file.stat().st_mode) == mode


@pytest.mark.parametrize("kind", ["txt", "xmp"])
def test_a_file_that_may_not_be_written_is_not_replaced(kind, public_folder):
    """Its folder may be written, which is all that a rename asks for."""
    image = public_folder / "p.jpg"
    write_sidecar(image, ["a"], kind=kind)
    file = sidecar_path(image, kind)
    there = file.read_bytes()
    public_folder.chmod(0o777)
    file.chmod(0o444)
    with as_nobody(), pytest.raises(PermissionError) as error:
        write_sidecar(image, ["more"], kind=kind)
    assert error.value.filename == str(file) and file.read_bytes() == there
    with as_nobody():
        assert write_sidecar(image, ["a"], kind=kind) == "unchanged"


def test_what_another_program_writes_meanwhile_stays(tmp_path, monkeypatch):
    image, file = tmp_path / "p.jpg", tmp_path / "p.xmp"
    file.write_bytes(described(""))
    read = sidecars.read_bytes

    def read_and_change(path):
        data = read(path)
        file.write_bytes(described("<dc:type/>"))
        return data

    monkeypatch.setattr(sidecars, "read_bytes", read_and_change)
    with pytest.raises(OSError, match="changed by another program"):
        write_sidecar(image, ["a"], kind="xmp")
    assert file.read_bytes() == described("<dc:type/>")
    assert list(tmp_path.iterdir()) == [file]


def test_a_full_disk_leaves_the_file(tmp_path, monkeypatch):
    image, file = tmp_path / "p.jpg", tmp_path / "p.xmp"
    file.write_bytes(described(""))

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as error:
        write_sidecar(image, ["a"], kind="xmp")
    assert error.value.filename == str(file)
    assert file.read_bytes() == described("") and list(tmp_path.iterdir()) == [file]


def test_mutated_sidecars(tmp_path, pytestconfig, quick):
    """A broken sidecar is named and stays; one that is read has its labels and all else."""
    image, file = tmp_path / "p.jpg", tmp_path / "p.xmp"
    outcomes: Counter[str] = Counter()

    @settings(
        max_examples=pytestconfig.getoption("mutations"), deadline=None, derandomize=True,
        database=None, suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(
        seed=st.integers(0, 999), edits=EDITS, existing=st.sampled_from(["append", "replace"]),
        near=st.booleans(),
    )  # fmt: skip
    def run(seed: int, edits: list[Edit], existing: sidecars.Existing, near: bool) -> None:
        before, place, after, _ = sidecar_of(seed)
        if near:  # what matters most is around the keywords
            part = mutated(before[-200:] + place + after[:200], edits)
            old = before[:-200] + part + after[200:]
        else:
            old = mutated(before + place + after, edits)
        file.write_bytes(old)
        try:
            outcome = write_sidecar(image, ["cat", "née <&>"], kind="xmp", existing=existing)
        except DataError as error:
            outcomes["named"] += 1
            assert file.read_bytes() == old
            assert str(file) in str(error) and "\n" not in str(error)
            if "dc:subject" not in str(error):
                with pytest.raises(xmp.Refused):  # not what the splice made is broken
                    xmp.parsed(old)
            return
        outcomes[outcome] += 1
        new = file.read_bytes()
        assert others_in(new) == others_in(old)
        there = {key(word) for word in keywords_in(new)}
        assert {"cat", "née <&>"} <= there
        assert existing == "append" or there == {"cat", "née <&>"} or b"rdf:value" in new

    run()
    print(f"\n{dict(outcomes)}")
    assert outcomes["named"] and outcomes["written"]
