"""Data sources, each read into one `Dataset`."""

from cnnrnn.data.dataset import Boxes, DataError, Dataset
from cnnrnn.data.files import Problems
from cnnrnn.data.images import BadImageError
from cnnrnn.data.load import load_dataset

__all__ = ["BadImageError", "Boxes", "DataError", "Dataset", "Problems", "load_dataset"]
