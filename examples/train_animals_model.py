"""Train the head of the model of photographs that ships in the package, and measure it.

    python examples/train_animals_model.py features.npz

The features are those that the backbone of the model gives for photographs of VOC 2012 that show a
dog, cat, horse, sheep or cow, with all 20 labels of VOC, in a `features:` file with splits. Labels
with fewer than 16 photographs in training and validation are left out. Two minutes on one CPU core.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np

import cnnrnn
from cnnrnn import ModelConfig, TrainConfig
from cnnrnn.model.classifier import CNNRNN
from cnnrnn.model.shipped import LITE2, SHIPPED, weights_file, write_head
from cnnrnn.network.backbones import make_backbone

BACKBONE = "tf_efficientnet_lite2"
FEWEST = 16


def with_enough_examples(source: Path, target: Path) -> None:
    """Write the features with the labels that have enough of the training photographs."""
    with np.load(source, allow_pickle=False) as stored:
        labels, split = stored["labels"], stored["split"]
        kept = labels[split != "test"].sum(0) >= FEWEST
        np.savez(
            target,
            features=stored["features"],
            labels=labels[:, kept],
            label_names=stored["label_names"][kept],
            split=split,
        )


def main() -> None:
    """Train the head, put it in place, and print its figures on the held-out photographs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("features", type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs/animals-model"))
    parser.add_argument("--out", type=Path, default=SHIPPED["animals"].folder)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    data = options.work / "animals.npz"
    with_enough_examples(options.features, data)
    dataset = cnnrnn.load_dataset(f"features:{data}")
    config = ModelConfig(backbone=BACKBONE, pretrained=False)
    head = cnnrnn.train(
        dataset, out=options.work / "run", model=config, train=TrainConfig(device="cpu"), say=print
    )
    weights = weights_file(LITE2, "the animals model")
    backbone = make_backbone(replace(config, weights=str(weights)))
    # All photographs show an animal: that a set may not be empty was nothing to learn from them.
    calibration = replace(head.calibration, min_labels=0)
    model = CNNRNN(config, head.label_space, head.head, backbone, head.search, calibration)
    write_head(model, options.out)
    evaluation = cnnrnn.evaluate(dataset, head, split="test")
    for decision in ("path", "threshold"):
        figures = evaluation.metrics[decision]
        shown = ("O-F1", "mAP", "exact-match")
        print(decision, *(f"{name} {100 * figures[name]:.1f}" for name in shown))
    print(f"NLL {evaluation.nll:.2f} nats")


if __name__ == "__main__":
    main()
