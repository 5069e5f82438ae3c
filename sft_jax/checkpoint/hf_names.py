"""Our parameters <-> the tensors of a Hugging Face folder: one table, read in both directions.

    layers.attention.query.kernel             [layers, D, N, H]
    model.layers.{layer}.self_attn.q_proj.weight       [N*H, D]    one for each layer

A rule is data: two names, and the dims of both sides in the letters of `datatypes.py`. `(N H)` is one dim of N * H,
with N outermost.
"""

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from sft_jax.checkpoint.safetensors_io import TensorInfo
from sft_jax.datatypes import StorageError
from sft_jax.model.families import TransformerConfig


@dataclass(frozen=True)
class TensorRule:
    """One parameter of ours: `dims` are those of one layer, where `hf_name` counts layers."""

    path: str
    dims: str
    hf_name: str
    hf_dims: str

    @property
    def is_stacked(self) -> bool:
        """Whether the parameter stacks one tensor per layer on a leading dim."""
        return "{layer}" in self.hf_name

    def hf_names(self, config: TransformerConfig) -> tuple[str, ...]:
        if not self.is_stacked:
            return (self.hf_name,)
        return tuple(self.hf_name.format(layer=layer) for layer in range(config.num_layers))

    def shape(self, config: TransformerConfig) -> tuple[int, ...]:
        """Of the whole parameter, with its layers."""
        sizes = _dim_sizes(config)
        layers = (config.num_layers,) if self.is_stacked else ()
        return layers + tuple(sizes[dim] for dim in self.dims.split())

    def hf_shape(self, config: TransformerConfig) -> tuple[int, ...]:
        """Of one tensor."""
        sizes = _dim_sizes(config)
        return tuple(math.prod(sizes[dim] for dim in group) for group in _groups(self.hf_dims))

    def from_hf(self, tensor: np.ndarray, config: TransformerConfig) -> np.ndarray:
        """One tensor in our dims: [N*H, D] -> [D, N, H]. A view, so slicing a mapped tensor reads that slice only."""
        sizes = _dim_sizes(config)
        hf_order = _flat(self.hf_dims)
        split = tensor.reshape([sizes[dim] for dim in hf_order])
        return split.transpose([hf_order.index(dim) for dim in self.dims.split()])

    def to_hf(self, values: np.ndarray) -> np.ndarray:
        """One layer of our parameter in their dims: [D, N, H] -> [N*H, D]."""
        dims = self.dims.split()
        sizes = dict(zip(dims, values.shape, strict=True))
        ordered = values.transpose([dims.index(dim) for dim in _flat(self.hf_dims)])
        return ordered.reshape([math.prod(sizes[dim] for dim in group) for group in _groups(self.hf_dims)])


def _groups(dims: str) -> list[list[str]]:
    """`"(N H) D"` -> `[["N", "H"], ["D"]]`."""
    return [grouped.split() or [single] for grouped, single in re.findall(r"\(([^)]*)\)|(\S+)", dims)]


def _flat(dims: str) -> list[str]:
    return [dim for group in _groups(dims) for dim in group]


def _dim_sizes(config: TransformerConfig) -> dict[str, int]:
    return {
        "V": config.vocab_size, "D": config.embed_dim, "F": config.mlp_dim,
        "N": config.num_heads, "K": config.num_kv_heads, "H": config.head_dim,
    }  # fmt: skip


EMBEDDING = TensorRule("embed.embedding", "V D", "model.embed_tokens.weight", "V D")
HEAD = TensorRule("head.kernel", "V D", "lm_head.weight", "V D")

LLAMA = (
    EMBEDDING,
    TensorRule("layers.attention_norm.scale", "D", "model.layers.{layer}.input_layernorm.weight", "D"),
    TensorRule("layers.attention.query.kernel", "D N H", "model.layers.{layer}.self_attn.q_proj.weight", "(N H) D"),
    TensorRule("layers.attention.key.kernel", "D K H", "model.layers.{layer}.self_attn.k_proj.weight", "(K H) D"),
    TensorRule("layers.attention.value.kernel", "D K H", "model.layers.{layer}.self_attn.v_proj.weight", "(K H) D"),
    TensorRule("layers.attention.out.kernel", "N H D", "model.layers.{layer}.self_attn.o_proj.weight", "D (N H)"),
    TensorRule("layers.mlp_norm.scale", "D", "model.layers.{layer}.post_attention_layernorm.weight", "D"),
    TensorRule("layers.mlp.gate.kernel", "D F", "model.layers.{layer}.mlp.gate_proj.weight", "F D"),
    TensorRule("layers.mlp.up.kernel", "D F", "model.layers.{layer}.mlp.up_proj.weight", "F D"),
    TensorRule("layers.mlp.down.kernel", "F D", "model.layers.{layer}.mlp.down_proj.weight", "D F"),
    TensorRule("final_norm.scale", "D", "model.norm.weight", "D"),
    HEAD,
)
# Buffers that old exports stored beside the weights; their values follow from config.json.
_BUFFERS = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


def tensor_rules(config: TransformerConfig) -> tuple[TensorRule, ...]:
    """The parameters of a model. A tied head has none of its own."""
    return tuple(rule for rule in LLAMA if not (config.tie_embeddings and rule is HEAD))


def hf_tensors(config: TransformerConfig) -> Iterator[tuple[str, TensorRule, int]]:
    """(name, rule, layer) of every tensor of an export, in the order in which a forward pass meets them. A tied folder
    holds the embedding only."""
    for is_stacked, group in itertools.groupby(tensor_rules(config), key=lambda rule: rule.is_stacked):
        rules = list(group)
        for layer in range(config.num_layers if is_stacked else 1):
            for rule in rules:
                yield rule.hf_names(config)[layer], rule, layer


def match_tensors(
    config: TransformerConfig, index: Mapping[str, TensorInfo], where: str
) -> dict[str, tuple[TensorInfo, ...]]:
    """For each parameter path, its tensors by layer. Reads nothing.

    A tied folder may store the one matrix under the embedding's name, the head's, or both; where it is both, the
    embedding's is taken and the caller compares them.

    Args:
      where: the folder, for error messages.

    Raises:
      StorageError: where a tensor is missing, has another shape than config.json asks, or belongs to no parameter.
    """
    matched = {}
    for rule in tensor_rules(config):
        names = rule.hf_names(config)
        if rule is EMBEDDING and config.tie_embeddings and EMBEDDING.hf_name not in index:
            names = HEAD.hf_names(config)
        missing = [name for name in names if name not in index]
        if missing:
            raise StorageError(
                f"{where}: has no tensor {missing[0]} ({len(missing)} of {len(names)} of its kind are missing). The "
                "download is incomplete, or config.json describes another model."
            )
        matched[rule.path] = tuple(index[name] for name in names)
        for tensor in matched[rule.path]:
            _check(tensor, rule.hf_shape(config))
    used = {tensor.name for tensors in matched.values() for tensor in tensors}
    if config.tie_embeddings and HEAD.hf_name in index:
        _check(index[HEAD.hf_name], HEAD.hf_shape(config))
        used.add(HEAD.hf_name)
    unknown = sorted(name for name in index.keys() - used if not _BUFFERS.fullmatch(name))
    if unknown:
        raise StorageError(
            f"{where}: holds {len(unknown)} tensors that this model would not use, such as {', '.join(unknown[:3])}. "
            "config.json describes another model, or these are an adapter or quantized weights. Name the base model."
        )
    return matched


def _check(tensor: TensorInfo, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise StorageError(
            f"{tensor} is {list(tensor.shape)}, and config.json asks for {list(shape)}. They are of different models."
        )
    if tensor.dtype.name not in ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"):
        raise StorageError(f"{tensor} has dtype {tensor.dtype.name}; quantized weights are not supported. Dequantize.")
