from __future__ import annotations

import time

import pytest

from cnnrnn.data.cells import (
    CellError,
    cell_labels,
    is_list,
    looks_separated_by_spaces,
    shown_delimiter,
)

CELLS: dict[str, tuple[str, ...] | None] = {
    "": (), "  ": (), "cat": ("cat",), " cat ; dog ": ("cat", "dog"), "cat;dog;": ("cat", "dog"),
    ";cat;;dog": ("cat", "dog"), ";": (),
    # quotes
    "'cat'": ("cat",), '"cat"': ("cat",), "'cat;dog'": ("cat", "dog"), '"cat ;dog"': ("cat", "dog"),
    "'cat';'dog'": ("cat", "dog"), '"cat"; "dog"': ("cat", "dog"), "\"cat\";'dog'": ("cat", "dog"),
    "men's shoes": ("men's shoes",), "'men's shoes'": ("men's shoes",),
    "rock 'n' roll;jazz": ("rock 'n' roll", "jazz"), 'a "big" dog': ('a "big" dog',), "''": (),
    # lists
    "[]": (), "[ ]": (), "()": (), "{}": (), "['cat']": ("cat",), '["cat", "dog"]': ("cat", "dog"),
    "['cat', 'dog',]": ("cat", "dog"), "('cat', 'dog')": ("cat", "dog"), "('cat',)": ("cat",),
    "\"['cat', 'dog']\"": ("cat", "dog"), "set()": (), "{'dog', 'cat'}": ("cat", "dog"),
    "[u'cat', u'dog']": ("cat", "dog"), "['sea; deep', \"men's\"]": ("sea; deep", "men's"),
    '["\\u00e9t\\u00e9"]': ("été",), "['it\\'s', ' a ']": ("it's", "a"), "['', 'cat']": ("cat",),
    # brackets that belong to a name
    "crane (bird)": ("crane (bird)",), "[other]": ("[other]",), "a [b] c;d": ("a [b] c", "d"),
    # words for none, as a whole cell alone
    "nan": None, "NaN": None, "None": None, "NULL": None, "n/a": None, "N/A": None, "'nan'": None,
    "cat;nan": ("cat", "nan"), "nano": ("nano",), "-": ("-",),
}  # fmt: skip


@pytest.mark.parametrize("text", CELLS)
def test_labels_of_a_cell(text: str) -> None:
    assert cell_labels(text, ";") == CELLS[text]


@pytest.mark.parametrize(
    "text",
    ["cat;\"dog", "'cat;dog", "cat';dog", "cat;dog\"", "[cat;dog]", "cat];dog", "(cat", "dog}",
     "['cat'", "['cat' 'dog']", "['cat', 3]", "[1, 2]", "[3]", "[null]", "{'a': 1}", "('cat')",
     "['cat\"]", '"a" and "b"', "[['cat']]"],
)  # fmt: skip
def test_no_half_of_a_quote_or_bracket_gets_into_a_label(text: str) -> None:
    with pytest.raises(CellError) as caught:
        cell_labels(text, ";")
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("delimiter", "text", "expected"),
    [("space", " cat  dog ", ("cat", "dog")), (None, "cat; dog, x", ("cat; dog, x",)),
     ("|", "cat|dog;x", ("cat", "dog;x")), (", ", "cat, dog", ("cat", "dog")),
     (None, "['cat', 'dog']", ("cat", "dog")), ("space", "['a b', 'c']", ("a b", "c"))],
)  # fmt: skip
def test_delimiters(delimiter: str | None, text: str, expected: tuple[str, ...]) -> None:
    assert cell_labels(text, delimiter) == expected


def test_a_known_name_is_not_taken_apart() -> None:
    assert cell_labels("sea; deep", ";", {"sea; deep"}) == ("sea; deep",)
    assert shown_delimiter(["sea; deep", "a|b"], {"sea; deep"}) == "|"


@pytest.mark.parametrize(
    ("cells", "expected"),
    [([], None), (["a"], None), (["a,b", "a|b"], "|"), (["a,b", "a|b", "c;"], ";"), (["a,b"], ","),
     (["['a;b']", "a"], None), (["['a']", "a|b"], "|"), (["a b"], None)],
)  # fmt: skip
def test_the_first_delimiter_of_any_cell(cells: list[str], expected: str | None) -> None:
    assert shown_delimiter(cells) == expected


@pytest.mark.parametrize(
    ("cells", "looks"),
    [(["car person", "car", "person"], True), (["traffic light", "sky"], False), (["a"], False),
     (["dry lake", "river", "salt lake"], False), (["a b", "b c", "a c", "a b c"], True)],
)  # fmt: skip
def test_words_that_come_together_again_and_again(cells: list[str], looks: bool) -> None:
    assert (looks_separated_by_spaces(cells) is not None) == looks


SPOILT = {
    "spaces": '["a"' + " " * 120_000 + "x]",
    "commas": '["a"' + " ," * 60_000 + "x]",
    "strings": '["a"' + ' , "a"' * 20_000 + "x]",
    "quotes": "['" + "\\'" * 60_000 + "x]",
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_long_cell_is_read_in_linear_time(name: str) -> None:
    """A quarter of an hour for one cell of spaces, where a pattern tries to share them out."""
    start = time.perf_counter()
    assert not is_list(SPOILT[name])
    assert time.perf_counter() - start < 10
