"""GSM8K as chats, as often as wanted and each row unique: the data of `data_prep.py` and `data_feed.py`."""

import json
import os
from pathlib import Path
from typing import Any

from sft_jax.config_schema import Config, DataConfig, SourceConfig

CHATS = "chats.jsonl"
NUM_ROWS = 7473


def write_chats(assets: Path, folder: Path, repeat: int) -> Path:
    """NUM_ROWS rows, `repeat` times over. A counter begins each question, so that nothing can be remembered."""
    lines = (assets / "sft/gsm8k/train.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    path = folder / CHATS
    with path.open("w") as out:
        for number in range(repeat * len(rows)):
            row = rows[number % len(rows)]
            turns = [("user", f"{number}. {row['question']}"), ("assistant", row["answer"])]
            out.write(json.dumps({"messages": [{"role": r, "content": c} for r, c in turns]}) + "\n")
    return path


def make_config(folder: Path, max_seq_len: int, **data: Any) -> Config:
    """Llama-2's tokenizer and template over the chats, and the stores beside them."""
    defaults: dict[str, Any] = {
        "train": (SourceConfig(path=str(folder / CHATS)),),
        "tokenizer": os.path.join(os.environ["SFT_JAX_ASSETS"], "tokenizers/llama2/tokenizer.model"),
        "chat_template": "llama2",
        "max_seq_len": max_seq_len,
        "store_dir": str(folder / "stores"),
    }
    return Config(data=DataConfig(**(defaults | data)))
