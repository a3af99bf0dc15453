"""The log of a run: JSONL, and TensorBoard."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnnrnn.machine.extras import from_extra
from cnnrnn.machine.files import writing
from cnnrnn.machine.words import without_nan

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class Log:
    """A JSONL file, one record per line, flushed at every line; None writes nothing.

    Args:
        file: emptied, or truncated to its first `position` bytes.
        tensorboard: folder that also gets the figures of each epoch, one run per stage.
        position: where a resumed run continues; None starts over.
    """

    def __init__(
        self, file: Path | None, tensorboard: Path | None = None, position: int | None = None
    ) -> None:
        self.file = file
        self._tensorboard = tensorboard
        self._writers: dict[str, SummaryWriter] = {}
        if tensorboard is not None and position is None:
            shutil.rmtree(tensorboard, ignore_errors=True)
        if file is None:
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        if position is None:
            file.write_text("", encoding="utf-8")
        elif file.exists() and file.stat().st_size > position:
            os.truncate(file, position)

    def position(self) -> int:
        """Flush the file to disk and return its length in bytes."""
        if self.file is None:
            return 0
        with open(self.file, "ab") as handle:
            os.fsync(handle.fileno())
            return handle.tell()

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; numbers that are not finite become null."""
        if self._tensorboard is not None and "epoch" in record:
            with writing(self._tensorboard):
                self._write_scalars(self._tensorboard / record["stage"], record)
        if self.file is None:
            return
        with writing(self.file), open(self.file, "a", encoding="utf-8") as handle:
            handle.write(json.dumps(without_nan(record)) + "\n")

    def _write_scalars(self, folder: Path, record: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        if folder.name not in self._writers:
            self._writers[folder.name] = SummaryWriter(folder, purge_step=record["epoch"])
        writer = self._writers[folder.name]
        for name, value in record.items():
            if isinstance(value, float):
                writer.add_scalar(name.replace(" ", "_"), value, record["epoch"])
        writer.flush()


def require_tensorboard() -> None:
    """Raise `ModuleNotFoundError` if TensorBoard is not installed."""
    with from_extra("TensorBoard", "tensorboard: true", "tensorboard"):
        import torch.utils.tensorboard  # noqa: F401
