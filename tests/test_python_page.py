"""The code of docs/python.md, run from its first block to its last."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (40, 60, 220)}


def write_pictures(folder: Path) -> None:
    """Pictures of one to three stripes; the file's name says their colours."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(90):
        names = sorted(random.permutation(list(COLOURS))[: 1 + i % 3])
        pixels = np.full((32, 32, 3), 120)
        for stripe, name in enumerate(names):
            pixels[stripe * 10 : stripe * 10 + 10] = COLOURS[name]
        noisy = (pixels + random.integers(-15, 16, pixels.shape)).clip(0, 255)
        Image.fromarray(noisy.astype(np.uint8)).save(folder / f"{','.join(names)}-{i:02}.png")


def test_each_block_runs_after_the_one_before(tmp_path, monkeypatch, capsys):
    write_pictures(tmp_path / "pictures")
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    assert len(blocks) == 7
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "docs/python.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "90 ('blue', 'green', 'red')" in printed
    assert names["found"].metrics["threshold"]["O-F1"] > 0.9  # type: ignore[attr-defined]
    prediction, told = names["prediction"], names["told"]
    true = set(names["labels"][0])  # type: ignore[index]
    assert set(prediction.labels) == true  # type: ignore[attr-defined]
    assert told.scores[prediction.labels[0]] == 1.0  # type: ignore[attr-defined]
    page = Path("page.html").read_text(encoding="utf-8")
    assert page.count("<figure") == page.count("data:image/jpeg") == 90
    assert 'id="mistakes"' in Path("report.html").read_text(encoding="utf-8")
    with Image.open("maps.png") as maps:
        assert maps.width > 256
    with Image.open("labelled.png") as labelled:
        assert labelled.size == (256, 256)
