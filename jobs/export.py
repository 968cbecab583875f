"""Export a run to ONNX and use the file: python jobs/export.py runs/quickstart-20261122-093625 [digits.onnx]"""

import sys
from pathlib import Path

import raytorch
from raytorch import onnx
from raytorch.serialization import load_model, read_architecture
from raytorch.training.export import example

if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    run = raytorch.find_run(sys.argv[1])
    path = Path(sys.argv[2] if len(sys.argv) > 2 else f"{run.name}.onnx")
    for difference in run.export("onnx", path):
        print(f"{path}  {difference}")

    weights = path.with_suffix(".safetensors")  # a model again, in PyTorch
    run.export("safetensors", weights)
    model = load_model(weights)
    inputs, _ = example(model, read_architecture(weights))
    with onnx.load(path) as graph:  # and without it
        (logits,) = graph.run(*inputs.values())
    print(f"PyTorch {model(*inputs.values()).argmax(-1).tolist()}  onnxruntime {logits.argmax(-1).tolist()}")
