"""The table is a bijection: every tensor has one parameter, both directions undo each other."""

import math

import numpy as np
import pytest
from llama_folder import TINY, TINY_TIED, llama_tensors

from sft_jax.checkpoint.hf_names import hf_tensors, match_tensors, tensor_rules
from sft_jax.checkpoint.model_files import ModelFile
from sft_jax.checkpoint.safetensors_io import TensorInfo
from sft_jax.datatypes import StorageError
from sft_jax.model.families import with_num_layers
from sft_jax.model.presets import PRESETS
from sft_jax.model.transformer import abstract_params


def index_of(tensors: dict[str, np.ndarray]) -> dict[str, TensorInfo]:
    return {n: TensorInfo(n, v.dtype, v.shape, ModelFile("x.safetensors"), 0, v.nbytes) for n, v in tensors.items()}


@pytest.mark.parametrize("config", [TINY, TINY_TIED], ids=["untied", "tied"])
def test_every_tensor_of_a_folder_has_exactly_one_place(config) -> None:
    tensors = llama_tensors(config)
    matched = match_tensors(config, index_of(tensors), "here")
    names = [tensor.name for sources in matched.values() for tensor in sources]
    assert sorted(names) == sorted(tensors)
    listed = {name: parts[0].hf_shape(config) for name, parts, _ in hf_tensors(config)}
    assert listed == {name: values.shape for name, values in tensors.items()}
    assert {rule.path: rule.shape(config) for rule in tensor_rules(config)} == {
        path: leaf.shape for path, leaf in abstract_params(config, "float32").items()
    }
    for rule in tensor_rules(config):
        num_values = sum(math.prod(tensor.shape) for tensor in matched[rule.path])
        assert math.prod(rule.shape(config)) == num_values


@pytest.mark.parametrize("rule", tensor_rules(TINY), ids=lambda rule: rule.path)
def test_both_directions_undo_each_other(rule) -> None:
    shape = rule.hf_shape(TINY)
    tensor = np.arange(math.prod(shape)).reshape(shape)
    ours = rule.from_hf(tensor, TINY)
    assert ours.shape == rule.shape(TINY)[-ours.ndim :]
    assert np.shares_memory(ours, tensor)  # a view: mapped tensors stay on disk
    again = np.empty_like(tensor)
    rule.from_hf(again, TINY)[...] = ours
    np.testing.assert_array_equal(again, tensor)


def test_heads_are_outermost_in_both_projections() -> None:
    rules = {rule.path: rule for rule in tensor_rules(TINY)}
    tensors = llama_tensors(TINY)
    query = tensors["model.layers.0.self_attn.q_proj.weight"]  # [N*H, D]
    ours = rules["layers.0.0.attention.query.kernel"].from_hf(query, TINY)  # [D, N, H]
    assert ours[3, 5, 2] == query[5 * TINY.head_dim + 2, 3]
    out = tensors["model.layers.0.self_attn.o_proj.weight"]  # [D, N*H]
    ours = rules["layers.0.0.attention.out.kernel"].from_hf(out, TINY)  # [N, H, D]
    assert ours[5, 2, 3] == out[3, 5 * TINY.head_dim + 2]


def test_a_tied_matrix_may_have_either_name_or_both() -> None:
    embedding = llama_tensors(TINY_TIED)
    both = embedding | {"lm_head.weight": embedding["model.embed_tokens.weight"]}
    head = {name: values for name, values in both.items() if name != "model.embed_tokens.weight"}
    for tensors, name in (
        (embedding, "model.embed_tokens.weight"),
        (both, "model.embed_tokens.weight"),
        (head, "lm_head.weight"),
    ):
        matched = match_tensors(TINY_TIED, index_of(tensors), "here")
        assert [tensor.name for tensor in matched["embed.embedding"]] == [name]
        assert "head.kernel" not in matched


def without(name: str) -> dict[str, np.ndarray]:
    return {key: values for key, values in llama_tensors(TINY).items() if key != name}


QUERY_1 = "model.layers.1.self_attn.q_proj.weight"
WRONG = {
    "layer missing": (without(QUERY_1), rf"here: has no tensor {QUERY_1} \(1 of 3"),
    "head missing": (without("lm_head.weight"), r"has no tensor lm_head.weight \(1 of 1"),
    "embedding missing": (without("model.embed_tokens.weight"), "has no tensor model.embed_tokens.weight"),
    "a bias": (llama_tensors(TINY) | {f"{QUERY_1[:-6]}bias": np.zeros(48, np.float32)}, "1 tensors that this model"),
    "a layer more": (llama_tensors(with_num_layers(TINY, 4)), r"9 tensors.*such as model.layers.3"),
    "an adapter": (llama_tensors(TINY) | {"base.lora_A.weight": np.zeros(1)}, "an adapter"),
    "another shape": (
        llama_tensors(TINY) | {QUERY_1: np.zeros((16, 48), np.float32)},
        rf"x.safetensors: tensor {QUERY_1} is \[16, 48\], and config.json asks for \[48, 16\]",
    ),
    "quantized": (llama_tensors(TINY) | {QUERY_1: np.zeros((48, 16), np.int8)}, "has dtype int8; quantized"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused(case: str) -> None:
    tensors, message = WRONG[case]
    with pytest.raises(StorageError, match=message):
        match_tensors(TINY, index_of(tensors), "here")


def test_known_buffers_are_no_weights() -> None:
    buffer = np.zeros(3, np.float32)
    old = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": buffer for i in range(3)}
    tensors = llama_tensors(TINY) | old | {"model.rotary_emb.inv_freq": buffer}
    assert match_tensors(TINY, index_of(tensors), "here") == match_tensors(TINY, index_of(llama_tensors(TINY)), "here")


def index_for(config) -> dict[str, TensorInfo]:
    """That of a folder of any size, which need not exist."""
    bfloat16 = np.dtype("bfloat16")
    shapes = {name: parts[0].hf_shape(config) for name, parts, _ in hf_tensors(config)}
    return {n: TensorInfo(n, bfloat16, shape, ModelFile("x.safetensors"), 0, 0) for n, shape in shapes.items()}


@pytest.mark.parametrize("preset", ["mixtral-8x7b", "qwen3-30b-a3b", "gpt-oss-20b", "deepseek-v3"])
def test_every_tensor_of_a_mixture_has_exactly_one_place(preset) -> None:
    config = with_num_layers(PRESETS[preset], 5)
    index = index_for(config)
    matched = match_tensors(config, index, "here")
    rules = {rule.path: rule for rule in tensor_rules(config)}
    places = [(name, rule.path, place) for name, parts, place in hf_tensors(config) for rule in parts]
    assert len(set(places)) == len(places) == sum(map(len, matched.values()))
    for name, path, place in places:
        number = np.ravel_multi_index(place, rules[path].stack) if place else 0
        assert matched[path][number].name == name
    assert {path: rule.shape(config) for path, rule in rules.items()} == {
        path: leaf.shape for path, leaf in abstract_params(config, "bfloat16").items()
    }


def test_experts_that_take_turns_in_one_tensor() -> None:
    config = with_num_layers(PRESETS["gpt-oss-20b"], 2)
    gate, up = (
        rule for rule in tensor_rules(config) if rule.hf_name.endswith("gate_up_proj_bias") and "0.0" in rule.path
    )
    tensor = np.arange(math.prod(gate.hf_shape(config))).reshape(gate.hf_shape(config))
    for rule, first in ((gate, 0), (up, 1)):
        ours = rule.from_hf(tensor, config)
        assert np.shares_memory(ours, tensor)
        np.testing.assert_array_equal(ours, tensor[:, first::2])


def test_the_layer_that_predicts_one_token_more_is_left_out(caplog) -> None:
    config = with_num_layers(PRESETS["deepseek-v3"], 4)
    index = index_for(config)
    extra = {f"model.layers.4.{name}": index["lm_head.weight"] for name in ("eh_proj.weight", "mlp.gate.weight")}
    assert match_tensors(config, index | extra, "here") == match_tensors(config, index, "here")
    (said,) = caplog.records
    assert (said.levelname, said.getMessage().split(",")[0]) == ("WARNING", "here: leaves out model.layers.4.*")
    for other in (
        {"model.layers.4.mlp.gate.weight": index["lm_head.weight"]},
        {"model.layers.5.eh_proj.weight": index["lm_head.weight"]},
    ):
        with pytest.raises(StorageError, match="would not use"):
            match_tensors(config, index | other, "here")
