"""Predictions as HTML, read back by html.parser: what is shown, and that nothing gets out of it."""

from __future__ import annotations

import errno
import os
import pickle
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cnnrnn import Prediction
from cnnrnn.labels import LabelSpace
from cnnrnn.prediction import html as page_html
from cnnrnn.prediction.html import contact_sheet, notebook_html, text
from tests.prediction.test_decisions import NAMES, feature_model, features
from tests.prediction.test_predict import make_model

HOSTILE = (
    "<script>alert(1)</script>",
    "\"'><img src=x onerror=alert(1)>",
    "a&amp;b",
    "\ud800",
    "é",
)
VOID = {"img", "meta", "input"}


class Page(HTMLParser):
    """Elements with their attributes and text; unbalanced tags fail."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def of(self, tag):
        return [data for where, data in self.texts if where == tag]


def requires_nothing(page: Page) -> None:
    """No element loads, leads or runs anywhere but the page's own script."""
    allowed = {
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "header",
        "main",
        "h1",
        "p",
        "div",
        "button",
        "bdi",
        "input",
        "span",
        "figure",
        "figcaption",
        "img",
        "i",
        "b",
        "script",
    }
    for tag, attributes in page.elements:
        assert tag in allowed
        assert not [name for name in attributes if name.startswith("on") or name == "href"]
        assert (attributes.get("src") or "data:").startswith("data:")
    assert not re.search(r"url\(|@import|https?:", "".join(page.of("style") + page.of("script")))


@pytest.fixture
def pictures(tmp_path):
    """Four files: two pictures, one whose name is hostile, and one that is no picture."""
    names = [
        "a.png", "b.jpg", "<b>\"quotes\" & 'more'.png", "bad.png",
        os.fsdecode(b"\xff\n.png"),
    ]  # fmt: skip
    random = np.random.default_rng(0)
    for name in names:
        pixels = random.integers(0, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / name)
    (tmp_path / "bad.png").write_bytes(b"no picture")
    return [tmp_path / name for name in names]


def hostile_model():
    model = make_model()
    names = (*HOSTILE, *model.labels)[: len(model.labels)]
    model.label_space = LabelSpace.given(names)
    return model


def sheet_of(file, predictions, **options):
    with contact_sheet(file, **options) as sheet:
        for prediction in predictions:
            sheet.add(prediction)
    return Page(file.read_text(encoding="utf-8"))


def test_text_is_only_text():
    assert text("<a href='x'>&\"") == "&lt;a href=&#x27;x&#x27;&gt;&amp;&quot;"
    assert text("é 猫") == "é 猫"
    assert text("\udcff\x00\n\x7f\ud800") == r"\xff\x00\x0a\x7f\ud800"
    for value in (*HOSTILE, "\udc80<"):
        assert "<" not in text(value) and '"' not in text(value)
        text(value).encode("utf-8")


def test_a_prediction_in_a_notebook(pictures):
    (prediction,) = make_model().predict(pictures[0], decide="threshold", threshold=0.3)
    page = Page(prediction._repr_html_())
    requires_nothing(page)
    (image,) = page.all("img")
    assert image["src"].startswith("data:image/jpeg;base64,")
    assert page.of("bdi") == [str(pictures[0]), *prediction.labels] and prediction.labels
    scores = [f"{prediction.scores[name]:.2f}" for name in prediction.labels]
    assert [data for data in page.of("span") if data.strip()] == scores
    widths = re.findall(r"width:(\d+)%", prediction._repr_html_())
    assert widths == [f"{100 * prediction.scores[name]:.0f}" for name in prediction.labels]
    assert pickle.loads(pickle.dumps(prediction))._repr_html_() == prediction._repr_html_()
    pictures[0].unlink()
    assert not Page(prediction._repr_html_()).all("img")


def test_what_has_no_picture(pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (4, 4)).save("0", format="png")  # not what was predicted
    of_features = feature_model().predict_features(features(1))[0]
    of_array = make_model().predict(np.zeros((20, 20, 3), np.uint8))[0]
    (bad,) = make_model().predict([pictures[3]], on_bad_image="skip")
    for prediction in (of_features, of_array, bad, Prediction("7", "no such file")):
        page = Page(prediction._repr_html_())
        assert not page.all("img")
        assert page.of("bdi") == [prediction.source, *prediction.labels]
    assert bad.error in Page(notebook_html(bad)).of("p")


def test_scores_that_are_no_numbers_and_no_labels():
    model = feature_model()
    model.head.max_labels = 1
    (impossible,) = model.predict_features(features(1), absent=NAMES)
    assert "(no labels)" in notebook_html(impossible)
    (one,) = model.predict_features(features(1), known=NAMES[:1])
    one._batch.scores[0, 0] = torch.nan
    assert "&ndash;" in notebook_html(one) and "nan" not in notebook_html(one)


def test_hostile_names(pictures, tmp_path):
    predictions = hostile_model().predict(
        pictures, decide="threshold", threshold=0.0, on_bad_image="skip"
    )
    page = sheet_of(tmp_path / "page.html", predictions, neighbours=3, title="<i>")
    requires_nothing(page)
    assert page.of("h1") == ["<i>"]
    assert len(page.all("script")) == 1 and len(page.all("img")) == 4
    for shown in ("<script>alert(1)</script>", "a&amp;b", r"\ud800", str(pictures[2])):
        assert shown in page.of("bdi")
    assert any(data.endswith(r"\xff\x0a.png") for data in page.of("bdi"))
    for prediction in predictions:
        requires_nothing(Page(prediction._repr_html_()))
        prediction._repr_html_().encode("utf-8")


def test_a_contact_sheet_has_every_image(pictures, tmp_path):
    model = make_model()
    predictions = model.predict(pictures, decide="threshold", threshold=0.4, on_bad_image="skip")
    page = sheet_of(tmp_path / "page.html", predictions)
    requires_nothing(page)
    assert len(page.all("figure")) == 5 and len(page.all("img")) == 4
    assert "5 images; 1 could not be read" in page.of("p")
    assert predictions[3].error in page.of("p") and "no picture" in page.of("div")
    shown = [name for p in predictions for name in p.labels]
    labels = [data for data in page.of("bdi") if data in model.labels]
    counted = sorted(set(shown), key=lambda name: (-shown.count(name), shown.index(name)))
    assert labels == counted + shown and shown
    scores = [f"{p.scores[name]:.2f}" for p in predictions for name in p.labels]
    assert page.of("b") == scores
    assert "near:" not in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert oct((tmp_path / "page.html").stat().st_mode & 0o777) == oct(0o666 & ~_umask())


def _umask():
    old = os.umask(0)
    os.umask(old)
    return old


def test_neighbours_on_a_contact_sheet(pictures, tmp_path):
    predictions = make_model().predict(pictures, on_bad_image="skip")
    source = tmp_path / "page.html"
    sheet_of(source, predictions, neighbours=2)
    found = re.findall(r'<p class="near">near: (.*?)</p>', source.read_text(encoding="utf-8"))
    expected = [
        ", ".join(f"<bdi>{text(name)}</bdi> {cosine:.2f}" for name, cosine in p.neighbours(2))
        for p in predictions
        if p.error is None
    ]
    assert found == expected and len(found) == 4


def test_more_images_than_are_shown(pictures, tmp_path):
    predictions = make_model().predict(pictures[:2] * 4)
    page = sheet_of(tmp_path / "page.html", predictions, limit=3)
    assert len(page.all("figure")) == 3
    assert "8 images; the first 3 are shown, counts are of all" in page.of("p")
    page = sheet_of(tmp_path / "page.html", [])
    assert "0 images" in page.of("p") and not page.all("figure")


def test_memory_does_not_grow_with_the_images(tmp_path):
    import tracemalloc

    predictions = [Prediction(f"{i}.png", "no such file") for i in range(100)]
    peaks = []
    for count in (20, 200):
        tracemalloc.start()
        with contact_sheet(tmp_path / "page.html", limit=10**6) as sheet:
            for _ in range(count):
                for prediction in predictions:
                    sheet.add(prediction)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (tmp_path / "page.html").stat().st_size > 3e6
    assert peaks[1] < peaks[0] + 5e5


def test_many_labels_are_counted_up_to_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(page_html, "MOST_LABELS", 2)
    model = feature_model()
    predictions = model.predict_features(features(50), decide="k", top_k=3, min_labels=3)
    page = sheet_of(tmp_path / "page.html", predictions)
    assert len(page.all("button")) == 2
    assert f"and {len({n for p in predictions for n in p.labels}) - 2} more labels" in page.of(
        "span"
    )


def test_a_page_appears_whole_or_not_at_all(pictures, tmp_path, monkeypatch):
    predictions = make_model().predict(pictures[:2])
    file = tmp_path / "out" / "page.html"
    file.parent.mkdir()
    file.write_text("what was there")
    with pytest.raises(KeyboardInterrupt), contact_sheet(file) as sheet:
        sheet.add(predictions[0])
        raise KeyboardInterrupt
    assert [f.name for f in file.parent.iterdir()] == ["page.html"]
    assert file.read_text() == "what was there"


class _Full:
    """A file on a full disk."""

    def write(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    def close(self):
        pass


def full(*arguments):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    "where", [("tempfile", "TemporaryFile", lambda dir: _Full()), ("shutil", "copyfileobj", full)]
)
def test_a_full_disk_names_the_page(tmp_path, monkeypatch, where):
    module, name, broken = where
    monkeypatch.setattr(getattr(page_html, module), name, broken)
    file = tmp_path / "page.html"
    file.write_text("what was there")
    with pytest.raises(OSError, match="No space left") as caught, contact_sheet(file) as sheet:
        sheet.add(Prediction("a.png", "no such file"))
    assert caught.value.filename == str(file)
    assert [f.name for f in tmp_path.iterdir()] == ["page.html"]
    assert file.read_text() == "what was there"


def test_a_folder_that_is_missing():
    with pytest.raises(OSError) as caught, contact_sheet(Path("missing/folder/page.html")):
        pass
    assert caught.value.filename == "missing/folder/page.html"
