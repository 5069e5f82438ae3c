"""The balance loss beside transformers' own, where both are defined: the tokens of one segment, one layer, softmax."""

import jax.numpy as jnp
import numpy as np
import pytest

from sft_jax.model.moe_config import MoeConfig
from sft_jax.model.router import TokenWeights, choose_experts, sum_router

torch = pytest.importorskip("torch", reason="torch is not installed here; make test-parity installs it")
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func  # noqa: E402

pytestmark = pytest.mark.parity


@pytest.mark.parametrize(("num_experts", "per_token", "skew"), [(8, 2, 0.0), (8, 2, 3.0), (16, 4, 1.0), (5, 1, 1.0)])
def test_the_balance_loss_is_theirs_over_the_experts_of_a_token(num_experts, per_token, skew) -> None:
    rng = np.random.default_rng(num_experts)
    logits = (rng.normal(size=(1, 50, num_experts)) + skew * np.linspace(0, 1, num_experts)).astype(np.float32)
    live = (np.arange(50) < 41).astype(np.int32)[None]
    moe = MoeConfig(num_experts=num_experts, experts_per_token=per_token, expert_dim=1)
    tokens = TokenWeights(jnp.asarray(live), jnp.asarray(live, jnp.float32))
    ours = sum_router(choose_experts(jnp.asarray(logits), None, moe), tokens).balance / live.sum()
    theirs = load_balancing_loss_func((torch.tensor(logits[0]),), num_experts, per_token, torch.tensor(live))
    assert float(ours) == pytest.approx(float(theirs) / per_token, rel=1e-5)
