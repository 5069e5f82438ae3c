import pytest

from sft_jax.datatypes import ConfigError
from sft_jax.model.families import num_active_params, num_params
from sft_jax.model.presets import PRESETS, preset_config


@pytest.mark.parametrize(
    ("preset", "expected"),
    [("llama3.1-70b", 70_553_706_496), ("llama3.1-8b", 8_030_261_248), ("llama3.2-1b", 1_235_814_400),
     ("llama2-7b", 6_738_415_616), ("testbed", 869_504), ("w1", 15_191_712), ("mixtral-8x7b", 46_702_792_704),
     ("qwen3-30b-a3b", 30_532_122_624), ("gpt-oss-20b", 20_914_757_184), ("gpt-oss-120b", 116_829_156_672),
     ("deepseek-v3", 671_026_419_200)],
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


@pytest.mark.parametrize(
    ("preset", "billions"),
    # Model cards and papers: arXiv:2401.04088, Qwen/Qwen3-30B-A3B, arXiv:2508.10925 (table 1), arXiv:2412.19437.
    [
        ("mixtral-8x7b", 12.9),
        ("qwen3-30b-a3b", 3.3),
        ("gpt-oss-20b", 3.61),
        ("gpt-oss-120b", 5.13),
        ("deepseek-v3", 37),
    ],
)
def test_a_token_meets_the_published_number_of_parameters(preset, billions):
    config = PRESETS[preset]
    read = config.vocab_size * config.embed_dim if preset.startswith("gpt-oss") else 0  # counted without the embedding
    assert num_active_params(config) - read == pytest.approx(billions * 1e9, rel=0.02)
