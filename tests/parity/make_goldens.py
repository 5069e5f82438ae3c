"""Write goldens/<name>: a small random Llama folder, a packed batch, and torch's loss and gradients for it.

    .venv-parity/bin/python tests/parity/make_goldens.py

test_golden_parity.py compares our step with them where torch is not installed.
"""

import shutil
from pathlib import Path

import numpy as np
import safetensors.numpy
from torch_reference import LLAMA3_ROPE, loss_and_grads, random_llama, random_packed_batch

GOLDENS = Path(__file__).parent / "goldens"
MODELS = {
    "untied_llama3_rope": dict(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False, rope_parameters=LLAMA3_ROPE,
    ),
    "tied_wide_heads": dict(
        vocab_size=96, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4, head_dim=10,
        num_key_value_heads=2, tie_word_embeddings=True, rms_norm_eps=1e-6,
    ),
}  # fmt: skip


def main() -> None:
    for seed, (name, fields) in enumerate(MODELS.items()):
        folder = GOLDENS / name
        shutil.rmtree(folder, ignore_errors=True)
        model = random_llama(seed, **fields)
        batch = random_packed_batch(seed, fields["vocab_size"])
        loss, grads = loss_and_grads(model, batch)
        model.save_pretrained(folder)
        (folder / "generation_config.json").unlink()
        expected = {f"batch.{field}": values for field, values in batch.items()}
        expected |= {f"grads.{tensor}": values for tensor, values in grads.items()} | {"loss": np.array(loss)}
        safetensors.numpy.save_file(expected, folder / "expected.safetensors")
        print(f"{name}: loss {loss:.6f}, {sum(f.stat().st_size for f in folder.iterdir())} bytes")


if __name__ == "__main__":
    main()
