"""Readers and writers: model files, images, recorded responses, result tables.

May import `cortexloop.weights`, NumPy and file-format libraries, nothing else of cortexloop.
"""

from __future__ import annotations

from cortexloop.io.arrays import load_arrays, save_arrays
from cortexloop.io.atomic import atomic_path
from cortexloop.io.images import ImageError, ImageSource, SkippedImage, image_number, open_images
from cortexloop.io.modelfiles import ModelFiles, load_models, open_models
from cortexloop.io.native import save_models
from cortexloop.io.onnx_export import export_onnx, onnx_model
from cortexloop.io.responses import Responses, load_responses, response_keys
from cortexloop.io.shared import load_shared
from cortexloop.io.state_dicts import load_state_dict
from cortexloop.io.tables import TableWriter, open_table

__all__ = [
    "ImageError",
    "ImageSource",
    "ModelFiles",
    "Responses",
    "SkippedImage",
    "TableWriter",
    "atomic_path",
    "export_onnx",
    "image_number",
    "load_arrays",
    "load_models",
    "load_responses",
    "load_shared",
    "load_state_dict",
    "onnx_model",
    "open_images",
    "open_models",
    "open_table",
    "response_keys",
    "save_arrays",
    "save_models",
]
