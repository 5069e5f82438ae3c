import math

import pytest

from sft_jax.datatypes import ConfigError
from sft_jax.model.families import list_layers
from sft_jax.model.family_table import FAMILIES
from sft_jax.model.hf_config import read_hf_config, to_hf_config
from sft_jax.model.presets import PRESETS
from sft_jax.model.rope import Llama3Scaling, RopeConfig


def hf_fields(**changes):
    fields = to_hf_config(PRESETS["llama3.1-8b"], "bfloat16") | changes
    return {name: value for name, value in fields.items() if value != "absent"}


@pytest.mark.parametrize("preset", PRESETS)
def test_writing_then_reading_a_config_is_the_identity(preset):
    assert read_hf_config(to_hf_config(PRESETS[preset], "float32"), "config.json") == PRESETS[preset]


def test_both_spellings_of_rope_read_the_same():
    scaling = {"factor": 8, "low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}
    new = {"rope_type": "llama3", "rope_theta": 500_000, **scaling}
    spellings = [
        hf_fields(),
        hf_fields(rope_scaling={"type": "llama3", **scaling}),
        hf_fields(rope_theta="absent", rope_scaling=None, rope_parameters=new),
    ]
    assert {read_hf_config(fields, "config.json") for fields in spellings} == {PRESETS["llama3.1-8b"]}


def test_absent_keys_have_llamas_defaults():
    required = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = read_hf_config({"model_type": "llama", "num_attention_heads": 4, **required}, "config.json")
    assert (config.num_layers, config.num_kv_heads, config.head_dim) == (2, 4, 8)
    assert list_layers(config)[0].rope == RopeConfig(theta=10_000.0)
    assert (config.norm_eps, config.tie_embeddings, config.max_position) == (1e-6, False, 2048)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "mamba"}, "'mamba'"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"attention_bias": 1}, "attention_bias is 1; expected bool"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1; only 0 is supported. Set it to 0 in the file"),
        ({"sliding_window": 4096}, "only None is supported. If it was trained so, name another model; if not, remove"),
        ({"quantization_config": {"bits": 4}}, "only None is supported. Load the model dequantized"),
        ({"logit_scale": 0.5}, "logit_scale"),
        ({"hidden_size": "4096"}, "hidden_size is '4096'; expected int"),
        ({"hidden_size": True}, "hidden_size is True; expected int"),
        ({"hidden_size": "absent"}, "has no hidden_size"),
        ({"num_key_value_heads": 5}, "num_kv_heads 5"),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"num_attention_heads": 0}, "num_heads is 0"),
        ({"rope_scaling": {"rope_type": "ntk", "factor": 4.0}}, "'ntk'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        ({"rope_scaling": {"rope_type": "default", "factor": 8.0}}, "factor = 8.0"),
        ({"rope_scaling": None, "rope_parameters": {"rope_theta": 1e4}}, "rope_theta is 10000.0"),
        ({"rope_parameters": {"rope_theta": 5e5}}, "both"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_theta": 1}, "rope_theta is 1.0"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "factor is 0.0"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": -2.0}}, "factor is -2.0"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "beta_slow": 0}}, "beta_slow is 0.0"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "attention_factor": 0}}, "attention_factor is 0.0"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}},
            "low_freq_factor is 4.0",
        ),
        ({"num_hidden_layers": 10_000_000}, "num_hidden_layers is 10000000; expected at most 1000"),
        ({"hidden_size": 10**400}, "hidden_size has more digits"),
        ({"tie_word_embeddings": None}, "tie_word_embeddings is null"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": None}}, "truncate is null"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "has no factor"),
        ({"num_attention_heads": 24, "num_key_value_heads": 24, "head_dim": 128}, "a multiple of 24 heads"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps has more digits"),
    ],
)
def test_what_would_be_ignored_is_refused_by_name(changes, named):
    with pytest.raises(ConfigError, match=r"^my/config.json: ") as caught:
        read_hf_config(hf_fields(**changes), "my/config.json")
    assert named in str(caught.value)


def fp8(**changes):
    described = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    return {"quantization_config": described | changes}


def mixture_fields(preset, **changes):
    return to_hf_config(PRESETS[preset], "bfloat16") | changes


def test_deepseek_says_how_it_routes():
    """Where it does not, vLLM takes another kind of routing."""
    routing = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1}
    assert routing.items() <= mixture_fields("deepseek-v3").items()


@pytest.mark.parametrize(
    ("preset", "changes", "named"),
    [
        ("mixtral-8x7b", {"router_jitter_noise": 0.1}, "router_jitter_noise is 0.1; only 0 is supported. Set it to 0"),
        ("mixtral-8x7b", {"num_experts": 4}, "num_local_experts and num_experts are 8 and 4"),
        ("mixtral-8x7b", {"num_experts_per_tok": 9}, "8 to choose from"),
        ("qwen3-30b-a3b", {"decoder_sparse_step": 0}, "decoder_sparse_step is 0"),
        ("qwen3-30b-a3b", {"norm_topk_prob": None}, "norm_topk_prob is null"),
        ("qwen3-30b-a3b", {"mlp_only_layers": ["1"]}, "mlp_only_layers[0] is '1'"),
        ("gpt-oss-20b", {"experts_per_token": 3}, "experts_per_token is 3, and num_experts_per_tok 4"),
        ("deepseek-v3", {"topk_group": None}, "topk_group is null"),
        ("gpt-oss-20b", {"swiglu_alpha": 1.0}, "swiglu_alpha is 1.0"),
        ("gpt-oss-20b", {"quantization_config": {"quant_method": "bitsandbytes"}}, "quantization_config is"),
        ("deepseek-v3", {"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ("deepseek-v3", fp8(weight_block_size=[64, 64]), "[64, 64]"),
        ("deepseek-v3", fp8(activation_scheme="static"), "activation_scheme is 'static'; expected one of dynamic"),
        ("deepseek-v3", fp8(scale_fmt="int8"), "scale_fmt is 'int8'; expected one of float, ue8m0"),
        ("deepseek-v3", fp8(fmt="e5m2"), "fmt is 'e5m2'; only 'e4m3' is supported. Load the model dequantized"),
        ("qwen3-30b-a3b", fp8(weight_block_size=None), "has no weight_block_size"),
        ("qwen3-30b-a3b", fp8(modules_to_convert=["model.embed_tokens"]), "modules_to_convert = ["),
        ("qwen3-30b-a3b", fp8(modules_to_not_convert=[1]), "modules_to_not_convert[0] is 1"),
        ("gpt-oss-20b", {"quantization_config": {"quant_method": "mxfp4", "bits": 4}}, "bits = 4: not a known part"),
        ("deepseek-v3", {"n_shared_experts": -1}, "n_shared_experts is -1; expected at least 0"),
        ("deepseek-v3", {"head_dim": 100}, "head_dim is 100; latent attention with these ranks has 64"),
        ("deepseek-v3", {"num_key_value_heads": 8}, "8 key heads for 128 query heads"),
    ],
)
def test_what_a_mixture_would_ignore_is_refused_by_name(preset, changes, named):
    with pytest.raises(ConfigError, match=r"^my/config.json: ") as caught:
        read_hf_config(mixture_fields(preset, **changes), "my/config.json")
    assert named in str(caught.value)


def test_null_is_false_where_transformers_asks_whether_it_is_true():
    for key in ("norm_topk_prob", "rope_interleave"):
        configs = [
            read_hf_config(mixture_fields("deepseek-v3", **{key: value}), "config.json") for value in (None, False)
        ]
        assert configs[0] == configs[1] != PRESETS["deepseek-v3"]


def test_published_folders_of_codes_are_read():
    deepseek = fp8(activation_scheme="dynamic", scale_fmt="ue8m0", modules_to_not_convert=None)
    mxfp4 = {"modules_to_not_convert": ["lm_head"], "quant_method": "mxfp4"}
    published = {"num_nextn_predict_layers": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "ep_size": 1}
    for preset, changes in (
        ("deepseek-v3", deepseek | {"moe_layer_freq": 1, **published}),
        ("gpt-oss-120b", {"quantization_config": mxfp4, "experts_per_token": 4, "initial_context_length": 4096}),
    ):
        assert read_hf_config(mixture_fields(preset, **changes), "config.json") == PRESETS[preset]


def test_dense_layers_stand_where_the_config_has_them():
    steps = read_hf_config(mixture_fields("qwen3-30b-a3b", decoder_sparse_step=3, mlp_only_layers=[5]), "config.json")
    assert [number for number, layer in enumerate(list_layers(steps)) if layer.moe] == [2, *range(8, 48, 3)]
    assert [bool(layer.moe) for layer in list_layers(PRESETS["deepseek-v3"])] == [False] * 3 + [True] * 58


@pytest.mark.parametrize(
    ("preset", "all_plain"),
    [("deepseek-v3", {"first_k_dense_replace": 61}), ("qwen3-30b-a3b", {"mlp_only_layers": list(range(48))})],
)
def test_layers_may_all_be_plain(preset, all_plain):
    config = read_hf_config(mixture_fields(preset, **all_plain), "config.json")
    assert not any(layer.moe for layer in list_layers(config))
    assert read_hf_config(to_hf_config(config, "float32"), "config.json") == config


def test_scaling_is_read():
    (layer, *_) = list_layers(read_hf_config(hf_fields(), "config.json"))
    assert layer.rope.scaling == Llama3Scaling(
        factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192
    )


SMALL = {
    "vocab_size": 31, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip


def longrope(short):
    return {"rope_scaling": {"type": "longrope", "short_factor": short, "long_factor": [1.0] * 4}}


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("gemma3", {}, "its type is gemma3_text"),
        ("mistral3", {}, "its type is mistral"),
        ("llama", {"sliding_window": 8}, "sliding_window is 8; only None"),
        ("mistral", {"sliding_window": 0}, "window is 0"),
        ("qwen2", {"use_mrope": True}, "use_mrope is True"),
        ("qwen2", {"attention_bias": True}, "attention_bias is True"),
        ("qwen3", {"layer_types": ["full_attention"] * 3}, "expected 4 of"),
        ("qwen3", {"layer_types": ["linear_attention"] * 4}, "linear_attention"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 4, "sliding_window": None}, "Say how long"),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ("gemma2", {"hidden_activation": "relu"}, "hidden_activation is 'relu'"),
        ("llama", {"hidden_activation": "gelu_pytorch_tanh"}, "hidden_activation is 'gelu_pytorch_tanh'"),
        ("gemma2", {"hidden_act": "silu"}, "hidden_act is 'silu'"),
        ("gemma3_text", {"hidden_act": "silu"}, "hidden_act is 'silu'"),
        ("gpt_oss", {"hidden_act": "gelu_pytorch_tanh"}, "hidden_act is 'gelu_pytorch_tanh'"),
        ("gemma2", {"sliding_window_pattern": 3}, "sliding_window_pattern is 3"),
        ("gemma3_text", {"_sliding_window_pattern": 3}, "_sliding_window_pattern is 3"),
        ("gemma3_text", {"sliding_window_pattern": 0}, "sliding_window_pattern is 0"),
        ("gemma2", {"attn_logit_softcapping": -1.0}, "attention_softcap is -1.0"),
        ("gemma2", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0.0; expected more than 0"),
        ("gemma3_text", {"query_pre_attn_scalar": -256}, "query_pre_attn_scalar is -256.0; expected more than 0"),
        ("gemma", {"hidden_size": -16}, "hidden_size is -16"),
        ("granite", {"residual_multiplier": math.nan}, "residual_multiplier is nan"),
        ("phi3", {"partial_rotary_factor": 1e308}, "partial_rotary_factor is 1e+308"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
        ("gemma3_text", {"rope_parameters": {"rope_type": "default"}}, "expected full_attention and sliding_attention"),
        ("gemma3_text", {"rope_parameters": {"full_attention": "x"}}, "full_attention is 'x'; expected dict"),
        ("gemma3_text", {"rope_local_base_freq": 0.5}, "rope_local_base_freq is 0.5"),
        ("gemma3_text", {"rope_local_base_freq": None}, "rope_local_base_freq is null"),
        (
            "gemma3_text",
            {"rope_local_base_freq": 50.0, "rope_parameters": {"sliding_attention": {"rope_theta": 60.0}}},
            "rope_theta is 60.0, and beside it rope_local_base_freq 50.0",
        ),
        (
            "gemma3_text",
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            "sliding_attention: has a scaling",
        ),
        ("gemma3_text", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "has type 'linear', which transformers 4"),
        ("olmo3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "as rope_type, and remove type"),
        ("gemma3_text", {"rope_scaling": {"type": "linear", "rope_type": "yarn"}}, "in 5 its rope_type is 'yarn'"),
        ("gemma2", {"layer_types": [{}, "full_attention"] * 2}, "layer_types[0] is {}"),
        ("phi3", longrope([math.inf, 1.0, 1.0, 1.0]), "short_factor[0] is inf"),
        ("phi3", longrope([math.nan, 1.0, 1.0, 1.0]), "short_factor[0] is nan"),
        ("phi3", longrope([1.0, 0.0, 1.0, 1.0]), "short_factor is [1.0, 0.0"),
        ("phi3", longrope([1.0, 10**400, 1.0, 1.0]), "short_factor[1] has more digits"),
        ("phi3", longrope([1.0, None, 1.0, 1.0]), "has no short_factor[1]"),
        ("phi3", longrope([1.0, True, 1.0, 1.0]), "short_factor[1] is True"),
        ("phi3", {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "'yarn'"),
        ("phi3", {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}}, "1 short and 1"),
        ("phi3", {"auto_map": {"AutoModelForCausalLM": "elsewhere.Phi3ForCausalLM"}}, "auto_map"),
        ("olmo2", {"clip_qkv": 8.0}, "clip_qkv = 8.0"),
        ("olmo3", {"rope_theta": 10_000.0}, "only 500000.0 is supported"),
        ("granite", {"attention_multiplier": "0.1"}, "attention_multiplier is '0.1'"),
        ("granite", {"logits_scaling": 0.0}, "logits_divisor is 0.0"),
    ],
)
def test_a_family_refuses_what_it_would_ignore(family, changes, named):
    with pytest.raises(ConfigError, match=r"^config.json: ") as caught:
        read_hf_config({"model_type": family} | SMALL | changes, "config.json")
    assert named in str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_number_makes_another_error(family):
    """What is read is written too."""
    preset = next(config for config in PRESETS.values() if config.family == family)
    fields = to_hf_config(preset, "float32") | SMALL
    fields |= {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}} if family == "llama" else {}
    for name in [name for name, value in fields.items() if type(value) in (int, float)] + [*FAMILIES[family].options]:
        for value in (0, -1, -0.5, 5e-324, 2**62, 1e308, math.inf, math.nan):
            try:
                config = read_hf_config(fields | {name: value}, "config.json")
            except ConfigError:
                continue
            assert to_hf_config(config, "float32")


def test_an_empty_scaling_is_none_in_the_newer_spelling_only():
    def scaling(**fields):
        (layer, *_) = list_layers(read_hf_config({"model_type": "gpt_oss"} | SMALL | fields, "config.json"))
        return layer.rope.scaling

    assert scaling(rope_parameters={}) is None
    assert scaling(rope_scaling={}) == scaling() is not None


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "gpt_oss"])
def test_a_window_is_written_even_where_no_layer_has_it(family):
    all_full = {"model_type": family, "layer_types": ["full_attention"] * 4}
    config = read_hf_config(all_full | SMALL, "config.json")
    fields = to_hf_config(config, "float32")
    assert type(fields["sliding_window"]) is int
    assert read_hf_config(fields, "config.json") == config


def test_layers_with_a_window_are_found():
    def windows(family, **fields):
        config = read_hf_config({"model_type": family, "sliding_window": 8} | SMALL | fields, "config.json")
        return [layer.window for layer in list_layers(config)]

    assert windows("mistral") == [8] * 4
    assert windows("mistral", sliding_window=None) == [None] * 4
    assert windows("qwen2") == [None] * 4
    assert windows("qwen2", use_sliding_window=True, max_window_layers=3) == [None] * 3 + [8]
    assert windows("gemma2") == [8, None] * 2
    assert windows("gemma3_text") == [8] * 4
    assert windows("gemma3_text", sliding_window_pattern=3) == [8, 8, None, 8]
    assert windows("gemma3_text", layer_types=["full_attention"] * 4) == [None] * 4
