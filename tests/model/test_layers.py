import jax
import jax.numpy as jnp
import numpy as np

from sft_jax.model.layers import RMSNorm
from sft_jax.model.linear import Linear


def test_norm_keeps_its_statistics_in_float32():
    x = 100 * jax.random.normal(jax.random.key(0), (1, 2, 4096))
    norm = RMSNorm(4096, 1e-5, jnp.float32)
    out = norm(x.astype(jnp.bfloat16))
    assert out.dtype == jnp.bfloat16
    expected = x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(out.astype(jnp.float32), expected, rtol=0.01, atol=0.01)


def test_linear_contracts_its_in_dims():
    linear = Linear((2, 3), (4,), 1.0, jax.random.key(0), jnp.float32)
    x = jax.random.normal(jax.random.key(1), (1, 5, 2, 3))
    np.testing.assert_allclose(linear(x, None), np.einsum("blnh,nhd->bld", x, linear.kernel[...]), rtol=1e-5)
