import dataclasses

import pytest

from sft_jax.datatypes import ConfigError
from sft_jax.model.families import LayerConfig, LayerGroup, group_layers, list_layers, same_layers, with_num_layers
from sft_jax.model.presets import PRESETS
from sft_jax.model.rope import LongRopeScaling, RopeConfig

WHOLE = LayerConfig(rope=RopeConfig(theta=100.0))
LOCAL = LayerConfig(rope=RopeConfig(theta=100.0), window=4)


@pytest.mark.parametrize(
    ("layers", "groups"),
    [
        ([WHOLE] * 5, [([WHOLE], 5)]),
        ([LOCAL, WHOLE] * 3, [([LOCAL, WHOLE], 3)]),
        (([LOCAL] * 5 + [WHOLE]) * 10 + [LOCAL] * 2, [([LOCAL] * 5 + [WHOLE], 10), ([LOCAL], 2)]),
        ([WHOLE] * 3 + [LOCAL] * 58, [([WHOLE], 3), ([LOCAL], 58)]),
        ([WHOLE], [([WHOLE], 1)]),
    ],
    ids=["plain", "alternating", "gemma3-27b", "prefix", "one"],
)
def test_layers_are_grouped_into_few_places(layers, groups):
    found = group_layers(layers)
    assert found == tuple(LayerGroup(tuple(pattern), repeats) for pattern, repeats in groups)
    assert list_layers(dataclasses.replace(PRESETS["w1"], layers=found)) == layers


def test_more_layers_go_on_with_the_pattern():
    config = dataclasses.replace(PRESETS["w1"], layers=group_layers([LOCAL, WHOLE] * 2))
    assert list_layers(with_num_layers(config, 7)) == [LOCAL, WHOLE] * 3 + [LOCAL]
    assert list_layers(with_num_layers(config, 3)) == [LOCAL, WHOLE, LOCAL]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"layers": same_layers(0, WHOLE)}, "num_layers is 0"),
        ({"layers": same_layers(2, LayerConfig(rope=None, window=0))}, "window is 0"),
        ({"layers": same_layers(2, LayerConfig(rope=RopeConfig(theta=1.0, fraction=1.5)))}, "of which 72 dims turn"),
        ({"layers": same_layers(2, LayerConfig(rope=RopeConfig(theta=1.0, scaling=LongRopeScaling(
            short=(1.0,), long=(1.0,) * 24, original_max_position=4, attention_factor=1.0))))}, "1 short and 24 long"),
        ({"norms": "last"}, "norms is 'last'"),
        ({"norm_eps": 0.0}, "norm_eps is 0"),
        ({"num_kv_heads": 5}, "num_kv_heads 5"),
    ],
)  # fmt: skip
def test_what_no_model_can_be_is_refused(changes, named):
    with pytest.raises(ConfigError, match=named):
        dataclasses.replace(PRESETS["w1"], **changes)
