"""Adapter folders that are not what config.lora says; test_peft_parity holds the others to peft."""

import dataclasses
import errno
import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from llama_folder import TINY, TINY_TIED, llama_tensors, write_folder

from sft_jax.checkpoint import peft
from sft_jax.checkpoint.hf import read_config
from sft_jax.checkpoint.peft import export_adapter
from sft_jax.config_schema import Config, LoraConfig, MeshConfig, ModelConfig
from sft_jax.datatypes import ConfigError, StorageError
from sft_jax.placed_model import ModelOnMesh
from sft_jax.sharding import build_mesh


class Adapter:
    """A base and an adapter for it, whose files may be changed."""

    def __init__(self, root: Path, model=TINY, **lora):
        self.base = write_folder(root / "base", model, llama_tensors(model))
        self.folder = root / "adapter"
        self.lora = {"rank": 2, "alpha": 4.0, "targets": ("q_proj",)} | lora
        placed = self.place()
        self.trained, _ = placed.open_params()
        export_adapter(self.folder, self.trained, placed.model, placed.config.lora, "base", "float32")

    def place(self, **changes) -> ModelOnMesh:
        section = ModelConfig(path=str(self.base), compute_dtype="float32")
        config = Config(model=section, lora=LoraConfig(**self.lora | changes))
        return ModelOnMesh(config, read_config(self.base)[0], build_mesh(MeshConfig(fsdp=1), jax.devices()[:1]))

    def load(self, **changes):
        return self.place(init_from=str(self.folder), **changes).open_params()[0]

    def change_options(self, **changes) -> None:
        path = self.folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    def change_tensors(self, **changes: np.ndarray | None) -> None:
        """By the names after `base_model.model.`; None: it is gone."""
        path = self.folder / "adapter_model.safetensors"
        tensors = safetensors.numpy.load_file(path) | {f"base_model.model.{n}": value for n, value in changes.items()}
        safetensors.numpy.save_file({name: value for name, value in tensors.items() if value is not None}, path)


@pytest.fixture
def adapter(tmp_path: Path) -> Adapter:
    return Adapter(tmp_path)


def test_an_export_that_fails_leaves_the_old_one_and_may_be_made_again(adapter: Adapter, monkeypatch) -> None:
    placed = adapter.place()
    again = lambda: export_adapter(adapter.folder, adapter.trained, placed.model, placed.config.lora, "x", "float32")  # noqa: E731
    old = {path.name: path.read_bytes() for path in adapter.folder.iterdir()}

    def fill_the_disk(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(peft, "write_json", fill_the_disk)
        with pytest.raises(StorageError, match="No space left on device"):
            again()
    assert {path.name: path.read_bytes() for path in adapter.folder.iterdir()} == old
    again()
    assert json.loads((adapter.folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "x"
    (adapter.folder / "notes.txt").write_text("mine")
    with pytest.raises(StorageError, match=r"holds notes\.txt, which no export of ours wrote"):
        again()


@pytest.mark.parametrize(("family", "expert"), [("mixtral", 2), ("qwen3_moe", 5), ("deepseek_v3", 2)])
def test_adapters_of_experts_come_back(family: str, expert: int, tmp_path: Path) -> None:
    base = Path(__file__).parents[1] / "parity" / "goldens" / family
    lora = LoraConfig(rank=2, targets=("o_proj", "experts.*"), modules_to_save=("router",))
    config = Config(model=ModelConfig(path=str(base), compute_dtype="float32"), lora=lora)
    placed = ModelOnMesh(config, read_config(base)[0], build_mesh(MeshConfig(expert=expert), jax.devices()[:expert]))
    drawn = np.random.default_rng(0)
    trained = {
        path: jax.device_put(drawn.normal(size=leaf.shape).astype("float32"), placed.shardings[path])
        for path, leaf in placed.leaves[0].items()
    }
    export_adapter(tmp_path / "adapter", trained, placed.model, lora, "base", "float32")
    lora = dataclasses.replace(lora, init_from=str(tmp_path / "adapter"))
    again, _ = dataclasses.replace(placed, config=dataclasses.replace(config, lora=lora)).open_params()
    assert all(np.array_equal(again[path], values) for path, values in trained.items())
    assert again["layers.0.0.attention.out.lora_b"].sharding == trained["layers.0.0.attention.out.lora_b"].sharding


# As PEFT 0.21.2 writes them, beside those of every adapter.
NEUTRAL = {
    "alora_invocation_tokens": None, "arrow_config": None, "auto_mapping": None, "base_model_name_or_path": "x",
    "bias": "none", "corda_config": None, "ensure_weight_tying": False, "eva_config": None, "exclude_modules": None,
    "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True, "kasa_config": None,
    "layer_replication": None, "layers_pattern": None, "layers_to_transform": None, "loftq_config": {},
    "lora_bias": False, "lora_dropout": 0.0, "lora_ga_config": None, "megatron_config": None,
    "megatron_core": "megatron.core", "modules_to_save": None, "monteclora_config": None, "peft_type": "LORA",
    "peft_version": "0.21.2", "qalora_group_size": 16, "revision": None, "target_parameters": None,
    "task_type": "CAUSAL_LM", "trainable_token_indices": None, "use_bdlora": None, "use_qalora": False,
    "velora_config": None,
}  # fmt: skip


def test_options_that_change_nothing_are_read_over(adapter: Adapter) -> None:
    adapter.change_options(**NEUTRAL)
    loaded = adapter.load()
    assert all(np.array_equal(loaded[path], value) for path, value in adapter.trained.items())


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("layers_to_transform", [0]), ("layers_to_transform", 0), ("layers_pattern", "layers"),
        ("exclude_modules", ["v_proj"]), ("rank_pattern", {"q_proj": 4}), ("alpha_pattern", {"q_proj": 8}),
        ("loftq_config", {"loftq_bits": 4}), ("eva_config", {"rho": 2.0}), ("corda_config", {"corda_method": "ipm"}),
        ("lora_ga_config", {"direction": "ArBr"}), ("megatron_config", {"hidden_size": 8}),
        ("runtime_config", {"ephemeral_gpu_offload": True}), ("use_qalora", True), ("trainable_token_indices", [3]),
        ("target_parameters", ["q_proj.weight"]), ("arrow_config", {"top_k": 3}), ("init_lora_weights", "pissa"),
        ("bias", "all"), ("lora_bias", True), ("peft_type", "IA3"), ("use_sparkling_lora", False),
        ("use_sparkling_lora", None), ("alora_invocation_tokens", [1]), ("kasa_config", {"beta": 1.0}),
    ],
)  # fmt: skip
def test_options_that_would_change_the_numbers_are_refused_by_name(adapter: Adapter, option: str, value) -> None:
    adapter.change_options(**{option: value})
    with pytest.raises(ConfigError, match=rf"adapter_config.json: {option} (is|=) "):
        adapter.load()


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_no_file_of_an_adapter_leads_out_of_its_folder(adapter: Adapter, tmp_path: Path, name: str) -> None:
    (adapter.folder / name).rename(tmp_path / "elsewhere")
    (adapter.folder / name).symlink_to("../elsewhere")
    with pytest.raises(StorageError, match=rf"{name}: is a link to .*elsewhere, outside"):
        adapter.load()


def test_options_are_a_file_of_some_size(adapter: Adapter) -> None:
    path = adapter.folder / "adapter_config.json"
    path.write_text(path.read_text() + " " * 2**20)
    with pytest.raises(ConfigError, match=r"adapter_config\.json: has \d+ bytes, more than 1048576"):
        adapter.load()
    path.unlink()
    with pytest.raises(StorageError, match=r"adapter_config\.json: cannot be read: No such file"):
        adapter.load()
    os.mkfifo(path)
    with pytest.raises(StorageError, match=r"adapter_config\.json: cannot be read: is no regular file"):
        adapter.load()


def test_an_adapter_s_pickle_is_never_opened(adapter: Adapter) -> None:
    weights = adapter.folder / "adapter_model.safetensors"
    (adapter.folder / "adapter_model.bin").write_bytes(b"\x80\x04")
    adapter.load()  # beside safetensors it is passed over
    weights.unlink()
    with pytest.raises(StorageError, match=r"only adapter_model\.bin.*never opened.*save_pretrained"):
        adapter.load()


@pytest.mark.parametrize("gone", ["rank_pattern", "alpha_pattern", "both"])
def test_the_patterns_of_fused_tensors_belong_together(tmp_path: Path, gone: str) -> None:
    base = Path(__file__).parents[1] / "parity" / "goldens" / "phi3"
    config = Config(model=ModelConfig(path=str(base)), lora=LoraConfig(rank=2, targets=("q_proj", "k_proj", "v_proj")))
    placed = ModelOnMesh(config, read_config(base)[0], build_mesh(MeshConfig(fsdp=1), jax.devices()[:1]))
    trained, _ = placed.open_params()
    export_adapter(tmp_path / "adapter", trained, placed.model, config.lora, "base", "float32")
    file = tmp_path / "adapter" / "adapter_config.json"
    fields = json.loads(file.read_text())
    assert fields["rank_pattern"]
    assert fields["alpha_pattern"]
    fields |= {name: {} for name in ("rank_pattern", "alpha_pattern") if gone in (name, "both")}
    file.write_text(json.dumps(fields))
    lora = dataclasses.replace(config.lora, init_from=str(tmp_path / "adapter"))
    again = dataclasses.replace(placed, config=dataclasses.replace(config, lora=lora))
    # Of PEFT's own, without any, the parts share one rank, which the tensors then do not have.
    with pytest.raises(StorageError if gone == "both" else ConfigError, match=r"Same base|only one rank and alpha"):
        again.open_params()


HEAD, EMBEDDING = np.ones((40, 16), np.float32), np.full((40, 16), 2, np.float32)


def test_what_peft_saves_twice_is_read_once(tmp_path: Path) -> None:
    adapter = Adapter(tmp_path, modules_to_save=("lm_head",))
    twice = {"lm_head.weight": HEAD, "lm_head.modules_to_save.weight": HEAD}
    adapter.change_tensors(**twice, **{"lm_head.original_module.weight": EMBEDDING})
    assert np.all(np.asarray(adapter.load()["head.kernel"]) == 1)
    adapter.change_tensors(**{"lm_head.modules_to_save.weight": EMBEDDING})
    with pytest.raises(StorageError, match=r"differs from .*Save the adapter again"):
        adapter.load()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"lm_head.weight": HEAD}, r"lm_head.weight, as PEFT saves it .* Add lm_head to config.lora.modules_to_save"),
        ({"model.embed_tokens.weight": HEAD}, r"Add model.embed_tokens to config.lora.modules_to_save"),
        ({"lm_head.lora_A.weight": HEAD}, r"lm_head.lora_A.weight is of an adapter of lm_head.*merge_and_unload"),
        ({"model.embed_tokens.lora_embedding_A": HEAD}, r"of an adapter of model.embed_tokens, .*merge_and_unload"),
        ({"model.norm.weight": HEAD}, r"such as base_model.model.model.norm.weight. Add their modules"),
        ({"model.layers.0.self_attn.q_proj.lora_A.weight": None}, r"has no tensor .*layers.0.self_attn.q_proj.lora_A"),
    ],
)
def test_tensors_that_have_no_place_are_named_with_the_way_to_mend_them(adapter: Adapter, tensors, message) -> None:
    adapter.change_tensors(**tensors)
    with pytest.raises(StorageError, match=message):
        adapter.load()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"lm_head.weight": None}, "has an embedding and no base_model.model.lm_head.weight.*ensure_weight_tying"),
        ({"lm_head.weight": HEAD}, "differs from the embedding, and this model ties them.*merge_and_unload"),
        ({"model.embed_tokens.weight": HEAD[:39]}, r"is \[39, 16\]; expected \[40, 16\]: .*config.data.new_tokens"),
    ],
)
def test_a_tied_embedding_must_be_the_head_and_of_the_model_s_size(tmp_path: Path, tensors, message) -> None:
    adapter = Adapter(tmp_path, TINY_TIED, modules_to_save=("embed_tokens",))
    adapter.change_tensors(**tensors)
    with pytest.raises(StorageError, match=message):
        adapter.load()
