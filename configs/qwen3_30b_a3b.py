"""Qwen3-30B-A3B, a mixture of 128 experts, all parameters, 8,192 tokens. No token is dropped.

Hardware: 32 chips of TPU v5p or more. Put the Hugging Face folder in MODEL_DIR and the chats in DATA_DIR:

    python -m sft_jax.main --config=configs/qwen3_30b_a3b.py --config.run.dir=runs/qwen3_30b_a3b

Memory: 20.26 of 95.73 GiB a device on v5p:2x4x4 (`make plans`).
"""

import os

from sft_jax.config import default_config


def get_config():
    config = default_config()
    config.run.distributed = True
    config.model.path = os.environ.get("MODEL_DIR", "models/Qwen3-30B-A3B")
    config.model.preset = "qwen3-30b-a3b"
    config.model.attention = "splash"
    data = os.environ.get("DATA_DIR", "data")
    config.data.train = [dict(path=f"{data}/train.jsonl")]
    config.data.eval = [dict(path=f"{data}/held_out.jsonl")]
    config.data.max_seq_len = 8192
    config.batch.batch_size = 32
    config.loss.chunk_tokens = 512
    config.loss.router_balance_weight = 0.001
    config.optimizer.learning_rate = 1e-5
    config.evaluation.every_steps = 200
    config.checkpoint.every_steps = 200
    return config
