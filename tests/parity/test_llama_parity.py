"""Live, beside transformers and torch: the same folder, the same logits; the same packed batch, the same gradients; and
what we export, transformers loads whole.
"""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from sft_jax.checkpoint.hf import load_pretrained, read_config
from sft_jax.checkpoint.hf_export import export_pretrained
from sft_jax.config_schema import MeshConfig
from sft_jax.data.tokenizer import Tokenizer, load_tokenizer
from sft_jax.model.families import TransformerConfig
from sft_jax.model.transformer import Params, forward, output_head

torch = pytest.importorskip("torch", reason="torch is not installed here; make test-parity installs it")
transformers = pytest.importorskip("transformers")

from packed_step import relative_difference, step_loss_and_grads, train_one_step  # noqa: E402
from torch_reference import LLAMA3_ROPE, loss_and_grads, random_llama, random_packed_batch  # noqa: E402

pytestmark = pytest.mark.parity

FAMILIES = sorted((Path(__file__).parent / "goldens").iterdir())
TEMPLATE = "{{ bos_token }} {% for message in messages %}{{ message.content }} <|im_end|>{% endfor %}"
LENGTH = 80  # past LLAMA3_ROPE's original length of 32
MODELS: dict[str, dict[str, Any]] = {
    "grouped_query_untied": dict(
        vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, tie_word_embeddings=False,
    ),
    "multi_query_tied_wide_heads": dict(
        vocab_size=61, hidden_size=36, intermediate_size=53, num_hidden_layers=2, num_attention_heads=3, head_dim=10,
        num_key_value_heads=1, tie_word_embeddings=True, rms_norm_eps=1e-6,
    ),
    "multi_head_llama3_rope": dict(
        vocab_size=64, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, tie_word_embeddings=False, rope_parameters=LLAMA3_ROPE,
    ),
    "one_layer_large_theta": dict(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True, rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    ),
}  # fmt: skip


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    """Ours, of a folder that transformers saved: <s> is 1, </s> is 2, <|im_end|> is 7."""
    words = ["<unk>", "<s>", "</s>", "a", "b", "c", "d", "<|im_end|>"]
    model = tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens([words[i] for i in (0, 1, 2, 7)])
    saved = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    saved.save_pretrained(tmp_path / "tokenizer")
    return load_tokenizer(tmp_path / "tokenizer")


@pytest.fixture(params=MODELS)
def llama(request, tmp_path: Path):
    """(a transformers model, the folder it saved)."""
    model = random_llama(seed=1, **MODELS[request.param])
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    return model, folder


def our_logits(folder: Path, ids: np.ndarray) -> np.ndarray:
    config, _ = read_config(folder)
    return logits_of(load_pretrained(folder, config, None, "float32"), config, ids)


def logits_of(params: Params, config: TransformerConfig, ids: np.ndarray) -> np.ndarray:
    positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
    options = {"compute_dtype": "float32", "remat": "none", "attention": "reference"}
    hidden = forward(params, config, jnp.asarray(ids), jnp.asarray(positions), jnp.ones_like(ids), **options)
    return np.asarray(config.logit_shape.apply(jnp.einsum("bld,vd->blv", hidden, output_head(params))))


def their_logits(model: Any, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(input_ids=torch.tensor(ids, dtype=torch.long)).logits.numpy()


def load_in_transformers(folder: Path) -> Any:
    """The model, with nothing missing, left over, resized or otherwise remarked on."""
    plain = {"attn_implementation": "eager"}
    if "num_experts_per_tok" in json.loads((folder / "config.json").read_text()):
        plain["experts_implementation"] = "eager"  # the others want sizes in multiples of 16 bytes
    model, notes = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **plain)
    assert not any(notes.values()), notes
    return model.eval()


def random_ids(vocab_size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(vocab_size, size=(2, LENGTH)).astype(np.int32)


def test_logits_and_log_probabilities_are_equal(llama) -> None:
    model, folder = llama
    ids = random_ids(model.config.vocab_size)
    ours, theirs = our_logits(folder, ids), their_logits(model, ids)
    assert np.abs(theirs).max() > 1  # there is something to compare
    assert np.abs(ours - theirs).max() <= 2e-4
    our_logprobs = jax.nn.log_softmax(ours)[:, :-1]
    their_logprobs = torch.log_softmax(torch.tensor(theirs), -1).numpy()[:, :-1]
    of_next = ids[:, 1:, None]
    np.testing.assert_allclose(
        np.take_along_axis(np.asarray(our_logprobs), of_next, -1),
        np.take_along_axis(their_logprobs, of_next, -1),
        atol=1e-4, rtol=0,
    )  # fmt: skip


@pytest.mark.parametrize(("num_devices", "axes"), [(1, {}), (4, {"replica": 4, "fsdp": 1})], ids=["one", "four"])
def test_loss_and_gradients_of_a_packed_batch_are_equal(llama, num_devices: int, axes: dict[str, int]) -> None:
    model, folder = llama
    batch = random_packed_batch(2, model.config.vocab_size)
    loss, grads = loss_and_grads(model, batch)
    our_loss, our_grads = step_loss_and_grads(folder, batch, MeshConfig(**axes), num_devices)
    assert our_loss == pytest.approx(loss, rel=1e-6)
    assert relative_difference(our_grads, grads) <= 1e-5


@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000])
def test_transformers_loads_what_we_export(llama, tokenizer, tmp_path: Path, max_shard_bytes: int) -> None:
    model, folder = llama
    config, _ = read_config(folder)
    params = load_pretrained(folder, config, None, "float32")
    out = tmp_path / "export"
    export_pretrained(out, params, config, tokenizer, TEMPLATE, (7,), max_shard_bytes=max_shard_bytes)
    loaded = load_in_transformers(out)
    expected = model.state_dict()
    assert loaded.state_dict().keys() == expected.keys()
    assert all(torch.equal(values, expected[name]) for name, values in loaded.state_dict().items())
    assert loaded.generation_config.eos_token_id == loaded.config.eos_token_id == [7, 2]
    ids = random_ids(config.vocab_size)
    np.testing.assert_array_equal(their_logits(loaded, ids), their_logits(model, ids))
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    rendered = theirs.apply_chat_template([{"role": "user", "content": "b a"}], return_dict=False)
    assert rendered == [1, 4, 3, 7]


@pytest.mark.parametrize("folder", FAMILIES, ids=lambda folder: folder.name)
def test_transformers_loads_what_we_have_trained_of_any_family(folder: Path, tokenizer, tmp_path: Path) -> None:
    batch = random_packed_batch(3, read_config(folder)[0].vocab_size)
    config, _, trained, _ = train_one_step(folder, batch, MeshConfig(), num_devices=1, learning_rate=1.0)
    export_pretrained(tmp_path / "export", trained, config, tokenizer, TEMPLATE, (7,))
    ids = random_ids(config.vocab_size)
    theirs = their_logits(load_in_transformers(tmp_path / "export"), ids)
    assert np.abs(theirs - their_logits(load_in_transformers(folder), ids)).max() > 0.01  # it has learnt
    assert np.abs(logits_of(trained, config, ids) - theirs).max() <= 2e-4


def test_a_bfloat16_export_is_loaded_as_bfloat16(llama, tokenizer, tmp_path: Path) -> None:
    model, folder = llama
    config, _ = read_config(folder)
    params = load_pretrained(folder, config, None, "float32")
    export_pretrained(tmp_path / "export", params, config, tokenizer, TEMPLATE, (7,), "bfloat16")
    loaded = load_in_transformers(tmp_path / "export")
    assert loaded.dtype == torch.bfloat16
    for name, values in loaded.state_dict().items():
        assert torch.equal(values, model.state_dict()[name].bfloat16())


def test_the_real_model_goes_in_and_out(assets: Path, tmp_path: Path) -> None:
    folder = assets / "models" / "TinyStories-656K"
    expected = json.loads((folder / "expected.json").read_text())
    ids = np.asarray([expected["greedy_ids"]], np.int32)
    ours = our_logits(folder, ids)
    assert np.abs(ours - their_logits(load_in_transformers(folder), ids)).max() <= 1e-4

    config, _ = read_config(folder)
    params = load_pretrained(folder, config, None, "float32")
    export_pretrained(tmp_path / "export", params, config, load_tokenizer(folder), TEMPLATE, (2,))
    exported = load_in_transformers(tmp_path / "export")
    assert np.abs(ours - their_logits(exported, ids)).max() <= 1e-4
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "export")
    assert theirs.decode(expected["greedy_ids"]) == expected["greedy_text"]
