"""Each comparison method against a loop, scikit-learn, or what it must not be able to know."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cnnrnn.comparison.baselines import (
    OBJECTIVES,
    IndependentClassifier,
    JointEmbedding,
    Training,
    choose_cut,
    predicted_scores,
    product_log_probs,
    remove_recurrence,
    train_independent,
)
from cnnrnn.comparison.classical import (
    CCA_NEIGHBOURS,
    fit_cca,
    fit_classifier_chain,
    fit_linear_svm,
    fit_low_rank_completion,
    fit_nearest_neighbours,
)
from cnnrnn.config import ModelConfig, SearchConfig, TrainConfig
from cnnrnn.data import Dataset
from cnnrnn.data.dataset import csr
from cnnrnn.labels import prefix_trie
from cnnrnn.network.head import Head
from cnnrnn.network.recurrence import prefix_outputs
from cnnrnn.search import beam_search
from cnnrnn.training.batches import Split
from cnnrnn.training.run import train

HEAD = ModelConfig(trunk_dim=0, hidden_dim=16, joint_dim=16, input_dropout=0.0, joint_dropout=0.0)
QUICK = TrainConfig(device="cpu", epochs=25, finish_epochs=15, batch_size=32,
                    learning_rate=1e-2)  # fmt: skip


def split_of(features, targets):
    """A split of feature vectors with targets, both tensors."""
    rows = [row.nonzero()[:, 0].tolist() for row in targets]
    names = tuple(f"label {i}" for i in range(targets.shape[1]))
    data = Dataset.from_arrays("features:made up", names, *csr(rows), features=features.numpy())
    return Split(data, targets, features)


def separable(count, seed, labels=4):
    """Each label is the sign of one feature; label 2 goes with label 0."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(count, 6, generator=generator)
    features += features.sign() * 0.5
    targets = features[:, :labels] > 0
    targets[:, 2] = targets[:, 0]
    return split_of(features, targets)


def with_constant_labels(split):
    """The split with one label that no image has, and one that all have, at the ends."""
    none = torch.zeros(len(split), 1, dtype=torch.bool)
    return split_of(split.features, torch.cat([none, split.targets, ~none], dim=1))


@pytest.mark.parametrize("loss", OBJECTIVES)
def test_a_network_learns_and_is_restored_to_its_best_epoch(loss):
    train_split, val = (with_constant_labels(separable(n, n)) for n in (400, 100))
    said = []
    model = train_independent(Training(train_split, val, HEAD, QUICK, said.append), loss)
    assert isinstance(model, IndependentClassifier)
    assert not model.training
    assert any(line.startswith(f"{loss} second") for line in said)
    scores = predicted_scores(model, val, loss)
    assert scores.isfinite().all()
    assert choose_cut(scores, val.targets, by_k=OBJECTIVES[loss].by_k).value > 0.8


def test_the_joint_embedding_ranks_by_inner_products():
    config = ModelConfig(trunk_dim=0, joint_dim=3, input_dropout=0.0, joint_dropout=0.0)
    train_split, val = separable(400, 0), separable(100, 1)
    model = train_independent(Training(train_split, val, config, QUICK), "warp", JointEmbedding)
    assert isinstance(model, JointEmbedding)
    weights = model.label_embedding.weight @ model.image_projection.weight  # of rank 3
    weights = weights * model.trunk.feature_scale
    torch.testing.assert_close(predicted_scores(model, val, "warp"), val.features @ weights.T)
    ranks_of_present = predicted_scores(model, val, "warp").argsort(1, descending=True)[:, 0]
    some = val.targets.any(1)
    assert val.targets.gather(1, ranks_of_present[:, None])[some].float().mean() > 0.9


def test_the_cut_is_k_or_a_threshold_whichever_is_better():
    targets = torch.eye(3, dtype=torch.bool)
    by_image = torch.tensor([[9.0, 1, 1], [1, 3, 1], [5, 5, 6]])  # best first, scales differ
    cut = choose_cut(by_image, targets, by_k=True)
    assert (cut.k, cut.threshold, cut.value) == (1, None, 1.0)
    assert choose_cut(by_image, targets).k is None
    by_threshold = torch.tensor([[2.0, 2, 0], [0, 0, 0], [0, 0, 0]])
    both = torch.tensor([[1, 1, 0], [0, 0, 0], [0, 0, 0]], dtype=torch.bool)
    cut = choose_cut(by_threshold, both, by_k=True)
    assert (cut.k, cut.threshold, cut.value) == (None, 1.0, 1.0)
    assert choose_cut(targets.float(), targets, by_k=True).k == 1  # of equally good ones k


def test_a_set_has_a_label_where_that_is_as_good():
    scores = torch.tensor([[0.9, 0.2], [0.3, 0.4]])
    some = torch.tensor([[True, False], [False, True]])
    cut = choose_cut(scores, some)
    assert (cut.threshold, cut.min_labels, cut.value) == (pytest.approx(0.6), 1, 1.0)
    dim = torch.tensor([[0.1, 0.2], [0.7, 0.6]])
    assert cut.sets(dim).tolist() == [[False, True], [True, True]]
    none = torch.tensor([[True, False], [False, False]])
    cut = choose_cut(scores, none)
    assert (cut.threshold, cut.min_labels, cut.value) == (pytest.approx(0.65), 0, 1.0)
    assert cut.sets(dim).tolist() == [[False, False], [True, False]]
    assert choose_cut(scores, some, by_k=True).sets(dim).tolist() == [[False, True], [True, False]]


# timm's losses, one by one as their papers have them.


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(7, 5, generator=generator, dtype=torch.float32).requires_grad_()
    targets = torch.rand(7, 5, generator=generator) < 0.4
    targets[2] = False
    targets[:, 3] = False
    return scores, targets


def loss_of(name, scores, targets):
    return OBJECTIVES[name].loss(targets)(scores, targets)


def test_poly_is_cross_entropy_and_its_first_term(batch):
    scores, targets = batch
    p = torch.where(targets, scores.sigmoid(), 1 - scores.sigmoid())
    torch.testing.assert_close(loss_of("poly", *batch), (-p.log() + 2 * (1 - p)).sum(1))


def test_zlpr_holds_labels_against_zero(batch):
    scores, targets = batch
    absent = 1 + (scores.exp() * ~targets).sum(1)
    present = 1 + ((-scores).exp() * targets).sum(1)
    losses = loss_of("zlpr", *batch)
    torch.testing.assert_close(losses, absent.log() + present.log())
    (gradient,) = torch.autograd.grad(losses.sum(), scores)
    assert gradient.isfinite().all()


def test_two_way_is_the_loss_of_the_batch(batch):
    def one_way(scores, targets):
        losses = []
        for f, present in zip(scores, targets, strict=True):
            if present.any():
                hard_absent = f[~present].logsumexp(0)
                hard_present = 4 * (-f[present] / 4).logsumexp(0)
                losses.append((1 + (hard_absent + hard_present).exp()).log())
        return torch.stack(losses).mean()

    scores, targets = batch
    expected = one_way(scores, targets) + one_way(scores.T, targets.T)
    torch.testing.assert_close(loss_of("two-way", *batch), expected.expand(7))


def test_distribution_balanced_weighs_by_the_training_images(batch):
    scores, targets = batch
    counts, n = targets.sum(0).clamp(1, 6).float(), len(targets)
    share = (1 / counts) / (targets / counts).sum(1, keepdim=True)
    weight = (10 * (share - 0.2)).sigmoid() + 0.1
    z = scores - (n / counts - 1).log() * 0.05 / 2
    present = 2 * (-z).sigmoid() ** 2 * (1 + (-z).exp()).log()
    absent = 2 * (2 * z).sigmoid() ** 2 * (1 + (2 * z).exp()).log() / 2
    expected = (weight * torch.where(targets, present, absent)).sum(1)
    torch.testing.assert_close(loss_of("db", *batch), expected)


def test_the_product_of_probabilities_does_not_underflow():
    logits = torch.tensor([[1.0, -2.0], [-1e4, 1e4]])
    targets = torch.tensor([[True, False], [True, False]])
    p = logits[0].double().sigmoid()
    expected = torch.stack([p[0].log() + (1 - p[1]).log(), torch.tensor(-2e4).double()])
    torch.testing.assert_close(product_log_probs(logits, targets), expected)


def random_head(cell="lstm", labels=5):
    torch.manual_seed(0)
    head = Head(labels, 3, joint_dim=4, hidden_dim=6, cell=cell, chain_term=True)
    with torch.no_grad():
        for value in head.parameters():
            value.copy_(torch.randn_like(value))
    return head.eval()


def outputs_of(head, trie):
    return prefix_outputs(head.recurrence, head.label_embedding, head.start, trie)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cell", ["lstm", "paper"])
def test_without_recurrence_a_state_is_a_function_of_the_last_label_alone(cell, dtype):
    head = random_head(cell).to(dtype)
    paths = torch.tensor([[3, -1, -1, -1], [0, 3, -1, -1], [1, 2, 3, -1], [0, 1, 2, 3], [2, 4, -1,
                          -1]])  # fmt: skip
    before = outputs_of(head, prefix_trie(paths))
    remove_recurrence(head)
    trie = prefix_trie(paths)
    outputs = outputs_of(head, trie)
    ends = trie.nodes.gather(1, (paths >= 0).sum(1, keepdim=True))[:, 0]
    of_label_3 = outputs[ends[:4]]
    assert len({int(node) for node in ends[:4]}) == 4
    assert torch.equal(of_label_3, of_label_3[:1].expand(4, -1))
    assert not torch.equal(outputs[ends[4]], outputs[ends[0]])
    assert not torch.equal(before[ends[0]], before[ends[3]])


@pytest.mark.parametrize("cell", ["lstm", "paper"])
@pytest.mark.parametrize("optimizer", ["adamw", "rmsprop"])
def test_training_keeps_the_recurrence_away(tmp_path, cell, optimizer):
    split = separable(60, 0)
    data = Dataset.from_arrays(
        "features:made up", split.dataset.label_names, split.dataset.label_indptr,
        split.dataset.label_indices, features=split.features.numpy(),
        splits={"train": np.arange(40), "val": np.arange(40, 60)},
    )  # fmt: skip
    config = TrainConfig(device="cpu", epochs=3, optimizer=optimizer, batch_size=8, seed=1)
    model_config = ModelConfig(trunk_dim=0, hidden_dim=32, joint_dim=5, cell=cell)
    model = train(
        data, tmp_path, model_config, SearchConfig(), config, prepare_head=remove_recurrence
    ).model
    head = model.head
    trie = prefix_trie(torch.tensor([[3, -1, -1], [0, 3, -1], [0, 1, 3]]))
    outputs = outputs_of(head, trie)[trie.nodes[torch.arange(3), torch.tensor([1, 2, 3])]]
    assert torch.equal(outputs, outputs[:1].expand(3, -1))
    assert outputs.abs().max() > 0
    fresh = Head.from_config(model.config, 4, 6)
    assert not torch.equal(head.recurrence.weight_ih, fresh.recurrence.weight_ih)


def test_the_compiled_search_finds_the_same_without_recurrence():
    head = random_head()
    remove_recurrence(head)
    embedding = head.embed(torch.randn(23, 3, generator=torch.Generator().manual_seed(1)))
    with torch.no_grad():
        found, expected = (
            beam_search(head, embedding, SearchConfig(beam_size=4), implementation=name)
            for name in ("native", "reference")
        )
    assert torch.equal(found.labels, expected.labels)
    torch.testing.assert_close(found.log_probs, expected.log_probs)


@pytest.mark.parametrize("neighbours", [1, 7, 1000])
def test_nearest_neighbours_are_the_loop(neighbours):
    train_split, val = with_constant_labels(separable(53, 0)), separable(17, 1)
    scores = fit_nearest_neighbours(train_split, neighbours)(val.features)
    for row, point in enumerate(val.features):
        distance = (train_split.features - point).square().sum(1)
        nearest = distance.argsort()[:neighbours]
        torch.testing.assert_close(scores[row], train_split.targets[nearest].float().mean(0))


@pytest.mark.parametrize("fit", [fit_linear_svm, fit_classifier_chain])
def test_classical_methods_learn_whatever_the_scale(fit):
    train_split, val = separable(300, 0), separable(100, 1)
    scores = fit(train_split, 10.0)(val.features)
    assert choose_cut(scores, val.targets).value > 0.95
    scaled = split_of(train_split.features * 256, train_split.targets)
    torch.testing.assert_close(fit(scaled, 10.0)(val.features * 256), scores)
    assert fit(train_split, 10.0)(val.features[:0]).shape == (0, 4)


def test_the_svm_is_scikit_learns():
    from sklearn.svm import LinearSVC

    train_split, val = separable(300, 0), separable(50, 1)
    scores = fit_linear_svm(train_split, 0.5)(val.features)
    scale = train_split.features.norm(dim=1).mean()
    for label in range(4):
        machine = LinearSVC(C=0.5, dual=False, tol=1e-8)
        machine.fit((train_split.features / scale).double(), train_split.targets[:, label])
        expected = machine.decision_function((val.features / scale).double())
        torch.testing.assert_close(
            scores[:, label].double(), torch.as_tensor(expected), rtol=0.02, atol=0.02
        )


def test_the_chain_goes_from_the_most_frequent_label_down():
    from sklearn.linear_model import LogisticRegression

    generator = torch.Generator().manual_seed(0)
    features = torch.randn(300, 3, generator=generator)
    common = features[:, 0] > -0.5
    rare = common & (torch.rand(300, generator=generator) < 0.3)
    train_split = split_of(features, torch.stack([rare, common], dim=1))
    scores = fit_classifier_chain(train_split, 10.0)(features)
    scaled = features / features.norm(dim=1).mean()
    first = LogisticRegression(C=10.0, tol=1e-8, max_iter=1000).fit(scaled, common)
    second = LogisticRegression(C=10.0, tol=1e-8, max_iter=1000).fit(
        torch.cat([scaled, common[:, None]], dim=1), rare
    )
    given = torch.as_tensor(first.predict(scaled))[:, None]
    expected = second.predict_proba(torch.cat([scaled, given], dim=1))[:, 1]
    torch.testing.assert_close(
        scores[:, 1].double(), torch.as_tensor(first.predict_proba(scaled)[:, 1]).double(),
        rtol=0.01, atol=0.01,
    )  # fmt: skip
    torch.testing.assert_close(
        scores[:, 0].double(), torch.as_tensor(expected).double(), rtol=0.02, atol=0.02
    )


@pytest.mark.parametrize("only_constant", [False, True])
@pytest.mark.parametrize(
    ("fit", "value", "least", "most"),
    [(fit_linear_svm, 1.0, -np.inf, np.inf), (fit_classifier_chain, 1.0, 0.0, 1.0),
     (fit_nearest_neighbours, 5, 0.0, 1.0)],
)  # fmt: skip
def test_labels_that_none_or_all_of_the_training_images_have(
    fit, value, least, most, only_constant
):
    train_split, val = with_constant_labels(separable(100, 0)), separable(20, 1)
    if only_constant:
        train_split = split_of(train_split.features, train_split.targets[:, [0, 5]])
    scores = fit(train_split, value)(val.features)
    assert (scores[:, 0] == least).all() and (scores[:, -1] == most).all()
    assert not scores.isnan().any()


def test_a_chain_gives_all_sets_together_probability_one():
    train_split, val = with_constant_labels(separable(100, 0)), separable(5, 1)
    train_split = split_of(train_split.features, train_split.targets[:, [0, 1, 2, 5]])
    chain = fit_classifier_chain(train_split, 1.0)
    total = torch.zeros(5, dtype=torch.float64)
    for number in range(16):
        present = torch.tensor([bool(number >> i & 1) for i in range(4)])
        total += chain.set_log_probs(val.features, present.expand(5, 4)).exp()
    torch.testing.assert_close(total, torch.ones(5, dtype=torch.float64))


def test_a_chain_reads_the_true_labels_before_each():
    train_split, val = separable(300, 0), separable(50, 1)
    chain = fit_classifier_chain(train_split, 10.0)
    expected = torch.zeros(50, dtype=torch.float64)
    order = train_split.targets.sum(0).argsort(descending=True, stable=True).tolist()
    scaled = val.features / train_split.features.norm(dim=1).mean()
    for i, label in enumerate(order):
        read = torch.cat([scaled, val.targets[:, order[:i]].float()], dim=1)
        p = torch.as_tensor(chain.chain.estimators_[i].predict_proba(read)).double()
        expected += p.gather(1, val.targets[:, label, None].long())[:, 0].log()
    found = chain.set_log_probs(val.features, val.targets)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def correlated(count, seed, noise=20):
    """Three labels by two features, beside larger features that say nothing."""
    generator = torch.Generator().manual_seed(seed)
    telling = torch.randn(count, 2, generator=generator)
    targets = torch.cat([telling > 0, telling.sum(1, keepdim=True) > 1], 1)
    others = 3 * torch.randn(count, noise, generator=generator)
    return split_of(torch.cat([telling, others], 1), targets)


def test_canonical_correlations_are_scikit_learns():
    cross_decomposition = pytest.importorskip("sklearn.cross_decomposition")
    train_split, test = correlated(300, 0, noise=3), correlated(80, 1, noise=3)
    score = fit_cca(train_split, ridge=1e-9)
    cca = cross_decomposition.CCA(n_components=3, max_iter=5000, tol=1e-12)
    x, y = cca.fit_transform(
        train_split.features.numpy(), train_split.targets.numpy().astype(float)
    )
    weights = [np.corrcoef(x[:, i], y[:, i])[0, 1] / x[:, i].std() for i in range(3)]
    joint, asked = x * weights, cca.transform(test.features.numpy()) * weights
    cosines = (asked / np.linalg.norm(asked, axis=1, keepdims=True)) @ (
        joint / np.linalg.norm(joint, axis=1, keepdims=True)
    ).T
    nearest = torch.from_numpy(cosines).topk(CCA_NEIGHBOURS, dim=1).indices
    expected = train_split.targets[nearest].float().mean(1)
    torch.testing.assert_close(score(test.features), expected, rtol=0, atol=1e-5)


def test_neighbours_by_correlation_do_not_look_at_features_that_say_nothing():
    train_split, test = correlated(600, 0), correlated(200, 1)
    plain = fit_nearest_neighbours(train_split, CCA_NEIGHBOURS)
    found, before = (
        choose_cut(score(test.features), test.targets).value
        for score in (fit_cca(train_split, ridge=0.1), plain)
    )
    assert found > before + 0.1 and found > 0.9
    constant = with_constant_labels(train_split)
    assert fit_cca(constant, ridge=0.1)(test.features)[:, 0].eq(0).all()


def test_completion_is_the_mean_of_a_normal_distribution_given_what_is_known():
    """Of the covariance that probabilistic principal components give features and labels."""
    train_split, test = correlated(200, 0, noise=4), correlated(27, 1, noise=4)
    rank, L = 3, 3
    fitted = fit_low_rank_completion(train_split, rank)
    x, y = train_split.features.double(), train_split.targets.double()
    scale = [((b - b.mean(0)).square().sum() / len(b)).sqrt() for b in (y, x)]
    scale[0] = scale[0] / 3
    rows = torch.cat([(b - b.mean(0)) / s for b, s in zip((y, x), scale, strict=True)], 1)
    _, singular, directions = torch.linalg.svd(rows / len(rows) ** 0.5, full_matrices=False)
    noise = singular[rank:].square().mean()
    kept = singular.square() - noise
    covariance = (directions[:rank].T * kept[:rank]) @ directions[:rank]
    covariance = covariance + noise * torch.eye(L + x.shape[1]).double()
    evidence = torch.cartesian_prod(*[torch.tensor([-1, 0, 1], dtype=torch.int8)] * L)
    asked = (test.features.double() - x.mean(0)) / scale[1]
    for image, told in enumerate(evidence):
        known = torch.cat([told != 0, torch.ones(x.shape[1], dtype=torch.bool)])
        values = torch.cat([((told > 0).double() - y.mean(0)) / scale[0], asked[image]])[known]
        mean = covariance[:L][:, known] @ torch.linalg.solve(covariance[known][:, known], values)
        expected = (y.mean(0) + mean * scale[0]).float()
        found = fitted.given(test.features[image : image + 1], told[None])[0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(found[told != 0], (told[told != 0] > 0).float())
        if not told.any():
            torch.testing.assert_close(fitted(test.features)[image], expected)


def test_completion_of_any_data():
    train_split = with_constant_labels(separable(60, 0))
    for rank in (1.0, 4.0, 500.0):
        fitted = fit_low_rank_completion(train_split, rank)
        scores = fitted(train_split.features)
        assert scores.isfinite().all() and fitted.covariance.isfinite().all()
    assert choose_cut(scores, train_split.targets).value > 0.9
    few = split_of(torch.ones(3, 6), torch.ones(3, 4, dtype=torch.bool))
    assert torch.equal(fit_low_rank_completion(few, 2.0)(few.features), torch.ones(3, 4))
