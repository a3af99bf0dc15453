"""CNN-RNN multi-label image classification with a compiled beam search over label prefixes."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from cnnrnn import _build_check as _build_check

if TYPE_CHECKING:
    from cnnrnn import metrics
    from cnnrnn.api import evaluate, load, predict, predict_features, predict_iter, train
    from cnnrnn.config import ModelConfig, Preprocessing, SearchConfig, TrainConfig
    from cnnrnn.data import BadImageError, DataError, Dataset, load_dataset
    from cnnrnn.export import OnnxModelError, OnnxPredictor, ProviderError, export_onnx
    from cnnrnn.inspection.explain import explain
    from cnnrnn.inspection.report import write_report
    from cnnrnn.model.checkpoint import CheckpointError
    from cnnrnn.model.classifier import CNNRNN
    from cnnrnn.model.ensemble import Ensemble, set_log_probs
    from cnnrnn.network.head import Head, ImageEmbedding
    from cnnrnn.prediction.result import Prediction
    from cnnrnn.search import NonFiniteError, SearchResult, beam_search

__version__ = "0.1.0"

# Public name -> module that defines it; loaded at first use, so that importing is fast.
_HOMES = {
    "BadImageError": "cnnrnn.data",
    "CNNRNN": "cnnrnn.model.classifier",
    "CheckpointError": "cnnrnn.model.checkpoint",
    "DataError": "cnnrnn.data",
    "Dataset": "cnnrnn.data",
    "Ensemble": "cnnrnn.model.ensemble",
    "Head": "cnnrnn.network.head",
    "ImageEmbedding": "cnnrnn.network.head",
    "ModelConfig": "cnnrnn.config",
    "NonFiniteError": "cnnrnn.search",
    "OnnxModelError": "cnnrnn.export",
    "OnnxPredictor": "cnnrnn.export",
    "Prediction": "cnnrnn.prediction.result",
    "Preprocessing": "cnnrnn.config",
    "ProviderError": "cnnrnn.export",
    "SearchConfig": "cnnrnn.config",
    "SearchResult": "cnnrnn.search",
    "TrainConfig": "cnnrnn.config",
    "beam_search": "cnnrnn.search",
    "evaluate": "cnnrnn.api",
    "explain": "cnnrnn.inspection.explain",
    "export_onnx": "cnnrnn.export",
    "load": "cnnrnn.api",
    "load_dataset": "cnnrnn.data",
    "predict": "cnnrnn.api",
    "predict_features": "cnnrnn.api",
    "predict_iter": "cnnrnn.api",
    "set_log_probs": "cnnrnn.model.ensemble",
    "train": "cnnrnn.api",
    "write_report": "cnnrnn.inspection.report",
}

__all__ = [
    "BadImageError",
    "CNNRNN",
    "CheckpointError",
    "DataError",
    "Dataset",
    "Ensemble",
    "Head",
    "ImageEmbedding",
    "ModelConfig",
    "NonFiniteError",
    "OnnxModelError",
    "OnnxPredictor",
    "Prediction",
    "Preprocessing",
    "ProviderError",
    "SearchConfig",
    "SearchResult",
    "TrainConfig",
    "__version__",
    "beam_search",
    "evaluate",
    "explain",
    "export_onnx",
    "load",
    "load_dataset",
    "metrics",
    "predict",
    "predict_features",
    "predict_iter",
    "set_log_probs",
    "train",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name == "metrics":
        return importlib.import_module("cnnrnn.metrics")
    if name not in _HOMES:
        raise AttributeError(f"module 'cnnrnn' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
