"""Our parameters <-> the tensors of a Hugging Face folder: one table, read in both directions.

    layers.0.0.attention.query.kernel                  [repeats, D, N, H]
    model.layers.{layer}.self_attn.q_proj.weight       [N*H, D]    one for each layer

A rule is data: two names, and the dims of both sides in the letters of `datatypes.py` and `_dim_sizes`. `(N H)` is one
dim of N * H, with N outermost. A fused tensor holds several parameters, each of which has a rule that says its part:
one below the other, or in turns along the dim 2, as in `E D (X 2)`. Where each expert has a tensor of its own, the
parameter stacks them too, [repeats, E, ...].
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from absl import logging

from sft_jax.checkpoint.stored_tensor import StoredTensor
from sft_jax.datatypes import StorageError
from sft_jax.model.families import LayerConfig, TransformerConfig, find_moe
from sft_jax.model.latent_config import LatentConfig
from sft_jax.model.moe_config import MoeConfig


@dataclass(frozen=True)
class TensorRule:
    """One parameter of ours: `dims` are those of one layer, where `hf_name` counts layers, and of one expert, where it
    counts experts."""

    path: str
    dims: str
    hf_name: str
    hf_dims: str
    fused: tuple[str, ...] = ()
    """The dims of all parts of a fused tensor, this one among them."""
    part: int = 0
    layers: tuple[int, ...] = ()
    """The numbers of the layers that the parameter stacks on a leading dim; (): it belongs to no layer."""
    num_experts: int = 0
    """Experts that it stacks on a second one, each with a tensor of its own; 0: there is no such dim."""

    @property
    def is_stacked(self) -> bool:
        return bool(self.layers)

    @property
    def stack(self) -> tuple[int, ...]:
        """Sizes of the leading dims: (), (layers,) or (layers, experts)."""
        return (len(self.layers), self.num_experts)[: bool(self.layers) + bool(self.num_experts)]

    def hf_names(self) -> tuple[str, ...]:
        """Of its tensors, in the order in which they are stacked."""
        return tuple(self.hf_name_at(place) for place in np.ndindex(self.stack))

    def hf_name_at(self, place: tuple[int, ...]) -> str:
        """Of the tensor at one place of the stack."""
        layer = self.layers[place[0]] if place else None
        return self.hf_name.format(layer=layer, expert=place[-1] if place else None)

    def shape(self, config: TransformerConfig) -> tuple[int, ...]:
        """Of the whole parameter, with its layers."""
        sizes = _dim_sizes(config)
        return self.stack + tuple(sizes[dim] for dim in self.dims.split())

    def hf_shape(self, config: TransformerConfig) -> tuple[int, ...]:
        """Of one tensor, with all its parts."""
        parts = [_grouped_shape(dims, config) for dims in self.fused or (self.hf_dims,)]
        if _TURNS in _flat(self.hf_dims):
            return parts[0]
        return (sum(rows for rows, *_ in parts), *parts[0][1:])

    def from_hf(self, tensor: np.ndarray, config: TransformerConfig) -> np.ndarray:
        """One tensor in our dims: [N*H, D] -> [D, N, H]. A view, so slicing a mapped tensor reads that slice only."""
        hf_order, sizes = _flat(self.hf_dims), _dim_sizes(config)
        if self.fused and _TURNS not in hf_order:
            start = sum(_grouped_shape(dims, config)[0] for dims in self.fused[: self.part])
            tensor = tensor[start : start + _grouped_shape(self.hf_dims, config)[0]]
        split = tensor.reshape([sizes[dim] for dim in hf_order])
        if _TURNS in hf_order:
            split = np.moveaxis(split, hf_order.index(_TURNS), 0)[self.part]
            hf_order.remove(_TURNS)
        return split.transpose([hf_order.index(dim) for dim in self.dims.split()])


_TURNS = "2"


def _groups(dims: str) -> list[list[str]]:
    """`"(N H) D"` -> `[["N", "H"], ["D"]]`."""
    return [grouped.split() or [single] for grouped, single in re.findall(r"\(([^)]*)\)|(\S+)", dims)]


def _flat(dims: str) -> list[str]:
    return [dim for group in _groups(dims) for dim in group]


def _dim_sizes(config: TransformerConfig) -> dict[str, int]:
    heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
    sizes = {
        "V": config.vocab_size, "D": config.embed_dim, "F": config.mlp_dim, "N": heads, "K": kv_heads, "H": head_dim,
        "NH": heads * head_dim, "KH": kv_heads * head_dim, "Hv": config.value_dim,
    }  # fmt: skip
    moe, latent = find_moe(config), config.latent
    if moe:
        sizes |= {"E": moe.num_experts, "X": moe.expert_dim, "S": moe.shared_dim, _TURNS: 2}
    if latent:  # the ranks of queries and keys; what is made of x, and for each head, of the latter
        sizes |= {"Rq": latent.query_rank or 0, "Rk": latent.kv_rank}
        sizes |= {"RkH": latent.kv_rank + latent.rope_dim, "HHv": latent.plain_dim + latent.value_dim}
    return sizes


def _grouped_shape(hf_dims: str, config: TransformerConfig) -> tuple[int, ...]:
    sizes = _dim_sizes(config)
    return tuple(math.prod(sizes[dim] for dim in group) for group in _groups(hf_dims))


EMBEDDING = TensorRule("embed.embedding", "V D", "model.embed_tokens.weight", "V D")
FINAL_NORM = TensorRule("final_norm.scale", "D", "model.norm.weight", "D")
HEAD = TensorRule("head.kernel", "V D", "lm_head.weight", "V D")


def _fused(hf_name: str, *parts: tuple[str, str, str]) -> tuple[TensorRule, ...]:
    """Rules of the (path, dims, hf_dims) that one tensor holds."""
    all_dims = tuple(hf_dims for _, _, hf_dims in parts)
    return tuple(TensorRule(*part[:2], hf_name, part[2], all_dims, number) for number, part in enumerate(parts))


# Rules of a layer: paths come after `layers.<group>.<place>.`, names after `model.layers.<layer>.`.
QKV = (
    TensorRule("attention.query.kernel", "D N H", "self_attn.q_proj.weight", "(N H) D"),
    TensorRule("attention.key.kernel", "D K H", "self_attn.k_proj.weight", "(K H) D"),
    TensorRule("attention.value.kernel", "D K H", "self_attn.v_proj.weight", "(K H) D"),
)
QKV_BIASES = (
    TensorRule("attention.query.bias", "N H", "self_attn.q_proj.bias", "(N H)"),
    TensorRule("attention.key.bias", "K H", "self_attn.k_proj.bias", "(K H)"),
    TensorRule("attention.value.bias", "K H", "self_attn.v_proj.bias", "(K H)"),
)
FUSED_QKV = _fused(
    "self_attn.qkv_proj.weight",
    ("attention.query.kernel", "D N H", "(N H) D"),
    ("attention.key.kernel", "D K H", "(K H) D"),
    ("attention.value.kernel", "D K H", "(K H) D"),
)
QK_NORMS = {
    "none": (),
    "head": (
        TensorRule("attention.query_norm.scale", "H", "self_attn.q_norm.weight", "H"),
        TensorRule("attention.key_norm.scale", "H", "self_attn.k_norm.weight", "H"),
    ),
    "all": (
        TensorRule("attention.query_norm.scale", "NH", "self_attn.q_norm.weight", "NH"),
        TensorRule("attention.key_norm.scale", "KH", "self_attn.k_norm.weight", "KH"),
    ),
}
OUT = (TensorRule("attention.out.kernel", "N H D", "self_attn.o_proj.weight", "D (N H)"),)
OUT_BIAS = (TensorRule("attention.out.bias", "D", "self_attn.o_proj.bias", "D"),)
GATE_UP = (
    TensorRule("mlp.gate.kernel", "D F", "mlp.gate_proj.weight", "F D"),
    TensorRule("mlp.up.kernel", "D F", "mlp.up_proj.weight", "F D"),
)
FUSED_GATE_UP = _fused("mlp.gate_up_proj.weight", ("mlp.gate.kernel", "D F", "F D"), ("mlp.up.kernel", "D F", "F D"))
DOWN = (TensorRule("mlp.down.kernel", "F D", "mlp.down_proj.weight", "D F"),)
MLP_BIASES = (
    TensorRule("mlp.gate.bias", "F", "mlp.gate_proj.bias", "F"),
    TensorRule("mlp.up.bias", "F", "mlp.up_proj.bias", "F"),
    TensorRule("mlp.down.bias", "D", "mlp.down_proj.bias", "D"),
)


def _norm(path: str, hf_name: str) -> TensorRule:
    return TensorRule(f"{path}.scale", "D", f"{hf_name}.weight", "D")


LATENT_QUERY = {  # by whether queries have a latent of their own
    True: (
        TensorRule("attention.query_down.kernel", "D Rq", "self_attn.q_a_proj.weight", "Rq D"),
        TensorRule("attention.query_norm.scale", "Rq", "self_attn.q_a_layernorm.weight", "Rq"),
        TensorRule("attention.query.kernel", "Rq N H", "self_attn.q_b_proj.weight", "(N H) Rq"),
    ),
    False: (TensorRule("attention.query.kernel", "D N H", "self_attn.q_proj.weight", "(N H) D"),),
}
LATENT = (
    TensorRule("attention.kv_down.kernel", "D RkH", "self_attn.kv_a_proj_with_mqa.weight", "RkH D"),
    TensorRule("attention.kv_norm.scale", "Rk", "self_attn.kv_a_layernorm.weight", "Rk"),
    TensorRule("attention.kv_up.kernel", "Rk N HHv", "self_attn.kv_b_proj.weight", "(N HHv) Rk"),
    TensorRule("attention.out.kernel", "N Hv D", "self_attn.o_proj.weight", "D (N Hv)"),
)
LATENT_QUERY_BIAS = (TensorRule("attention.query_down.bias", "Rq", "self_attn.q_a_proj.bias", "Rq"),)
LATENT_BIASES = (
    TensorRule("attention.kv_down.bias", "RkH", "self_attn.kv_a_proj_with_mqa.bias", "RkH"),
    TensorRule("attention.out.bias", "D", "self_attn.o_proj.bias", "D"),
)
SINKS = (TensorRule("attention.sinks", "N", "self_attn.sinks", "N"),)
SHARED = (
    TensorRule("mlp.shared.gate.kernel", "D S", "mlp.shared_experts.gate_proj.weight", "S D"),
    TensorRule("mlp.shared.up.kernel", "D S", "mlp.shared_experts.up_proj.weight", "S D"),
    TensorRule("mlp.shared.down.kernel", "S D", "mlp.shared_experts.down_proj.weight", "D S"),
)
CORRECTION = (TensorRule("mlp.router.correction", "E", "mlp.gate.e_score_correction_bias", "E"),)
GPT_OSS_MOE = (
    TensorRule("mlp.router.kernel", "D E", "mlp.router.weight", "E D"),
    TensorRule("mlp.router.bias", "E", "mlp.router.bias", "E"),
    *_fused(
        "mlp.experts.gate_up_proj",
        ("mlp.experts.gate.kernel", "E D X", "E D (X 2)"),
        ("mlp.experts.up.kernel", "E D X", "E D (X 2)"),
    ),
    *_fused(
        "mlp.experts.gate_up_proj_bias",
        ("mlp.experts.gate.bias", "E X", "E (X 2)"),
        ("mlp.experts.up.bias", "E X", "E (X 2)"),
    ),
    TensorRule("mlp.experts.down.kernel", "E X D", "mlp.experts.down_proj", "E X D"),
    TensorRule("mlp.experts.down.bias", "E D", "mlp.experts.down_proj_bias", "E D"),
)


def _moe(prefix: str, gate: str, up: str, down: str, num_experts: int) -> tuple[TensorRule, ...]:
    """Rules of a router and of experts that have tensors of their own, by their names."""
    rules = (
        TensorRule("mlp.experts.gate.kernel", "D X", f"{prefix}.experts.{{expert}}.{gate}.weight", "X D"),
        TensorRule("mlp.experts.up.kernel", "D X", f"{prefix}.experts.{{expert}}.{up}.weight", "X D"),
        TensorRule("mlp.experts.down.kernel", "X D", f"{prefix}.experts.{{expert}}.{down}.weight", "D X"),
    )
    router = TensorRule("mlp.router.kernel", "D E", f"{prefix}.gate.weight", "E D")
    return (router, *(dataclasses.replace(rule, num_experts=num_experts) for rule in rules))


# By `TransformerConfig.norms`: those of attention, then those of the MLP. One name of theirs means two of ours.
NORMS = {
    "pre": ((_norm("attention_norm", "input_layernorm"),), (_norm("mlp_norm", "post_attention_layernorm"),)),
    "post": (
        (_norm("attention_post_norm", "post_attention_layernorm"),),
        (_norm("mlp_post_norm", "post_feedforward_layernorm"),),
    ),
    "sandwich": (
        (_norm("attention_norm", "input_layernorm"), _norm("attention_post_norm", "post_attention_layernorm")),
        (_norm("mlp_norm", "pre_feedforward_layernorm"), _norm("mlp_post_norm", "post_feedforward_layernorm")),
    ),
}
_FUSED_FAMILIES = ("phi3",)


def layer_rules(config: TransformerConfig, layer: LayerConfig) -> tuple[TensorRule, ...]:
    """The rules of one layer, in the order in which a forward pass meets them."""
    attention_norms, mlp_norms = NORMS[config.norms]
    return (
        *attention_norms,
        *(_attention_rules(config) if config.latent is None else _latent_rules(config.latent)),
        *mlp_norms,
        *(_mlp_rules(config) if layer.moe is None else _moe_rules(config.family, layer.moe)),
    )


def _attention_rules(config: TransformerConfig) -> tuple[TensorRule, ...]:
    return (
        *(FUSED_QKV if config.family in _FUSED_FAMILIES else QKV),
        *(QKV_BIASES if config.qkv_bias else ()),
        *QK_NORMS[config.qk_norm],
        *(SINKS if config.attention_sinks else ()),
        *OUT,
        *(OUT_BIAS if config.out_bias else ()),
    )


def _latent_rules(latent: LatentConfig) -> tuple[TensorRule, ...]:
    has_rank = latent.query_rank is not None
    biases = (LATENT_QUERY_BIAS if has_rank else ()) + LATENT_BIASES
    return (*LATENT_QUERY[has_rank], *LATENT, *(biases if latent.use_bias else ()))


def _mlp_rules(config: TransformerConfig) -> tuple[TensorRule, ...]:
    gate_up = FUSED_GATE_UP if config.family in _FUSED_FAMILIES else GATE_UP
    return (*gate_up, *DOWN, *(MLP_BIASES if config.mlp_bias else ()))


def _moe_rules(family: str, moe: MoeConfig) -> tuple[TensorRule, ...]:
    if family == "gpt_oss":
        return GPT_OSS_MOE
    if family == "mixtral":
        return _moe("block_sparse_moe", "w1", "w3", "w2", moe.num_experts)
    experts = _moe("mlp", "gate_proj", "up_proj", "down_proj", moe.num_experts)
    return (*experts, *(CORRECTION if moe.correction_bias else ()), *(SHARED if moe.shared_dim else ()))


# Buffers that old exports stored beside the weights; their values follow from config.json.
_BUFFERS = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


def tensor_rules(config: TransformerConfig) -> tuple[TensorRule, ...]:
    """The parameters of a model. A tied head has none of its own."""
    rules, first = [EMBEDDING], 0
    for number, group in enumerate(config.layers):
        for place, layer in enumerate(group.pattern):
            numbers = tuple(range(first + place, first + group.repeats * len(group.pattern), len(group.pattern)))
            rules += [_of_layers(rule, f"layers.{number}.{place}", numbers) for rule in layer_rules(config, layer)]
        first += group.repeats * len(group.pattern)
    return (*rules, FINAL_NORM, *(() if config.tie_embeddings else (HEAD,)))


def _of_layers(rule: TensorRule, prefix: str, layers: tuple[int, ...]) -> TensorRule:
    hf_name = f"model.layers.{{layer}}.{rule.hf_name}"
    return dataclasses.replace(rule, path=f"{prefix}.{rule.path}", hf_name=hf_name, layers=layers)


def hf_tensors(config: TransformerConfig) -> Iterator[tuple[str, tuple[TensorRule, ...], tuple[int, ...]]]:
    """(name, rules of its parts, place in their stacks) of every tensor of an export, in the order in which a forward
    pass meets them; `parameter[place]` is what the tensor holds of it. A tied folder holds the embedding only."""
    rules = tensor_rules(config)
    by_layer: dict[int, list[tuple[str, TensorRule, tuple[int, ...]]]] = {}
    for rule in rules:
        if rule.is_stacked:
            for place in np.ndindex(rule.stack):
                by_layer.setdefault(rule.layers[place[0]], []).append((rule.hf_name_at(place), rule, place))
    yield EMBEDDING.hf_name, (EMBEDDING,), ()
    for _, found in sorted(by_layer.items()):
        for hf_name, parts in itertools.groupby(found, key=lambda item: item[0]):
            _, of_tensor, places = zip(*parts, strict=True)
            yield hf_name, of_tensor, places[0]
    for rule in rules:
        if not rule.is_stacked and rule is not EMBEDDING:
            yield rule.hf_name, (rule,), ()


def match_tensors(
    config: TransformerConfig, index: Mapping[str, StoredTensor], where: str
) -> dict[str, tuple[StoredTensor, ...]]:
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
        names = rule.hf_names()
        if rule is EMBEDDING and config.tie_embeddings and EMBEDDING.hf_name not in index:
            names = HEAD.hf_names()
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
    unused = {name for name in index.keys() - used if not _BUFFERS.fullmatch(name)}
    unknown = sorted(unused - _of_next_token_layer(config, unused, where))
    if unknown:
        raise StorageError(
            f"{where}: holds {len(unknown)} tensors that this model would not use, such as {', '.join(unknown[:3])}. "
            "config.json describes another model, or these are an adapter or quantized weights. Name the base model."
        )
    return matched


def _of_next_token_layer(config: TransformerConfig, unused: set[str], where: str) -> set[str]:
    """DeepSeek-V3's layer after the last, which predicts the token after the next one. No logit depends on it."""
    prefix = f"model.layers.{config.num_layers}."
    if config.family != "deepseek_v3" or f"{prefix}eh_proj.weight" not in unused:
        return set()
    found = {name for name in unused if name.startswith(prefix)}
    logging.warning("%s: leaves out %s*, %d tensors that predict one token more", where, prefix, len(found))
    return found


def _check(tensor: StoredTensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise StorageError(
            f"{tensor} is {list(tensor.shape)}, and config.json asks for {list(shape)}. They are of different models."
        )
    if tensor.dtype.name not in ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"):
        raise StorageError(f"{tensor} has dtype {tensor.dtype.name}; quantized weights are not supported. Dequantize.")
