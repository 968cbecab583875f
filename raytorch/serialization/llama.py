"""The decoder gpt as a folder that the package transformers reads: with SwiGLU it is a Llama, in other words."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from raytorch.config import GptModel
from raytorch.errors import UserError
from raytorch.models.gpt import EPSILON, Gpt
from raytorch.models.networks import Architecture
from raytorch.serialization.weights import load_tensors, save_tensors

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
_OUTSIDE = {
    "embed.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_IN_BLOCK = {
    "attention_norm": "input_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.project": "self_attn.o_proj",
    "feedforward_norm": "post_attention_layernorm",
    "feedforward.gate": "mlp.gate_proj",
    "feedforward.up": "mlp.up_proj",
    "feedforward.down": "mlp.down_proj",
}


def require_llama(architecture: Architecture) -> None:
    """Refuse a model that is no Llama. Raises UserError."""
    config = architecture.config
    if not isinstance(config, GptModel):
        raise UserError(f"the format hf is for model gpt, and this is {config.name}; take another format")
    if config.activation != "swiglu":
        raise UserError(
            f"the format hf is for model gpt with activation swiglu, and this has {config.activation}; take another "
            "format"
        )


def save_llama(model: nn.Module, folder: Path, architecture: Architecture) -> None:
    """Write ``config.json`` and ``model.safetensors`` into a new folder. Raises UserError for what is no Llama."""
    require_llama(architecture)
    assert isinstance(model, Gpt)
    folder.mkdir()
    config = json.dumps(_config(model, architecture), indent=2)
    (folder / CONFIG_FILE).write_text(f"{config}\n", encoding="utf-8")
    weights = {_llama_name(name): tensor for name, tensor in model.state_dict().items()}
    save_tensors(weights, folder / WEIGHTS_FILE, {"format": "pt"})


def load_llama(folder: Path, architecture: Architecture) -> nn.Module:
    """The model that :func:`save_llama` wrote of this architecture, in evaluation mode."""
    model, tensors = architecture.build(), load_tensors(folder / WEIGHTS_FILE)
    own: dict[str, Tensor] = {name: tensors[_llama_name(name)] for name in model.state_dict()}
    model.load_state_dict(own)
    return model.eval()


def _config(model: Gpt, architecture: Architecture) -> dict[str, Any]:
    """What transformers' LlamaConfig is made of; the base of the positions as its older and its newer versions read
    it."""
    end_token = architecture.facts.get("end_token")
    known = {"bos_token_id": end_token, "eos_token_id": end_token}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": model.vocabulary,
        "max_position_embeddings": model.context,
        "hidden_size": model.embed.embedding_dim,
        "intermediate_size": model.blocks[0].feedforward.up.out_features,  # type: ignore[union-attr]
        "num_hidden_layers": len(model.blocks),
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": EPSILON,
        "rope_theta": model.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "tie_word_embeddings": model.tied,
        **known,
        "torch_dtype": str(model.embed.weight.dtype).removeprefix("torch."),
    }


def _llama_name(name: str) -> str:
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    _, number, within = name.split(".", 2)
    return f"model.layers.{number}.{_IN_BLOCK[within.removesuffix('.weight')]}.weight"
