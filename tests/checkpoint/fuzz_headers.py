"""Mutated safetensors files through the reader: whatever is raised is a StorageError, none takes over a second, and a
file that is accepted gives every tensor that it names.

    python tests/checkpoint/fuzz_headers.py --files 100000 --seed 0
"""

import argparse
import json
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from sft_jax.checkpoint.model_files import ModelFile
from sft_jax.checkpoint.safetensors_io import DTYPES, map_tensor, read_header
from sft_jax.datatypes import StorageError

MAX_SECONDS = 1.0
_VALUES = [-(2**70), -(2**63), -1, 0, 1, 2, 3, 8, 2**31, 2**53, 2**63, 2**64, 10**40, 1e400, 0.5, True, None, "1", []]
_PIECES = [*(bytes([byte]) for byte in b'{}[]",:\\-\0\xff'), b"e9", b'"\\ud800"', b"[" * 3000, b'{"a":' * 3000]
_LENGTHS = [lambda n: n + 1, lambda n: max(n - 1, 0), *(lambda n, wrong=wrong: wrong for wrong in (0, 10**9, 2**63))]


@dataclass
class Account:
    verdicts: Counter = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


def make_header(chosen: random.Random) -> tuple[dict, int]:
    """An honest header, and how many bytes its tensors have."""
    header: dict = {"__metadata__": {"format": "pt"}} if chosen.random() < 0.5 else {}
    at = 0
    for number in range(chosen.randint(0, 4)):
        name, shape = chosen.choice(sorted(DTYPES)), [chosen.randint(0, 3) for _ in range(chosen.randint(0, 3))]
        num_bytes = DTYPES[name].itemsize
        for size in shape:
            num_bytes *= size
        header[f"t{number}"] = {"dtype": name, "shape": shape, "data_offsets": [at, at + num_bytes]}
        at += num_bytes
    return header, at


def mutate_fields(header: dict, chosen: random.Random) -> None:
    """One wrong value somewhere in the tree."""
    entries = [entry for name, entry in header.items() if name != "__metadata__"]
    if not entries:
        return
    entry, kind = chosen.choice(entries), chosen.randrange(5)
    if kind == 0 and entry["shape"]:
        entry["shape"][chosen.randrange(len(entry["shape"]))] = chosen.choice(_VALUES)
    elif kind == 1:
        entry["data_offsets"][chosen.randrange(2)] = chosen.choice(_VALUES)
    elif kind == 2:
        entry["dtype"] = chosen.choice([*DTYPES, "F4", "", None, 1, "\ud800"])
    elif kind == 3:
        entry[chosen.choice(["dtype", "shape", "data_offsets", "more"])] = chosen.choice(_VALUES)
    else:
        header[chosen.choice(["t0", "t1", "", "__metadata__", "../x", "\0"])] = chosen.choice([entry, *_VALUES])


def mutate_bytes(data: bytearray, chosen: random.Random) -> None:
    at, kind = chosen.randrange(len(data) + 1), chosen.randrange(4)
    if kind == 0 and at < len(data):
        data[at] = chosen.randrange(256)
    elif kind == 1:
        data[at:at] = chosen.choice(_PIECES)
    elif kind == 2:
        del data[at : at + chosen.randint(1, 9)]
    else:
        data[at:at] = data[chosen.randrange(len(data) + 1) :][: chosen.randint(1, 60)]


def make_file(chosen: random.Random) -> bytes:
    header, num_bytes = make_header(chosen)
    if chosen.random() < 0.5:
        mutate_fields(header, chosen)
    text = bytearray(json.dumps(header).encode())
    for _ in range(chosen.choice([0, 0, 0, 1, 1, 4])):
        mutate_bytes(text, chosen)
    length = chosen.choice(_LENGTHS)(len(text)) if chosen.random() < 0.1 else len(text)
    data = bytearray(length.to_bytes(8, "little") + text + chosen.randbytes(num_bytes))
    if chosen.random() < 0.1:
        mutate_bytes(data, chosen)
    return bytes(data)


def read_whole(file: ModelFile) -> None:
    for tensor in read_header(file).values():
        assert map_tensor(tensor).nbytes == tensor.end - tensor.begin
        map_tensor(tensor).tobytes()


def main(num_files: int, seed: int, read=read_whole) -> Account:
    chosen, account = random.Random(seed), Account()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        for _ in range(num_files):
            content = make_file(chosen)
            path.write_bytes(content)
            start = time.process_time()
            try:
                read(ModelFile(str(path)))
                account.verdicts["accepted"] += 1
            except StorageError as error:
                message = str(error).removeprefix(f"{path}: ")
                account.verdicts[" ".join(word for word in message.split()[:5] if word.isalpha())] += 1
            except Exception:
                account.failures.append(f"{content[:500]!r}\n{traceback.format_exc()}")
            if time.process_time() - start > MAX_SECONDS:
                account.failures.append(f"over {MAX_SECONDS} s: {content[:500]!r}")
    return account


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    result = main(options.files, options.seed)
    for verdict, count in result.verdicts.most_common():
        print(f"{count:9,} {verdict}")
    print("\n".join(result.failures[:5]))
    print(f"{options.files:,} files, {len(result.failures)} failures")
    sys.exit(bool(result.failures))
