"""Models in files: as weights, with all that rebuilds them, as TorchScript, and as exported programs (.pt2).

Safetensors and state dicts hold numbers only. A TorchScript file and a ``.pt2`` can run code when they are read, so
reading one needs ``trust=True``. Where PyTorch's own object or function does it already, use that one:

- a TorchScript module is called, ``.eval()``-ed, ``.train()``-ed and ``.save(path)``-d like any module;
- ``torch.save(model.state_dict(), path)`` writes a state dict, ``torch.export.save(program, path)`` a ``.pt2``;
- ``program.module()`` of an exported program is a module again;
- ``del`` frees either of them, as nothing else holds on to it.

Example:
    >>> model, batch = nn.Linear(2, 1), torch.ones(4, 2)
    >>> trace(model, batch).save("model.pt")
    >>> load_torchscript("model.pt", trust=True)(batch).shape
    torch.Size([4, 1])
    >>> save_tensors(model.state_dict(), Path("weights.safetensors"))
    >>> sorted(load_weights("weights.safetensors"))
    ['bias', 'weight']
"""

from raytorch.serialization.exported_programs import capture, load_program
from raytorch.serialization.torchscript import load_torchscript, script, trace
from raytorch.serialization.weights import load_state, load_tensors, load_weights, save_tensors
from raytorch.serialization.whole_models import load_model, read_architecture, save_model

__all__ = [
    "capture",
    "load_model",
    "load_program",
    "load_state",
    "load_tensors",
    "load_torchscript",
    "load_weights",
    "read_architecture",
    "save_model",
    "save_tensors",
    "script",
    "trace",
]
