"""Write goldens/<name>: a small random folder, a packed batch, and torch's loss and gradients for it.

    .venv-parity/bin/python tests/parity/make_goldens.py [name ...]

test_golden_parity.py compares our step with them where torch is not installed.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import safetensors.numpy
from torch_reference import LLAMA3_ROPE, loss_and_grads, random_llama, random_model, random_packed_batch

GOLDENS = Path(__file__).parent / "goldens"
LLAMAS = {
    "untied_llama3_rope": dict(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False, rope_parameters=LLAMA3_ROPE,
    ),
    "tied_wide_heads": dict(
        vocab_size=96, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4, head_dim=10,
        num_key_value_heads=2, tie_word_embeddings=True, rms_norm_eps=1e-6,
    ),
}  # fmt: skip


_SIZES = dict(
    vocab_size=31,
    hidden_size=12,
    intermediate_size=10,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=None,
)
_FACTORS = {"short_factor": [1.0, 1.2], "long_factor": [1.5, 6.0]}
# What is a family's own, with windows and the contexts of rope scalings shorter than the longest segment.
FAMILIES = {
    "mistral": dict(head_dim=6, sliding_window=4, tie_word_embeddings=False),
    "qwen2": dict(
        use_sliding_window=True, sliding_window=5, max_window_layers=1, head_dim=4,
        rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
    ),
    "qwen3": dict(
        head_dim=8, tie_word_embeddings=True, max_position_embeddings=9,
        rope_scaling={"rope_type": "dynamic", "factor": 2.0},
    ),
    "gemma": dict(head_dim=6, hidden_act="gelu", num_key_value_heads=1),
    "gemma2": dict(
        head_dim=4, sliding_window=3, query_pre_attn_scalar=7, attn_logit_softcapping=2.0, final_logit_softcapping=3.0
    ),
    "gemma3_text": dict(
        head_dim=4, sliding_window=3, sliding_window_pattern=2, num_hidden_layers=3, query_pre_attn_scalar=5,
        rope_theta=1000.0, rope_local_base_freq=50.0, rope_scaling={"rope_type": "linear", "factor": 8.0},
    ),
    "phi3": dict(
        hidden_size=24, partial_rotary_factor=0.7, original_max_position_embeddings=10, sliding_window=6,
        rope_scaling={"type": "longrope"} | _FACTORS,
    ),
    "olmo2": dict(head_dim=4),
    "granite": dict(
        head_dim=4, tie_word_embeddings=True, mlp_bias=True, embedding_multiplier=3.5, attention_multiplier=0.4,
        residual_multiplier=0.22, logits_scaling=0.8,
    ),
    "mixtral": dict(head_dim=4, num_local_experts=4, num_experts_per_tok=2, sliding_window=5),
    "qwen3_moe": dict(
        head_dim=4, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=6, mlp_only_layers=[0],
        norm_topk_prob=True,
    ),
    "gpt_oss": dict(
        head_dim=4, num_local_experts=4, num_experts_per_tok=2, sliding_window=3, swiglu_limit=1.0,
        layer_types=["sliding_attention", "full_attention"],
        rope_scaling={"rope_type": "yarn", "factor": 8.0, "truncate": False, "original_max_position_embeddings": 8},
    ),
    "deepseek_v3": dict(
        num_key_value_heads=4, q_lora_rank=10, kv_lora_rank=6, qk_nope_head_dim=3, qk_rope_head_dim=4, v_head_dim=2,
        n_routed_experts=8, n_group=4, topk_group=2, num_experts_per_tok=3, moe_intermediate_size=4, n_shared_experts=2,
        first_k_dense_replace=1,
        rope_scaling={
            "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    ),
    "olmo3": dict(
        head_dim=4, sliding_window=3, layer_types=["sliding_attention", "full_attention"],
        rope_scaling={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
    ),
}  # fmt: skip


def main(names: list[str]) -> None:
    for seed, (name, fields) in enumerate((LLAMAS | FAMILIES).items()):
        if names and name not in names:
            continue
        if name in FAMILIES:
            fields = _SIZES | fields | {"model_type": name}
        folder = GOLDENS / name
        shutil.rmtree(folder, ignore_errors=True)
        model = random_model(seed, json.loads(json.dumps(fields))) if name in FAMILIES else random_llama(seed, **fields)
        batch = random_packed_batch(seed, fields["vocab_size"])
        loss, grads = loss_and_grads(model, batch)
        model.save_pretrained(folder)
        (folder / "generation_config.json").unlink()
        expected = {f"batch.{field}": values for field, values in batch.items()}
        expected |= {f"grads.{tensor}": values for tensor, values in grads.items()} | {"loss": np.array(loss)}
        safetensors.numpy.save_file(expected, folder / "expected.safetensors")
        print(f"{name}: loss {loss:.6f}, {sum(f.stat().st_size for f in folder.iterdir())} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
