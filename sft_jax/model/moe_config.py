"""What a mixture of experts is made of, as data."""

from dataclasses import dataclass

from sft_jax.datatypes import ConfigError


@dataclass(frozen=True, kw_only=True)
class MoeConfig:
    """An MLP of many experts, of which a router chooses a few for each token. The defaults are Mixtral's."""

    num_experts: int
    experts_per_token: int
    expert_dim: int
    """Hidden dim of one expert."""
    scores: str = "softmax"
    """What the router makes of its logits: softmax (over all experts) or sigmoid (of each alone)."""
    normalize_weights: bool = True
    """The scores of a token's experts are divided by their sum. With softmax this is a softmax over those alone."""
    weights_multiplier: float = 1.0
    """Multiplies what the experts of a token add, after normalisation; shared experts not."""
    router_bias: bool = False
    correction_bias: bool = False
    """Each expert has a number that is added to its score in choosing, not in weighing. It gets no gradient."""
    num_groups: int = 1
    """Experts lie in groups of equal size; a token chooses among those of its best groups."""
    groups_per_token: int = 1
    expert_bias: bool = False
    shared_dim: int = 0
    """Hidden dim of the MLP that every token goes through besides; 0: none."""
    clamp: float | None = None
    """gpt-oss's activation: gate and up are clamped here, and up has 1 added; None: activation(gate) * up."""

    def __post_init__(self) -> None:
        for name in ("num_experts", "experts_per_token", "expert_dim", "num_groups", "groups_per_token"):
            if getattr(self, name) < 1:
                raise ConfigError(f"model: {name} is {getattr(self, name)}; expected at least 1.")
        if self.scores not in ("softmax", "sigmoid"):
            raise ConfigError(f"model: router scores are {self.scores!r}; expected softmax or sigmoid.")
        if self.num_experts % self.num_groups or self.groups_per_token > self.num_groups:
            raise ConfigError(
                f"model: {self.num_experts} experts in {self.num_groups} groups, {self.groups_per_token} of them per "
                "token; expected groups of equal size, and no more per token than there are."
            )
        within = self.num_experts // self.num_groups * self.groups_per_token
        if self.experts_per_token > within:
            raise ConfigError(
                f"model: experts_per_token is {self.experts_per_token}; a token has {within} to choose from."
            )
        if self.num_groups > 1 and self.num_experts // self.num_groups < 2:
            raise ConfigError(f"model: {self.num_groups} groups of one expert; a group is judged by its best two.")
