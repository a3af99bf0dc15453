"""Throughput of the compiled search against the plain-torch specification.

Each benchmark proves equality first. One thread; images per second stand in `extra_info`.
"""

from __future__ import annotations

import pytest
import torch

from cnnrnn.config import SearchConfig
from cnnrnn.model import Head, ImageEmbedding
from cnnrnn.search import beam_search

CONFIG = SearchConfig(beam_size=4, max_labels=5)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def case(batch: int, num_labels: int = 80) -> tuple[Head, ImageEmbedding]:
    torch.manual_seed(0)
    head = Head(num_labels, feature_dim=64, hidden_dim=512, chain_term=True).eval()
    with torch.no_grad():
        head.label_embedding.mul_(8)
        assert head.label_classifier is not None
        head.label_classifier.bias.sub_(3.0)  # a few labels are likely, as after training
        return head, head.embed(torch.randn(batch, 64))


@pytest.mark.parametrize(
    ("implementation", "batch", "prefixes"),
    [("reference", 16, "none"), ("native", 256, "cold"), ("native", 256, "all there")],
)
def test_search(benchmark, implementation, batch, prefixes):
    """`cold` starts each round with an empty prefix table, `all there` with every state made."""
    head, embedding = case(batch)
    few = ImageEmbedding(embedding.joint[:16], embedding.label_logits[:16])
    native = beam_search(head, few, CONFIG, "native")
    expected = beam_search(head, few, CONFIG, "reference")
    assert torch.equal(native.labels, expected.labels)
    arguments = (head, embedding, CONFIG, implementation)
    if prefixes == "cold":
        result = benchmark.pedantic(beam_search, arguments, setup=head.clear_cache, rounds=15)
    else:
        result = benchmark(beam_search, *arguments)
    benchmark.extra_info["images_per_second"] = batch / benchmark.stats.stats.median
    benchmark.extra_info["prefix_hit_rate"] = result.stats.hit_rate


@pytest.mark.parametrize("part", ["resnet50", "search"])
def test_share_of_the_search(benchmark, part):
    """A ResNet-50 on 16 pictures, and the head with its search on the same features."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    backbone = timm.create_model("resnet50", pretrained=False, num_classes=0).eval()
    images = torch.randn(16, 3, 224, 224)
    with torch.no_grad():
        features = backbone(images)
        head = Head(80, features.shape[1], hidden_dim=512, chain_term=True).eval()
        if part == "resnet50":
            benchmark.pedantic(backbone, args=(images,), rounds=5, warmup_rounds=1)
        else:
            benchmark(lambda: beam_search(head, head.embed(features), CONFIG))
    benchmark.extra_info["images_per_second"] = 16 / benchmark.stats.stats.median
