"""A store holds what the renderer gave, accounts for every row, and can be neither stale nor half written."""

import dataclasses
import errno
import functools
import json
import os

import numpy as np
import pytest
from word_renderer import WordRenderer, make_config

from sft_jax.config_schema import DataConfig, SourceConfig
from sft_jax.data import part_sharing, preparation
from sft_jax.data import store as store_module
from sft_jax.data.conversations import parse_row
from sft_jax.data.example_builder import RenderedExample
from sft_jax.data.rendering import open_renderer
from sft_jax.data.report import account_to_json, check_account
from sft_jax.data.sources import read_rows, resolve_files
from sft_jax.data.store import open_store
from sft_jax.datatypes import ConfigError, DataError, StorageError

GOOD = '{"prompt": "1 2", "completion": "3"}'
EXPANDS = (
    '{"messages": [{"role": "system", "content": "rewrites"}, {"role": "user", "content": "1"}, '
    '{"role": "assistant", "content": "2"}, {"role": "user", "content": "3"}, {"role": "assistant", "content": "4"}]}'
)


def write(tmp_path, *lines, name="rows.jsonl"):
    path = tmp_path / name
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def prepare(tmp_path, path, renderer=None, source=None, **data):
    config = make_config(tmp_path, path, **data)
    source = dataclasses.replace(config.data.train[0], **(source or {}))
    factory = functools.partial(WordRenderer, data.get("unknown_tokens", "error"))
    return open_store(source, resolve_files(str(path), "path"), config.data, renderer or factory(), factory)


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(part_sharing, "CHUNK_BYTES", 100)
    monkeypatch.setattr(part_sharing, "PART_BYTES", 500)


def lines_of(lost):
    return [origin.line for origin in lost.origins]


def test_a_store_gives_back_what_the_renderer_gave(tmp_path):
    rewriting = EXPANDS.replace("rewrites", "5 5")
    path = write(tmp_path, rewriting, "", rewriting.replace("4", "4 4"), EXPANDS.replace('"rewrites"', '"6"'))
    renderer = WordRenderer()
    expected = [e for row in read_rows(str(path)) for e in renderer.render(parse_row(row, "messages", {}))]
    store = prepare(tmp_path, path)
    assert len(store) == len(expected) == 3
    assert store.lengths.tolist() == [len(example) for example in expected]
    assert store.lengths.dtype == np.int32
    for index, example in enumerate(expected):
        found = store.example(index)
        assert (found.origin, store.origin(index)) == (example.origin, example.origin)
        for name in ("inputs", "targets", "loss_weights"):
            assert getattr(found, name).tolist() == getattr(example, name).tolist()
            assert getattr(found, name).dtype == getattr(example, name).dtype
    assert [example.origin.line for example in expected] == [1, 3, 4]


def test_the_arrays_on_disk_are_those_of_the_module_docstring(tmp_path):
    path = write(tmp_path, GOOD, GOOD.replace('"3"', '"3 4"'))
    folder = prepare(tmp_path, path).folder
    assert np.fromfile(folder / "ids.int32", np.int32).tolist() == [1, 5, 11, 12, 6, 13, 2, 1, 5, 11, 12, 6, 13, 14, 2]
    assert np.fromfile(folder / "loss_weights.float32", np.float32).tolist() == [0] * 5 + [1, 1] + [0] * 5 + [1] * 3
    assert np.fromfile(folder / "offsets.int64", np.int64).tolist() == [0, 7, 15]
    assert np.fromfile(folder / "files.int32", np.int32).tolist() == [0, 0]
    assert np.fromfile(folder / "lines.int64", np.int64).tolist() == [1, 2]
    words = np.random.Philox(key=0).random_raw(8).tolist()
    first = sum((token_id + 1) * word for token_id, word in zip([1, 5, 11, 12, 6, 13, 2], words, strict=False))
    assert np.fromfile(folder / "hashes.uint64", "<u8")[0] == first % 2**64
    arrays = ["elements.int32", "files.int32", "hashes.uint64", "ids.int32", "lines.int64", "loss_weights.float32"]
    assert sorted(file.name for file in folder.iterdir()) == [*arrays, "meta.json", "offsets.int64"]


def test_the_account_balances(tmp_path):
    path = write(
        tmp_path,
        GOOD,
        "broken",
        GOOD.replace("1 2", "1 " * 20),
        GOOD.replace("1 2", "?"),
        '{"text": "1 2"}',
        GOOD.replace('"completion"', '"id": 7, "completion"'),
        *["broken"] * 6,
    )
    account = prepare(tmp_path, path, too_long="drop", unknown_tokens="drop").account
    assert account.rows_read == 12
    assert account.rows_trained == account.examples == 2
    assert {reason: lost.count for reason, lost in account.bad.items()} == {"malformed_json": 7, "wrong_format": 1}
    assert {reason: lost.count for reason, lost in account.dropped.items()} == {"too_long": 1, "unknown_token": 1}
    assert account.rows_read == account.rows_trained + account.rows_bad + account.rows_dropped
    assert lines_of(account.bad["malformed_json"]) == [2, 7, 8, 9, 10]  # the first five
    assert (account.tokens, account.supervised_tokens) == (12, 4)
    assert account.ignored_fields == {"id": 1}


@pytest.mark.parametrize("policy", ["error", "drop"])
def test_a_policy_decides_whether_a_lost_row_is_bad(tmp_path, policy):
    path = write(tmp_path, GOOD, GOOD.replace("1 2", "1 " * 20), GOOD.replace("1 2", "?"))
    account = prepare(tmp_path, path, too_long=policy, unknown_tokens=policy).account
    reasons = account.bad if policy == "error" else account.dropped
    assert sorted(reasons) == ["too_long", "unknown_token"]
    assert (account.rows_bad, account.rows_dropped) == ((2, 0) if policy == "error" else (0, 2))


def test_what_the_renderer_counts_in_trained_rows_is_in_the_account(tmp_path):
    path = write(tmp_path, GOOD, GOOD.replace("1 2", "? 1 ?"), GOOD.replace("1 2", "? " * 20))
    account = prepare(tmp_path, path, unknown_tokens="keep").account
    assert (account.rows_trained, account.rendering) == (2, {"unknown_tokens": 2})


def test_a_row_of_several_examples_is_trained_or_lost_as_one(tmp_path):
    path = write(tmp_path, EXPANDS)
    account = prepare(tmp_path, path).account
    assert (account.rows_trained, account.examples, account.rendering) == (1, 2, {"expanded": 1})
    account = prepare(tmp_path, path, max_seq_len=8, too_long="drop").account  # the second is longer
    assert (account.rows_trained, account.examples, account.rows_dropped) == (0, 0, 1)


def test_max_seq_len_bounds_the_inputs(tmp_path):
    path = write(tmp_path, GOOD)  # 7 ids: 6 inputs and their targets
    assert len(prepare(tmp_path, path, max_seq_len=6)) == 1
    (message,) = prepare(tmp_path, path, max_seq_len=5).account.bad["too_long"].messages
    assert message.startswith("is 6 tokens long; config.data.max_seq_len is 5. Raise it, shorten the row, or set ")


def test_a_row_with_no_supervised_token_is_bad(tmp_path):
    class Unsupervised(WordRenderer):
        def render_row(self, row):
            rendered = super().render_row(row)
            ((example, *turns),) = rendered.examples
            unsupervised = dataclasses.replace(example, loss_weights=example.loss_weights * 0)
            return rendered._replace(examples=[RenderedExample(unsupervised, *turns)])

    account = prepare(tmp_path, write(tmp_path, GOOD), Unsupervised()).account
    assert lines_of(account.bad["nothing_supervised"]) == [1]


def test_auto_takes_the_first_row_that_has_a_format(tmp_path):
    path = write(tmp_path, "broken", '{"question": "1"}', GOOD, '{"text": "1"}')
    account = prepare(tmp_path, path).account
    assert account.rows_trained == 1
    assert lines_of(account.bad["malformed_json"]) == [1]
    assert lines_of(account.bad["wrong_format"]) == [2, 4]


def test_a_row_that_may_be_read_in_two_ways_is_bad_wherever_it_stands(tmp_path):
    two_ways = GOOD[:-1] + ', "text": "2 3"}'
    account = prepare(tmp_path, write(tmp_path, GOOD, two_ways, GOOD)).account
    assert (account.rows_trained, lines_of(account.bad["wrong_format"])) == (2, [2])
    account = prepare(tmp_path, write(tmp_path, GOOD, two_ways), source={"format": "prompt_completion"}).account
    assert account.rows_trained == 2


def test_role_map_reaches_the_rows(tmp_path):
    path = write(tmp_path, EXPANDS.replace('"user"', '"human"'))
    assert prepare(tmp_path, path).account.bad["unknown_role"].count == 1
    assert prepare(tmp_path, path, role_map={"human": "user"}).account.rows_trained == 1


# --- One name for one content -----------------------------------------------------------------------------------------


def test_everything_that_shapes_a_store_is_in_its_name(tmp_path):
    path = write(tmp_path, GOOD)
    stores = [
        prepare(tmp_path, path),
        prepare(tmp_path, path, max_seq_len=17),
        prepare(tmp_path, path, too_long="drop"),
        prepare(tmp_path, path, unknown_tokens="drop"),
        prepare(tmp_path, path, unknown_tokens="keep"),
        prepare(tmp_path, path, role_map={"human": "user"}),
        prepare(tmp_path, path, WordRenderer(version="other words")),
        prepare(tmp_path, write(tmp_path, GOOD.replace("3", "4"))),  # the same path
    ]
    assert len({store.fingerprint for store in stores}) == len(stores)
    assert stores[-1].example(0).targets.tolist() != stores[0].example(0).targets.tolist()


def test_how_a_file_is_read_is_in_its_name(tmp_path):
    array = f"[{GOOD}, {GOOD}]"
    lines = prepare(tmp_path, write(tmp_path, GOOD, array), max_bad_fraction=0.5)
    assert lines.account.rows_trained == 1
    stored = prepare(tmp_path, write(tmp_path, array, name="rows.json"))
    named = prepare(tmp_path, write(tmp_path, array, name="rows.jsonl"), max_bad_fraction=1.0)
    assert stored.account.rows_trained == 2
    assert named.fingerprint != stored.fingerprint


def test_the_path_and_the_limit_on_bad_rows_are_not_in_its_name(tmp_path):
    store = prepare(tmp_path, write(tmp_path, GOOD))
    moved = prepare(tmp_path, write(tmp_path, GOOD, name="moved.jsonl"), max_bad_fraction=0.5)
    assert moved.fingerprint == store.fingerprint
    assert moved.origin(0).path == str(tmp_path / "moved.jsonl")


def test_a_store_is_made_once(tmp_path, monkeypatch):
    path = write(tmp_path, GOOD)
    first = prepare(tmp_path, path)
    monkeypatch.setattr(preparation, "parse_row", None)  # no row may be parsed again
    assert prepare(tmp_path, path).folder == first.folder


def test_a_source_that_changes_while_it_is_read_is_refused(tmp_path):
    path = write(tmp_path, GOOD, GOOD)

    class Writer(WordRenderer):
        """Asked for its fingerprint between the hashing of the file and the reading."""

        def fingerprint(self):
            path.write_text(f"{GOOD}\n{GOOD}\n{GOOD}\n")
            return super().fingerprint()

    with pytest.raises(DataError, match=r"rows\.jsonl: changed while it was read"):
        prepare(tmp_path, path, Writer())
    assert not [folder for folder in (tmp_path / "stores").iterdir() if folder.suffix != ".parts"]


@pytest.mark.parametrize("damage", ["truncated", "changed", "missing"])
@pytest.mark.parametrize("name", ["ids.int32", "loss_weights.float32", "hashes.uint64", "lines.int64", "meta.json"])
def test_a_damaged_store_is_noticed(tmp_path, name, damage):
    path = write(tmp_path, GOOD)
    file = prepare(tmp_path, path).folder / name
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content[:-4] if damage == "truncated" else content)
    if damage == "missing":
        file.unlink()
    with pytest.raises(DataError, match=rf"is damaged: {name} has .*\. Delete it"):
        prepare(tmp_path, path)


def test_a_large_array_is_held_against_its_size_alone(tmp_path, monkeypatch):
    path = write(tmp_path, GOOD)
    file = prepare(tmp_path, path).folder / "ids.int32"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    monkeypatch.setattr(store_module, "CHECKED_BYTES", len(content) - 1)
    assert len(prepare(tmp_path, path)) == 1
    file.write_bytes(content[:-4])
    with pytest.raises(DataError, match="is damaged"):
        prepare(tmp_path, path)


def test_a_store_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "stores").write_text("a file")
    with pytest.raises(StorageError, match=r"config\.data\.store_dir: .*stores cannot be written: .* Remove the file"):
        prepare(tmp_path, write(tmp_path, GOOD))


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "No space left on device. Free space there"),
        (errno.EACCES, "Permission denied. Give yourself the permission to write there"),
        (errno.EROFS, "Read-only file system. Mount it so that it can be written"),
        (errno.EIO, "Input/output error. Look at what is there"),
    ],
)
def test_why_a_store_cannot_be_written_decides_what_to_do(tmp_path, monkeypatch, number, advice):
    def fail(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(store_module, "make_parts", fail)
    with pytest.raises(StorageError, match=rf"cannot be written: {advice}, or name another folder\.$"):
        prepare(tmp_path, write(tmp_path, GOOD))


# --- Several files ----------------------------------------------------------------------------------------------------


def test_a_source_of_several_files_keeps_the_file_and_the_line(tmp_path, small_parts):
    (tmp_path / "rows").mkdir()
    for name, lines in (("a", [GOOD, "broken"]), ("b", ['{"text": "1"}', "[]", '{"text": "2"}']), ("c", [GOOD] * 9)):
        write(tmp_path / "rows", *lines, name=f"{name}.jsonl")
    store = prepare(tmp_path, tmp_path / "rows")
    expected = [("a", 1), ("b", 1), ("b", 3), *(("c", line) for line in range(1, 10))]
    names = [(os.path.basename(store.origin(i).path)[0], store.origin(i).line) for i in range(len(store))]
    assert names == expected  # and each file has its own format
    bad = store.account.bad
    assert [str(origin) for lost in bad.values() for origin in lost.origins] == [
        f"{tmp_path}/rows/a.jsonl:2",
        f"{tmp_path}/rows/b.jsonl:2",
    ]
    (tmp_path / "rows").rename(tmp_path / "moved")
    moved = prepare(tmp_path, tmp_path / "moved")
    assert moved.folder == store.folder
    assert str(moved.account.bad["not_an_object"].origins[0]) == f"{tmp_path}/moved/b.jsonl:2"
    assert str(moved.origin(1)) == f"{tmp_path}/moved/b.jsonl:1"


def test_the_order_of_files_is_in_the_name(tmp_path):
    (tmp_path / "rows").mkdir()
    for number in "12":
        write(tmp_path / "rows", GOOD.replace("3", number), name=f"{number}.jsonl")
    first = prepare(tmp_path, tmp_path / "rows").fingerprint
    (tmp_path / "rows" / "1.jsonl").rename(tmp_path / "rows" / "9.jsonl")
    assert prepare(tmp_path, tmp_path / "rows").fingerprint != first


# --- The rows that are taken ------------------------------------------------------------------------------------------


def rows_of(store):
    return [store.origin(i).line for i in range(len(store))]


def numbered(count):
    return [GOOD.replace("1 2", f"{i}") for i in range(count)]


def test_max_rows_takes_the_first_and_counts_the_others(tmp_path, small_parts):
    path = write(tmp_path, *numbered(10), "", "broken", *numbered(20))
    for max_rows, bad in ((1, 0), (10, 0), (11, 1), (15, 1), (31, 1), (50, 1)):
        store = prepare(tmp_path, path, source={"max_rows": max_rows})
        taken = min(max_rows, 31)
        assert len(store) == taken - bad
        assert (store.account.rows_read, store.account.rows_not_taken) == (31, 31 - taken)
        store.account.check_balance()
    assert rows_of(prepare(tmp_path, path, source={"max_rows": 12})) == [*range(1, 11), 13]


def test_a_split_has_two_sides(tmp_path, small_parts):
    path = write(tmp_path, *numbered(400), "broken")
    sides = {
        split: prepare(tmp_path, path, source={"split": split, "held_out_fraction": 0.25})
        for split in ("train", "held_out")
    }
    assert sorted(rows_of(sides["train"]) + rows_of(sides["held_out"])) == list(range(1, 401))
    assert 80 <= len(sides["held_out"]) <= 120
    for store in sides.values():
        account = store.account
        account.check_balance()
        assert (account.rows_read, account.rows_bad) == (401, 1)  # a row that cannot be read is on both sides
        assert account.rows_not_taken == 400 - len(store)
    assert rows_of(sides["held_out"])[:8] == [1, 5, 8, 10, 11, 14, 21, 22]  # for ever: what is held out stays so


def test_a_row_is_always_on_the_same_side(tmp_path):
    rows = [json.loads(row) | {"id": i, "note": "Foxholm \u2028 é"} for i, row in enumerate(numbered(50))]
    options = {"split": "held_out", "held_out_fraction": 0.5}
    first = write(tmp_path, *map(json.dumps, rows))
    turned = [json.dumps(dict(reversed(row.items())), ensure_ascii=False) for row in reversed(rows)]
    found = [prepare(tmp_path, path, source=options) for path in (first, write(tmp_path, *turned, name="other.jsonl"))]
    assert set(rows_of(found[0])) == {51 - line for line in rows_of(found[1])}
    wider = prepare(tmp_path, first, source=options | {"held_out_fraction": 0.6})
    assert set(rows_of(found[0])) < set(rows_of(wider))


# --- The account's limit ----------------------------------------------------------------------------------------------

FIELD = "config.data.train[1]"


def test_bad_rows_over_the_limit_stop_with_reasons_lines_and_remedies(tmp_path):
    path = write(tmp_path, GOOD, "broken", GOOD.replace('"3"', "3"), "{", "[]", GOOD, GOOD, GOOD, GOOD, GOOD)
    account = prepare(tmp_path, path).account
    check_account(account, str(path), 0.4, FIELD)
    with pytest.raises(DataError) as raised:
        check_account(account, str(path), 0.39, FIELD)
    assert str(raised.value) == (
        f"{FIELD}.path: 4 of 10 rows of {path} are bad; config.data.max_bad_fraction allows 0.39 of them.\n"
        f"       2 malformed_json: {path}:2: JSON is malformed: invalid character (byte 0). Fix or remove the line.\n"
        f"         also {path}:4\n"
        f"       1 content_not_text: {path}:3: completion is a number; expected a string. Fix the row.\n"
        f'       1 not_an_object: {path}:5: is a JSON list; expected an object such as {{"messages": [...]}}. '
        "Let the name of a file that is one array end in .json.\n"
        "Mend the rows, or raise config.data.max_bad_fraction to have them dropped and counted."
    )


def test_rows_dropped_by_choice_are_not_bad(tmp_path):
    path = write(tmp_path, GOOD, GOOD.replace("1 2", "1 " * 20))
    check_account(prepare(tmp_path, path, too_long="drop").account, str(path), 0.0, FIELD)


def test_a_source_with_nothing_to_train_on_is_refused(tmp_path):
    path = write(tmp_path, GOOD.replace("1 2", "1 " * 20))
    with pytest.raises(
        DataError, match=r"none of the 1 rows of .* can be trained on\.\n +1 too_long: .*rows\.jsonl:1: "
    ):
        check_account(prepare(tmp_path, path, too_long="drop").account, str(path), 1.0, FIELD)
    empty = write(tmp_path, "", name="empty.jsonl")
    with pytest.raises(DataError, match=r"^config\.data\.train\[1\]\.path: .*empty\.jsonl has no rows"):
        check_account(prepare(tmp_path, empty).account, str(empty), 1.0, FIELD)


def test_rows_of_an_array_on_one_line_are_told_apart(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text(f"[{GOOD}, {EXPANDS}, 17, {GOOD}]")
    store = prepare(tmp_path, path, source=dict(format="auto"))
    assert [str(store.origin(i)) for i in range(len(store))] == [f"{path}:1#1", f"{path}:1#4"]
    bad = {reason: str(lost.origins[0]) for reason, lost in store.account.bad.items()}
    assert bad == {"wrong_format": f"{path}:1#2", "not_an_object": f"{path}:1#3"}
    assert prepare(tmp_path, path).account == store.account  # read again


def test_the_report_names_file_and_line(tmp_path):
    path = write(tmp_path, GOOD, "broken")
    report = account_to_json(prepare(tmp_path, path).account)
    assert json.loads(json.dumps(report)) == report
    assert report["bad"]["malformed_json"]["count"] == 1
    assert report["bad"]["malformed_json"]["first"][0]["origin"] == f"{path}:2"


def test_a_template_that_writes_the_date_for_some_rows_only_is_refused(tmp_path, tiny_byte_level):
    """The probes did not see it; the row that does must not be trained under a fingerprint without the date."""
    (tmp_path / "late.jinja").write_text(
        "{{ strftime_now('%d %b %Y') if messages | length > 3 else '' }}"
        "{% for m in messages %}{{ '<|im_start|>' + m.role + m.content + '<|im_end|>' }}{% endfor %}"
        "{{ '<|im_start|>assistant' if add_generation_prompt else '' }}"
    )
    turns = [{"role": role, "content": "a"} for role in ("user", "assistant", "user", "assistant")]
    path = write(tmp_path, json.dumps({"messages": turns}))
    data = DataConfig(
        train=(SourceConfig(path=str(path)),),
        tokenizer=str(tiny_byte_level),
        chat_template=str(tmp_path / "late.jinja"),
        store_dir=str(tmp_path / "stores"),
    )
    factory = functools.partial(open_renderer, data, "")
    with pytest.raises(ConfigError, match="writes today's date into every prompt"):
        open_store(data.train[0], [str(path)], data, factory(), factory)
