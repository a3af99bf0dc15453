"""`write_report`: a page that shows a model on a dataset."""

from __future__ import annotations

from pathlib import Path

from cnnrnn.config import Backend, OnBadImage, SearchDevice
from cnnrnn.data import Dataset
from cnnrnn.evaluation import model_features
from cnnrnn.inspection.report.findings import find
from cnnrnn.inspection.report.page import report_values, write_page
from cnnrnn.machine.extras import from_extra
from cnnrnn.machine.progress import Progress, no_progress
from cnnrnn.model.classifier import CNNRNN
from cnnrnn.model.ensemble import Ensemble


def require_report() -> None:
    """Raise `ModuleNotFoundError` if what makes a page is not installed."""
    with from_extra("matplotlib", "a report", "report"):
        import matplotlib  # noqa: F401
    with from_extra("Jinja2", "a report", "report"):
        import jinja2  # noqa: F401


def write_report(
    model: CNNRNN | Ensemble,
    dataset: Dataset,
    file: str | Path,
    *,
    title: str | None = None,
    remarks: list[str] | None = None,
    log: Path | None = None,
    cache: Path | None = None,
    backend: Backend | None = None,
    search_device: SearchDevice = "auto",
    batch_size: int = 128,
    workers: int | None = None,
    on_bad_image: OnBadImage = "error",
    progress: Progress = no_progress,
) -> None:
    """Measure a model on labelled images or features, and write one page that shows it.

    The page needs no other file and makes no request. Its figures are of all images; pictures are
    shown of the worst mistakes and of the most suspicious labels, which are sought, as the gains
    by known labels are, in a sample of large data.

    Args:
        model: where its weights are decides the device.
        dataset: images, or feature vectors for a model without a backbone; its label names must
            be among the model's.
        file: HTML, written whole or not at all.
        title: of the page; by default it names the data.
        remarks: sentences for its head.
        log: the run's `log.jsonl`, for the curves of its training.
        cache: folder that keeps features of images; None for none.
        backend: as in `evaluate`.
        search_device: as in `evaluate`.
        batch_size: images per batch.
        workers: threads that decode.
        on_bad_image: `skip` leaves unreadable images out and warns with their count.
        progress: told how many images are done.

    Raises:
        DataError: the dataset is empty, or does not fit the model.
        ModuleNotFoundError: matplotlib or Jinja2, of the extra `report`, is not installed.
        OSError: the page cannot be written.
    """
    require_report()
    features = model_features(
        model, dataset, cache=cache, backend=backend, batch_size=batch_size, workers=workers,
        on_bad_image=on_bad_image, progress=progress,
    )  # fmt: skip
    found = find(model, dataset, features, log=log, search_device=search_device)
    values = report_values(found, model.labels, remarks or [])
    write_page(Path(file), "report.html.j2", title or f"Report on {dataset.source}", values)
