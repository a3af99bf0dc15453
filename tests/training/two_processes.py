"""What `test_distributed.py` starts twice: cases of training in two processes, or in one.

`python -m tests.training.two_processes FOLDER` is the one process; torchrun makes it two. Each
writes what it found to FOLDER/CASE-RANK.json beside the runs themselves.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from cnnrnn import load_dataset
from cnnrnn.config import Preprocessing
from cnnrnn.machine.distributed import join
from cnnrnn.machine.files import weights_digest
from cnnrnn.training import run as train_module
from cnnrnn.training.batches import Split
from cnnrnn.training.log import Log
from cnnrnn.training.loop import NonFiniteLossError, Stage, Validation, run_stage
from cnnrnn.training.run import train
from tests.training.test_training import MODEL, QUICK, SEARCH, SMALL

torch.set_num_threads(1)

# Adam's step is the sign of a gradient that is next to nothing: a high rate would show it.
PICTURES = replace(QUICK, warm_epochs=1, epochs=2, batch_size=16, learning_rate=1e-3)
CASES = {}


def case(function):
    CASES[function.__name__] = function
    return function


class Stop(Exception):
    pass


def features(folder):
    return load_dataset(f"features:{folder / 'data.npz'}")


def summary(model):
    return {"digest": weights_digest(model.state_dict().items())}


@case
def plain(folder, ranks):
    return summary(
        train(features(folder), folder / "plain", MODEL, SEARCH, QUICK, ranks=ranks).model
    )


@case
def many_options(folder, ranks):
    config = replace(QUICK, accumulate=2, ema_decay=0.8, schedule="cosine", clip_norm=0.5)
    model = replace(MODEL, trunk_dim=8)
    return summary(
        train(features(folder), folder / "many_options", model, SEARCH, config, ranks=ranks).model
    )


@case
def lonely_image(folder, ranks):
    """193 training images in batches of 32: the last one leaves nothing for process 1."""
    data = features(folder)
    data = data.with_changes(splits=data.splits | {"train": data.splits["train"][:193]})
    # Larger features: gradients near 0, of which AdamW takes the sign, are few.
    config = replace(QUICK, feature_rms=1.0)
    return summary(train(data, folder / "lonely_image", MODEL, SEARCH, config, ranks=ranks).model)


@case
def frozen(folder, ranks):
    data = load_dataset(f"scenes:{folder / 'scenes'}")
    out, model = folder / "frozen", replace(SMALL, freeze_backbone=True)
    result = train(data, out, model, SEARCH, PICTURES, ranks=ranks)
    cached = folder / "frozen-cached"  # reads the features from the cache, which process 0 has
    config = replace(PICTURES, feature_cache=str(out / "features"))
    again = train(data, cached, model, SEARCH, config, ranks=ranks)
    return summary(result.model) | {"again": summary(again.model)}


@case
def trained(folder, ranks):
    """With dropout, augmentation and batch norm, which differ from one process by their nature."""
    data = load_dataset(f"scenes:{folder / 'scenes'}")
    model = replace(SMALL, joint_dropout=0.2)
    config = replace(PICTURES, batch_size=14, ema_decay=0.5)
    result = train(data, folder / "trained", model, SEARCH, config, ranks=ranks)
    return summary(result.model) | {"metrics": result.metrics["path"]["O-F1"]}


def picture_stage(backbone_of):
    torch.manual_seed(0)
    module = backbone_of()
    groups = [{"params": list(module.parameters()), "lr": 1e-2}]

    def loss(batch):
        return (module(batch.inputs).mean((1, 2, 3)) - batch.targets.sum(1)).square()

    return Stage("path", 2, module, groups, loss, lambda: Validation(0.0, {}))


def stage_run(stage, split, config):
    return run_stage(stage, split, config, device=torch.device("cpu"),
                     generator=torch.Generator().manual_seed(0), log=Log(None))  # fmt: skip


@case
def pictures_without_batch_norm(folder, ranks):
    """Augmented, some unreadable, in workers: equal to one process, as nothing mixes images."""
    data = load_dataset(f"scenes:{folder / 'damaged'}").split("train")
    split = Split(data, data.label_matrix(), None, Preprocessing(image_size=8), ranks)
    stage = picture_stage(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 1, 3)))
    config = replace(QUICK, batch_size=7, workers=ranks.rank, on_bad_image="skip", accumulate=2)
    stage_run(stage, split, config)
    values, records = split.over_batches(lambda b: stage.module(b.inputs).flatten(1), config,
                                         torch.device("cpu"))  # fmt: skip
    return {
        "weights": torch.cat([p.detach().flatten() for p in stage.module.parameters()]).tolist(),
        "records": records.tolist(),
        "outputs": values.mean(1).tolist(),
    }


@case
def running_figures(folder, ranks):
    """One step of a norm alone: means by images, whatever the shares are."""
    data = load_dataset(f"scenes:{folder / 'scenes'}").split("train").select(range(15))
    split = Split(data, data.label_matrix(), None, Preprocessing(image_size=8), ranks)
    stage = picture_stage(lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 1, 3)))
    config = replace(QUICK, batch_size=15, augment=False, patience=1)
    stage_run(replace(stage, epochs=1), split, config)
    norm = stage.module[0]
    return {"mean": norm.running_mean.tolist(), "count": int(norm.num_batches_tracked)}


@case
def infinite_loss(folder, ranks):
    part = features(folder).split("train")
    split = Split(part, part.label_matrix(), torch.from_numpy(part.features), None, ranks)
    module = nn.Linear(5, 1)
    groups = [{"params": list(module.parameters()), "lr": 1e-2}]

    def loss(batch):
        losses = module(batch.inputs)[:, 0]
        return losses.masked_fill(batch.records == 40, torch.inf)

    stage = Stage("path", 2, module, groups, loss, lambda: Validation(0.0, {}))
    try:
        stage_run(stage, split, QUICK)
    except NonFiniteLossError as error:
        return {"error": str(error)}


@case
def other_figures(folder, ranks):
    """Each process measures something else: what process 0 finds holds."""
    part = features(folder).split("train")
    split = Split(part, part.label_matrix(), torch.from_numpy(part.features), None, ranks)
    module = nn.Linear(5, 1)
    groups = [{"params": list(module.parameters()), "lr": 1e-2}]
    merits = iter([[0.1, 0.9, 0.2, 0.3, 0.4], [0.5, 0.1, 0.6, 0.7, 0.8]][ranks.rank])
    epochs = []

    def validate():
        merit = next(merits)
        epochs.append(merit)
        return Validation(merit, {"m": merit})

    stage = Stage("path", 5, module, groups, lambda b: module(b.inputs)[:, 0].square(), validate)
    best = stage_run(stage, split, replace(QUICK, patience=2))
    return {"best": best.merit, "m": best.metrics["m"], "epochs": len(epochs)}


@case
def stopped_and_resumed(folder, ranks):
    model = replace(MODEL, joint_dropout=0.3)
    real, calls = train_module._random_state, []

    def stopping(*arguments):
        calls.append(1)
        if len(calls) in (2, 4):
            raise Stop
        return real(*arguments)

    train_module._random_state = stopping
    stops = 0
    try:
        for _ in range(3):
            try:
                train(features(folder), folder / "resumed", model, SEARCH, QUICK, resume=True,
                      ranks=ranks)  # fmt: skip
            except Stop:
                stops += 1
    finally:
        train_module._random_state = real
    whole = train(features(folder), folder / "unstopped", model, SEARCH, QUICK, ranks=ranks)
    return summary(whole.model) | {"stops": stops}


def main(folder: Path) -> None:
    with join(torch.device("cpu")) as ranks:
        for name, function in CASES.items():
            torch.manual_seed(1 + ranks.rank)
            found = function(folder, ranks)
            (folder / f"{name}-{ranks.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
