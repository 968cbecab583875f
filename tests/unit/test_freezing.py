"""Parameters that stay as they are: which, what that means for the modules that have them, and what is refused."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from raytorch.config import MlpModel
from raytorch.errors import ConfigError
from raytorch.models.networks import Architecture
from raytorch.training.preparing import prepare


class Net(nn.Module):
    """A stem to be frozen and a head to be trained, each with batch normalization and dropout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
        self.head = nn.Sequential(nn.BatchNorm2d(4), nn.Flatten(), nn.Dropout(0.5), nn.Linear(4 * 36, 3))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.head(self.stem(images))
        return scores


def frozen(*patterns: str) -> Net:
    model = Net()
    assert prepare(model, MlpModel(freeze=list(patterns))) is model
    return model


def trained_names(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def training_modules(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if module.training}


def test_patterns_are_of_the_names_of_parameters() -> None:
    assert trained_names(frozen("stem.*")) == ["head.0.weight", "head.0.bias", "head.3.weight", "head.3.bias"]
    assert trained_names(frozen("*.bias", "stem.*")) == ["head.0.weight", "head.3.weight"]
    assert trained_names(frozen()) == trained_names(Net())


def test_what_is_frozen_as_a_whole_computes_as_in_evaluation() -> None:
    """Its running statistics do not drift, and what its dropout would draw is not drawn."""
    model = frozen("stem.*")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    for mode in (True, False, True):
        model.train(mode)
        assert training_modules(model) == ({"", "head", "head.0", "head.1", "head.2", "head.3"} if mode else set())
    F.cross_entropy(model(torch.randn(8, 1, 8, 8)), torch.arange(8) % 3).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if name.startswith("head.")}


def test_a_norm_that_is_half_frozen_goes_on() -> None:
    assert "stem.1" in training_modules(frozen("*.weight").train())
    assert "stem.1" not in training_modules(frozen("stem.1.*").train())
    assert "stem.2" in training_modules(frozen("stem.1.*").train())


def test_copies_and_names_stay_as_they_were() -> None:
    model = frozen("stem.*")
    assert list(model.state_dict()) == list(Net().state_dict())
    assert isinstance(model.stem, nn.Sequential)
    assert type(model.stem).__name__ == "Sequential"
    copy = deepcopy(model).train()
    assert training_modules(copy) == training_modules(model.train())
    torch.testing.assert_close(copy.eval()(torch.ones(2, 1, 8, 8)), model.eval()(torch.ones(2, 1, 8, 8)))


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (
            ["stemm.*"],
            "model.freeze: no parameter has a name like 'stemm.*' (did you mean 'stem.*'?); there are stem.0.",
        ),
        (
            ["stem"],
            "model.freeze: no parameter has a name like 'stem' (did you mean 'stem.*'?); there are stem.0.weight",
        ),
        (["stem.*", "x"], "model.freeze: no parameter has a name like 'x'; there are stem.0.weight, "),
        (["*"], "model.freeze: leaves no parameter to train; name fewer of them"),
    ],
)
def test_patterns_of_nothing_and_of_everything_are_refused(patterns: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        frozen(*patterns)
    assert str(refused.value).startswith(message)


def test_what_is_kept_of_an_architecture_is_not_how_it_is_trained() -> None:
    """A file of weights tells no place of others, and what is built from it trains as a whole."""
    config = MlpModel(freeze=["1.*"], weights="/home/me/stem.pt", strict=False, checkpointing=["1"])
    told = {"input_shape": (1, 8, 8), "num_classes": 10}
    architecture = Architecture.of(config, told, None)
    assert architecture == Architecture.from_json(architecture.to_json())
    assert architecture.to_json() == Architecture.of(MlpModel(), told, None).to_json()
    assert '"freeze"' not in Architecture(config, (1, 8, 8), 10).to_json()
    assert len(trained_names(architecture.build())) == 4
