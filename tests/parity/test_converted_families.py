"""Weights of every family go through an Orbax item and come out bit for bit; from shards, in bfloat16 but for
what a family keeps in float32."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from random_configs import DRAWN_FAMILIES, draw_config

from sft_jax.checkpoint.hf import open_sources, read_config
from sft_jax.checkpoint.hf_export import export_pretrained
from sft_jax.checkpoint.hf_names import hf_tensors
from sft_jax.cli.convert import main as convert
from sft_jax.data.tokenizer import Tokenizer, load_tokenizer
from sft_jax.model.router import dtype_among
from sft_jax.testbed.make import BASE_MODEL


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(BASE_MODEL)


def write_shards(folder: Path, fields: dict) -> dict[str, np.ndarray]:
    """A folder of three shards, by the safetensors library. Returns its tensors."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(fields))
    config, _ = read_config(folder)
    rng = np.random.default_rng(0)
    tensors = {
        name: rng.normal(size=parts[0].hf_shape(config)).astype(dtype_among(parts[0].path, "bfloat16"))
        for name, parts, _ in hf_tensors(config)
    }
    weight_map = {}
    for number in range(3):
        file = f"model-{number + 1:05}-of-00003.safetensors"
        names = list(tensors)[number::3]
        safetensors.numpy.save_file({name: tensors[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tensors


@pytest.mark.parametrize("family", DRAWN_FAMILIES)
def test_what_goes_in_comes_out(tmp_path: Path, tokenizer, family: str) -> None:
    tensors = write_shards(tmp_path / "model", draw_config(family, seed=0))
    config, _ = read_config(tmp_path / "model")
    convert([f"--from={tmp_path}/model", f"--to={tmp_path}/converted"])
    params, out = open_sources(tmp_path / "converted", config), tmp_path / "out"
    export_pretrained(out, params, config, tokenizer, "", (2,), "bfloat16", max_shard_bytes=5000)
    assert read_config(out)[0] == config
    files = list(out.glob("*.safetensors"))
    assert len(files) > 1
    exported = {key: values for file in files for key, values in safetensors.numpy.load_file(file).items()}
    assert exported.keys() == tensors.keys()
    for key, values in tensors.items():
        assert (exported[key].dtype, exported[key].shape) == (values.dtype, values.shape)
        assert exported[key].tobytes() == values.tobytes(), key
