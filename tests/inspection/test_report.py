"""The report: its figures against hand calculations and scikit-learn, its page in a browser."""

from __future__ import annotations

import builtins
import json
import math
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn_metrics

import cnnrnn
from cnnrnn import Dataset, Ensemble, SearchConfig
from cnnrnn.api import DEMO_MODEL
from cnnrnn.cli import main
from cnnrnn.comparison.report import write_comparison
from cnnrnn.comparison.results import Row
from cnnrnn.data import DataError, load_dataset
from cnnrnn.data.dataset import csr
from cnnrnn.data.sources.scenes import write_scenes
from cnnrnn.evaluation import evaluate, model_features
from cnnrnn.inspection.report import figures, findings, write_report
from cnnrnn.inspection.report.page import SECTIONS
from cnnrnn.inspection.report.statistics import (
    CURVE_POINTS,
    in_two_dimensions,
    pairs,
    precision_recall,
    reliability,
)
from cnnrnn.inspection.suspects import find_suspects
from cnnrnn.labels import LabelSpace

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
IMAGES = 60


def test_reliability_by_hand():
    probabilities = torch.tensor([0.0, 0.05, 0.31, 0.39, 0.95, 1.0])
    happened = torch.tensor([False, True, True, False, True, True])
    found = reliability(probabilities, happened)
    assert found.counts.tolist() == [2, 0, 0, 2, 0, 0, 0, 0, 0, 2]
    expected = torch.tensor([0.025, 0.35, 0.975], dtype=torch.float64)
    torch.testing.assert_close(found.predicted[[0, 3, 9]], expected)
    assert found.observed[[0, 3, 9]].tolist() == [0.5, 0.5, 1.0]
    assert found.observed[1].isnan()
    gaps = 2 * 0.475 + 2 * 0.15 + 2 * 0.025
    assert math.isclose(found.error, gaps / 6, rel_tol=1e-6)


def test_reliability_of_nothing():
    found = reliability(torch.zeros(0), torch.zeros(0, dtype=torch.bool))
    assert found.error == 0 and found.counts.sum() == 0


@pytest.mark.parametrize(("count", "levels"), [(1, 1), (7, 3), (500, 20), (500, 100_000)])
def test_curves_are_those_of_scikit_learn(count, levels):
    generator = torch.Generator().manual_seed(count + levels)
    scores = torch.randint(levels, (count,), generator=generator).double() / levels
    targets = torch.rand(count, generator=generator) < 0.3
    targets[0] = True
    found = precision_recall(scores, targets)
    precision, recall, _ = sklearn_metrics.precision_recall_curve(targets.numpy(), scores.numpy())
    known = {(round(r, 9), round(p, 9)) for r, p in zip(recall, precision, strict=True)}
    assert {(round(r, 9), round(p, 9)) for r, p in found.tolist()} <= known
    assert 1 <= len(found) <= CURVE_POINTS and found[-1, 0] == 1
    assert (found[1:, 0] > found[:-1, 0]).all()
    best = {r: max(p for s, p in known if s == r) for r, _ in known}  # the first cut that has it
    assert all(best[round(r, 9)] == round(p, 9) for r, p in found.tolist())


def test_a_curve_without_positives_has_no_points():
    assert precision_recall(torch.rand(5), torch.zeros(5, dtype=torch.bool)).shape == (0, 2)


def test_pairs_by_counting(monkeypatch):
    generator = torch.Generator().manual_seed(1)
    targets, sets = (torch.rand(30, 6, generator=generator) < 0.5 for _ in range(2))
    found = pairs(targets, sets)
    assert len(found.first) == 15 and found.all_labels
    for a, b, true, decided in zip(
        found.first, found.second, found.true, found.decided, strict=True
    ):
        assert a < b
        assert true == sum(bool(row[a] and row[b]) for row in targets)
        assert decided == sum(bool(row[a] and row[b]) for row in sets)
    logs = np.log1p(np.stack([found.true.numpy(), found.decided.numpy()]))
    assert math.isclose(found.correlation, np.corrcoef(logs)[0, 1])
    monkeypatch.setattr("cnnrnn.inspection.report.statistics.PAIRED_LABELS", 3)
    few = pairs(targets, sets)
    frequent = set(targets.sum(0).topk(3).indices.tolist())
    assert len(few.first) == 3 and not few.all_labels
    assert {*few.first.tolist(), *few.second.tolist()} == frequent


def test_the_map_keeps_what_lies_in_a_plane():
    """Unit vectors of a plane through the origin stay as far from each other as they are."""
    angles = torch.tensor([0.1, 0.9, 2.0, 4.0], dtype=torch.float64)
    flat = torch.stack([angles.cos(), angles.sin()], 1)
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(7, 2, dtype=torch.float64, generator=generator)).Q
    places, share = in_two_dimensions(3.7 * flat @ basis.T)
    torch.testing.assert_close(torch.cdist(places, places), torch.cdist(flat, flat))
    assert math.isclose(share, 1.0)


def test_a_map_of_one_label():
    places, share = in_two_dimensions(torch.ones(1, 5))
    assert places.tolist() == [[0, 0]] and share == 1


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "scenes"
    write_scenes(folder, train=4, val=4, test=IMAGES, seed=11)
    return load_dataset(f"scenes:{folder}").split("test")


@pytest.fixture(scope="module")
def model():
    return cnnrnn.load(DEMO_MODEL)


def found_in(model, data):
    return findings.find(model, data, model_features(model, data))


@pytest.fixture(scope="module")
def found(model, scenes):
    return found_in(model, scenes)


def test_findings_are_those_of_evaluate_and_of_suspects(model, scenes, found):
    evaluation = evaluate(model, scenes, revealed=2)
    assert found.evaluation.metrics == evaluation.metrics
    assert found.known[1].before == evaluation.others["none known"]
    assert found.known[1].after == evaluation.others["2 known"]
    suspects = find_suspects(model, scenes)
    assert found.suspects_found == len(suspects) and found.suspects_among == IMAGES
    shown = [(row.name, row.label, row.given) for row in found.suspects]
    assert shown == [(s.image, s.label, s.given) for s in list(suspects)[: len(shown)]]
    assert all(row.probability >= 0.5 for row in found.suspects)


def test_sizes_and_counts_add_up(found):
    targets = found.evaluation.targets
    for counts in found.sizes.values():
        assert counts.sum() == len(targets)
    assert (found.sizes["true"] * torch.arange(len(found.sizes["true"]))).sum() == targets.sum()
    assert sum(row.positives for row in found.labels) == targets.sum()
    assert len(found.labels) == targets.shape[1]


def test_mistakes_are_the_surest_wrong_answers(model, scenes, found):
    assert found.images_wrong == round(
        IMAGES * (1 - found.evaluation.metrics["path"]["exact-match"])
    )
    ratios = [row.p_decided / row.p_true for row in found.mistakes]
    assert ratios == sorted(ratios, reverse=True) and len(ratios) >= 5
    names = [scenes.record_name(i) for i in range(len(scenes))]
    for row in found.mistakes:
        image = names.index(row.name)
        true = {scenes.label_names[label] for label in scenes.labels(image)}
        assert {*row.found, *row.missed} == true
        prediction = model.predict(row.name)[0]
        assert set(prediction.labels) == {*row.found, *row.wrong} != true
        assert math.isclose(prediction.sets[0][1], row.p_decided, rel_tol=1e-3)
        assert row.thumbnail is not None


def test_thresholds_mark_what_is_uncalibrated(model, scenes):
    calibration = replace(model.calibration, uncalibrated=(3,))
    other = cnnrnn.CNNRNN(
        model.config, model.label_space, model.head, model.backbone, model.search, calibration
    )
    rows = {row.name: row for row in found_in(other, scenes).labels}
    marked = [name for name, row in rows.items() if not row.calibrated]
    assert marked == [model.labels[3]]
    assert rows[model.labels[0]].threshold == calibration.label_thresholds[0]


def test_samples_of_large_data_are_told(model, scenes, tmp_path, monkeypatch):
    monkeypatch.setattr(findings, "SUSPECTS_AMONG", 20)
    monkeypatch.setattr(findings, "KNOWN_AMONG", 30)
    found = found_in(model, scenes)
    assert (found.suspects_among, found.known_among) == (20, 30)
    assert all(row.images <= 30 for row in found.known)
    write_report(model, scenes, tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert "20 images (a sample)" in text and "of a sample of 30 images" in text


class Page(HTMLParser):
    """The ids of a page, and the addresses that it names."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.addresses: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if "id" in values:
            self.ids.append(values["id"])
        self.addresses += [
            v for k, v in values.items() if k in ("src", "href", "xlink:href", "action", "data")
        ]


@pytest.fixture(scope="module")
def page(model, scenes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    log = folder / "log.jsonl"
    epochs = [
        {"stage": "warm", "epoch": 1, "loss": 3.0, "O-F1": 0.5, "mAP": 0.4},
        {"stage": "path", "epoch": 1, "loss": 2.0, "NLL": 2.5, "O-F1": 0.6, "mAP": None},
    ]
    log.write_text("".join(json.dumps(epoch) + "\n" for epoch in epochs) + '{"stage": "pa')
    file = folder / "report.html"
    write_report(model, scenes, file, title="Scenes <script>", remarks=["R & D"], log=log)
    return file


def test_the_page_needs_nothing_else(page):
    text = page.read_text()
    parsed = Page(text)
    assert len(parsed.ids) == len(set(parsed.ids))
    assert set(SECTIONS) | {"run"} <= set(parsed.ids)
    for address in parsed.addresses:
        assert address.startswith("data:") or address[1:] in parsed.ids, address
    assert not re.search(r"url\((?!#)", text)
    assert "Scenes &lt;script&gt;" in text and "R &amp; D" in text
    assert len(text) < 5e6


def test_labels_are_escaped(tmp_path):
    torch.manual_seed(0)
    names = ["<b>bold</b>", 'a"quote', "$x^$", "a_{\\frac", "plain"]
    rng = np.random.default_rng(0)
    indptr, indices = csr(np.flatnonzero(row) for row in rng.integers(0, 2, (40, 5)))
    features = rng.standard_normal((40, 6)).astype(np.float32)
    dataset = Dataset.from_arrays("made", names, indptr, indices, features=features)
    head = cnnrnn.Head(5, 6, chain_term=True)
    config = cnnrnn.ModelConfig(backbone="features")
    space = LabelSpace.given(tuple(names))
    model = cnnrnn.CNNRNN(config, space, head, None, SearchConfig()).eval()
    write_report(model, dataset, tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert "<b>bold" not in text and "&lt;b&gt;bold&lt;/b&gt;" in text


def test_a_log_is_read_as_far_as_it_is_whole(page):
    assert [e["stage"] for e in findings._epochs(page.with_name("log.jsonl"))] == ["warm", "path"]
    assert findings._epochs(page.with_name("none")) == []


def test_an_ensemble(model, scenes, tmp_path):
    ensemble = Ensemble([model, model])
    write_report(ensemble, scenes, tmp_path / "r.html")
    assert "joint spaces of their own" in (tmp_path / "r.html").read_text()
    one, both = found_in(model, scenes), found_in(ensemble, scenes)
    assert one.of_sets is not None and both.of_sets is not None
    assert math.isclose(one.of_sets.error, both.of_sets.error, abs_tol=1e-4)
    assert [row.name for row in one.mistakes] == [row.name for row in both.mistakes]


def test_another_order(model, scenes, tmp_path):
    other = cnnrnn.CNNRNN(
        model.config, model.label_space, model.head, model.backbone,
        replace(model.search, order="unique"), model.calibration,
    )  # fmt: skip
    write_report(other, scenes, tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert "Suspected labels need" in text and "Sets have no probability here" in text
    rows = found_in(other, scenes).mistakes
    assert all(row.p_decided is None for row in rows)
    wrong = [len(row.missed) + len(row.wrong) for row in rows]
    assert wrong == sorted(wrong, reverse=True)


def test_probabilities_are_of_the_decided_set(model, scenes):
    """Where the best path is too short, another set is decided, and far less probable."""
    calibration = replace(model.calibration, min_labels=6)
    other = cnnrnn.CNNRNN(
        model.config, model.label_space, model.head, model.backbone, model.search, calibration
    )
    for row in found_in(other, scenes).mistakes:
        decided = {*row.found, *row.wrong}
        assert len(decided) >= 6
        (index,) = [i for i in range(len(scenes)) if scenes.record_name(i) == row.name]
        features = model_features(model, scenes.select([index])).values
        sets = torch.tensor([[name in decided for name in model.labels]])
        expected = math.exp(-float(model.set_nll(features, sets)))
        assert math.isclose(row.p_decided, expected, rel_tol=1e-3)


def test_no_images(model, scenes, tmp_path):
    with pytest.raises(DataError, match="has no images to evaluate on"):
        write_report(model, scenes.select([]), tmp_path / "r.html")


def test_what_is_left_out_is_told(model, tmp_path):
    write_scenes(tmp_path / "s", train=2, val=2, test=6, seed=3)
    data = load_dataset(f"scenes:{tmp_path / 's'}").split("test")
    Path(data.image_paths[2]).write_bytes(b"no image")
    sky = Dataset(list(data.image_paths), [["sky"]] * 6)
    with pytest.warns(UserWarning, match="1 of 6"):
        write_report(model, sky, tmp_path / "r.html", on_bad_image="skip")
    text = (tmp_path / "r.html").read_text()
    assert "1 of 6 images could not be read and are left out." in text
    assert "25 of the model&#39;s 26 labels not at all" in text
    assert Path(data.image_paths[2]).name not in text


def test_unknown_labels_count_nowhere(model, scenes):
    """With a label unknown in every image it is as if the label were in no image's figures."""
    label = model.labels.index("sky")
    names = [scenes.label_names[i] for i in range(len(scenes.label_names))]
    column = names.index("sky")
    counts = np.arange(len(scenes) + 1)
    indptr, indices = csr(
        [label for label in scenes.labels(i).tolist() if label != column]
        for i in range(len(scenes))
    )
    hidden = scenes.with_changes(
        label_indptr=indptr,
        label_indices=indices,
        unknown_indptr=counts.astype(np.int64),
        unknown_indices=np.full(len(scenes), column, dtype=np.int32),
    )
    found = found_in(model, hidden)
    row = next(row for row in found.labels if row.name == "sky")
    assert row.positives == 0 and math.isnan(row.ap) and not len(row.curve)
    assert found.mistakes == []  # no set is known whole
    pairs_of_sky = (found.pairs.first == label) | (found.pairs.second == label)
    assert found.pairs.decided[pairs_of_sky].sum() == 0


def test_what_is_not_installed_is_named(model, scenes, tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "matplotlib":
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError, match=r"a report needs matplotlib: .*cnnrnn\[report\]"):
        write_report(model, scenes, tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_the_command(scenes, tmp_path, capsys):
    root = Path(scenes.source.partition(":")[2])
    file = tmp_path / "page.html"
    assert main(["report", str(DEMO_MODEL), "--data", f"scenes:{root}", "--out", str(file)]) == 0
    assert f"report: {file}" in capsys.readouterr().out
    assert set(SECTIONS) <= set(Page(file.read_text()).ids)
    nowhere = tmp_path / "none" / "page.html"
    assert main(["report", str(DEMO_MODEL), "--data", f"scenes:{root}", "--out", str(nowhere)]) == 1
    assert "must be in a folder that exists" in capsys.readouterr().err


def test_train_and_compare_with_report(tmp_path, capsys):
    rng = np.random.default_rng(0)
    labels = (rng.random((60, 4)) < 0.4).astype(np.uint8)
    labels[0] = 1
    features = labels @ rng.standard_normal((4, 8)) + rng.standard_normal((60, 8))
    split = np.array(["train"] * 40 + ["val"] * 10 + ["test"] * 10)
    source = tmp_path / "d.npz"
    np.savez(source, features=features.astype(np.float32), labels=labels,
             label_names=np.array(list("abcd")), split=split)  # fmt: skip
    small = "--epochs 1 --finish_epochs 0 --model.hidden_dim 4 --model.joint_dim 4".split()
    run = tmp_path / "run"
    arguments = ["train", "--data", f"features:{source}", "--out", str(run), "--report", *small]
    assert main(arguments) == 0
    text = (run / "report.html").read_text()
    assert "These are the validation images" in text and "1 epoch;" in text
    assert "report" not in (run / "config.yaml").read_text()
    assert main(["report", str(run), "--data", f"features:{source}", "--split", "train"]) == 0
    assert "trained on 40 of these 40 images" in (run / "report.html").read_text()
    out = tmp_path / "compared"
    chosen = ["--methods", "bce,cnn-rnn", "--seeds", "0", "--settings", "1", "--report"]
    arguments = ["compare", "--data", f"features:{source}", "--out", str(out), *chosen, *small]
    assert main(arguments) == 0
    capsys.readouterr()
    assert "comparison-table" in Page((out / "report.html").read_text()).ids


def test_a_comparison_ranks_its_methods(tmp_path):
    def row(title, seed, value):
        own = {"O-F1": value, "C-F1": value, "mAP": value}
        return Row(
            title, title, seed, {}, {"k": 1}, own, own, math.nan, math.nan, math.nan, False, 1.0
        )

    rows = [row(title, seed, 0.5 + 0.1 * i + 0.01 * seed)
            for i, title in enumerate(("one", "<two>")) for seed in (0, 1)]  # fmt: skip
    write_comparison(rows, tmp_path / "c.html", "Two")
    text = (tmp_path / "c.html").read_text()
    assert "&lt;two&gt;" in text and "<two>" not in text
    assert re.search(r'data-value="60\.5" class="best">60\.5 ± 0\.5<', text)


def test_plots_have_no_names_that_come_twice():
    plot = figures.size_plot({"true": torch.tensor([1, 2]), "path": torch.tensor([2, 1])})
    other = figures.known_label_plot(
        [findings.Known(1, 5, {"example-AP": 0.5}, {"example-AP": 0.6})]
    )
    names = Page(plot + other).ids
    assert len(names) == len(set(names))
    used = set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", plot + other))
    assert used and used <= set(names)


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Seen:
    """What a page did in a browser: messages, errors, and requests for other files."""

    def __init__(self, page) -> None:
        self.said: list[str] = []
        page.on("console", lambda message: self.said.append(message.text))
        page.on("pageerror", lambda error: self.said.append(str(error)))
        page.on("request", lambda request: self.said.append(request.url))

    def others(self, own: str) -> list[str]:
        return [text for text in self.said if text != own and not text.startswith("data:")]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 390])
def test_the_page_in_a_browser(browser, page, scheme, width):
    tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    seen = Seen(tab)
    tab.goto(page.as_uri())
    for section in SECTIONS:
        assert tab.locator(f"#{section}").bounding_box()["height"] > 40
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    dark = {"light": False, "dark": True}[scheme]
    assert is_dark(tab) is dark
    line = tab.evaluate("getComputedStyle(document.querySelector('#sizes svg text')).fill")
    assert (brightness(line) > 128) is dark
    tab.locator("#theme").click()
    assert is_dark(tab) is not dark
    assert seen.others(page.as_uri()) == []
    tab.close()


def is_dark(tab) -> bool:
    return brightness(tab.evaluate("getComputedStyle(document.body).backgroundColor")) < 128


def brightness(color: str) -> float:
    return sum(map(float, re.findall(r"[\d.]+", color)[:3])) / 3


def test_sorting_and_filtering_in_a_browser(browser, page):
    tab = browser.new_page()
    seen = Seen(tab)
    tab.goto(page.as_uri())

    def column(number):
        cells = tab.locator(f"#label-table tbody tr:visible td:nth-child({number})")
        return cells.all_inner_texts()

    before = column(1)
    tab.locator("#label-table th button", has_text="label").first.click()
    assert column(1) == sorted(before)
    ap = tab.locator("#label-table th button", has_text="AP")
    ap.click()
    values = [float(text) for text in column(7) if text != "–"]
    assert values == sorted(values, reverse=True) and len(values) > 5
    assert column(7)[: len(values)] == [text for text in column(7) if text != "–"]
    ap.click()
    assert [float(t) for t in column(7) if t != "–"] == sorted(values)
    tab.locator("input[data-filters]").fill("SUN")
    assert column(1) == ["sun"]
    assert seen.others(page.as_uri()) == []
    tab.close()


def test_pictures_are_drawn_in_a_browser(browser, page):
    tab = browser.new_page()
    tab.goto(page.as_uri())
    first = tab.locator("#mistakes img").first
    first.scroll_into_view_if_needed()
    first.evaluate("image => image.decode()")
    assert first.evaluate("image => image.naturalWidth") > 0
    assert first.get_attribute("loading") == "lazy"
    tab.close()
