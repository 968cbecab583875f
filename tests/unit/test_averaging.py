"""The moving average of the weights, against the formula."""

import pytest
import torch
from torch import nn

from raytorch.config import Averaging
from raytorch.training.averaging import WeightAverage


def test_an_average_is_the_exponential_one_of_the_weights_after_each_step() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    average = WeightAverage(model, Averaging(decay=0.75))
    expected: dict[str, torch.Tensor] = {}
    for step in range(40):  # of which the last ones have the decay that was asked for
        model(torch.randn(4, 2))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        average.update()
        now = {name: value.double() for name, value in model.state_dict().items() if value.is_floating_point()}
        decay = min(0.75, (1 + step) / (10 + step))
        expected = {name: decay * expected[name] + (1 - decay) * value for name, value in now.items()} if step else now
    for name, value in expected.items():
        torch.testing.assert_close(average.model.state_dict()[name].double(), value, rtol=1e-6, atol=1e-6)


def test_a_run_goes_on_with_what_was_averaged() -> None:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    there, here = WeightAverage(first, Averaging()), WeightAverage(second, Averaging())
    for _ in range(3):
        with torch.no_grad():
            first.weight.mul_(2)
        there.update()
    here.load_state_dict(there.model.state_dict(), there.state_dict())
    second.load_state_dict(first.state_dict())
    for average in (there, here):
        average.update()
    assert torch.equal(here.model.weight, there.model.weight)
    with pytest.raises(ValueError, match="steps of an average None"):
        here.load_state_dict(there.model.state_dict(), {"steps": None})
