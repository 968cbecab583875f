"""Export a run to ONNX and use the file: python jobs/export.py runs/quickstart-20261122-093625 [digits.onnx]"""

import sys
from pathlib import Path

from raytorch import onnx
from raytorch.export import example, export_run
from raytorch.runs.catalog import find_run
from raytorch.runs.checkpoint_folders import latest_checkpoint
from raytorch.serialization import load_model, read_architecture

if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    folder = find_run(sys.argv[1], "runs")
    path = Path(sys.argv[2] if len(sys.argv) > 2 else f"{folder.name}.onnx")
    for difference in export_run(folder, "onnx", path):
        print(f"{path}  {difference}")

    weights = folder.file(f"{latest_checkpoint(folder)}/model.safetensors")  # a model again, in PyTorch
    model = load_model(weights)
    inputs, _ = example(read_architecture(weights))
    with onnx.load(path) as graph:  # and without it
        (logits,) = graph.run(*inputs.values())
    print(f"PyTorch {model(*inputs.values()).argmax(-1).tolist()}  onnxruntime {logits.argmax(-1).tolist()}")
