import dataclasses

import pytest

from sft_jax.datatypes import ConfigError
from sft_jax.model.families import (
    LayerConfig,
    LayerGroup,
    group_layers,
    list_layers,
    longest_text,
    same_layers,
    with_num_layers,
)
from sft_jax.model.presets import PRESETS
from sft_jax.model.rope import LinearScaling, LongRopeScaling, RopeConfig, YarnScaling

WHOLE = LayerConfig(rope=RopeConfig(theta=100.0))
LOCAL = LayerConfig(rope=RopeConfig(theta=100.0), window=4)
ONES = (1.0,) * 64


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


@pytest.mark.parametrize(
    ("preset", "tokens"),
    [
        ("llama2-7b", 4096),
        ("llama3.2-1b", 131_072),  # not 32 times 8,192
        ("phi3-medium-4k", 4096),
        ("gemma3-27b", 131_072),
        ("gpt-oss-20b", 131_072),
        ("deepseek-v3", 163_840),
    ],
)
def test_a_scaling_that_max_position_does_not_count_lengthens_the_longest_text(preset, tokens):
    assert longest_text(PRESETS[preset]) == tokens


@pytest.mark.parametrize(
    ("scaling", "tokens"),
    [
        (LinearScaling(factor=2.5), 10_240),
        (YarnScaling(factor=4.0, original_max_position=4096, attention_factor=1.0), 16_384),
        (YarnScaling(factor=2.0, original_max_position=1024, attention_factor=1.0), 4096),
        (LongRopeScaling(short=ONES, long=ONES, original_max_position=2048, attention_factor=1.0), 4096),
    ],
)
def test_the_longest_text_by_each_scaling(scaling, tokens):
    whole = LayerConfig(rope=RopeConfig(theta=10_000.0, scaling=scaling))
    local = LayerConfig(rope=RopeConfig(theta=10_000.0), window=512)  # sees no distance but those within it
    config = dataclasses.replace(PRESETS["llama2-7b"], layers=same_layers(4, whole) + same_layers(4, local))
    assert longest_text(config) == tokens


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
