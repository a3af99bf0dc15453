"""Small jobs of every command, run in forked processes that share their imports.

`python -m tests.reliability.jobs FOLDER` writes what they read; the tests run drivers that import
this.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np

TRAIN = ["--device=cpu", "--batch_size=32", "--warm_epochs=1", "--epochs=3", "--finish_epochs=1",
         "--patience=9", "--model.trunk_dim=16", "--model.hidden_dim=16",
         "--model.joint_dropout=0.1"]  # fmt: skip


def write_sources(folder: Path) -> None:
    """Write feature vectors, pictures and a run trained on each into a folder."""
    from cnnrnn.cli import main

    rng = np.random.default_rng(0)
    labels = rng.random((400, 6)) < 0.4
    features = labels @ rng.normal(size=(6, 12)) + rng.normal(size=(400, 12))
    split = np.array(["train"] * 240 + ["val"] * 80 + ["test"] * 80)
    np.savez(
        folder / "data.npz", features=features.astype(np.float32), labels=labels, split=split,
        label_names=np.array(list("abcdef")),
    )  # fmt: skip
    words = ["--train=60", "--val=24", "--test=24", "--image_size=32"]
    assert main(["scenes", "--out", str(folder / "scenes"), *words]) == 0
    for name in ("train", "train pictures"):
        assert main(jobs(folder, folder / name)[name]) == 0


def jobs(sources: Path, out: Path) -> dict[str, list[str]]:
    """Return the commands that read `write_sources`' files and write into a folder."""
    vectors = ["--data", f"features:{sources / 'data.npz'}"]
    pictures = ["--data", f"scenes:{sources / 'scenes'}"]
    tuned, frozen = (
        ["--model.backbone=small", f"--model.freeze_backbone={word}"] for word in ("false", "true")
    )
    of_vectors, of_pictures = (f"{sources / name}/run" for name in ("train", "train pictures"))
    return {
        "train": ["train", *vectors, "--out", f"{out}/run", *TRAIN, "--resume"],
        "train pictures": ["train", *pictures, "--out", f"{out}/run", *TRAIN, *tuned, "--resume"],
        "train frozen": ["train", *pictures, "--out", f"{out}/run", *TRAIN, *frozen, "--resume"],
        "ensemble": ["train", *vectors, "--out", f"{out}/run", *TRAIN, "--members=2", "--resume"],
        "compare": ["compare", *vectors, "--out", f"{out}/compared", "--seeds=0", "--settings=1",
                    "--methods=cnn-rnn,bce,pcc", *TRAIN],
        "evaluate": ["evaluate", *pictures, "--model", of_pictures, "--json", f"{out}/figures.json",
                     "--per_label", f"{out}/labels.csv"],
        "predict": ["predict", str(sources / "scenes" / "test"), "--model", of_pictures,
                    "--format=jsonl", "--out", f"{out}/labels.jsonl", "--html", f"{out}/page.html"],
        "report": ["report", of_pictures, *pictures, "--out", f"{out}/report.html"],
        "suggest": ["suggest", str(sources / "scenes" / "test"), "--model", of_pictures,
                    "--format=jsonl", "--out", f"{out}/questions.jsonl"],
        "explain": ["explain", of_pictures, str(sources / "scenes" / "test" / "000001.png"),
                    "--method=occlusion", "--out", f"{out}/maps.png"],
        "export": ["export", of_vectors, f"{out}/model.onnx"],
        "scenes": ["scenes", "--out", f"{out}/drawn", "--train=30", "--val=6", "--test=6"],
        "check": ["data", "check", f"scenes:{sources / 'scenes'}", "--json", f"{out}/report.json"],
    }  # fmt: skip


def started(
    words: list[str], said: Path, around: AbstractContextManager[None] | None = None
) -> int:
    """Run a command in a forked process whose output goes to a file; return its number.

    Args:
        words: of the command.
        said: the file.
        around: is entered in that process first, and left at its end.
    """
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        target = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(target, 1)
        os.dup2(target, 2)
        from cnnrnn.cli import main

        with around or nullcontext():
            if words[0] == "export":  # torch's exporter waits for ever in a forked process
                os.execv(sys.executable, [sys.executable, "-m", "cnnrnn", *words])
            status = main(words, ends_at_once=True)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def ended(child: int, within: float = 600) -> int:
    """Wait for a process; return its status, or minus the signal that killed it."""
    until = time.monotonic() + within
    while time.monotonic() < until:
        process, status = os.waitpid(child, os.WNOHANG)
        if process:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    raise TimeoutError(f"process {child} runs for longer than {within} s")


if __name__ == "__main__":
    write_sources(Path(sys.argv[1]))
