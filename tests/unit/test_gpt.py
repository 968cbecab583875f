"""The decoder gpt: what it computes, against plain PyTorch, how it begins, and how text is trained on and judged."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lone_runs import final, train, without_ray
from torch import Tensor, nn
from torch.nn import functional as F
from whole_runs import assert_bitwise_equal

from raytorch.config import GptModel, RunConfig, TokensData
from raytorch.config.file import from_data, load_config
from raytorch.errors import ConfigError
from raytorch.models.gpt import Gpt
from raytorch.models.networks import Architecture
from raytorch.models.objectives import BitsPerByte, metrics_of, shipped_loss
from raytorch.runs.catalog import read_evaluations
from raytorch.serialization import load_model
from raytorch.sources import open_source
from raytorch.sources.token_files import TokenWriter
from raytorch.sources.tokenizer import ByteTokenizer
from raytorch.training.evaluation import EVALUATION_BATCH, evaluation_batch
from raytorch.training.precision import autocast

CONFIGS = Path(__file__).parents[2] / "configs"
VOCABULARY, CONTEXT = 40, 24
SMALL = {"dim": 32, "heads": 4, "layers": 2}
VARIANTS: list[dict[str, Any]] = [
    {},
    {"kv_heads": 2, "tied": False},
    {"kv_heads": 1, "activation": "relu2", "feedforward": 40, "rope_theta": 100.0},
]


def built(**keys: Any) -> Gpt:
    torch.manual_seed(0)
    facts = {"vocabulary": VOCABULARY, "context": CONTEXT}
    model = Architecture(GptModel(**{**SMALL, **keys}), facts=facts).build()
    assert isinstance(model, Gpt)
    return model


def stirred(**keys: Any) -> Gpt:
    """A model with weights so large that every part of it tells."""
    model = built(**keys).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def tokens_of(batch: int = 3, length: int = CONTEXT) -> Tensor:
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


def plainly(weights: dict[str, Tensor], tokens: Tensor, config: GptModel) -> Tensor:
    """The logits (T, vocabulary) of one sequence, by float64 and a loop over heads."""
    weights = {name: tensor.double() for name, tensor in weights.items()}
    x = weights["embed.weight"][tokens]
    for number in range(config.layers):
        block = {name.partition(f"blocks.{number}.")[2]: tensor for name, tensor in weights.items()}
        x = x + plain_attention(plain_norm(x, block["attention_norm.weight"]), block, config)
        x = x + plain_feedforward(plain_norm(x, block["feedforward_norm.weight"]), block, config.activation)
    return plain_norm(x, weights["norm.weight"]) @ weights["embed.weight" if config.tied else "head.weight"].T


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def plain_feedforward(x: Tensor, block: dict[str, Tensor], activation: str) -> Tensor:
    up = x @ block["feedforward.up.weight"].T
    if activation == "swiglu":
        gate = x @ block["feedforward.gate.weight"].T
        up = gate * gate.sigmoid() * up
    else:
        up = up.clamp(min=0) ** 2
    return up @ block["feedforward.down.weight"].T


def plain_attention(x: Tensor, block: dict[str, Tensor], config: GptModel) -> Tensor:
    heads, head = config.heads, config.dim // config.heads
    query, key, value = (x @ block[f"attention.{part}.weight"].T for part in ("query", "key", "value"))
    seen = []
    for number in range(heads):
        own, shared = slice(number * head, (number + 1) * head), number * (config.kv_heads or heads) // heads
        of = slice(shared * head, (shared + 1) * head)
        scores = plain_turn(query[:, own], config) @ plain_turn(key[:, of], config).T / math.sqrt(head)
        later = torch.ones_like(scores, dtype=torch.bool).triu(1)
        seen.append(scores.masked_fill(later, -math.inf).softmax(1) @ value[:, of])
    return torch.cat(seen, 1) @ block["attention.project.weight"].T


def plain_turn(x: Tensor, config: GptModel) -> Tensor:
    """Each pair of one number of the first half and one of the second, (T, head), as a complex number."""
    half = x.shape[1] // 2
    angles = torch.arange(len(x)).double()[:, None] * config.rope_theta ** (-torch.arange(half).double() / half)
    turned = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], 1)


@pytest.mark.parametrize("keys", VARIANTS)
def test_it_computes_what_plain_pytorch_does(keys: dict[str, Any]) -> None:
    model, tokens = stirred(**keys), tokens_of()
    config = GptModel(**{**SMALL, **keys})
    expected = torch.stack([plainly(model.state_dict(), row, config) for row in tokens])
    torch.testing.assert_close(model(tokens).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("keys", VARIANTS)
def test_tokens_that_are_kept_give_the_same_logits(keys: dict[str, Any]) -> None:
    model, tokens = stirred(**keys), tokens_of()
    with torch.no_grad():
        expected = model(tokens)
        kept, begin = model.keeping(batch=3), 0
        for end in (7, 8, 9, 14, CONTEXT):
            found = model.extend(tokens[:, begin:end], kept)
            torch.testing.assert_close(found, expected[:, end - 1], rtol=1e-4, atol=1e-5)
            begin = end
    with pytest.raises(ValueError, match="25 tokens exceed the context of 24"):
        model.extend(tokens[:, :1], kept)


def test_it_agrees_with_itself_in_bfloat16() -> None:
    model, tokens = built(kv_heads=2), tokens_of()
    with torch.no_grad():
        expected = model(tokens)
        with autocast("cpu", torch.bfloat16):
            found = model(tokens)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.02)


def test_new_weights_are_drawn_as_those_of_gpt2() -> None:
    model = built(dim=256, layers=8, tied=False)
    for name, weight in model.state_dict().items():
        if weight.dim() == 1:
            assert torch.equal(weight, torch.ones_like(weight))
        else:
            is_added = ".project." in name or ".down." in name
            assert float(weight.std() / (0.02 / 4 if is_added else 0.02)) == pytest.approx(1, abs=0.05)
            assert abs(float(weight.mean())) < 0.001
    assert {name for name, _ in model.named_parameters() if "bias" in name} == set()


def test_dropout_acts_in_training_alone() -> None:
    model, tokens = stirred(dropout=0.5), tokens_of()
    assert torch.equal(model(tokens), model(tokens))
    assert not torch.allclose(model.train()(tokens), model(tokens))


@pytest.mark.parametrize(
    ("file", "vocabulary", "parameters"),
    [("text_gpt", 257, 994_560), ("gpt2_small", 50_257, 123_551_232), ("gpt_1b", 50_257, 1_015_420_928)],
)
def test_configurations_have_the_parameters_that_they_claim(file: str, vocabulary: int, parameters: int) -> None:
    config = load_config(CONFIGS / f"{file}.yaml")
    facts = {"vocabulary": vocabulary, "context": config.data.context}  # type: ignore[union-attr]
    model = Architecture.of(config.model, facts, None).build(torch.device("meta"))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"dim": 30, "heads": 4}, r"model\.dim: dim \(30\) must be a multiple of heads \(4\)"),
        ({"dim": 20, "heads": 4}, r"model\.dim: dim \(20\) must be a multiple of twice heads \(2 x 4\), as .*"),
        ({"kv_heads": 3}, r"model\.kv_heads: heads \(4\) must be a multiple of kv_heads \(3\)"),
        ({"activation": "gelu"}, r"model\.activation: must be one of swiglu, relu2, not 'gelu' .*"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(model: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        from_data({"epochs": 1, "data": "text", "model": {"name": "gpt", **model}})


@pytest.mark.parametrize(
    ("run", "said"),
    [
        ({"data": "text", "model": "mlp"}, "model mlp reads images.*, data text has tokens; take .*model gpt$"),
        (
            {"data": "digits", "model": "gpt"},
            "model gpt reads tokens, data digits has images; take data .*text or tokens, or model ",
        ),
        ({"data": "text", "model": "gpt", "loss": "mse"}, "model gpt needs loss cross_entropy, not mse"),
    ],
)
def test_models_and_data_of_other_kinds_are_refused(run: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        from_data({"epochs": 1, **run})


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"input_shape": [1, 8, 8], "num_classes": 10}, "gpt has to know vocabulary and context; let the data set"),
        ({"vocabulary": 10, "context": 0}, "the data's context is 0, not a number of at least 1"),
        ({"vocabulary": True, "context": 4}, "the data's vocabulary is True, not a number of at least 1"),
    ],
)
def test_data_that_does_not_say_what_it_has_is_refused(facts: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Architecture.of(GptModel(), facts, None).build()


# -- bits per byte -----------------------------------------------------------------------------------------------------


class Guess(nn.Module):
    """A model that thinks each of eight tokens as likely as the others: three bits each."""

    metrics = Gpt.metrics

    def forward(self, tokens: Tensor) -> Tensor:
        return torch.zeros(*tokens.shape, 8)


def test_of_bytes_each_counts_and_the_ends_of_documents_have_none() -> None:
    targets = torch.tensor([[1, 2, 7, 3], [7, 5, -100, -100]])
    judge = BitsPerByte().of({"tokenizer": "bytes", "end_token": 7, "bytes_per_token": 99})
    bits, counted = judge(Guess(), (targets, targets))
    assert (float(bits), float(counted)) == (pytest.approx(6 * 3), 4)


def test_of_other_tokens_all_have_the_mean_number() -> None:
    targets = torch.tensor([[1, 2, 7, 3], [7, 5, -100, -100]])
    judge = BitsPerByte().of({"tokenizer": "tokenizer.json", "end_token": 7, "bytes_per_token": 2.5})
    bits, counted = judge(Guess(), (targets, targets))
    assert (float(bits), float(counted)) == (pytest.approx(6 * 3), 6 * 2.5)


@pytest.mark.parametrize("facts", [{}, {"bytes_per_token": "2"}, {"bytes_per_token": 0}])
def test_data_that_does_not_tell_its_bytes_is_refused_before_training(facts: dict[str, Any]) -> None:
    config = RunConfig(epochs=1, data=TokensData(), model=GptModel())
    assert [(metric.name, metric.better) for metric in config.judged_by] == [
        ("bits_per_byte", "lower"),
        ("accuracy", "higher"),
    ]
    with pytest.raises(ConfigError, match=r"bytes_per_token in its facts, or take metrics: \[accuracy\]"):
        metrics_of(config.judged_by, Guess(), facts=facts)


def test_fewer_bits_are_better_however_they_are_named(tmp_path: Path) -> None:
    for metrics in ([], ["bits_per_byte"], [{"name": "bits_per_byte"}]):
        run = from_data({"epochs": 1, "data": "text", "model": "gpt", "metrics": metrics})
        assert run.ranking == ("bits_per_byte", False)


def test_text_is_judged_in_batches_no_larger_than_those_trained_on() -> None:
    sizes = {"batch_size": 96, "accumulate": 3, "scaling": {"workers": 2}}
    assert evaluation_batch(from_data({"epochs": 1, "data": "text", "model": "gpt", **sizes})) == 16
    assert evaluation_batch(from_data({"epochs": 1, **sizes})) == EVALUATION_BATCH


# -- runs --------------------------------------------------------------------------------------------------------------

RUN: dict[str, Any] = {
    "data": {"name": "text", "train": "words.txt", "context": 16},
    "optimizer": {"name": "adamw", "lr": 0.01},
    "schedule": "constant",
    "batch_size": 8,
}
NET = {"name": "gpt", "dim": 16, "heads": 2, "layers": 2, "dropout": 0.1}


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "words.txt").write_text("The cat sat on the mat, and the dog sat on the cat.\n" * 40, encoding="utf-8")
    return tmp_path


def settings(root: Path, **keys: Any) -> dict[str, Any]:
    return {**RUN, "data": {**RUN["data"], "root": str(root)}, **keys}


def test_a_run_on_text_learns_is_judged_exactly_and_goes_on_as_it_was(
    text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with without_ray(text, monkeypatch):
        whole = train("whole", NET, epochs=2, export=["hf"], **settings(text))
        for epochs in (1, 2):
            parted = train("parted", NET, epochs=epochs, **settings(text))
        assert_bitwise_equal(final(parted), final(whole))
        recomputed = train("recomputed", NET | {"checkpointing": ["blocks.*"]}, epochs=2, **settings(text))
        assert_bitwise_equal(final(recomputed), final(whole))
        begun = train("begun", NET | {"weights": "whole", "dropout": 0.0}, epochs=1, **settings(text))
        (first, last), (tuned,) = read_evaluations(whole), read_evaluations(begun)
        model = load_model(max(text.glob("runs/whole/checkpoint_*")) / "model.safetensors")
    assert tuned.metrics["bits_per_byte"] < last.metrics["bits_per_byte"] < first.metrics["bits_per_byte"] < 8
    assert {file.name for file in text.glob("runs/whole/export/model-hf/*")} == {"config.json", "model.safetensors"}
    content = (text / "words.txt").read_bytes()
    tokens = torch.tensor([256, *content, 256])
    held_out = 16 * round(0.1 * math.ceil((len(tokens) - 1) / 16))
    windows = math.ceil((len(tokens) - 1) / 16)
    nats = counted = 0.0
    for start in range(16 * windows - held_out, len(tokens) - 1, 16):
        inputs, targets = tokens[start : start + 16], tokens[start + 1 : start + 17]
        with torch.no_grad():
            nats += float(F.cross_entropy(model(inputs[None, : len(targets)])[0], targets, reduction="sum"))
        counted += int((targets < 256).sum())
    assert last.metrics["bits_per_byte"] == pytest.approx(nats / math.log(2) / counted, rel=1e-5)


def test_over_a_whole_split_of_other_tokens_the_bytes_are_those_of_its_text(tmp_path: Path) -> None:
    class Words(ByteTokenizer):
        name, vocabulary, end_token = "words", 8, 7

    rng = np.random.default_rng(0)
    with TokenWriter(tmp_path / "train.tokens", Words()) as writer:
        for length, text_bytes in ((5, 31), (9, 40), (2, 17)):
            writer.add(rng.integers(0, 7, length), text_bytes)
            writer.end_document()
    split = open_source(TokensData(root=str(tmp_path), context=4), "train", training=False)
    judge = BitsPerByte().of(split.facts)
    bits, counted = judge(Guess(), split.batch(torch.arange(len(split))))
    assert (float(bits), float(counted)) == (pytest.approx(19 * 3), pytest.approx(31 + 40 + 17))


def test_compiled_it_learns_the_same() -> None:
    plain, tokens = built(), tokens_of(2, 9)
    batch = tokens[:, :-1], tokens[:, 1:]
    compiled = torch.compile(built(), dynamic=False, fullgraph=True, backend="aot_eager")
    for model in (plain, compiled):
        total, count = shipped_loss(model, batch, name="cross_entropy")
        (total / count).backward()
    for (name, one), other in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        assert one.grad is not None, name
        torch.testing.assert_close(other.grad, one.grad)
