"""The records of a run directory -> README.md of its export: what was trained, on what, and how well.

Only figures and names: of paths no more than their last part, and nothing of any row.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from sft_jax.checkpoint.hf import read_config

_HEAD = """---
{base}library_name: transformers
pipeline_tag: text-generation
tags:
- sft_jax
- sft
---
"""
_USE = """From beside this folder:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{folder}")
model = AutoModelForCausalLM.from_pretrained("{folder}", dtype="auto")
messages = [{{"role": "user", "content": "Who are you?"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=256)[0]))
```"""


# On the Hub, as it caches it: models--<owner>--<name>/snapshots/<revision>.
_HUB_NAME, _HUB_CACHE = (
    re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*"),
    re.compile(r"models--([\w.-]+?)--([\w.-]+)/snapshots/"),
)


def name_base(folder: str) -> str:
    """The Hub's name of a base, by its place in the Hub's cache or its config.json; "": neither says it, or there is no
    folder. A preset says it not: many weights have one's sizes."""
    if cached := _HUB_CACHE.search(folder):
        return "/".join(cached.groups())
    said = read_config(folder)[1].get("_name_or_path") if folder else None
    return said if isinstance(said, str) and _HUB_NAME.fullmatch(said) else ""


def make_model_card(run_dir: epath.Path, step: int, folder: str | os.PathLike[str], base_name: str) -> str:
    """
    Args:
      step: the exported one; what was measured after it is left out.
      folder: that the card is for.
      base_name: by `name_base`.
    """
    config, report, provenance = (
        json.loads((run_dir / f"{name}.json").read_text()) for name in ("config", "data_report", "provenance")
    )
    records = [record for record in _read_metrics(run_dir / "metrics.jsonl") if record["step"] <= step]
    name, base = _last_part(config["run"]["dir"]), config["model"]
    origin = f"from {_last_part(base['path'])}" if base["path"] else f"from random weights of preset {base['preset']}"
    sections = {
        f"# {name}": f"Trained {origin} by supervised fine-tuning: step {step:,} of {report['num_steps']:,}. "
        "The licenses of the base model and of the data apply.",
        "## Use": _USE.format(folder=_last_part(os.path.abspath(folder)))
        + "\n\nThe chat template is the one that was trained, and generation stops at "
        "the stop token that was trained.",
        "## Data": _describe_data(report),
        "## Training": _table(("", ""), _describe_training(config, report, provenance).items()),
        "## Results": _describe_results(records),
    }
    head = _HEAD.format(base=f"base_model: {base_name}\n" if base_name else "")
    return head + "".join(f"\n{title}\n\n{text}\n" for title, text in sections.items())


def _read_metrics(path: epath.Path) -> list[dict[str, Any]]:
    """Whole lines only: one may be cut where a run was killed."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def _last_part(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]


def _describe_data(report: Mapping[str, Any]) -> str:
    columns = ("source", "rows read", "trained on", "not taken", "bad", "dropped", "tokens", "of them supervised")
    fields = ("rows_read", "rows_trained", "rows_not_taken", "rows_bad", "rows_dropped", "tokens", "supervised_tokens")
    rows = [(name, *(f"{source[field]:,}" for field in fields)) for name, source in report["sources"].items()]
    return _table(columns, rows) + f"\n\nFingerprint of the data as it was trained: `{report['fingerprint']}`."


def _describe_training(
    config: Mapping[str, Any], report: Mapping[str, Any], provenance: Mapping[str, Any]
) -> dict[str, str]:
    optimizer, schedule, model = config["optimizer"], config["schedule"], config["model"]
    devices, versions = provenance["devices"], provenance["libraries"]
    return {
        "steps": f"{report['num_steps']:,}, {report['num_epochs']:.4g} epochs",
        "batch": f"{report['batch_size']:,} rows of {report['max_seq_len']:,} tokens, "
        f"{report['fill_fraction']:.1%} full",
        "optimizer": f"{optimizer['name']}, learning rate {optimizer['learning_rate']:g}, {schedule['name']} schedule, "
        f"weight decay {optimizer['weight_decay']:g}, gradients clipped at {optimizer['grad_clip_norm']:g}",
        "numbers": f"parameters {model['param_dtype']}, computation {model['compute_dtype']}",
        "frozen": _describe_lora(config["lora"]) or _in_backticks(model["freeze"]) or "nothing",
        "seed": str(config["run"]["seed"]),
        "devices": f"{devices['count']} x {devices['kind']}, {devices['processes']} processes",
        "versions": f"sft_jax {versions['sft_jax']}, jax {versions['jax']}",
        "config": f"digest `{provenance['config_digest']}`",
    }


def _describe_lora(lora: Mapping[str, Any]) -> str:
    if not lora["rank"]:
        return ""
    kind = ("rs" if lora["use_rslora"] else "") + ("DoRA" if lora["use_dora"] else "LoRA")
    held = "" if lora["quantize"] == "none" else f", its kernels in {lora['quantize']},"
    whole = f" {_in_backticks(lora['modules_to_save'])} trained whole." if lora["modules_to_save"] else ""
    return (
        f"the base{held} but for adapters that are merged here: {kind} of rank {lora['rank']}, "
        f"alpha {lora['alpha']:g}, on {_in_backticks(lora['targets'])}.{whole}"
    )


def _in_backticks(patterns: Sequence[str]) -> str:
    return ", ".join(f"`{pattern}`" for pattern in patterns)


def _describe_results(records: Sequence[Mapping[str, Any]]) -> str:
    """First and last value of each measured loss and accuracy."""
    measured: dict[str, list[str]] = {}
    for record in records:
        for key, value in record.items():
            kind, _, held_out = key.partition("/")
            if key in ("loss", "accuracy") or (kind == "eval" and held_out.endswith(("/loss", "/accuracy"))):
                name = f"held-out {held_out.replace('/', ', ')}" if held_out else f"training batch, {key}"
                measured.setdefault(name, []).append(f"{value:.4g} (step {record['step']:,})")
    if not measured:
        return "Nothing was measured before this step."
    rows = [(name, values[0], values[-1]) for name, values in sorted(measured.items())]
    return _table(("", "first", "last"), rows) + "\n\nLoss is in nats per supervised token."


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines)
