"""TRL's data preparation for `data_prep.py`, run by a Python that has torch, transformers, trl and datasets.

    python data_prep_trl.py FOLDER --tokenizer-from ASSETS    the tokenizer as transformers reads it, into FOLDER
    python data_prep_trl.py FOLDER                            FOLDER's chats through SFTTrainer, packed best fit

The second loads the chats and makes a trainer, which tokenizes, masks and packs; the model is as good as none.
"""

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path

import peers

MAX_SEQ_LEN = 2048


def prepare(folder: Path) -> dict:
    os.environ["HF_DATASETS_CACHE"] = str(folder / "datasets")
    import pyarrow.compute as pc
    import torch
    from datasets import load_dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(1)
    sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32000, **sizes))
    config = SFTConfig(
        output_dir=str(folder / "trl"), use_cpu=True, bf16=False, gradient_checkpointing=False, max_length=MAX_SEQ_LEN,
        assistant_only_loss=True, packing=True, packing_strategy="bfd", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    start, start_cpu = time.perf_counter(), cpu_seconds()
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    chats = load_dataset("json", data_files=str(folder / "chats.jsonl"), split="train")
    trainer = SFTTrainer(model=model, args=config, train_dataset=chats, processing_class=tokenizer)
    seconds, cpu = time.perf_counter() - start, cpu_seconds() - start_cpu

    packed = trainer.train_dataset
    table = (packed if packed._indices is None else packed.flatten_indices()).data
    num_ids = pc.sum(pc.list_value_length(table.column("input_ids"))).as_py()
    labels = pc.list_flatten(table.column("labels").combine_chunks())
    supervised = pc.sum(pc.not_equal(labels, -100)).as_py()
    return {
        "examples": len(chats), "ids": num_ids, "supervised": supervised, "fill": num_ids / (len(packed) * MAX_SEQ_LEN),
        "seconds": seconds, "cpu_seconds": cpu,
    }  # fmt: skip


def cpu_seconds() -> float:
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer-from", type=Path)
    options = parser.parse_args()
    if options.tokenizer_from:
        with tempfile.TemporaryDirectory() as elsewhere:  # its chats are not ours
            peers.prepare(options.tokenizer_from, Path(elsewhere))
            os.rename(Path(elsewhere) / "tokenizer", options.folder / "tokenizer")
        print(json.dumps({}))
    else:
        print(json.dumps(prepare(options.folder)))
