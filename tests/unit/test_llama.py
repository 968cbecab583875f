"""Format hf: a gpt as a folder that the package transformers reads as a Llama."""

import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lone_runs import train, without_ray
from safetensors.torch import load_file
from torch import nn

from raytorch.config import GptModel, MlpModel
from raytorch.errors import UserError
from raytorch.models.networks import Architecture
from raytorch.training.export import export_model

SIZES = {"dim": 32, "heads": 4, "layers": 2}
VARIANTS: list[dict[str, Any]] = [{}, {"kv_heads": 2, "tied": False}, {"feedforward": 72, "rope_theta": 500.0}]


def architecture_of(**keys: Any) -> Architecture:
    return Architecture(GptModel(**SIZES, **keys), facts={"vocabulary": 50, "context": 24, "end_token": 49})


def stirred(architecture: Architecture) -> nn.Module:
    torch.manual_seed(0)
    model = architecture.build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("keys", VARIANTS)
def test_a_folder_has_a_llamas_names_and_sizes(keys: dict[str, Any], tmp_path: Path) -> None:
    architecture = architecture_of(**keys)
    model, folder = stirred(architecture), tmp_path / "model-hf"
    (difference,) = export_model(model, architecture, "hf", folder)
    assert difference.absolute == 0
    config, tensors = json.loads((folder / "config.json").read_text("utf-8")), load_file(folder / "model.safetensors")
    assert {key: config[key] for key in ("model_type", "vocab_size", "max_position_embeddings", "eos_token_id")} == {
        "model_type": "llama",
        "vocab_size": 50,
        "max_position_embeddings": 24,
        "eos_token_id": 49,
    }
    heads, kv_heads, wide = config["num_attention_heads"], config["num_key_value_heads"], config["intermediate_size"]
    head, inside = config["head_dim"], {"input_layernorm": (32,), "post_attention_layernorm": (32,)}
    inside |= {"self_attn.q_proj": (heads * head, 32), "self_attn.o_proj": (32, heads * head)}
    inside |= dict.fromkeys(("self_attn.k_proj", "self_attn.v_proj"), (kv_heads * head, 32))
    inside |= {"mlp.gate_proj": (wide, 32), "mlp.up_proj": (wide, 32), "mlp.down_proj": (32, wide)}
    expected = {f"model.layers.{layer}.{name}.weight": shape for layer in range(2) for name, shape in inside.items()}
    expected |= {"model.embed_tokens.weight": (50, 32), "model.norm.weight": (32,)}
    expected |= {} if config["tie_word_embeddings"] else {"lm_head.weight": (50, 32)}
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected
    assert (heads, kv_heads, wide) == (4, keys.get("kv_heads", 4), keys.get("feedforward", 128))
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == keys.get("rope_theta", 10_000.0)


@pytest.mark.skipif(not importlib.util.find_spec("transformers"), reason="transformers is not installed")
@pytest.mark.parametrize("keys", VARIANTS)
def test_transformers_computes_the_same_logits(keys: dict[str, Any], tmp_path: Path) -> None:
    transformers: Any = importlib.import_module("transformers")
    architecture = architecture_of(**keys)
    model, tokens = stirred(architecture), torch.randint(50, (3, 24))
    export_model(model, architecture, "hf", tmp_path / "hf")
    llama = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "hf").eval()
    with torch.no_grad():
        torch.testing.assert_close(llama(tokens).logits, model(tokens), rtol=1e-4, atol=1e-5)


def test_a_folder_that_is_there_gets_the_new_files_and_keeps_others(tmp_path: Path) -> None:
    architecture = architecture_of()
    folder, elsewhere = tmp_path / "hf", tmp_path / "elsewhere"
    export_model(stirred(architecture), architecture, "hf", folder)
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    before = load_file(folder / "model.safetensors")["model.norm.weight"]
    export_model(architecture.build(), architecture, "hf", folder)
    assert not torch.equal(load_file(folder / "model.safetensors")["model.norm.weight"], before)
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    elsewhere.mkdir()
    (tmp_path / "link").symlink_to(elsewhere)
    export_model(architecture.build(), architecture, "hf", tmp_path / "link")
    assert (list(elsewhere.iterdir()), (tmp_path / "link").is_symlink()) == ([], False)
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match="file cannot be written: File exists; give another path"):
        export_model(architecture.build(), architecture, "hf", tmp_path / "file")


@pytest.mark.parametrize(
    ("architecture", "said"),
    [
        (Architecture(MlpModel(), (1, 8, 8), 10), "the format hf is for model gpt, and this is mlp; take another"),
        (architecture_of(activation="relu2"), "for model gpt with activation swiglu, and this has relu2; take another"),
    ],
)
def test_what_is_no_llama_is_refused(architecture: Architecture, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        export_model(architecture.build(), architecture, "hf", tmp_path / "hf")
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_asks_for_what_cannot_be_is_refused_before_it_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with without_ray(tmp_path, monkeypatch), pytest.raises(UserError, match="the format hf is for model gpt"):
        train("refused", export=["hf"])
    assert not list(tmp_path.glob("runs/refused/checkpoint_*"))
