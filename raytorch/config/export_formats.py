"""The formats that a trained model is exported to. Imports nothing, so that the command line starts at once."""

from typing import Literal

ExportFormat = Literal["onnx", "torchscript", "pt2", "safetensors", "hf"]
