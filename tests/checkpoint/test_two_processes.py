"""Two processes with four devices each: either kind of folder is read to one mesh, and one folder is written."""

from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from llama_folder import TINY, llama_tensors, write_folder
from two_processes import run_two_processes

from sft_jax.checkpoint.hf import read_config
from sft_jax.checkpoint.peft import export_adapter
from sft_jax.cli.convert import main as convert
from sft_jax.config_schema import Config, LoraConfig, MeshConfig, ModelConfig
from sft_jax.placed_model import ModelOnMesh
from sft_jax.sharding import build_mesh

_WORKER = """
import sys
from pathlib import Path
import jax
jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
from llama_folder import TINY
from test_hf import export, shardings
from sft_jax.checkpoint.hf import load_pretrained
from sft_jax.datatypes import StorageError

folder = Path(sys.argv[3])
assert jax.process_count() == 2 and jax.device_count() == 8
placed = shardings(TINY, fsdp=2, tensor=4)
for name in ("model", "converted"):
    params = load_pretrained(folder / name, TINY, placed, "float32")
    assert all(params[path].sharding == placed[path] for path in params)
    assert not params["layers.0.0.mlp.up.kernel"].is_fully_addressable
    export(folder / f"{name}-out", params, TINY, max_shard_bytes=5000)
params["layers.0.0.mlp.up.kernel"] = params["layers.0.0.mlp.up.kernel"] * 1e6
for name, dtype in (("occupied", "float32"), ("narrow", "float16")):
    try:
        export(folder / name, params, TINY, dtype)
    except StorageError as error:
        print(f"{name}: {error}")
from test_two_processes import export_drawn_adapter
export_drawn_adapter(folder / "model", folder / "adapter")
try:
    export_drawn_adapter(folder / "model", folder / "occupied")
except StorageError as error:
    print(f"adapter: {error}")
"""


def export_drawn_adapter(base: Path, target: Path) -> None:
    """An adapter of random values, from however many processes hold it."""
    lora = LoraConfig(rank=4, targets=("all-linear",), modules_to_save=("embed_tokens",))
    config = Config(model=ModelConfig(path=str(base)), lora=lora, mesh=MeshConfig(fsdp=2, tensor=4))
    placed = ModelOnMesh(config, read_config(base)[0], build_mesh(config.mesh))
    rng, trained = np.random.default_rng(0), {}
    for path, leaf in placed.leaves[0].items():
        values = rng.normal(size=leaf.shape).astype("float32")
        trained[path] = jax.make_array_from_callback(leaf.shape, placed.shardings[path], lambda at, v=values: v[at])
    export_adapter(target, trained, placed.model, lora, "base", "float32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    write_folder(folder / "model", TINY, llama_tensors(TINY))
    convert([f"--from={folder}/model", f"--to={folder}/converted"])
    (folder / "occupied").mkdir()
    (folder / "occupied" / "mine.txt").write_text("")
    return folder


@pytest.fixture(scope="module")
def said(folder: Path) -> list[str]:
    """What each process printed."""
    return run_two_processes(_WORKER, folder, Path(__file__).parent)


@pytest.mark.parametrize("name", ["model", "converted"])
def test_what_goes_in_comes_out(folder: Path, said: list[str], name: str) -> None:
    files = sorted((folder / f"{name}-out").glob("*.safetensors"))
    assert len(files) > 1
    exported = {key: values for file in files for key, values in safetensors.numpy.load_file(file).items()}
    assert {n: v.tobytes() for n, v in exported.items()} == {n: v.tobytes() for n, v in llama_tensors(TINY).items()}


def test_an_adapter_is_that_of_one_process(folder: Path, said: list[str]) -> None:
    export_drawn_adapter(folder / "model", folder / "by-one")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (folder / "adapter" / name).read_bytes() == (folder / "by-one" / name).read_bytes()


def test_where_one_process_cannot_write_all_say_so(folder: Path, said: list[str]) -> None:
    assert "holds mine.txt, which no export of ours wrote" in said[0]
    assert "occupied: process 0 could not write the export" in said[1]
    for out in said:
        assert "adapter: " in out
        assert "mlp.up_proj.weight has NaN or infinite values (as float16)" in out
    assert not (folder / "narrow").exists()
