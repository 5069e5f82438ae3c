"""Workload W1: GSM8K as chats, Llama-2's tokenizer, a Llama of 15.2 million parameters, 8 packed rows of 512 a step.

Run by `benchmarks/train_speed.py`; needs W1_DATA (made by `benchmarks/peers.py prepare`) and SFT_JAX_ASSETS.

    python -m sft_jax.main --config=benchmarks/w1.py
"""

import os

from sft_jax.config import default_config


def get_config():
    config = default_config()
    config.run.dir = os.path.join(os.environ["W1_DATA"], "run")
    config.model.preset = "w1"
    config.model.compute_dtype = "float32"
    config.model.remat = "dots"  # fewer saved activations: quicker than none here, for want of page faults
    config.data.tokenizer = os.path.join(os.environ["SFT_JAX_ASSETS"], "tokenizers/llama2/tokenizer.model")
    config.data.chat_template = "llama2"
    config.data.train = [dict(path=os.path.join(os.environ["W1_DATA"], "chats.jsonl"))]
    config.data.max_seq_len = 512
    config.data.too_long = "drop"  # 10 of 7,473
    config.batch.batch_size = 8
    config.loss.chunk_tokens = 256
    config.optimizer.learning_rate = 3e-4
    config.schedule.num_steps = 12
    config.checkpoint.export = False
    config.log.every_steps = 1
    config.log.tensorboard = False
    return config
