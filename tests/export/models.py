"""Small models that the tests export, and what the reference finds in features."""

from __future__ import annotations

from dataclasses import replace

import torch

from cnnrnn import ModelConfig, SearchConfig
from cnnrnn.config import Calibration
from cnnrnn.labels import LabelSpace
from cnnrnn.model.classifier import CNNRNN
from cnnrnn.network.backbones import make_backbone
from cnnrnn.network.head import Head
from cnnrnn.search import reference
from cnnrnn.search.checks import resolve_max_labels

L, F = 6, 5


def head_model(search: SearchConfig, seed: int = 0, **options: object) -> CNNRNN:
    """A random model of feature vectors."""
    torch.manual_seed(seed)
    config = ModelConfig(backbone="features", trunk_dim=7, joint_dim=8, hidden_dim=9, **options)
    head = Head.from_config(config, L, F)
    head.max_labels = 3
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.mul_(3)
    labels = LabelSpace.given([f"label {i}" for i in range(L)])
    return CNNRNN(config, labels, head, None, search, Calibration(0.4, 0.25)).eval()


def picture_model() -> CNNRNN:
    torch.manual_seed(1)
    config = ModelConfig(backbone="small", image_size=16, trunk_dim=0, joint_dim=8, hidden_dim=8)
    backbone = make_backbone(config)
    head = Head.from_config(config, L, backbone.feature_dim)
    head.max_labels = 3
    with torch.no_grad():
        head.label_classifier.weight.mul_(8)
        head.label_embedding.mul_(3)
    labels = LabelSpace.given([f"label {i}" for i in range(L)])
    search = SearchConfig(beam_size=4)
    return CNNRNN(config, labels, head, backbone, search, Calibration(0.4, 0.25)).eval()


HEADS = {
    "increasing": head_model(SearchConfig(beam_size=4)),
    "unique, loop": head_model(SearchConfig(beam_size=8, order="unique"), chain_term=False),
    "free": head_model(SearchConfig(beam_size=4, order="free"), tied_embedding=True),
    "paper, loop": head_model(
        SearchConfig.paper(1), chain_term=False, cell="paper", tied_embedding=True
    ),
}


@torch.no_grad()
def by_reference(model, features, evidence=None, **changes):
    search = replace(model.search, **changes)
    embedding, _ = model.head.embed_with_label_scores(features)
    return reference.beam_search(
        model.head, embedding, search, max_labels=resolve_max_labels(model.head, search),
        marginals=True, evidence=evidence,
    )  # fmt: skip
