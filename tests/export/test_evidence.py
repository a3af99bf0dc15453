"""Exported files in ONNX Runtime where labels are known: against the reference in float64."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cnnrnn import ModelConfig, OnnxPredictor, SearchConfig, export_onnx
from cnnrnn.config import Calibration
from cnnrnn.export.graph import PathSearch
from cnnrnn.labels import LabelSpace
from cnnrnn.model.classifier import CNNRNN
from cnnrnn.network.head import Head, ImageEmbedding, chain_logits
from cnnrnn.search import beam_search, reference
from cnnrnn.search.checks import resolve_max_labels
from tests.export.models import picture_model
from tests.search.replay import assert_search_equal, random_evidence

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

F = 5


def random_model(seed):
    """A model of feature vectors, and how it is exported: all drawn from the seed."""
    rng = random.Random(seed)
    L = rng.choice([1, 2, 3, 5, 7, 12, 17, 29, 40])
    order = rng.choice(["increasing", "increasing", "unique", "free"])
    longest = rng.choice([1, 1, 2, 2, 3])
    most = longest if order == "free" else min(longest, L)
    search = SearchConfig(
        beam_size=rng.randint(1, 8),
        max_labels=longest,
        min_labels=rng.choice([0, 0, rng.randint(0, most)]),
        order=order,
        end_takes_slot=rng.random() < 0.3,
        stop=rng.choice(["n_best", "n_best", "literal"]),
        marginal_places=rng.choice([None, None, rng.randint(1, 12)]),
    )
    config = ModelConfig(
        backbone="features", trunk_dim=rng.choice([0, 6]), joint_dim=rng.choice([1, 3, 16]),
        hidden_dim=rng.choice([1, 5, 16]), cell=rng.choice(["lstm", "lstm", "paper"]),
        activation=rng.choice(["relu", "tanh", "identity"]), score_bias=rng.random() < 0.7,
        chain_term=rng.random() < 0.5, tied_embedding=rng.random() < 0.5,
    )  # fmt: skip
    head = Head.from_config(config, L, F)
    numbers = np.random.default_rng(seed)
    scale = 1.0 if config.cell == "paper" else 3.0
    with torch.no_grad():
        for parameter in head.parameters():
            bound = scale / max(parameter.shape[-1], 1) ** 0.5
            drawn = numbers.uniform(-bound, bound, tuple(parameter.shape))
            parameter.copy_(torch.from_numpy(drawn))
    labels = LabelSpace.given([f"label {i}" for i in range(L)])
    model = CNNRNN(config, labels, head, None, search, Calibration(0.4, 0.25)).eval()
    return model, {"loop": rng.random() < 0.5, "max_known": rng.choice([0, 1, 2, 4])}


class TiedError(Exception):
    """Paths of equal scores stand in another order, or others of them: nothing can be replayed."""


class Searched:
    """A file in the place of a compiled head: what `replay.Pack` makes, for one batch."""

    def __init__(self, predictor, head, features):
        self.predictor, self.head, self.features = predictor, head, features

    @torch.no_grad()
    def beam_search(self, joint, label_logits, *options, evidence=None, **places):
        predictor = self.predictor
        found = predictor.run(self.features, min_labels=options[2], evidence=evidence)
        trace = None
        if options[7]:  # of the same operations in torch
            search = predictor.search_config
            paths, trace = traced(self.head, joint, label_logits, search, evidence)
            if not torch.equal(paths.labels, found["labels"]):
                torch.testing.assert_close(
                    paths.log_probs, found["log_probs"], rtol=1e-5, atol=1e-5, equal_nan=True
                )
                raise TiedError
        names = ("labels", "lengths", "log_probs", "marginals")
        return (*(found[name] for name in names), trace, (0,) * 5, None, found["log_evidence"])


def traced(head, joint, label_logits, search, evidence):
    """The paths, and the decisions of every step: [B, T+1, P, 2] ranks of parents and labels."""
    T, known = resolve_max_labels(head, search), evidence
    if known is None:
        known = torch.zeros(1, head.num_labels, dtype=torch.int8)
    most = int((known == 1).sum(1).max())

    class Recorded(PathSearch):
        def _step(self, state, t, *rest, **options):
            after = super()._step(state, t, *rest, **options)
            for b in range(len(joint)):
                live = state.labels[b][state.scores[b] > -torch.inf][:, :t]
                ranks = {tuple(path): rank for rank, path in enumerate(live.tolist())}
                taken = after.labels[b][after.scores[b] > -torch.inf][:, : t + 1]
                for n, (*path, label) in enumerate(taken.tolist()):
                    trace[b, t, n] = torch.tensor([ranks[tuple(path)], label])
            return after

    searching = Recorded(head, search, loop=False, max_known=most)
    trace = torch.full((len(joint), T + 1, (most + 1) * searching.places, 2), -1)
    paths = searching(
        joint, label_logits, torch.tensor(search.min_labels), known, torch.arange(most + 1)
    )
    return paths, trace


def kinds_of_evidence(seed, head, batch, most):
    """Evidence of every kind that a file of `most` known labels takes."""
    L = head.num_labels
    yield None
    yield torch.zeros(1, L, dtype=torch.int8)
    drawn = random_evidence(seed, head, batch, most)
    yield drawn
    yield drawn[:1]
    whole = torch.full((batch, L), -1, dtype=torch.int8)  # of every label it is known
    for row in whole:
        row[torch.randperm(L, generator=torch.Generator().manual_seed(seed))[:most]] = 1
    yield whole
    yield torch.full((1, L), -1, dtype=torch.int8)  # END is impossible under min_labels
    if most:
        yield (torch.arange(L) >= L - most).to(torch.int8)[None]  # the last labels


def check_random_file(seed, folder):
    """Hold the file of a seed against float64; return the searches, and those with ties."""
    model, options = random_model(seed)
    export_onnx(model, folder / "model.onnx", **options)
    predictor = OnnxPredictor(folder / "model.onnx", threads=1)
    head, T = model.head, predictor.max_labels
    most = min(options["max_known"], T, head.num_labels)
    searches = excused = 0
    for batch in (1, 7):
        generator = torch.Generator().manual_seed(seed)
        features = 2 * torch.randn(batch, F, generator=generator)
        with torch.no_grad():
            embedding = head.embed(features)
        packed = Searched(predictor, head, features)
        for evidence in kinds_of_evidence(seed, head, batch, most):
            searches += 1
            try:
                excused += 0 < assert_search_equal(
                    head, embedding, predictor.search_config, marginals=True,
                    pack=lambda _, packed=packed: packed, evidence=evidence,
                )  # fmt: skip
            except TiedError:
                excused += 1
    return searches, excused


def test_random_files_equal_the_float64_reference(tmp_path, request):
    files = max(1, request.config.getoption("--searches") // 200)
    found = [check_random_file(seed, tmp_path) for seed in range(files)]
    searches, excused = (sum(counts) for counts in zip(*found, strict=True))
    print(f"{files} files, {searches} searches, with an excused image {excused}")
    # Literal ReLU cells forget: orders of one set tie exactly.
    assert sum(of_file > 0 for _, of_file in found) <= max(1, files // 20)


# As the model


@pytest.fixture(scope="module", params=["unrolled", "loop"])
def pair(request, tmp_path_factory):
    """A model of pictures whose banks have N places as the file's have, and its file."""
    model = picture_model()
    model.search = replace(model.search, marginal_places=model.search.beam_size)
    model.calibration = replace(model.calibration, known_mix_weight=0.75)
    drawn = torch.rand(200, 6, generator=torch.Generator().manual_seed(1)) < 0.3
    model.head.count_cooccurrence(drawn | drawn.roll(1, 1))
    file = tmp_path_factory.mktemp("exported") / "model.onnx"
    export_onnx(model, file, loop=request.param == "loop", max_known=2)
    return model, file


@pytest.fixture(scope="module")
def pictures():
    random = np.random.default_rng(0)
    base = random.integers(0, 256, (9, 1, 1, 3))
    return list((base + random.integers(-60, 61, (9, 16, 16, 3))).clip(0, 255).astype(np.uint8))


def assert_same_predictions(found, expected):
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.labels == theirs.labels
        assert [path for path, _ in mine.paths] == [path for path, _ in theirs.paths]
        assert mine.scores == pytest.approx(theirs.scores, abs=1e-4, nan_ok=True)
        assert mine.mass == pytest.approx(theirs.mass, abs=1e-4)


@pytest.mark.parametrize("decide", ["path", "threshold", "k", "f1"])
def test_predictions_given_labels_are_the_models(pair, pictures, decide):
    model, file = pair
    names = model.labels
    given = [[], [names[5]], [names[0], names[3]], [], [], [names[1]], [], [], [names[5]]]
    cases = (
        {"known": [names[-1]], "absent": [names[0]]},
        {"known": given},
        {"absent": [[names[2]] * (i % 2) for i in range(9)], "min_labels": 1},
        {"absent": list(names), "min_labels": 2},
        {},
    )
    for search in ("onnx", "native"):
        predictor = OnnxPredictor(file, search=search, threads=1)
        for case in cases:
            expected = model.predict(pictures, decide=decide, **case)
            found = predictor.predict(pictures, decide=decide, **case)
            assert_same_predictions(found, expected)


def test_the_scores_of_the_file_are_mixed_given_what_is_known(pair, pictures):
    model, file = pair
    images = torch.from_numpy(np.stack(pictures))
    evidence = torch.zeros(9, 6, dtype=torch.int8)
    evidence[0, 2], evidence[1, 0], evidence[2, [1, 4]] = 1, -1, 1
    predictor = OnnxPredictor(file, threads=1)
    found = predictor.run(images, evidence=evidence)
    mixed = predictor.infer(images, evidence=evidence).mixed(model.calibration)
    torch.testing.assert_close(found["scores"], mixed, equal_nan=True)
    assert found["scores"][0, 2] == 1 and found["scores"][1, 0] == 0


def test_a_row_of_zeros_changes_no_bit_beside_others(pair, pictures):
    predictor = OnnxPredictor(pair[1], threads=1)
    images = torch.from_numpy(np.stack(pictures))
    without = predictor.run(images)
    evidence = torch.zeros(9, 6, dtype=torch.int8)
    zeros = predictor.run(images, evidence=evidence[:1])
    evidence[2, 1], evidence[3, [0, 5]], evidence[4, 2] = 1, 1, -1
    beside = predictor.run(images, evidence=evidence)
    rows = [0, 1, 5, 6, 7, 8]
    for name, values in without.items():
        assert torch.equal(zeros[name], values), name
        assert torch.equal(beside[name][rows], values[rows]), name
    assert not torch.equal(beside["marginals"], without["marginals"])


def test_more_than_the_file_takes(pair, pictures):
    model, file = pair
    predictor = OnnxPredictor(file, threads=1)
    three = list(model.labels[:3])
    with pytest.raises(
        ValueError,
        match=r"image 1 has 3 labels known to be present, more than max_known of .* \(2\); export",
    ):
        predictor.predict(pictures[:2], known=[[], three])
    images = torch.from_numpy(np.stack(pictures[:3]))
    evidence = torch.zeros(3, 6, dtype=torch.int8)
    evidence[1, :3] = 1
    with pytest.raises(ValueError, match=r"image 1 has 3 .*, more than max_known of .* \(2\)"):
        predictor.infer(images, evidence=evidence)
    with pytest.raises(ValueError, match="is both known to be present and absent for image 0"):
        predictor.predict(pictures[:1], known=three[:1], absent=three[:1])
    compiled = OnnxPredictor(file, search="native", threads=1)
    found = compiled.predict(pictures, known=three)
    assert_same_predictions(found, model.predict(pictures, known=three))
    # The graph itself, which checks nothing: such an image has no path, others are as ever.
    feed = {"images": images.numpy(), "evidence": evidence.numpy()}
    raw = dict(zip(predictor._output_names, predictor._session.run(None, feed), strict=True))
    expected = predictor.run(images)
    assert raw["log_evidence"][1] == -np.inf and np.isnan(raw["marginals"][1]).all()
    assert (raw["log_probs"][1] == -np.inf).all() and (raw["labels"][1] == -1).all()
    assert np.array_equal(raw["labels"][[0, 2]], expected["labels"][[0, 2]].numpy())


def test_a_file_whose_defaults_were_taken_off(pair, pictures, tmp_path):
    model, file = pair
    proto = onnx.load(file)
    kept = [t for t in proto.graph.initializer if t.name not in ("evidence", "min_labels")]
    assert len(kept) == len(proto.graph.initializer) - 2
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    onnx.save(proto, tmp_path / "model.onnx")
    for search in ("onnx", "native"):
        predictor = OnnxPredictor(tmp_path / "model.onnx", search=search, threads=1)
        for known in ([], [model.labels[1]]):
            found = predictor.predict(pictures, known=known)
            assert_same_predictions(found, model.predict(pictures, known=known))


def test_forbidden_labels_are_absent_ones(pair, pictures):
    model, file = pair
    first, second, *_ = model.labels
    expected = model.predict(pictures, absent=[first, second])
    for search in ("onnx", "native"):
        predictor = OnnxPredictor(file, search=search, threads=1)
        for case in ({}, {"absent": [second]}, {"absent": [[second]] * 9}):
            forbidden = [first, second] if not case else [first]
            with pytest.warns(FutureWarning, match="forbidden_labels is deprecated and acts as ab"):
                found = predictor.predict(pictures, forbidden_labels=forbidden, **case)
            assert_same_predictions(found, expected)
        with pytest.warns(FutureWarning), pytest.raises(ValueError, match="got 'nothing'"):
            predictor.predict(pictures, forbidden_labels=["nothing"])
        images = torch.from_numpy(np.stack(pictures))
        mask = torch.tensor([[True, True] + [False] * 4])
        with pytest.warns(FutureWarning, match="forbidden is deprecated and acts as absent"):
            found = predictor.infer(images, forbidden=mask)
        absent = predictor.infer(images, evidence=-mask.to(torch.int8))
        assert torch.equal(found.marginals, absent.marginals)
        present = torch.tensor([[0, 1, 0, 0, 0, 0]], dtype=torch.int8)
        with pytest.warns(FutureWarning), pytest.raises(ValueError, match="'label 1' is both kno"):
            predictor.infer(images, forbidden=mask, evidence=present)
    with pytest.raises(ValueError, match="forbidden_labels are only for exported files, got lab"):
        model.predict(pictures, forbidden_labels=[first])


def test_places_of_the_file(tmp_path):
    """Wider banks find what those of the model's own search find."""
    model, _ = random_model(5)
    model.search = SearchConfig(beam_size=2, max_labels=3, marginal_places=9)
    export_onnx(model, tmp_path / "wide.onnx", loop=True, max_known=1)
    features = torch.randn(7, F, generator=torch.Generator().manual_seed(0))
    predictor = OnnxPredictor(tmp_path / "wide.onnx", threads=1)
    for known in ([], [model.labels[0]]):
        found = predictor.predict_features(features, known=known)
        assert_same_predictions(found, model.predict_features(features, known=known))


def test_absent_labels_alone(tmp_path):
    """With max_known 0 there is one bank, and no width that depends on values."""
    model, _ = random_model(5)
    export_onnx(model, tmp_path / "none.onnx", max_known=0)
    nodes = [node.name for node in onnx.load(tmp_path / "none.onnx").graph.node]
    assert nodes and not [name for name in nodes if name.startswith("banks")]
    predictor = OnnxPredictor(tmp_path / "none.onnx", threads=1)
    features = torch.randn(7, F, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"more than max_known of .* \(0\)"):
        predictor.predict_features(features, known=[model.labels[0]])
    evidence = torch.zeros(7, len(model.labels), dtype=torch.int8)
    evidence[1:4, 0] = -1
    found = predictor.run(features, evidence=evidence)
    with torch.no_grad():
        embedding = model.head.embed(features)
        expected = beam_search(
            model.head, embedding, predictor.search_config, "reference", True, evidence=evidence
        )
    assert torch.equal(found["labels"], expected.labels)
    for name, values in (
        ("marginals", expected.marginals()), ("log_evidence", expected.log_evidence)
    ):  # fmt: skip
        torch.testing.assert_close(found[name], values, rtol=1e-5, atol=1e-5)


# Files of earlier releases

OLD = Path(__file__).with_name("format3.onnx")
"""Of six labels, whose input `forbidden` is masked before the softmax."""


def test_a_file_of_format_3_keeps_its_meaning(monkeypatch):
    features = torch.randn(7, F, generator=torch.Generator().manual_seed(0))
    whole, compiled = OnnxPredictor(OLD, threads=1), OnnxPredictor(OLD, search="native")
    assert_same_results(whole.infer(features), compiled.infer(features))
    assert whole.predict_features(features)[0].mass == pytest.approx(
        sum(p for _, p in whole.predict_features(features)[0].sets)
    )
    with pytest.warns(FutureWarning, match="it is for files of format 1 to 3 such as .*format3"):
        predictions = whole.predict_features(features, forbidden_labels=["label 0", "label 2"])
    mask = torch.tensor([[True, False, True, False, False, False]])
    found = whole.infer(features, forbidden=mask)
    allowed = reference.allowed_labels

    def without_forbidden(num_labels, config, labels, device):
        every = allowed(num_labels, config, labels, device)
        every[:num_labels] &= ~mask[0]
        return every

    monkeypatch.setattr(reference, "allowed_labels", without_forbidden)
    embedded = compiled.run(features)
    embedding = ImageEmbedding(embedded["joint"], chain_logits(embedded["label_scores"]))
    expected = beam_search(
        compiled._head, embedding, whole.search_config, "reference", marginals=True
    )
    assert torch.equal(found.search[0].labels, expected.labels)
    torch.testing.assert_close(found.marginals, expected.marginals(), rtol=1e-5, atol=1e-5)
    assert [p.labels for p in predictions] == [
        [whole.labels[i] for i in row.nonzero()[:, 0].tolist()] for row in found.sets
    ]
    with pytest.raises(ValueError, match="forbidden labels need the search in the file"):
        compiled.infer(features, forbidden=mask)
    with pytest.raises(ValueError, match="need a file of format 4, got 3 in .*format3"):
        whole.predict_features(features, known=["label 0"])
    assert "label 0" in compiled.predict_features(features, known=["label 0"])[0].labels


def assert_same_results(mine, theirs):
    assert torch.equal(mine.search[0].labels, theirs.search[0].labels)
    torch.testing.assert_close(mine.marginals, theirs.marginals, rtol=1e-5, atol=1e-5)
