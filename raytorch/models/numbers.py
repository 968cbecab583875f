"""Numbers that are foretold: targets (B,) or (B, K) of a floating dtype, and outputs of the same shape.

Of one number for each sample either may be (B, 1) as well, as the outputs of the models that ship are.
"""

from typing import Any

from torch import Tensor


def as_numbers(outputs: Any, targets: Any) -> tuple[Tensor, Tensor] | None:
    """Outputs and targets in the same shape, in float32; None if they are something else.

    Example:
        >>> outputs, targets = as_numbers(torch.zeros(3, 1), torch.ones(3))
        >>> outputs.shape, targets.shape
        (torch.Size([3]), torch.Size([3]))
    """
    if not (isinstance(outputs, Tensor) and isinstance(targets, Tensor) and outputs.dim() and targets.dim()):
        return None
    if not (outputs.is_floating_point() and targets.is_floating_point()):
        return None
    shapes = {tuple(outputs.shape), tuple(targets.shape)}
    if shapes == {(len(targets),), (len(targets), 1)}:
        outputs, targets = outputs.flatten(), targets.flatten()
    if outputs.shape != targets.shape:
        return None
    return outputs.float(), targets.float()


def of_each_sample(errors: Tensor) -> Tensor:
    """The mean over the numbers of each sample, (B,)."""
    return errors.reshape(len(errors), -1).mean(dim=1)
