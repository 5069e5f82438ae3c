"""A store is the same however many processes, runs or attempts it took, and no work is done twice."""

import functools
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from word_renderer import WordRenderer, make_config

from sft_jax.data import part_sharing
from sft_jax.data import store as store_module
from sft_jax.data.part_files import read_part
from sft_jax.data.store import open_store
from sft_jax.datatypes import DataError, StorageError


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(part_sharing, "CHUNK_BYTES", 100)
    monkeypatch.setattr(part_sharing, "PART_BYTES", 500)


def write(tmp_path, count, *more):
    path = tmp_path / "rows.jsonl"
    rows = [f'{{"prompt": "{i}", "completion": "3"}}' for i in range(count)]
    path.write_text("".join(f"{row}\n" for row in [*rows, *more]))
    return path


def prepare(tmp_path, path, factory=WordRenderer, renderer=None, **data):
    config = make_config(tmp_path, path, **{"prepare_processes": 1, **data})
    return open_store(config.data.train[0], [str(path)], config.data, renderer or WordRenderer(), factory)


def content_of(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def rows_of(store):
    return [store.origin(i).line for i in range(len(store))]


def parts_in(tmp_path):
    return {path for path in (tmp_path / "stores").glob("*.parts/part-*") if not path.suffix}


# --- Processes --------------------------------------------------------------------------------------------------------


def test_the_store_is_the_same_for_any_number_of_processes(tmp_path):
    mixed = ["broken", '{"prompt": "?", "completion": "3"}', '{"text": "1"}'] * 20
    path = write(tmp_path, 100, *mixed)
    contents = [
        content_of(prepare(tmp_path, path, prepare_processes=count, store_dir=f"{tmp_path}/stores{count}").folder)
        for count in (1, 2, 3)
    ]
    assert contents[0] == contents[1] == contents[2]


def test_the_store_is_the_same_however_it_is_cut(tmp_path, monkeypatch):
    path = write(tmp_path, 100, "broken")
    small = content_of(prepare(tmp_path, path).folder)
    monkeypatch.setattr(part_sharing, "PART_BYTES", 1 << 20)
    assert content_of(prepare(tmp_path, path, store_dir=f"{tmp_path}/other").folder) == small


def open_without_jax(parent):
    """The factory of a worker: it is a process of its own, and has no jax that could take the accelerator."""
    assert os.getpid() != parent
    assert "jax" not in sys.modules
    assert os.environ["JAX_PLATFORMS"] == "cpu"
    return WordRenderer()


def test_workers_have_no_jax(tmp_path):
    factory = functools.partial(open_without_jax, os.getpid())
    assert len(prepare(tmp_path, write(tmp_path, 100), factory, prepare_processes=2)) == 100


def fail_to_open():
    raise KeyError("by mistake")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("factory", "error", "message"),
    [
        (functools.partial(WordRenderer, version="other"), DataError, "tokenizer or chat_template: changed while"),
        (fail_to_open, RuntimeError, "KeyError: 'by mistake'"),
        (die, DataError, r"config\.data\.prepare_processes: a process that prepares data ended with status -9"),
    ],
)
def test_what_a_worker_raises_reaches_the_run(tmp_path, factory, error, message):
    with pytest.raises(error, match=message):
        prepare(tmp_path, write(tmp_path, 100), factory, prepare_processes=2)


def test_little_work_starts_no_process(tmp_path, monkeypatch):
    monkeypatch.setattr(part_sharing, "PART_BYTES", 4 << 20)
    monkeypatch.setattr(part_sharing, "make_parts_together", None)
    assert len(prepare(tmp_path, write(tmp_path, 100), prepare_processes=0)) == 100


# --- Runs -------------------------------------------------------------------------------------------------------------


class SlowRenderer(WordRenderer):
    """Logs the process and the line of each row."""

    def __init__(self, log):
        super().__init__()
        self.log = log

    def render_row(self, row):
        time.sleep(0.004)
        with open(self.log, "a") as log:
            log.write(f"{os.getpid()} {row.origin.line}\n")
        return super().render_row(row)


PROGRAM = f"""
import functools, sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
from pathlib import Path
from test_preparation import SlowRenderer, part_sharing, prepare
part_sharing.CHUNK_BYTES, part_sharing.PART_BYTES = 100, 500
folder, processes = Path(sys.argv[1]), int(sys.argv[2])
factory = functools.partial(SlowRenderer, folder / "log")
assert len(prepare(folder, folder / "rows.jsonl", factory, factory(), prepare_processes=processes)) == 200
"""


def start(tmp_path, processes=1):
    return subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path), str(processes)])


def rendered(tmp_path):
    return [line.split() for line in (tmp_path / "log").read_text().splitlines()]


def test_two_runs_share_the_work(tmp_path):
    path = write(tmp_path, 200)
    runs = [start(tmp_path), start(tmp_path)]
    assert [run.wait(60) for run in runs] == [0, 0]
    rows = rendered(tmp_path)
    by_run = [sum(pid == str(run.pid) for pid, _ in rows) for run in runs]
    assert sum(by_run) == len(rows) == 200, "every row is rendered once"
    assert min(by_run) >= 20, by_run
    (folder,) = (tmp_path / "stores").iterdir()
    assert content_of(folder) == content_of(prepare(tmp_path, path, store_dir=f"{tmp_path}/alone").folder)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_preparation_goes_on_with_the_parts_that_are_done(tmp_path, monkeypatch, processes):
    path = write(tmp_path, 200)
    run = start(tmp_path, processes)
    deadline = time.monotonic() + 60
    while len(parts_in(tmp_path)) < 5:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    run.kill()
    run.wait()
    time.sleep(0.2)
    before = len(rendered(tmp_path))
    time.sleep(0.3)
    assert len(rendered(tmp_path)) == before, "no worker outlives its parent"
    kept = sum(read_part(part).account.rows_read for part in parts_in(tmp_path))
    assert 0 < kept <= before < 200
    again = []

    class Counting(WordRenderer):
        def render_row(self, row):
            again.append(row.origin.line)
            return super().render_row(row)

    monkeypatch.setattr(part_sharing, "_appear", None)  # claims of a process that is gone are not waited for
    store = prepare(tmp_path, path, renderer=Counting())
    assert len(again) == 200 - kept
    assert rows_of(store) == list(range(1, 201))
    assert list((tmp_path / "stores").iterdir()) == [store.folder]  # nothing is left of the parts


def test_threads_of_one_process_may_prepare_the_same_store(tmp_path):
    path = write(tmp_path, 100)
    stores = []
    threads = [threading.Thread(target=lambda: stores.append(prepare(tmp_path, path))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [rows_of(store) for store in stores] == [list(range(1, 101))] * 4
    assert list((tmp_path / "stores").iterdir()) == [stores[0].folder]


def test_parts_that_are_damaged_or_of_other_content_are_made_again(tmp_path, monkeypatch):
    path = write(tmp_path, 60)

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(store_module, "_join", fail)
        with pytest.raises(StorageError, match="No space left on device"):
            prepare(tmp_path, path)
    first, second, third, *_ = sorted(parts_in(tmp_path))
    content = bytearray(first.read_bytes())
    content[len(content) // 2] ^= 1
    first.write_bytes(content)
    second.write_bytes(third.read_bytes())  # whole, but of another place
    third.write_bytes(b"")
    for claim in first.parent.glob("*.claim"):
        claim.unlink()
    assert rows_of(prepare(tmp_path, path)) == list(range(1, 61))


def test_a_claim_that_comes_to_nothing_is_overridden(tmp_path, monkeypatch):
    path = write(tmp_path, 60)
    monkeypatch.setattr(part_sharing, "PATIENCE_SECONDS", 0.3)
    claim = part_sharing._claim

    def claimed_elsewhere(part, override):
        if part.name == "part-00002":
            part.with_name(f"{part.name}.claim").write_text("another-host 7 life")
        return claim(part, override)

    monkeypatch.setattr(part_sharing, "_claim", claimed_elsewhere)
    started = time.monotonic()
    assert rows_of(prepare(tmp_path, path)) == list(range(1, 61))
    assert 0.3 < time.monotonic() - started < 10


def test_a_claim_of_one_killed_before_it_wrote_its_name_is_not_waited_for(tmp_path, monkeypatch):
    path = write(tmp_path, 60)
    claim = part_sharing._claim

    def claimed_by_nobody(part, override):
        if part.name == "part-00002":
            part.with_name(f"{part.name}.claim").touch()
        return claim(part, override)

    monkeypatch.setattr(part_sharing, "_claim", claimed_by_nobody)
    monkeypatch.setattr(part_sharing, "_appear", None)  # nobody is waited for
    assert rows_of(prepare(tmp_path, path)) == list(range(1, 61))


def test_a_name_that_is_being_written_is_waited_for(tmp_path, monkeypatch):
    claim = tmp_path / "part-00000.claim"
    claim.touch()
    monkeypatch.setattr(part_sharing.time, "sleep", lambda _: claim.write_text("another-host 7 life"))
    assert not part_sharing._claim(tmp_path / "part-00000", override=False)


def test_whose_claims_count():
    host, pid, life = part_sharing._ME.split(" ")
    assert not part_sharing._is_gone(f"{host} {pid} {life}")  # another thread of ours
    assert part_sharing._is_gone(f"{host} {pid} earlier")
    assert not part_sharing._is_gone(f"{host} {os.getppid()} life")
    assert not part_sharing._is_gone("another-host 7 life")
    assert part_sharing._is_gone("")  # killed before it wrote its name
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert part_sharing._is_gone(f"{host} {process.pid} life")
