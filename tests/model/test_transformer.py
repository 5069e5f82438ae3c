"""The decoder's invariants, on a tiny float64 model whose matrices are large enough to make every path matter."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sft_jax.config_schema import MeshConfig
from sft_jax.datatypes import ConfigError
from sft_jax.model import transformer
from sft_jax.model.attention import Rows, Scores, attend
from sft_jax.model.families import LayerConfig, TransformerConfig, group_layers, num_params, same_layers
from sft_jax.model.latent_config import LatentConfig
from sft_jax.model.moe_config import MoeConfig
from sft_jax.model.param_dims import logical_dims
from sft_jax.model.presets import PRESETS
from sft_jax.model.rope import LinearScaling, Llama3Scaling, RopeConfig, rope_for, rotate
from sft_jax.model.router import TokenWeights, dtype_among
from sft_jax.model.transformer import (
    EmbeddingNoise,
    abstract_params,
    decode,
    empty_cache,
    init_params,
    output_head,
)
from sft_jax.sharding import build_mesh, shardings_for

SCALING = Llama3Scaling(factor=2.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=16)
ROPE = RopeConfig(theta=100.0, scaling=SCALING)
CONFIG = TransformerConfig(
    vocab_size=32, layers=same_layers(3, LayerConfig(rope=ROPE)), embed_dim=16, mlp_dim=24, num_heads=4, num_kv_heads=2,
    head_dim=4, norm_eps=1e-5, tie_embeddings=True, max_position=64, initializer_range=0.3,
)  # fmt: skip
UNTIED = dataclasses.replace(CONFIG, tie_embeddings=False)
LOCAL = LayerConfig(rope=RopeConfig(theta=10.0, fraction=0.5), window=2)
WHOLE = LayerConfig(rope=RopeConfig(theta=100.0, scaling=LinearScaling(factor=2.0)))
RICH = dataclasses.replace(
    CONFIG, layers=group_layers([LOCAL, WHOLE, LOCAL, WHOLE, LOCAL]), norms="sandwich", norm_adds_one=True,
    qk_norm="head", qkv_bias=True, out_bias=True, mlp_bias=True, activation="gelu_tanh", attention_scale=0.7,
    attention_softcap=2.0, attention_sinks=True, embedding_multiplier=4.0, residual_multiplier=0.5,
)  # fmt: skip
EXPERTS = MoeConfig(
    num_experts=4, experts_per_token=2, expert_dim=4, scores="sigmoid", correction_bias=True, num_groups=2,
    groups_per_token=1, shared_dim=6,
)  # fmt: skip
LATENT = dataclasses.replace(
    CONFIG, num_kv_heads=4, head_dim=6,
    latent=LatentConfig(query_rank=6, kv_rank=8, plain_dim=2, rope_dim=4, value_dim=3),
    layers=group_layers([LayerConfig(rope=ROPE)] + 2 * [LayerConfig(rope=ROPE, moe=EXPERTS)]),
)  # fmt: skip
PLAIN = {"compute_dtype": jnp.float64, "remat": "none", "attention": "reference"}


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def params():
    with jax.enable_x64(True):
        return jax.jit(partial(init_params, CONFIG, dtype=jnp.float64))(jax.random.key(0))


@pytest.fixture(scope="module", params=[CONFIG, RICH, LATENT], ids=["plain", "rich", "latent"])
def model(request, params):
    """A config and its parameters, random and none of them zero."""
    if request.param is CONFIG:
        return CONFIG, params
    with jax.enable_x64(True):
        made = jax.jit(partial(init_params, request.param, dtype=jnp.float64))(jax.random.key(0))
        keys = jax.random.split(jax.random.key(1), len(made))
        noise = {path: jax.random.normal(key, made[path].shape) for path, key in zip(sorted(made), keys, strict=True)}
        return request.param, {path: values + 0.1 * noise[path] for path, values in made.items()}


@partial(jax.jit, static_argnames=("config", "compute_dtype", "remat", "attention", "mesh"))
def forward(params, inputs, positions, segment_ids, *, config=CONFIG, noise=None, **options):
    return transformer.forward(params, config, inputs, positions, segment_ids, noise=noise, **(PLAIN | options))


# One row of two examples, 4 and 3 tokens, and one of padding.
PACKED = (
    jnp.array([[5, 9, 3, 7, 5, 2, 8, 0]]),
    jnp.array([[0, 1, 2, 3, 0, 1, 2, 0]]),
    jnp.array([[1, 1, 1, 1, 2, 2, 2, 0]]),
)


def test_a_hidden_state_depends_on_its_own_segment_up_to_itself(params):
    inputs, positions, segment_ids = PACKED

    def hidden_of(embeddings):  # one table row per position, so that the gradient tells positions apart
        table = dict(params, **{"embed.embedding": embeddings})
        return forward(table, jnp.arange(8)[None], positions, segment_ids)[0]

    jacobian = jax.jit(jax.jacrev(hidden_of))(params["embed.embedding"][inputs[0]])  # [L, D, L, D]
    depends = np.abs(jacobian).max(axis=(1, 3)) > 0
    expected = np.zeros((8, 8), bool)
    expected[:4, :4] = np.tri(4, dtype=bool)
    expected[4:7, 4:7] = np.tri(3, dtype=bool)
    assert np.array_equal(depends[:7], expected[:7])
    assert np.isfinite(jacobian).all()
    assert not depends[7, :7].any()


def test_changing_a_token_changes_nothing_in_another_segment(params):
    inputs, positions, segment_ids = PACKED
    before = forward(params, inputs, positions, segment_ids)
    after = forward(params, inputs.at[0, 2].set(30), positions, segment_ids)
    assert np.array_equal(before[:, 4:], after[:, 4:])
    assert np.array_equal(before[:, :2], after[:, :2])
    assert np.abs(before - after)[0, 2:4].max(axis=-1).min() > 1e-3


def test_packed_equals_separate(params):
    weights = jax.random.normal(jax.random.key(1), (1, 8, CONFIG.embed_dim), jnp.float64)

    def packed(params):
        return jnp.sum((forward(params, *PACKED) * weights)[:, :7])

    def separate(params):  # each example in a row of its own, padded
        first = [field.at[:, 4:].set(0) for field in PACKED]
        second = [jnp.roll(field, -4, axis=1).at[:, 3:].set(0) for field in PACKED]
        rows = [jnp.concatenate(pair) for pair in zip(first, second, strict=True)]
        hidden = forward(params, *rows)
        return jnp.sum(hidden[:1, :4] * weights[:, :4]) + jnp.sum(hidden[1:, :3] * weights[:, 4:7])

    (value, grads), (other_value, other_grads) = (value_and_grad(loss, params) for loss in (packed, separate))
    assert value == pytest.approx(other_value, rel=1e-9)
    assert_equal(grads, other_grads)


def value_and_grad(loss, params):
    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    return float(value), jax.device_get(grads)


def assert_equal(tree, other, tolerance=1e-9):
    """Relative difference, max over leaves of ||a - b|| / ||b||, which is none where both are 0."""
    assert tree.keys() == other.keys()
    assert all(np.linalg.norm(tree[p] - other[p]) <= tolerance * np.linalg.norm(other[p]) for p in tree)


def test_padding_is_finite_and_takes_no_gradient(params):
    inputs, positions, segment_ids = PACKED
    blank = jnp.zeros_like(segment_ids)

    def loss(params):
        hidden = forward(params, inputs, positions, blank)
        return jnp.sum(hidden * 0)  # as the loss does with weights of 0

    value, grads = value_and_grad(loss, params)
    assert value == 0
    assert all(np.array_equal(grad, np.zeros(grad.shape)) for grad in grads.values())


def test_scan_equals_a_loop_over_layers(params):
    inputs, positions, segment_ids = PACKED
    model = transformer._merge(params, CONFIG)
    rope = rope_for(positions, None, ROPE, CONFIG.head_dim, jnp.float64)
    rows = Rows(positions, segment_ids)

    @jax.jit
    def run_layer(layer, x):
        def attend_rows(q, k, v, sinks=None):
            return attend("reference", rotate(q, rope), rotate(k, rope), v, rows, Scores(0.5)), None

        return layer(x, attend_rows, TokenWeights(segment_ids, None), None)[0]

    x = model.embed(inputs, jnp.float64, None)
    for i in range(CONFIG.num_layers):
        x = run_layer(jax.tree.map(lambda leaf, i=i: leaf[i], model.layers[0][0]), x)
    np.testing.assert_allclose(forward(params, *PACKED), model.final_norm(x), rtol=1e-12)


def test_remat_changes_no_number(params):
    def loss(params, remat):
        return jnp.sum(jnp.sin(forward(params, *PACKED, remat=remat)))

    expected, expected_grads = value_and_grad(partial(loss, remat="none"), params)
    for remat in ("dots", "attention", "full", "offload", "offload_attention"):
        value, grads = value_and_grad(partial(loss, remat=remat), params)
        assert value == pytest.approx(expected, rel=1e-12)
        assert_equal(grads, expected_grads, tolerance=1e-12)


def test_remat_keeps_less_and_less_for_the_backward_pass(params):
    def kept(remat):
        run = partial(transformer.forward, config=CONFIG, **dict(PLAIN, remat=remat))
        names = dict(zip(("inputs", "positions", "segment_ids"), PACKED, strict=True))
        pullback = jax.eval_shape(lambda params: jax.vjp(lambda params: run(params, **names), params)[1], params)
        of_tokens = lambda shape: shape[:1] == (CONFIG.num_layers,) and 8 in (*shape[1:2], *shape[2:3])  # noqa: E731
        kernels = [value.shape for value in params.values()]
        leaves = [leaf for leaf in jax.tree.leaves(pullback) if leaf.shape not in kernels]
        return sum(leaf.size for leaf in leaves if of_tokens(leaf.shape))

    layer_inputs = CONFIG.num_layers * 8 * CONFIG.embed_dim
    assert layer_inputs == kept("full") < kept("attention") < kept("dots") < kept("none")


@pytest.mark.parametrize("option", [{"remat": "half"}, {"attention": "flush"}])
def test_unknown_names_are_refused(params, option):
    with pytest.raises(ConfigError, match=next(iter(option.values()))):
        forward(params, *PACKED, **option)


def test_an_id_outside_the_vocabulary_is_never_another_token(params):
    inputs, positions, segment_ids = PACKED
    assert np.isnan(forward(params, inputs.at[0, 5].set(CONFIG.vocab_size), positions, segment_ids)[0, 5]).all()


@pytest.mark.parametrize("split", [(3, 1), (1, 1, 1, 1, 1)])
def test_cached_decoding_equals_the_whole_row(model, split):
    """Two rows of 6 and 4 tokens: the prompt in one go, then in chunks; slots of padding are written over."""
    config, params = model
    inputs = jax.random.randint(jax.random.key(3), (2, 6), 0, config.vocab_size)
    positions = jnp.broadcast_to(jnp.arange(6), (2, 6))
    segment_ids = jnp.array([[1] * 6, [1] * 4 + [0] * 2])
    expected = forward(params, inputs, positions, segment_ids, config=config)

    options = {"compute_dtype": jnp.float64, "attention": "reference"}
    step = jax.jit(lambda *arrays: decode(params, config, *arrays, **options))
    prompt = 6 - sum(split)
    lengths = jnp.array([prompt, 1])  # the second row's prompt is shorter, and padded
    at = jnp.broadcast_to(jnp.arange(prompt), (2, prompt))
    hidden, cache = step(inputs[:, :prompt], at, lengths, empty_cache(config, 2, 8, jnp.float64))
    np.testing.assert_allclose(hidden[0], expected[0, :prompt], rtol=1e-9)
    np.testing.assert_allclose(hidden[1, 0], expected[1, 0], rtol=1e-9)
    for count in split:
        at = lengths[:, None] + jnp.arange(count)[None]
        real = at < jnp.array([[6], [4]])
        ids = jnp.take_along_axis(inputs, jnp.minimum(at, 5), axis=1)
        hidden, cache = step(ids, at, lengths + real.sum(axis=1), cache)
        for row, column in np.argwhere(real):
            np.testing.assert_allclose(hidden[row, column], expected[row, at[row, column]], rtol=1e-9)
        lengths = lengths + real.sum(axis=1)
    assert int(lengths[0]) == 6


def test_noise_is_bounded_by_the_length_of_each_segment(params):
    rows = Rows(*PACKED[1:])
    keys = jax.random.split(jax.random.key(0), 1)
    noise = np.abs(transformer._draw_noise(EmbeddingNoise(keys, 5.0), rows, CONFIG.embed_dim))[0]
    for tokens, length in ((slice(0, 4), 4), (slice(4, 7), 3)):
        bound = 5 / np.sqrt(length * CONFIG.embed_dim)
        assert 0.9 * bound < noise[tokens].max() <= bound
    assert not noise[7].any()
    assert np.abs(forward(params, *PACKED, noise=EmbeddingNoise(keys, 5.0)) - forward(params, *PACKED)).max() > 1e-3


def test_noise_belongs_to_the_row_and_not_to_the_batch(params):
    inputs, positions, segment_ids = (jnp.tile(field, (4, 1)) for field in PACKED)
    keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(7)))(jnp.arange(4))
    whole = forward(params, inputs, positions, segment_ids, noise=EmbeddingNoise(keys, 5.0))
    half = forward(params, inputs[2:], positions[2:], segment_ids[2:], noise=EmbeddingNoise(keys[2:], 5.0))
    np.testing.assert_allclose(whole[2:], half, rtol=1e-9)
    assert np.abs(whole[0] - whole[1]).max() > 1e-3


_OF_EACH_FAMILY = {config.family: config for config in PRESETS.values()}.values()


@pytest.mark.parametrize("config", [CONFIG, UNTIED, RICH, LATENT, *_OF_EACH_FAMILY])
def test_every_parameter_is_counted_and_has_one_rule(config):
    shapes = abstract_params(config, jnp.bfloat16)
    assert sum(leaf.size for leaf in shapes.values()) == num_params(config)
    for path, leaf in shapes.items():
        assert len(logical_dims(path)) == leaf.ndim
        assert leaf.dtype == dtype_among(path, jnp.bfloat16)
    assert ("head.kernel" in shapes) == (not config.tie_embeddings)


def test_a_path_without_a_rule_is_refused():
    with pytest.raises(AssertionError, match="matches 0"):
        logical_dims("layers.0.0.attention.query.scale")


def test_initialisation_on_a_mesh_equals_one_device():
    mesh = build_mesh(MeshConfig(replica=2, fsdp=2, tensor=2))
    shapes = {path: leaf.shape for path, leaf in abstract_params(UNTIED, jnp.float32).items()}
    shardings = shardings_for(mesh, {path: logical_dims(path) for path in shapes}, shapes)
    init = partial(init_params, UNTIED, dtype=jnp.float32)
    alone = jax.jit(init)(jax.random.key(5))
    spread = jax.jit(init, out_shardings=shardings)(jax.random.key(5))
    assert all(np.array_equal(alone[path], spread[path]) for path in shapes)
    assert len(spread["layers.0.0.mlp.up.kernel"].addressable_shards) == 8
    assert np.std(alone["layers.0.0.mlp.up.kernel"]) == pytest.approx(UNTIED.initializer_range, rel=0.1)
    assert not np.array_equal(alone["layers.0.0.mlp.up.kernel"][0], alone["layers.0.0.mlp.up.kernel"][1])


def test_a_mesh_changes_no_number(model):
    config, params = model
    mesh = build_mesh(MeshConfig(replica=2, fsdp=2, tensor=2))
    shapes = {path: leaf.shape for path, leaf in params.items()}
    spread = jax.device_put(params, shardings_for(mesh, {path: logical_dims(path) for path in shapes}, shapes))
    rows = tuple(jnp.tile(field, (4, 1)) for field in PACKED)

    def loss(params, mesh):
        return jnp.sum(jnp.sin(forward(params, *rows, config=config, mesh=mesh, remat="full")))

    value, grads = value_and_grad(partial(loss, mesh=mesh), spread)
    expected, expected_grads = value_and_grad(partial(loss, mesh=None), params)
    assert value == pytest.approx(expected, rel=1e-9)
    assert_equal(grads, expected_grads)


def test_the_head_is_the_embedding_only_where_tied(params):
    assert output_head(params) is params["embed.embedding"]
    head = jnp.ones((32, 16))
    assert output_head(params | {"head.kernel": head}) is head
    assert abstract_params(UNTIED, jnp.float32)["head.kernel"].shape == (32, 16)
