"""From the config: a learning-rate schedule, and an optax transformation that the step scales by it."""

from typing import Any

import optax

from sft_jax.config_schema import OptimizerConfig, ScheduleConfig
from sft_jax.training.moments import keep_moments


def build_schedule(config: ScheduleConfig, learning_rate: float, num_steps: int) -> optax.Schedule:
    """Learning rate of update 0, 1, ..., `num_steps` - 1.

    With 8 steps, 2 of warmup and a peak of 1 (final_fraction 0.1, decay_fraction 0.5):

        update    0    1    2    3    4    5    6    7
        constant  0.5  1    1    1    1    1    1    1
        linear    0.5  1    1    0.82 0.64 0.46 0.28 0.10
        cosine    0.5  1    1    0.91 0.69 0.41 0.19 0.10
        wsd       0.5  1    1    1    1    0.70 0.40 0.10
    """
    warmup = round(config.warmup_fraction * num_steps) if config.warmup_steps is None else config.warmup_steps
    final = 0.1 if config.final_fraction is None else config.final_fraction
    decay_fraction = 0.2 if config.decay_fraction is None else config.decay_fraction
    peak, last = learning_rate, num_steps - 1

    # optax schedules start at the joint's own count of 0.
    parts = [optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))]
    joints = [warmup]
    if config.name == "constant":
        parts.append(optax.constant_schedule(peak))
    elif config.name == "linear":
        parts.append(optax.linear_schedule(peak, final * peak, max(last - warmup, 1)))
    elif config.name == "cosine":
        parts.append(optax.cosine_decay_schedule(peak, max(last - warmup, 1), alpha=final))
    else:
        decay_steps = max(round(decay_fraction * num_steps) - 1, 1)
        parts += [optax.constant_schedule(peak), optax.linear_schedule(peak, final * peak, decay_steps)]
        joints.append(max(last - decay_steps, warmup))
    return optax.join_schedules(parts, joints)


def build_optimizer(config: OptimizerConfig, seed: int) -> optax.GradientTransformation:
    """Gradient -> direction to subtract, before the learning rate: `params -= learning_rate * direction`.

    Weight decay is decoupled (arXiv:1711.05101) and acts on matrices only. Adafactor (arXiv:1804.04235) is used with
    an absolute learning rate, like the others, rather than one relative to each parameter's scale.

    Args:
      seed: of the draws by which moments in bfloat16 are rounded; others have none.
    """
    b1 = 0.9 if config.b1 is None else config.b1
    if config.name == "adamw":
        b2 = 0.95 if config.b2 is None else config.b2
        direction = optax.scale_by_adam(b1, b2, 1e-8 if config.eps is None else config.eps)
    elif config.name == "lion":
        direction = optax.scale_by_lion(b1, 0.99 if config.b2 is None else config.b2)
    elif config.name == "sgd":
        direction = optax.trace(decay=b1)
    else:
        direction = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
    direction = keep_moments(direction, config.moment_dtype, seed)
    return optax.chain(direction, optax.add_decayed_weights(config.weight_decay, mask=_decays))


def _decays(params: dict[str, Any]) -> dict[str, bool]:
    return {path: path.endswith((".kernel", ".embedding", ".lora_a", ".lora_b")) for path in params}
