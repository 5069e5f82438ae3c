"""The sizes of latent attention, as data."""

from dataclasses import dataclass

from sft_jax.datatypes import ConfigError


@dataclass(frozen=True, kw_only=True)
class LatentConfig:
    """The sizes of latent attention. A head's query and key have `plain_dim + rope_dim` dims, its value `value_dim`."""

    query_rank: int | None
    """Dims of the vector that queries are made from; None: they are made from x."""
    kv_rank: int
    plain_dim: int
    rope_dim: int
    value_dim: int
    interleaved: bool = True
    """The dims that turn together lie side by side in the checkpoint; False: half of rope_dim apart."""
    use_bias: bool = False
    """Whether the maps from x and to x have biases."""

    def __post_init__(self) -> None:
        for name in ("query_rank", "kv_rank", "plain_dim", "rope_dim", "value_dim"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"model: {name} is {value}; expected at least 1.")
        if self.rope_dim % 2:
            raise ConfigError(f"model: rope_dim is {self.rope_dim}; rotary positions need an even number.")

    @property
    def head_dim(self) -> int:
        return self.plain_dim + self.rope_dim
