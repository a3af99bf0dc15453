"""Predictions as HTML: one in a notebook, many on one page that needs nothing else.

Every label and path is untrusted text: `text` is the only way it gets into a page.
"""

from __future__ import annotations

import html
import math
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cnnrnn.config import MAX_PIXELS
from cnnrnn.data.thumbnails import thumbnail_uri
from cnnrnn.machine.files import write_whole, writing
from cnnrnn.prediction.result import Prediction

MOST_SHOWN = 2000
"""Images that a contact sheet shows: some 15 MB, which a telephone still opens."""

MOST_LABELS = 60
"""Labels that a contact sheet counts in its heading."""

_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def text(value: str) -> str:
    r"""Escape text for HTML; bytes that are no text, and control characters, become `\xff`."""
    return html.escape(_UNPRINTABLE.sub(_shown, value), quote=True)


def _shown(match: re.Match[str]) -> str:
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a file name, by surrogateescape
        return f"\\x{code - 0xDC00:02x}"
    return f"\\u{code:04x}" if code > 0xFF else f"\\x{code:02x}"


def picture_of(prediction: Prediction, side: int, max_pixels: int = MAX_PIXELS) -> str | None:
    """Return the picture of a prediction as a data URI, where its source is a file."""
    # What had no path is named by its number, and a file may have that name too.
    if prediction.error is not None or re.fullmatch("[0-9]+", prediction.source):
        return None
    return thumbnail_uri(prediction.source, side, max_pixels)


def notebook_html(prediction: Prediction) -> str:
    """Return a prediction as a notebook shows it: picture, labels and scores.

    Colours are those around it or stand out on light and dark; no style leaves the block.
    """
    uri = picture_of(prediction, side=320)
    picture = (
        "" if uri is None else f'<img src="{uri}" alt="" style="max-width:240px;max-height:240px">'
    )
    if prediction.error is not None:
        body = f'<p style="margin:0;color:#d9453d">{text(prediction.error)}</p>'
    elif not prediction.labels:
        body = '<p style="margin:0">(no labels)</p>'
    else:
        body = "".join(
            '<div style="display:flex;align-items:center;gap:.5em;margin:.15em 0">'
            f'<bdi style="flex:0 1 9em;overflow-wrap:anywhere">{text(name)}</bdi>'
            '<span style="flex:1;min-width:4em;height:.6em;background:rgba(128,128,128,.25)">'
            '<span style="display:block;height:100%;background:#3b82f6;'
            f'width:{_percent(score)}%"></span></span>'
            f"<span>{_number(score)}</span></div>"
            for name, score in _scored(prediction)
        )
    return (
        '<div style="display:flex;flex-wrap:wrap;gap:1em;align-items:flex-start">'
        f'{picture}<div style="flex:1;min-width:14em;max-width:28em">'
        '<div style="overflow-wrap:anywhere;opacity:.7;margin-bottom:.4em">'
        f"<bdi>{text(prediction.source)}</bdi></div>{body}</div></div>"
    )


def _scored(prediction: Prediction) -> list[tuple[str, float]]:
    scores = prediction.scores
    return [(name, scores[name]) for name in prediction.labels]


def _percent(score: float) -> str:
    return f"{100 * score:.0f}" if math.isfinite(score) else "0"


def _number(score: float) -> str:
    return f"{score:.2f}" if math.isfinite(score) else "&ndash;"


def card_html(prediction: Prediction, uri: str | None, neighbours: int = 0) -> str:
    """Return an image of a contact sheet, with so many of its nearest labels."""
    picture = (
        '<div class="none">no picture</div>'
        if uri is None
        else f'<img src="{uri}" alt="" decoding="async">'
    )
    parts = [f'<figure class="card">{picture}<figcaption>']
    if prediction.error is not None:
        parts.append(f'<p class="error">{text(prediction.error)}</p>')
    elif not prediction.labels:
        parts.append("<p>(no labels)</p>")
    parts += [
        f'<p class="row"><bdi class="label">{text(name)}</bdi><span class="bar">'
        f'<i style="width:{_percent(score)}%"></i></span><b>{_number(score)}</b></p>'
        for name, score in _scored(prediction)
    ]
    if neighbours and prediction.error is None:
        near = ", ".join(
            f"<bdi>{text(name)}</bdi> {cosine:.2f}"
            for name, cosine in prediction.neighbours(neighbours)
        )
        parts.append(f'<p class="near">near: {near}</p>')
    parts.append(f'<p class="path"><bdi>{text(prediction.source)}</bdi></p></figcaption></figure>')
    return "".join(parts) + "\n"


class ContactSheet:
    """Predictions on one page, as they come; see `contact_sheet`.

    Attributes:
        count: images so far.
        shown: of these, images on the page.
        bad: images that could not be read.
        labels: how many images each label was predicted for, those not shown too.
    """

    def __init__(
        self, file: Path, title: str, neighbours: int, side: int, limit: int, max_pixels: int
    ) -> None:
        self.file, self.title, self.side = file, title, side
        self.neighbours, self.limit, self.max_pixels = neighbours, limit, max_pixels
        self.count = self.shown = self.bad = 0
        self.labels: Counter[str] = Counter()
        with writing(file):  # it has no name: whatever ends this process, nothing is left of it
            self._cards = tempfile.TemporaryFile(dir=file.absolute().parent)

    def add(self, prediction: Prediction) -> None:
        """Take the next image."""
        self.count += 1
        self.bad += prediction.error is not None
        self.labels.update(prediction.labels)
        if self.shown < self.limit:
            self.shown += 1
            card = card_html(
                prediction, picture_of(prediction, self.side, self.max_pixels), self.neighbours
            )
            with writing(self.file):
                self._cards.write(card.encode())

    def write(self) -> None:
        """Write the page, whole or not at all."""

        def page(part: Path) -> None:
            self._cards.seek(0)
            with open(part, "wb") as stream:
                stream.write(_head(self).encode())
                shutil.copyfileobj(self._cards, stream)
                stream.write(_TAIL.encode())

        write_whole(self.file, page)

    def close(self) -> None:
        """Forget the images; the page stays if it was written."""
        with suppress(OSError):  # of a full disk, of what nobody wants any more
            self._cards.close()


@contextmanager
def contact_sheet(
    file: str | Path,
    *,
    title: str = "Predictions",
    neighbours: int = 0,
    side: int = 160,
    limit: int = MOST_SHOWN,
    max_pixels: int = MAX_PIXELS,
) -> Iterator[ContactSheet]:
    """Write predictions as one HTML page, which appears whole when the block ends without an error.

    Args:
        file: the page, which loads nothing from anywhere.
        title: of the page.
        neighbours: also show so many of each image's nearest labels, `Prediction.neighbours`.
        side: of the pictures, in pixels.
        limit: the first so many images are shown, and the page says so; of others it has counts.
        max_pixels: as in `predict`.

    Yields:
        What takes each prediction, by `add`.

    Raises:
        OSError: with the page's name; a former page there stays.
    """
    sheet = ContactSheet(Path(file), title, neighbours, side, limit, max_pixels)
    try:
        yield sheet
        sheet.write()
    finally:
        sheet.close()


_STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #1a1d21; --soft: #5b6470;
  --line: #d9dde3; --bar: #2563eb; --track: #e5e9ef; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --page: #14171b; --card: #1f242a; --ink: #e8eaed;
  --soft: #a3adb9; --line: #363d46; --bar: #6ea8fe; --track: #323a44; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0; padding: 1rem; background: var(--page); color: var(--ink);
  font: 15px/1.4 system-ui, sans-serif; }
h1 { font-size: 1.25rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
p { margin: 0; }
.soft, .path, .near { color: var(--soft); }
.find { position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: .5rem;
  align-items: center; padding: .6rem 0; background: var(--page); }
.find input { flex: 1 1 12rem; max-width: 24rem; min-width: 0; font: inherit; color: inherit;
  padding: .45rem .6rem; border: 1px solid var(--line); border-radius: 6px;
  background: var(--card); }
.counts { display: flex; flex-wrap: wrap; gap: .3rem; margin: .5rem 0 0; }
.counts button { font: inherit; font-size: .85rem; color: inherit; background: var(--card);
  border: 1px solid var(--line); border-radius: 1rem; padding: .15rem .6rem; cursor: pointer;
  max-width: 100%; overflow-wrap: anywhere; }
.sheet { display: grid; gap: .75rem; grid-template-columns: repeat(auto-fill, minmax(min(10.5rem,
  100%), 1fr)); align-items: start; }
.card { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  overflow: hidden; content-visibility: auto; contain-intrinsic-size: auto 15rem; }
.card[hidden] { display: none; }
.card img, .none { display: block; width: 100%; height: 10rem; object-fit: contain;
  background: var(--track); }
.none { display: grid; place-items: center; color: var(--soft); }
figcaption { padding: .5rem .6rem; }
.row { display: flex; align-items: center; gap: .4rem; }
.label { flex: 1 1 50%; min-width: 0; overflow-wrap: anywhere; }
.bar { flex: 1 1 30%; height: .5rem; background: var(--track); border-radius: 3px;
  overflow: hidden; }
.bar i { display: block; height: 100%; background: var(--bar); }
.row b { font-weight: 500; font-variant-numeric: tabular-nums; }
.near, .path { font-size: .8rem; margin-top: .3rem; overflow-wrap: anywhere; }
.error { color: var(--bad); overflow-wrap: anywhere; }
@media (max-width: 480px) { body { padding: .6rem; }
  .sheet { gap: .5rem; grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .card img, .none { height: 8rem; }
  .row { flex-wrap: wrap; column-gap: .4rem; row-gap: 0; } .label { flex: 1 1 0; }
  .bar { order: 1; flex: 1 0 100%; height: .25rem; margin-bottom: .2rem; } }
"""

_SCRIPT = """
const box = document.getElementById("filter"), seen = document.getElementById("seen");
const cards = Array.from(document.querySelectorAll(".card")).map(card => [card,
  Array.from(card.querySelectorAll(".label"), label => label.textContent.toLowerCase())]);
const names = new Set(cards.flatMap(([, labels]) => labels));
function filter() {
  const part = box.value.trim().toLowerCase(), whole = names.has(part);
  let count = 0;
  for (const [card, labels] of cards) {
    card.hidden = part !== "" &&
      !labels.some(label => whole ? label === part : label.includes(part));
    count += !card.hidden;
  }
  seen.textContent = part === "" ? "" : count.toLocaleString("en") + " of "
    + cards.length.toLocaleString("en") + " shown";
}
box.addEventListener("input", filter);
for (const button of document.querySelectorAll(".counts button"))
  button.addEventListener("click", () => {
    const name = button.firstElementChild.textContent;
    box.value = box.value === name ? "" : name;
    filter();
  });
filter();
"""

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"

_TAIL = f"</main>\n<script>{_SCRIPT}</script>\n</body>\n</html>\n"


def _head(sheet: ContactSheet) -> str:
    """Return the page up to its first image."""
    said = [f"{sheet.count:,} image{'' if sheet.count == 1 else 's'}"]
    if sheet.shown < sheet.count:
        said.append(f"the first {sheet.shown:,} are shown, counts are of all")
    if sheet.bad:
        said.append(f"{sheet.bad:,} could not be read")
    common = sheet.labels.most_common(MOST_LABELS)
    buttons = "".join(
        f'<button type="button"><bdi>{text(name)}</bdi> {count:,}</button>'
        for name, count in common
    )
    if len(sheet.labels) > len(common):
        buttons += f'<span class="soft">and {len(sheet.labels) - len(common):,} more labels</span>'
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f"<title>{text(sheet.title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<header>\n"
        f'<h1>{text(sheet.title)}</h1>\n<p class="soft">{"; ".join(said)}</p>\n'
        f'<div class="counts">{buttons}</div>\n</header>\n'
        '<div class="find"><input id="filter" type="search" autocomplete="off" '
        'placeholder="only images with the label ..." aria-label="Filter by label">'
        '<span id="seen" class="soft" role="status"></span></div>\n<main class="sheet">\n'
    )
