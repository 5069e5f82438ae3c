"""The log of a run: what a disk does to it is said, and is no reason to lose the rest."""

import json

import pytest
from etils import epath

from sft_jax.datatypes import StorageError
from sft_jax.training.metrics import MetricsWriter


def lines(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_damaged_lines_are_set_aside_and_the_others_kept(tmp_path):
    log = tmp_path / "metrics.jsonl"
    damaged = [b'{"step": 3, "lo\0\0\0', b'{"step": 4, "\xff": 1}', b"7", b'{"stop": 5}']
    whole = [b'{"step": %d}' % step for step in (1, 2, 6, 7, 8)]
    log.write_bytes(b"\n".join([*whole[:2], *damaged, *whole[2:], b'{"step": 9']))
    writer = MetricsWriter(epath.Path(tmp_path), 7, tensorboard=False)
    writer.write(8, {"loss": 1.0})
    writer.close()
    assert lines(log) == [1, 2, 6, 7, 8]
    assert (tmp_path / "quarantine" / "metrics.jsonl").read_bytes().splitlines() == damaged
    assert writer.num_damaged == 4
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "quarantine"}


def test_a_full_disk_is_said(tmp_path):
    writer = MetricsWriter(epath.Path(tmp_path), 0, tensorboard=False)
    writer._file.close()
    writer._file = open("/dev/full", "a")  # noqa: SIM115
    with pytest.raises(StorageError, match=r"metrics\.jsonl: cannot be written: No space left on device\. Is there"):
        writer.write(1, {"loss": 1.0})
    writer.close()
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(StorageError, match=r"metrics\.jsonl: cannot be written: Is a directory"):
        MetricsWriter(epath.Path(tmp_path), 0, tensorboard=False)
