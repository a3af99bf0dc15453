"""Deployment: a model as one ONNX file, and that file in ONNX Runtime."""

from cnnrnn.export.onnx import export_onnx as export_onnx
from cnnrnn.export.runtime import OnnxPredictor as OnnxPredictor
from cnnrnn.export.session import OnnxModelError as OnnxModelError
from cnnrnn.export.session import ProviderError as ProviderError
