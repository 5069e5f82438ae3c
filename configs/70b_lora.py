"""Llama-3.1-70B, adapters of rank 16 on all linear maps, 4,096 tokens.

Hardware: 64 chips of TPU v5e (16 GB each) or more. Put the Hugging Face folder in MODEL_DIR and the chats in DATA_DIR:

    python -m sft_jax.main --config=configs/70b_lora.py --config.run.dir=runs/70b_lora

Memory: 11.91 of 15.75 GiB a device on v5e:8x8 (`make plans`).
Time: by the roofline 24.5 hours for a billion tokens.
"""

import os

from sft_jax.config import default_config


def get_config():
    config = default_config()
    config.run.distributed = True
    config.model.path = os.environ.get("MODEL_DIR", "models/Llama-3.1-70B-Instruct")
    config.model.preset = "llama3.1-70b"
    config.model.attention = "splash"
    data = os.environ.get("DATA_DIR", "data")
    config.data.train = [dict(path=f"{data}/train.jsonl")]
    config.data.eval = [dict(path=f"{data}/held_out.jsonl")]
    config.data.max_seq_len = 4096
    config.batch.batch_size = 64
    config.loss.chunk_tokens = 512
    config.model.frozen_dtype = "bfloat16"
    config.lora.rank = 16
    config.lora.alpha = 32
    config.optimizer.learning_rate = 1e-4
    config.evaluation.every_steps = 200
    config.checkpoint.every_steps = 200
    return config
