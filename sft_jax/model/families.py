"""What a decoder is made of, as data: one frozen TransformerConfig describes every family, whatever it is called.

Layers come in groups, each a pattern and how often it repeats, because a scan runs the repeats of a pattern: Gemma 3's
62 layers are ten times (five local, one global) and two local ones:

    layers = (LayerGroup((local, local, local, local, local, whole), 10), LayerGroup((local,), 2))

`hf_config.py` reads it from a folder's config.json, `presets.py` has the usual sizes by name.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sft_jax.datatypes import ConfigError
from sft_jax.model.latent_config import LatentConfig
from sft_jax.model.logits import LogitShape
from sft_jax.model.moe_config import MoeConfig
from sft_jax.model.rope import LinearScaling, LongRopeScaling, RopeConfig, YarnScaling


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """In what layers of one model may differ."""

    rope: RopeConfig | None
    """Rotary positions; None: none."""
    window: int | None = None
    """A token sees this many tokens, itself the last; None: all before it."""
    moe: MoeConfig | None = None
    """The MLP is a mixture of experts; None: one MLP of `mlp_dim`."""


class LayerGroup(NamedTuple):
    """Layers whose configs are `pattern`, over and over."""

    pattern: tuple[LayerConfig, ...]
    repeats: int


@dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """A decoder: RMSNorm, grouped queries, gated MLP. The defaults are Llama's."""

    family: str = "llama"
    """`model_type` in config.json; it says how the folder is read and written, and changes no number."""
    vocab_size: int
    """Rows of the embedding, padding included: often more than the tokenizer has ids."""
    embed_dim: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    layers: tuple[LayerGroup, ...]
    norm_eps: float
    norms: str = "pre"
    """pre: attention and MLP have their inputs normalised; post: their outputs; sandwich: both."""
    norm_adds_one: bool = False
    """Whether norms multiply by `1 + scale` instead of `scale`."""
    qk_norm: str = "none"
    """Queries and keys are normalised before they turn: none, head (each head alone) or all (all heads together)."""
    qkv_bias: bool = False
    out_bias: bool = False
    """Whether attention's output projection has a bias."""
    mlp_bias: bool = False
    activation: str = "silu"
    """Of the MLP's gate: silu or gelu_tanh."""
    latent: LatentConfig | None = None
    """Attention is latent: every head has its own key and value, and `head_dim` is that of queries and keys."""
    attention_sinks: bool = False
    """Each head learns a score beside those of the tokens, which takes its share of attention and gives nothing."""
    attention_scale: float | None = None
    """Multiplies the scores; None: head_dim ** -0.5."""
    attention_softcap: float | None = None
    """Scores become c * tanh(score / c); None: they stay."""
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    """Multiplies what attention and MLP add to their inputs."""
    logits_divisor: float = 1.0
    logit_softcap: float | None = None
    """Logits become c * tanh(logit / c), after the divisor; None: they stay."""
    tie_embeddings: bool
    """The output head is the embedding; there is no `head.kernel`."""
    max_position: int
    """Tokens in the longest sequence that the model was made for. The caller decides about longer ones."""
    initializer_range: float = 0.02
    """Standard deviation of randomly initialised matrices."""

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if isinstance(value, int | float) and not isinstance(value, bool) and value <= 0:
                raise ConfigError(f"model: {f.name} is {value}; expected more than 0.")
            if f.name in _CHOICES and value not in _CHOICES[f.name]:
                raise ConfigError(f"model: {f.name} is {value!r}; expected one of {', '.join(_CHOICES[f.name])}.")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"model: num_kv_heads {self.num_kv_heads} does not divide num_heads {self.num_heads}. "
                "Every key/value head serves the same number of query heads."
            )
        if self.num_layers < 1:
            raise ConfigError(f"model: num_layers is {self.num_layers}; expected more than 0.")
        latent = self.latent
        if latent and (self.num_kv_heads, self.head_dim) != (self.num_heads, latent.head_dim):
            raise ConfigError(
                f"model: latent attention has {self.num_kv_heads} key heads for {self.num_heads} query heads, and "
                f"head_dim {self.head_dim}; expected as many, and {latent.head_dim}."
            )
        plain = (self.attention_sinks, self.qkv_bias, self.out_bias, self.qk_norm != "none")
        if latent and any(plain):
            raise ConfigError(
                "model: latent attention has neither sinks nor norms of heads, and its biases are its own. Leave "
                "attention_sinks, qk_norm, qkv_bias and out_bias at their defaults."
            )
        for layer in {layer for group in self.layers for layer in group.pattern}:
            _check_layer(layer, self.rope_head_dim)

    @property
    def num_layers(self) -> int:
        return sum(len(group.pattern) * group.repeats for group in self.layers)

    @property
    def rope_head_dim(self) -> int:
        """Dims of a head of which `RopeConfig.fraction` turn."""
        return self.latent.rope_dim if self.latent else self.head_dim

    @property
    def value_dim(self) -> int:
        """Dims of a head's value."""
        return self.latent.value_dim if self.latent else self.head_dim

    @property
    def logit_shape(self) -> LogitShape:
        return LogitShape(self.logits_divisor, self.logit_softcap)


_CHOICES = {
    "norms": ("pre", "post", "sandwich"),
    "qk_norm": ("none", "head", "all"),
    "activation": ("silu", "gelu_tanh"),
}


def _check_layer(layer: LayerConfig, head_dim: int) -> None:
    if layer.window is not None and layer.window < 1:
        raise ConfigError(f"model: window is {layer.window}; expected at least 1, or none.")
    if layer.rope is None:
        return
    num_rotated = layer.rope.num_rotated(head_dim)
    if num_rotated % 2 or not 0 < num_rotated <= head_dim:
        raise ConfigError(
            f"model: head_dim is {head_dim}, of which {num_rotated} dims turn; rotary positions need an even number."
        )
    scaling = layer.rope.scaling
    if isinstance(scaling, LongRopeScaling) and {len(scaling.short), len(scaling.long)} != {num_rotated // 2}:
        raise ConfigError(
            f"model: longrope has {len(scaling.short)} short and {len(scaling.long)} long factors; expected one for "
            f"each of the {num_rotated // 2} pairs of dims that turn."
        )


def same_layers(num_layers: int, layer: LayerConfig) -> tuple[LayerGroup, ...]:
    """The groups of a model whose layers are all alike."""
    return (LayerGroup((layer,), num_layers),)


def list_layers(config: TransformerConfig) -> list[LayerConfig]:
    """The config of every layer, first to last."""
    return [layer for group in config.layers for layer in group.pattern * group.repeats]


def find_moe(config: TransformerConfig) -> MoeConfig | None:
    """The mixture that layers of a model have, all the same; None: none has one."""
    return next((layer.moe for group in config.layers for layer in group.pattern if layer.moe), None)


def group_layers(layers: Sequence[LayerConfig]) -> tuple[LayerGroup, ...]:
    """Layer by layer -> the groups with the fewest places in their patterns together, since each place is compiled.

    a a b a a b a a -> (a a b) twice, (a) twice.
    """
    kinds = list(dict.fromkeys(layers))
    numbers = [kinds.index(layer) for layer in layers]  # compared often
    best: list[tuple[int, tuple[LayerGroup, ...]]] = [(0, ())]  # for the last n layers: their places, and groups
    for start in reversed(range(len(layers))):
        rest = len(layers) - start
        options = []
        for period in range(1, rest + 1):
            pattern = numbers[start : start + period]
            for repeats in itertools.count(1):
                stop = start + repeats * period
                if numbers[stop - period : stop] != pattern:
                    break
                places, groups = best[len(layers) - stop]
                options.append((period + places, len(groups), -repeats, period, groups))
        places, _, repeats, period, groups = min(options, key=lambda option: option[:3])
        best.append((places, (LayerGroup(tuple(layers[start : start + period]), -repeats), *groups)))
    return best[-1][1]


def longest_text(config: TransformerConfig) -> int:
    """Tokens in the longest text that the model was made for. `max_position` does not count what `linear` adds (but in
    Gemma 3), and may count what `yarn` adds.

    Source: `rope_scaling` and `max_position_embeddings` in https://huggingface.co/docs/transformers/model_doc/llama.
    """
    longest = []
    for layer in list_layers(config):
        scaling = layer.rope.scaling if layer.rope else None
        if isinstance(scaling, LinearScaling) and config.family != "gemma3_text":
            longest.append(int(scaling.factor * config.max_position))
        elif isinstance(scaling, YarnScaling):
            longest.append(max(config.max_position, int(scaling.factor * scaling.original_max_position)))
        elif layer.window is None:
            longest.append(config.max_position)
    return min(longest, default=config.max_position)


def with_num_layers(config: TransformerConfig, num_layers: int) -> TransformerConfig:
    """The first layers of a model, or more of them by its last group's pattern."""
    if num_layers < 1:
        raise ConfigError(f"model: num_layers is {num_layers}; expected more than 0.")
    layers = list_layers(config)
    more = itertools.cycle(config.layers[-1].pattern)
    layers += itertools.islice(more, max(0, num_layers - len(layers)))
    return dataclasses.replace(config, layers=group_layers(layers[:num_layers]))


def num_params(config: TransformerConfig) -> int:
    """Number of parameters, with a tied head counted once."""
    embeddings = config.vocab_size * config.embed_dim * (1 if config.tie_embeddings else 2)
    norms = config.embed_dim * (4 if config.norms == "sandwich" else 2)
    layers = list_layers(config)
    mlps = sum(_mlp_params(config, layer, layer.moe.num_experts if layer.moe else 0) for layer in layers)
    return embeddings + mlps + len(layers) * (_attention_params(config) + norms) + config.embed_dim


def num_active_params(config: TransformerConfig) -> int:
    """Those that one token meets: of a mixture, its own experts."""
    layers = list_layers(config)
    idle = sum(
        _mlp_params(config, layer, layer.moe.num_experts) - _mlp_params(config, layer, layer.moe.experts_per_token)
        for layer in layers
        if layer.moe
    )
    return num_params(config) - idle


def train_flops_per_token(config: TransformerConfig, length: int) -> int:
    """Forward and backward matmul FLOPs per token: 6 per parameter that multiplies, and causal attention over rows of
    `length`. Source: PaLM (arXiv:2204.02311), appendix B, with half of the attention square."""
    embedding = 0 if config.tie_embeddings else config.vocab_size * config.embed_dim
    attention = 3 * config.num_layers * config.num_heads * (config.head_dim + config.value_dim) * length
    return 6 * (num_active_params(config) - embedding) + attention


def _attention_params(config: TransformerConfig) -> int:
    embed, heads, kv_heads, latent = config.embed_dim, config.num_heads, config.num_kv_heads, config.latent
    if latent:
        query_in = latent.query_rank or embed
        query = query_in * heads * config.head_dim + (embed + 1) * (latent.query_rank or 0)  # with the latent's norm
        kv = embed * (latent.kv_rank + latent.rope_dim) + latent.kv_rank
        expanded = latent.kv_rank * heads * (latent.plain_dim + latent.value_dim)
        biases = (latent.query_rank or 0) + latent.kv_rank + latent.rope_dim + embed
        return query + kv + expanded + heads * latent.value_dim * embed + biases * latent.use_bias
    attention = 2 * embed * config.head_dim * (heads + kv_heads)
    attention += config.head_dim * (heads + 2 * kv_heads) * config.qkv_bias + embed * config.out_bias
    attention += {"none": 0, "head": 2, "all": heads + kv_heads}[config.qk_norm] * config.head_dim
    return attention + heads * config.attention_sinks


def _mlp_params(config: TransformerConfig, layer: LayerConfig, num_experts: int) -> int:
    """With so many experts of a mixture counted."""
    embed, mlp, moe = config.embed_dim, config.mlp_dim, layer.moe
    if moe is None:
        return 3 * embed * mlp + (2 * mlp + embed) * config.mlp_bias
    router = moe.num_experts * (embed + moe.router_bias + moe.correction_bias)
    expert = 3 * embed * moe.expert_dim + (2 * moe.expert_dim + embed) * moe.expert_bias
    return router + num_experts * expert + 3 * embed * moe.shared_dim
