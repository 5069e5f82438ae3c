"""Small Hugging Face folders, written without the code under test."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import safetensors.numpy

from sft_jax.model.families import LayerConfig, TransformerConfig, same_layers
from sft_jax.model.hf_config import to_hf_config
from sft_jax.model.rope import RopeConfig

# Every size differs, so that no two dims can be confused.
TINY = TransformerConfig(
    vocab_size=40, layers=same_layers(3, LayerConfig(rope=RopeConfig(theta=10_000.0))), embed_dim=16, mlp_dim=32,
    num_heads=8, num_kv_heads=4, head_dim=6, norm_eps=1e-5, tie_embeddings=False, max_position=64,
)  # fmt: skip
TINY_TIED = dataclasses.replace(TINY, tie_embeddings=True)


def llama_shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes as transformers has them, spelt out."""
    d, f, h = config.embed_dim, config.mlp_dim, config.head_dim
    shapes = {"model.embed_tokens.weight": (config.vocab_size, d), "model.norm.weight": (d,)}
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, d)
    for i in range(config.num_layers):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (d,),
            f"{layer}.self_attn.q_proj.weight": (config.num_heads * h, d),
            f"{layer}.self_attn.k_proj.weight": (config.num_kv_heads * h, d),
            f"{layer}.self_attn.v_proj.weight": (config.num_kv_heads * h, d),
            f"{layer}.self_attn.o_proj.weight": (d, config.num_heads * h),
            f"{layer}.post_attention_layernorm.weight": (d,),
            f"{layer}.mlp.gate_proj.weight": (f, d),
            f"{layer}.mlp.up_proj.weight": (f, d),
            f"{layer}.mlp.down_proj.weight": (d, f),
        }
    return shapes


def llama_tensors(config: TransformerConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 weights."""
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in llama_shapes(config).items()}


def write_folder(folder: Path, config: TransformerConfig, tensors: dict[str, np.ndarray]) -> Path:
    """config.json and model.safetensors, by the safetensors library."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(to_hf_config(config, "float32")))
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_tokenizer(folder: Path) -> Path:
    """A tokenizer of 40 words: <s> is 1, </s> is 2, <|im_end|> is 39."""
    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(36)), "<|im_end|>"]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    added = [{"id": i, "content": words[i]} | flags for i in (0, 1, 2, 39)]
    model = {"type": "WordLevel", "vocab": {word: i for i, word in enumerate(words)}, "unk_token": "<unk>"}
    spec = {"version": "1.0", "added_tokens": added, "pre_tokenizer": {"type": "WhitespaceSplit"}, "model": model}
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special))
    return folder


def write_sparse_folder(folder: Path, config: TransformerConfig) -> int:
    """A folder whose float32 weights are all 0 and take no room on disk. Returns their size in bytes."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(to_hf_config(config, "float32")))
    header, at = {}, 0
    for name, shape in llama_shapes(config).items():
        end = at + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, end]}
        at = end
    data = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as stream:
        stream.write(len(data).to_bytes(8, "little") + data)
        stream.truncate(8 + len(data) + at)
    return at
