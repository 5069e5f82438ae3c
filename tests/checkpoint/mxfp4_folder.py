"""A gpt-oss folder as it is published: experts in MXFP4, everything else in bfloat16."""

import json
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np

from sft_jax.checkpoint.hf_names import hf_tensors
from sft_jax.checkpoint.safetensors_writer import TensorSpec, write_tensors
from sft_jax.model.hf_config import read_hf_config

CONFIG = {
    "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "vocab_size": 48, "hidden_size": 64,
    "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "num_local_experts": 4, "num_experts_per_tok": 2, "experts_per_token": 2, "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"], "max_position_embeddings": 256, "rope_theta": 150000,
    "rope_scaling": {
        "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
        "original_max_position_embeddings": 8,
    },
    "tie_word_embeddings": False, "rms_norm_eps": 1e-5, "hidden_act": "silu", "swiglu_limit": 7.0,
    "quantization_config": {
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens",
                                   "lm_head"],
        "quant_method": "mxfp4",
    },
}  # fmt: skip
Tensors = dict[str, np.ndarray]


def write_mxfp4_folder(
    folder: Path, seed: int, change: Callable[[Tensors], Tensors] = lambda tensors: tensors
) -> Tensors:
    """Random numbers of about unit scale; what was written, by name."""
    rng, tensors = np.random.default_rng(seed), {}
    config = read_hf_config(CONFIG, "config.json")
    for name, (rule, *_), _ in hf_tensors(config):
        shape = rule.hf_shape(config)
        if name.endswith((".gate_up_proj", ".down_proj")):
            experts, size, rows = shape
            tensors[f"{name}_blocks"] = rng.integers(256, size=(experts, rows, size // 32, 16), dtype=np.uint8)
            tensors[f"{name}_scales"] = rng.integers(121, 125, (experts, rows, size // 32), dtype=np.uint8)
        else:
            values = rng.uniform(0.5, 1.5, shape) if "norm" in name else rng.normal(0, shape[-1] ** -0.5, shape)
            tensors[name] = values.astype(ml_dtypes.bfloat16)
    tensors = change(tensors)
    specs = [TensorSpec(name, values.dtype, values.shape) for name, values in tensors.items()]
    write_tensors(folder, specs, iter(tensors.items()))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return tensors
