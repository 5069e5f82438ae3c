"""What a run was made with: library versions, devices, git commit, command."""

import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax

from sft_jax.config_schema import Config

_LIBRARIES = (
    "sft_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "ml_collections", "numpy",
    "sentencepiece", "tokenizers", "jinja2",
)  # fmt: skip


def describe_environment(config: Config) -> dict[str, Any]:
    """A JSON object, saved beside `config.json` as `provenance.json`."""
    return {
        "config_digest": config.digest(),
        "command": sys.argv,
        "python": platform.python_version(),
        "libraries": {name: importlib.metadata.version(name) for name in _LIBRARIES},
        "devices": {
            "kind": jax.devices()[0].device_kind,
            "count": jax.device_count(),
            "processes": jax.process_count(),
        },
        "git_commit": _git_commit(),
    }


def _git_commit() -> str | None:
    """Commit of the checkout that holds this package, with `+changes` where files differ from it; None outside one."""
    where = Path(__file__).parent
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=where, capture_output=True, text=True, check=True)
        changes = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=where, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit.stdout.strip() + ("+changes" if changes.stdout.strip() else "")
