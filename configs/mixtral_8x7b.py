"""Mixtral-8x7B, a mixture of 8 experts, all parameters, 8,192 tokens. No token is dropped.

Hardware: 64 chips of TPU v5p or more. Put the Hugging Face folder in MODEL_DIR and the chats in DATA_DIR:

    python -m sft_jax.main --config=configs/mixtral_8x7b.py --config.run.dir=runs/mixtral_8x7b

Memory: not planned yet; make plans does it.
"""

import os

from sft_jax.config import default_config


def get_config():
    config = default_config()
    config.run.distributed = True
    config.model.path = os.environ.get("MODEL_DIR", "models/Mixtral-8x7B-Instruct-v0.1")
    config.model.preset = "mixtral-8x7b"
    config.model.attention = "splash"
    data = os.environ.get("DATA_DIR", "data")
    config.data.train = [dict(path=f"{data}/train.jsonl")]
    config.data.eval = [dict(path=f"{data}/held_out.jsonl")]
    config.data.max_seq_len = 8192
    config.batch.batch_size = 64
    config.loss.router_balance_weight = 0.01
    config.optimizer.learning_rate = 5e-6
    config.evaluation.every_steps = 200
    config.checkpoint.every_steps = 200
    return config
