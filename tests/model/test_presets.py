import pytest

from sft_jax.datatypes import ConfigError
from sft_jax.model.families import num_params
from sft_jax.model.presets import PRESETS, preset_config


@pytest.mark.parametrize(
    ("preset", "expected"),
    [("llama3.1-70b", 70_553_706_496), ("llama3.1-8b", 8_030_261_248), ("llama3.2-1b", 1_235_814_400),
     ("llama2-7b", 6_738_415_616), ("testbed", 869_504), ("w1", 15_191_712)],
)  # fmt: skip
def test_presets_have_the_published_sizes(preset, expected):
    assert num_params(PRESETS[preset]) == expected


def test_overrides_change_a_preset():
    config = preset_config(
        "llama3.1-8b", {"num_layers": 2, "norm_eps": 1, "attention_softcap": 30, "logit_softcap": None}
    )
    assert (config.num_layers, config.norm_eps, config.attention_softcap, config.logit_softcap) == (2, 1.0, 30.0, None)
    assert preset_config("llama3.1-8b", {"num_layers": 40}).num_layers == 40
    assert preset_config("w1", {}) == PRESETS["w1"]


@pytest.mark.parametrize(
    ("preset", "overrides", "named"),
    [("llama9", {}, "llama3.1-8b"), ("w1", {"layers": 2}, "'layers'"), ("w1", {"num_layers": 2.0}, "num_layers is 2.0"),
     ("w1", {"num_layers": -1}, "num_layers is -1"), ("w1", {"layers": ()}, "'layers'")],
)  # fmt: skip
def test_wrong_overrides_are_refused(preset, overrides, named):
    with pytest.raises(ConfigError, match="model") as caught:
        preset_config(preset, overrides)
    assert named in str(caught.value)
