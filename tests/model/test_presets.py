import pytest

from sft_jax.datatypes import ConfigError
from sft_jax.model.families import num_active_params, num_params
from sft_jax.model.hf_config import read_hf_config
from sft_jax.model.presets import PRESETS, TABLE, preset_config

# As the repositories' safetensors count them; of models that see images, what is left of theirs without those parts.
NUM_PARAMS = {
    "testbed": 869_504, "w1": 15_191_712, "llama2-7b": 6_738_415_616, "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192, "llama3-8b": 8_030_261_248, "llama3-70b": 70_553_706_496,
    "llama3.1-8b": 8_030_261_248, "llama3.1-70b": 70_553_706_496, "llama3.1-405b": 405_853_388_800,
    "llama3.2-1b": 1_235_814_400, "llama3.2-3b": 3_212_749_824, "llama3.3-70b": 70_553_706_496,
    "mistral-7b-v0.1": 7_241_732_096, "mistral-7b-v0.3": 7_248_023_552, "mistral-nemo-12b": 12_247_782_400,
    "mistral-small-24b": 23_572_403_200, "qwen2.5-0.5b": 494_032_768, "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688, "qwen2.5-7b": 7_615_616_512, "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352, "qwen2.5-72b": 72_706_203_648, "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976, "qwen3-4b": 4_022_468_096, "qwen3-8b": 8_190_735_360, "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264, "gemma-2b": 2_506_172_416, "gemma-7b": 8_537_680_896, "gemma2-2b": 2_614_341_888,
    "gemma2-9b": 9_241_705_984, "gemma2-27b": 27_227_128_320, "gemma3-270m": 268_098_176, "gemma3-1b": 999_885_952,
    "gemma3-4b": 3_880_263_168, "gemma3-12b": 11_766_034_176, "gemma3-27b": 27_009_346_304,
    "phi3-mini-4k": 3_821_079_552, "phi3-medium-4k": 13_960_238_080, "phi4": 14_659_507_200, "phi4-mini": 3_836_021_760,
    "olmo2-1b": 1_484_916_736, "olmo2-7b": 7_298_617_344, "olmo2-13b": 13_716_198_400, "olmo2-32b": 32_234_279_936,
    "olmo3-7b": 7_298_011_136, "olmo3-32b": 32_233_522_176,
    "granite3.1-2b": 2_533_531_648, "granite3.1-8b": 8_170_848_256, "mixtral-8x7b": 46_702_792_704,
    "qwen3-30b-a3b": 30_532_122_624, "gpt-oss-20b": 20_914_757_184, "gpt-oss-120b": 116_829_156_672,
    "deepseek-v3": 671_026_419_200,
}  # fmt: skip


def test_presets_have_the_published_sizes():
    assert {name: num_params(config) for name, config in PRESETS.items()} == NUM_PARAMS


# What the published files say beside what the table has.
ALWAYS = {
    "attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True, "bos_token_id": 1, "eos_token_id": [2, 3],
    "torch_dtype": "bfloat16", "transformers_version": "4.46.0",
}  # fmt: skip
BESIDE = {
    "llama3.1-8b": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "mlp_bias": False, "hidden_act": "silu",
        "pretraining_tp": 1, "tie_word_embeddings": False,
    },
    "mistral-7b-v0.3": {
        "architectures": ["MistralForCausalLM"], "hidden_act": "silu", "tie_word_embeddings": False, "head_dim": None,
    },
    "qwen2.5-7b": {
        "architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu", "max_window_layers": 28, "rms_norm_eps": 1e-6,
        "sliding_window": 131_072, "tie_word_embeddings": False, "use_mrope": False, "use_sliding_window": False,
    },
    "qwen3-8b": {
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "hidden_act": "silu", "max_window_layers": 36,
        "rms_norm_eps": 1e-6, "rope_scaling": None, "sliding_window": None, "tie_word_embeddings": False,
        "use_sliding_window": False,
    },
    "gemma-2b": {
        "architectures": ["GemmaForCausalLM"], "attention_bias": False, "head_dim": 256, "hidden_act": "gelu",
        "max_position_embeddings": 8192, "pad_token_id": 0, "rms_norm_eps": 1e-6, "rope_scaling": None,
        "rope_theta": 10_000.0,
    },
    "gemma2-9b": {
        "architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attn_logit_softcapping": 50.0,
        "cache_implementation": "hybrid", "final_logit_softcapping": 30.0, "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 8192,
        "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6, "rope_theta": 10_000.0,
        "sliding_window": 4096, "sliding_window_size": 4096,
    },
    "gemma3-1b": {
        "architectures": ["Gemma3ForCausalLM"], "attention_bias": False, "attn_logit_softcapping": None,
        "cache_implementation": "hybrid", "final_logit_softcapping": None, "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh", "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6,
        "rope_local_base_freq": 10_000, "rope_scaling": None, "rope_theta": 1_000_000, "sliding_window_pattern": 6,
    },
    "phi3-mini-4k": {
        "_name_or_path": "Phi-3-mini-4k-instruct", "architectures": ["Phi3ForCausalLM"], "attention_bias": False,
        "auto_map": {
            "AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM",
        },
        "embd_pdrop": 0.0, "hidden_act": "silu", "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096, "pad_token_id": 32_000, "resid_pdrop": 0.0, "rms_norm_eps": 1e-5,
        "rope_scaling": None, "rope_theta": 10_000.0, "tie_word_embeddings": False,
    },
    "olmo2-7b": {
        "architectures": ["Olmo2ForCausalLM"], "attention_bias": False, "hidden_act": "silu", "pad_token_id": 100_277,
        "rope_scaling": None, "tie_word_embeddings": False,
    },
    "granite3.1-8b": {
        "architectures": ["GraniteForCausalLM"], "attention_bias": False, "hidden_act": "silu", "mlp_bias": False,
        "pad_token_id": 0, "rope_scaling": None,
    },
}  # fmt: skip


@pytest.mark.parametrize("preset", BESIDE)
def test_published_files_are_read_whole(preset):
    fields = TABLE[preset].fields | ALWAYS | BESIDE[preset]
    assert read_hf_config(fields, "config.json") == PRESETS[preset]


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
     ("w1", {"num_layers": -1}, "num_layers is -1"), ("deepseek-v3", {"attention_sinks": True}, "latent attention has"),
     ("deepseek-v3", {"latent": None}, "'latent'"), ("w1", {"layers": ()}, "'layers'")],
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
