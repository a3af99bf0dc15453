"""One model in many threads and in forked processes: the labels and scores of one thread alone."""

from __future__ import annotations

import os
import random
import threading
from pathlib import Path

import pytest
import torch

import cnnrnn
from cnnrnn import Prediction
from cnnrnn.model.classifier import CNNRNN
from tests.reliability.jobs import ended

THREADS = 8


def values(prediction: Prediction) -> tuple[object, ...]:
    return prediction.labels, prediction.log_prob, tuple(sorted(prediction.scores.items()))


class Cases:
    """Pictures with what is known of them, and what one thread alone predicts."""

    def __init__(self, sources: Path) -> None:
        loaded = cnnrnn.load(sources / "train pictures" / "run")
        assert isinstance(loaded, CNNRNN)
        self.model = loaded
        pictures = sorted((sources / "scenes" / "test").iterdir())
        names = (*self.model.labels, None)
        self.cases = [
            (picture, [] if name is None else [name]) for picture in pictures for name in names
        ]
        self.expected = [self.predicted(number) for number in range(len(self.cases))]

    def predicted(self, number: int) -> tuple[object, ...]:
        picture, known = self.cases[number]
        return values(self.model.predict(picture, known=known, workers=0)[0])


@pytest.fixture(scope="module")
def cases(sources: Path) -> Cases:
    return Cases(sources)


def test_threads(cases: Cases, pytestconfig: pytest.Config) -> None:
    count = 300 if pytestconfig.getoption("attacks") else 15
    wrong: list[object] = []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        try:
            for _ in range(count):
                number = rng.randrange(len(cases.cases))
                if rng.random() < 0.05:
                    cases.model.head.clear_cache()
                if cases.predicted(number) != cases.expected[number]:
                    wrong.append(number)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(f"{THREADS * count} predictions")
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_forks_while_others_predict(cases: Cases, pytestconfig: pytest.Config) -> None:
    count = 200 if pytestconfig.getoption("attacks") else 10
    rng, stop = random.Random(0), threading.Event()

    def work() -> None:
        while not stop.is_set():
            cases.predicted(0)

    other = threading.Thread(target=work)
    other.start()
    try:
        for _ in range(count):
            number = rng.randrange(len(cases.cases))
            child = os.fork()
            if child == 0:
                status = 1
                try:
                    status = 0 if cases.predicted(number) == cases.expected[number] else 2
                finally:
                    os._exit(status)
            assert ended(child, within=30) == 0
    finally:
        stop.set()
        other.join()
    assert torch.get_num_threads() == 1
    print(f"{count} forks")
