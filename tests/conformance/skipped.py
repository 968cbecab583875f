"""Operators of PyTorch's table that are not the same with handles, or cannot be compared, and why."""

_CUDA_ONLY = "it runs on CUDA only; these tests compare on a CPU"
_WINDOW = (
    "it makes a tensor of numbers alone, so no handle is among its arguments, and it is none of the session's "
    "factories: session.run(torch.signal.windows.hann, 8) makes it on the workers"
)

SKIPPED = {
    "jiterator_2inputs_2outputs": _CUDA_ONLY,
    "jiterator_4inputs_with_extra_args": _CUDA_ONLY,
    "jiterator_binary": _CUDA_ONLY,
    "jiterator_binary_return_by_ref": _CUDA_ONLY,
    "jiterator_unary": _CUDA_ONLY,
    "nn.functional.batch_norm.without_cudnn": _CUDA_ONLY,
    "torch.ops.aten._efficient_attention_forward": _CUDA_ONLY,
    "torch.ops.aten._flash_attention_forward": _CUDA_ONLY,
    "normal.number_mean": (
        "it makes a tensor of numbers alone, so no handle is among its arguments; session.randn() * std + mean does"
    ),
    "torch._scaled_mm_v2": (
        "it takes torch.nn.functional's private _ScalingType and _SwizzleType, which pickle does not find under these "
        "names, so they cannot travel"
    ),
    "signal.windows.bartlett": _WINDOW,
    "signal.windows.blackman": _WINDOW,
    "signal.windows.cosine": _WINDOW,
    "signal.windows.exponential": _WINDOW,
    "signal.windows.gaussian": _WINDOW,
    "signal.windows.general_cosine": _WINDOW,
    "signal.windows.general_hamming": _WINDOW,
    "signal.windows.hamming": _WINDOW,
    "signal.windows.hann": _WINDOW,
    "signal.windows.kaiser": _WINDOW,
    "signal.windows.nuttall": _WINDOW,
}
