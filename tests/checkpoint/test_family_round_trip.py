"""Import and then export give every tensor of every family back, bit for bit, from one file or several.

The folders are transformers' own: the small models of tests/parity/goldens.
"""

import json
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from llama_folder import write_tokenizer

from sft_jax.checkpoint.hf import load_pretrained, read_config
from sft_jax.checkpoint.hf_export import export_pretrained
from sft_jax.config_schema import Config, ModelConfig
from sft_jax.data.tokenizer import load_tokenizer
from sft_jax.experiment import export_dtypes
from sft_jax.model.family_table import FAMILIES

GOLDENS = sorted((Path(__file__).parents[1] / "parity" / "goldens").iterdir())
OF_CHOICE = "e_score_correction_bias"  # float32 in transformers' folders


def write_shards(folder: Path, golden: Path, dtype: str, num_shards: int) -> dict[str, np.ndarray]:
    """A golden's folder in another dtype and other files -> its tensors."""
    tensors = safetensors.numpy.load_file(golden / "model.safetensors")
    tensors = {name: values if name.endswith(OF_CHOICE) else values.astype(dtype) for name, values in tensors.items()}
    folder.mkdir()
    (folder / "config.json").write_bytes((golden / "config.json").read_bytes())
    weight_map = {name: f"part-{place % num_shards}.safetensors" for place, name in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        mine = {name: values for name, values in tensors.items() if weight_map[name] == file}
        safetensors.numpy.save_file(mine, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tensors


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    return {
        name: values
        for file in folder.glob("*.safetensors")
        for name, values in safetensors.numpy.load_file(file).items()
    }


@pytest.mark.parametrize(("dtype", "num_shards"), [("float32", 1), ("bfloat16", 3)])
@pytest.mark.parametrize("golden", GOLDENS, ids=lambda folder: folder.name)
def test_import_then_export_is_the_identity(tmp_path: Path, golden: Path, dtype: str, num_shards: int) -> None:
    expected = write_shards(tmp_path / "base", golden, np.dtype(getattr(ml_dtypes, dtype, dtype)), num_shards)
    config, _ = read_config(tmp_path / "base")
    params = load_pretrained(tmp_path / "base", config, None, dtype)
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "tokenizer"))
    limit = {} if num_shards == 1 else {"max_shard_bytes": sum(v.nbytes for v in expected.values()) // num_shards}
    export_pretrained(tmp_path / "export", params, config, tokenizer, "template", (2,), dtype, **limit)

    assert (len(list((tmp_path / "export").glob("*.safetensors"))) > 1) == (num_shards > 1)
    found = read_tensors(tmp_path / "export")
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].dtype == values.dtype
        assert found[name].tobytes() == values.tobytes(), name
    assert read_config(tmp_path / "export")[0] == config


@pytest.mark.parametrize(
    ("family", "part", "dtype"),
    [
        ("gemma2", "norm", "float32"),
        ("deepseek_v3", "norm", "float32"),
        ("deepseek_v3", OF_CHOICE, "bfloat16"),  # used in float32 all the same
    ],
)
def test_an_export_keeps_the_dtype_of_each_tensor(tmp_path: Path, family: str, part: str, dtype: str) -> None:
    golden = next(folder for folder in GOLDENS if folder.name == family)
    expected = write_shards(tmp_path / "base", golden, np.dtype(ml_dtypes.bfloat16), 1)
    expected |= {name: values.astype(jnp.dtype(dtype)) for name, values in expected.items() if part in name}
    safetensors.numpy.save_file(expected, tmp_path / "base/part-0.safetensors", metadata={"format": "pt"})
    config, _ = read_config(tmp_path / "base")
    params = load_pretrained(tmp_path / "base", config, None, "float32")
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "tokenizer"))
    dtypes = export_dtypes(Config(model=ModelConfig(path=str(tmp_path / "base"))))
    export_pretrained(tmp_path / "export", params, config, tokenizer, "template", (2,), dtypes)
    found = read_tensors(tmp_path / "export")
    assert {name: (values.dtype, values.tobytes()) for name, values in found.items()} == {
        name: (values.dtype, values.tobytes()) for name, values in expected.items()
    }
    assert json.loads((tmp_path / "export/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_every_family_has_a_golden() -> None:
    assert {json.loads((golden / "config.json").read_text())["model_type"] for golden in GOLDENS} == set(FAMILIES)
