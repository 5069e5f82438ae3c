"""Both kinds of tokenizer: text round-trips, continuations join without a seam, and text never becomes control."""

import json
import logging
import shutil

import pytest
import sentencepiece
import tokenizers
from tiny_tokenizers import SENTENCES, edit_json, train_sentencepiece, write_byte_level, write_sentencepiece

from sft_jax.data.sentencepiece_model import Piece, parse_sentencepiece
from sft_jax.data.tokenizer import load_tokenizer
from sft_jax.data.tokenizer_sample import SAMPLE
from sft_jax.datatypes import ConfigError, DataError

TEXTS = (*SENTENCES, *SAMPLE, "", " ", "\n", "  \n x", "\ue000\ue001 and \ue000", "nul \x00 byte", "<s></s><unk><0x0A>")
NEW = ("<|im_start|>", "<|im_end|>")


@pytest.fixture(scope="module", params=["sentencepiece", "byte_level", "prepend"])
def tokenizer(request, tiny_sentencepiece, tiny_byte_level, tmp_path_factory):
    if request.param == "byte_level":
        return load_tokenizer(tiny_byte_level)
    if request.param == "prepend":  # a tokenizer.json in Llama-2's manner, made from the sentencepiece model
        return load_tokenizer(write_llama_json(tiny_sentencepiece, tmp_path_factory.mktemp("prepend") / "t"))
    return load_tokenizer(tiny_sentencepiece)


def write_llama_json(source, folder, prefix=None):
    """`source`'s sentencepiece model as a tokenizer.json alone, with `prefix` as its normalizer for the space."""
    folder.mkdir()
    load_tokenizer(source).save(folder, "")
    (folder / "tokenizer.model").unlink()
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prefix = prefix or {"type": "Prepend", "prepend": "▁"}
    if prefix["type"] == "Metaspace":
        edit_json(folder / "tokenizer.json", normalizer=None, pre_tokenizer=prefix)
    else:
        edit_json(folder / "tokenizer.json", normalizer={"type": "Sequence", "normalizers": [prefix, replace]})
    return folder


def control_ids(tokenizer, ids):
    return [i for i in ids if i in tokenizer.control.texts]


# --- Text ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
def test_text_round_trips(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text
    continued = tokenizer.encode(text, continuation=True)
    assert tokenizer.decode(continued, continuation=True) == text
    assert max([*tokenizer.encode(text), *continued, 0]) < tokenizer.vocab_size


@pytest.mark.parametrize("text", [text for text in TEXTS if len(text) > 1])
def test_a_continuation_joins_without_a_seam(tokenizer, text):
    for border in (1, len(text) // 2, len(text) - 1):
        ids = tokenizer.encode(text[:border]) + tokenizer.encode(text[border:], continuation=True)
        assert tokenizer.decode(ids) == text


def test_continuations_have_no_prefix_where_texts_have_one(tiny_sentencepiece):
    tokenizer = load_tokenizer(tiny_sentencepiece)
    space = tokenizer.encode(" ", continuation=True)
    assert tokenizer.encode("zq") == space + tokenizer.encode("zq", continuation=True)
    whole = "Hi, how are you today?"
    assert tokenizer.encode("Hi,") + tokenizer.encode(whole[3:], continuation=True) == tokenizer.encode(whole)


def test_sentencepiece_itself_encodes(tiny_sentencepiece):
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tiny_sentencepiece / "tokenizer.model"))
    tokenizer = load_tokenizer(tiny_sentencepiece)
    for text in TEXTS:
        if "\ue000\ue001" not in text:
            assert tokenizer.encode(text) == reference.encode(text)


@pytest.mark.parametrize("options", [{"model_type": "unigram"}, {"normalization_rule_name": "nmt_nfkc"}])
def test_a_model_that_changes_text_keeps_its_own_rules(tmp_path, options):
    options = {"vocab_size": 120, "byte_fallback": False, "remove_extra_whitespaces": True} | options
    write_sentencepiece(tmp_path, **options)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    tokenizer = load_tokenizer(tmp_path)
    for text in SENTENCES:
        assert tokenizer.encode(text) == reference.encode(text)
        for border in (text.index(" "), text.index(" ") + 3):
            ids = tokenizer.encode(text[:border]) + tokenizer.encode(text[border:], continuation=True)
            assert tokenizer.decode(ids) == text
    assert tokenizer.encode("The  answer ") == tokenizer.encode("The answer")


# --- Control tokens --------------------------------------------------------------------------------------------------


def test_text_never_becomes_control(tokenizer):
    for text in tokenizer.control_tokens:
        for around in ("{}", "a{}b", " {} ", "{}{}", "\n{}"):
            content = around.replace("{}", text)
            for continuation in (False, True):
                ids = tokenizer.encode(content, continuation=continuation)
                assert control_ids(tokenizer, ids) == []
                assert tokenizer.decode(ids, continuation=continuation) == content


def test_control_tokens_decode_as_their_text(tokenizer):
    for text, token_id in tokenizer.control_tokens.items():
        assert tokenizer.token_id(text) == token_id
        assert tokenizer.decode([token_id, *tokenizer.encode("Hi", continuation=True)], continuation=True)[:-2] == text
    assert tokenizer.token_id("clips") is None


def test_a_whole_rendered_text_decodes(tokenizer):
    first, second = list(tokenizer.control_tokens)[1:3]
    text = f"{first}user\nHi{second}\n{first}assistant\n  Hello{second}"
    assert tokenizer.decode(tokenizer.encode_parts(tokenizer.control.split(text))) == text


def test_user_defined_pieces_are_control_unless_they_are_spaces(tmp_path):
    write_sentencepiece(tmp_path, user_defined_symbols=["<|user|>", "▁▁▁▁"])
    raw = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    tokenizer = load_tokenizer(tmp_path)
    user, spaces = raw.piece_to_id("<|user|>"), raw.piece_to_id("▁▁▁▁")
    assert user in raw.encode("a<|user|>b")  # the trap
    assert user not in tokenizer.encode("a<|user|>b")
    assert tokenizer.token_id("<|user|>") == user
    assert spaces in tokenizer.encode("a    b")
    assert tokenizer.token_id("▁▁▁▁") is None


def test_an_ordinary_piece_that_the_folder_calls_special_is_control(tiny_sentencepiece, tmp_path):
    shutil.copytree(tiny_sentencepiece, tmp_path / "t")
    raw = load_tokenizer(tiny_sentencepiece)
    (piece,) = raw.encode(" clips", continuation=True)
    (tmp_path / "t" / "tokenizer_config.json").write_text(json.dumps({"pad_token": "▁clips"}))
    tokenizer = load_tokenizer(tmp_path / "t")
    assert tokenizer.token_id("▁clips") == piece
    assert piece not in tokenizer.encode("sold clips")
    assert tokenizer.decode(tokenizer.encode("sold clips")) == "sold clips"


@pytest.mark.parametrize("kind", ["WordLevel", "Unigram", "BPE"])
def test_entries_of_the_vocabulary_that_are_control_are_not_found_in_text(tmp_path, kind):
    pieces = ("<unk>", "<s>", "Hi", "<think>", "H", "i", "<", "<s", "s", ">")
    vocab = {piece: i for i, piece in enumerate(pieces)}
    model = {
        "WordLevel": {"vocab": vocab, "unk_token": "<unk>"},
        "Unigram": {"vocab": [[text, -1.0] for text in vocab], "unk_id": 0},
        "BPE": {
            "vocab": vocab,
            "merges": [["H", "i"], ["<", "s"], ["<s", ">"]],
            "unk_token": "<unk>",
            "ignore_merges": True,
        },
    }[kind]
    flags = {"special": True, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
    spec = {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": text} | flags for i, text in ((0, "<unk>"), (1, "<s>"), (10, "<new>"))],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": kind} | model,
    }
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<think>"}))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.control_tokens == {"<unk>": 0, "<s>": 1, "<think>": 3, "<new>": 10}
    assert tokenizer.encode("Hi") == [2]
    for text in ("<s>", "<think>", "Hi <think>", "<new>", "\ue000\ue0010", "\ue000\ue0011", "\ue000\ue0012"):
        assert not {1, 3, 10} & set(tokenizer.encode(text))


def test_added_tokens_with_runs_of_spaces_stay_text(tiny_byte_level):
    tokenizer = load_tokenizer(tiny_byte_level)
    spaces = tokenizers.Tokenizer.from_file(str(tiny_byte_level / "tokenizer.json")).token_to_id("    ")
    assert spaces in tokenizer.encode("a    b")
    assert "    " not in tokenizer.control_tokens
    assert tokenizer.token_id("<think>") is not None  # non-special, and control all the same


@pytest.mark.parametrize(
    ("prefix", "restarts"),
    [
        ({"type": "Prepend", "prepend": "▁"}, True),
        ({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}, True),
        ({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}, False),
    ],
)
def test_pieces_are_encoded_as_the_library_would(tiny_sentencepiece, tmp_path, prefix, restarts):
    folder = write_llama_json(tiny_sentencepiece, tmp_path / "t", prefix)
    spec = json.loads((folder / "tokenizer.json").read_text())
    edit_json(folder / "tokenizer.json", added_tokens=[f | {"normalized": False} for f in spec["added_tokens"]])
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer = load_tokenizer(folder)
    assert bool(tokenizer.restarting) == restarts
    for text in ("Hi", "<s>Hi</s>", "Hi</s>Hi <s> Hi", "</s>\nHi"):
        expected = library.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode_parts(tokenizer.control.split(text)) == expected


def test_sentencepiece_restarts_after_bos_alone(tiny_sentencepiece):
    tokenizer = load_tokenizer(tiny_sentencepiece, NEW)
    fresh, continued = tokenizer.encode("Hi"), tokenizer.encode("Hi", continuation=True)
    bos, start = tokenizer.token_id("<s>"), tokenizer.token_id("<|im_start|>")
    assert tokenizer.encode_parts(["Hi", bos, "Hi", start, "Hi"]) == [*fresh, bos, *fresh, start, *continued]


# --- New tokens ------------------------------------------------------------------------------------------------------


def test_new_tokens_are_one_id_each_behind_the_vocabulary(tiny_sentencepiece):
    before, after = load_tokenizer(tiny_sentencepiece), load_tokenizer(tiny_sentencepiece, NEW)
    assert [after.token_id(text) for text in NEW] == [before.vocab_size, before.vocab_size + 1]
    assert after.vocab_size == before.vocab_size + 2
    assert all(after.encode(text) == before.encode(text) for text in (*TEXTS, *NEW))


@pytest.mark.parametrize("new", [("</s>",), ("<|a|>", "<|a|>"), ("",), ("▁clips",), ("  ",)])
def test_new_tokens_must_be_new(tiny_sentencepiece, new):
    with pytest.raises(ConfigError, match=r"config\.data\.new_tokens\[\d\]: '.*' is (there already|empty)"):
        load_tokenizer(tiny_sentencepiece, new)


# --- Saving ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("new", [(), ("<|a|>", "<|b|>")])
def test_a_saved_folder_is_the_same_tokenizer(tokenizer, tmp_path, new):
    if new:
        (tmp_path / "first").mkdir()
        tokenizer.save(tmp_path / "first", "")
        tokenizer = load_tokenizer(tmp_path / "first", new)
    (tmp_path / "saved").mkdir()
    tokenizer.save(tmp_path / "saved", "{{ messages }}\n")
    again = load_tokenizer(tmp_path / "saved")
    assert again.chat_template == "{{ messages }}\n"
    for name in ("vocab_size", "control_tokens", "restarting", "special_tokens", "adds_bos", "unk_id"):
        assert getattr(again, name) == getattr(tokenizer, name), name
    for text in TEXTS:
        assert again.encode(text) == tokenizer.encode(text)
        assert again.encode(text, continuation=True) == tokenizer.encode(text, continuation=True)
    assert not (tmp_path / "first" / "chat_template.jinja").exists()
    config = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert config["chat_template"] == "{{ messages }}\n"


@pytest.mark.parametrize("new", [(), ("<|a|>", "<|b|>")])
def test_the_saved_tokenizer_json_says_what_we_do(tokenizer, tmp_path, new):
    tokenizer.save(tmp_path, "")
    if new:
        tokenizer = load_tokenizer(tmp_path, new)
        tokenizer.save(tmp_path, "")
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    first, second = [*tokenizer.control_tokens][-2:]
    texts = [text for text in TEXTS if not control_ids(tokenizer, tokenizer.control.split(text))]
    rendered = [f"{first}user\n{text} {second}\n{first} {text}" for text in texts]
    bos = tokenizer.bos_token
    for text in [*TEXTS, *rendered, *(bos + text for text in rendered)]:
        expected = tokenizer.encode_parts(tokenizer.control.split(text))
        assert library.encode(text, add_special_tokens=False).ids == expected, text


def test_merges_follow_scores_where_ids_do_not(tmp_path):
    proto = parse_sentencepiece(train_sentencepiece(), "test")
    normal = [i for i, piece in enumerate(proto.pieces) if piece.type == Piece.NORMAL]
    for i, j in zip(normal[: len(normal) // 2], reversed(normal), strict=False):
        held = Piece.FromString(proto.pieces[i].SerializeToString())
        proto.pieces[i].CopyFrom(proto.pieces[j])
        proto.pieces[j].CopyFrom(held)
    (tmp_path / "tokenizer.model").write_bytes(proto.SerializeToString())
    load_tokenizer(tmp_path).save(tmp_path, "")
    assert (tmp_path / "tokenizer.json").exists()


def test_a_model_without_counterpart_is_saved_alone_and_says_so(tmp_path, caplog):
    options = {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True}
    tokenizer = load_tokenizer(write_sentencepiece(tmp_path / "t", **options))
    (tmp_path / "saved").mkdir()
    with caplog.at_level(logging.WARNING):
        tokenizer.save(tmp_path / "saved", "")
    assert "has only the .model" in caplog.text
    assert not (tmp_path / "saved" / "tokenizer.json").exists()
    assert load_tokenizer(tmp_path / "saved").encode("The answer") == tokenizer.encode("The answer")


def test_ids_with_a_gap_are_not_saved(tiny_byte_level, tmp_path):
    shutil.copytree(tiny_byte_level, tmp_path / "t")
    (tmp_path / "t" / "added_tokens.json").write_text(json.dumps({"<|far|>": 1000}))
    tokenizer = load_tokenizer(tmp_path / "t")
    assert tokenizer.vocab_size == 1001
    with pytest.raises(DataError, match=r"'<\|far\|>' is id 1000, and the saved tokenizer.json would give it"):
        tokenizer.save(tmp_path / "t", "")


# --- Files -----------------------------------------------------------------------------------------------------------


def test_two_forms_must_agree(tiny_sentencepiece, tmp_path):
    load_tokenizer(tiny_sentencepiece).save(tmp_path, "")
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    merges = sorted(spec["model"]["merges"], key=lambda pair: spec["model"]["vocab"]["".join(pair)], reverse=True)
    edit_json(tmp_path / "tokenizer.json", model=spec["model"] | {"merges": merges})
    with pytest.raises(DataError, match="disagree, first on '"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"IQ== 0\nIg== 1\n", "tiktoken ranks"),
        (b"{}", "no 'model' entry"),
        (b'{"model": ', "is not JSON"),
        (b'{"model": {"type": "BPE", "vocab": {"a": 0}}}', "does not read it"),
        (b"neither of them", "neither a sentencepiece model nor a tokenizer.json"),
        (b"", "without pieces"),
    ],
)
def test_a_file_is_known_by_its_content(tmp_path, content, message):
    (tmp_path / "tokenizer.model").write_bytes(content)
    for path in (tmp_path, tmp_path / "tokenizer.model"):
        with pytest.raises(DataError, match=message):
            load_tokenizer(path)


def test_ranks_beside_a_tokenizer_json_are_left_alone(tiny_byte_level, tmp_path):
    shutil.copytree(tiny_byte_level, tmp_path / "t")
    (tmp_path / "t" / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    assert load_tokenizer(tmp_path / "t").fingerprint() == load_tokenizer(tiny_byte_level).fingerprint()


def test_missing_tokenizers_are_config_errors(tmp_path):
    (tmp_path / "merges.txt").touch()
    with pytest.raises(ConfigError, match=r"no sentencepiece .model, only merges\.txt"):
        load_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match="does not exist"):
        load_tokenizer(tmp_path / "nowhere")


def test_a_file_alone_is_enough(tiny_sentencepiece, tiny_byte_level):
    alone = load_tokenizer(tiny_sentencepiece / "tokenizer.model")
    assert (alone.bos_token, alone.eos_token, alone.adds_bos) == ("<s>", "</s>", True)
    alone = load_tokenizer(tiny_byte_level / "tokenizer.json")
    assert (alone.bos_token, alone.eos_token, alone.adds_bos) == ("", "", False)


def test_a_suffix_model_is_refused(tmp_path):
    write_sentencepiece(tmp_path, treat_whitespace_as_suffix=True)
    with pytest.raises(DataError, match="treat_whitespace_as_suffix"):
        load_tokenizer(tmp_path)


def test_truncation_and_padding_of_the_file_are_not_ours(tiny_byte_level, tmp_path):
    shutil.copytree(tiny_byte_level, tmp_path / "t")
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    edit_json(tmp_path / "t" / "tokenizer.json", truncation=truncation)
    expected = load_tokenizer(tiny_byte_level).encode(SENTENCES[0])
    assert load_tokenizer(tmp_path / "t").encode(SENTENCES[0]) == expected


def test_text_that_could_vanish_is_refused(tiny_byte_level, tmp_path):
    shutil.copytree(tiny_byte_level, tmp_path / "t")
    path = tmp_path / "t" / "tokenizer.json"
    model = json.loads(path.read_text())["model"]
    vocab = {piece: i for piece, i in model["vocab"].items() if piece != "Ã"}
    edit_json(path, model=model | {"vocab": vocab})
    with pytest.raises(DataError, match="lacks 1 of 256 bytes"):
        load_tokenizer(tmp_path / "t")
    edit_json(path, model=model | {"vocab": vocab | {"<unk>": model["vocab"]["Ã"]}, "unk_token": "<unk>"})
    tokenizer = load_tokenizer(tmp_path / "t")
    assert tokenizer.unk_id == model["vocab"]["Ã"]
    assert tokenizer.unk_id in tokenizer.encode("é")


def test_contradicting_ids_are_refused(tiny_sentencepiece, tmp_path):
    shutil.copytree(tiny_sentencepiece, tmp_path / "t")
    for text, token_id, message in (("<pad>", 5, "has another"), ("</s>", 5, "has two ids"), ("<x>", 9999, "another")):
        (tmp_path / "t" / "added_tokens.json").write_text(json.dumps({text: token_id}))
        with pytest.raises(DataError, match=message):
            load_tokenizer(tmp_path / "t")


def test_chat_templates_are_found(tiny_sentencepiece, tmp_path):
    shutil.copytree(tiny_sentencepiece, tmp_path / "t")
    config = tmp_path / "t" / "tokenizer_config.json"
    several = [{"name": "default", "template": "A"}, {"name": "rag", "template": "B"}]
    config.write_text(json.dumps({"chat_template": several}))
    assert load_tokenizer(tmp_path / "t").chat_template == "A"
    (tmp_path / "t" / "chat_template.jinja").write_text("C\n")
    assert load_tokenizer(tmp_path / "t").chat_template == "C\n"
    (tmp_path / "t" / "chat_template.jinja").unlink()
    config.write_text(json.dumps({"chat_template": several[1:]}))
    with pytest.raises(ConfigError, match="none named 'default'"):
        load_tokenizer(tmp_path / "t")


def test_the_fingerprint_follows_what_encodes(tiny_sentencepiece, tmp_path):
    shutil.copytree(tiny_sentencepiece, tmp_path / "t")
    config = tmp_path / "t" / "tokenizer_config.json"
    prints = [load_tokenizer(tiny_sentencepiece).fingerprint(), load_tokenizer(tiny_sentencepiece, NEW).fingerprint()]
    (tmp_path / "other").write_bytes(train_sentencepiece(vocab_size=390))
    prints.append(load_tokenizer(tmp_path / "other").fingerprint())
    stripping = {"2": {"content": "</s>", "special": True, "rstrip": True}}
    for fields in ({"add_bos_token": False}, {"eos_token": "<unk>"}, {"added_tokens_decoder": stripping}):
        config.write_text(json.dumps(fields))
        prints.append(load_tokenizer(tmp_path / "t").fingerprint())
    assert len(set(prints)) == len(prints)
    config.write_text(json.dumps({"model_max_length": 5}))
    assert load_tokenizer(tmp_path / "t").fingerprint() == prints[0]


def test_byte_level_alone_gets_an_added_bos(tmp_path):
    folder = write_byte_level(tmp_path)
    edit_json(folder / "tokenizer_config.json", bos_token="<|endoftext|>", add_bos_token=None)
    assert not load_tokenizer(folder).adds_bos
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    bos_id = library.token_to_id("<|endoftext|>")
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", bos_id)]
    )
    library.save(str(folder / "tokenizer.json"))
    assert load_tokenizer(folder).adds_bos


# --- Real tokenizers -------------------------------------------------------------------------------------------------

REAL = (
    "tokenizers/llama2",
    "tokenizers/mistral/mistral_instruct_tokenizer_241114.model.v7",
    "tokenizers/sentencepiece-test",
    "models/TinyStories-656K",
    "tokenizers/minimind",
)


@pytest.mark.parametrize("name", REAL)
def test_real_tokenizers_never_read_control_from_text(assets, name):
    tokenizer = load_tokenizer(assets / name, ("<|new|>",))
    for text in tokenizer.control_tokens:
        for continuation in (False, True):
            ids = tokenizer.encode(f"a{text}b {text}", continuation=continuation)
            assert set(control_ids(tokenizer, ids)) <= {tokenizer.unk_id}


@pytest.mark.parametrize("name", REAL[:3])
def test_real_sentencepiece_models_encode_as_they_are(assets, name):
    tokenizer = load_tokenizer(assets / name)
    path = assets / name if (assets / name).is_file() else next((assets / name).glob("*.model"))
    reference = sentencepiece.SentencePieceProcessor(model_file=str(path))
    for text in read_gsm8k(assets):
        assert tokenizer.encode(text) == reference.encode(text)


def test_llama2_as_tokenizer_json_tokenizes_gsm8k_alike(assets, tmp_path):
    tokenizer = load_tokenizer(assets / "tokenizers/llama2", NEW)
    tokenizer.save(tmp_path, "")
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in read_gsm8k(assets):
        rendered = f"<s>[INST] {text} [/INST]</s><|im_start|>{text}"
        expected = tokenizer.encode_parts(tokenizer.control.split(rendered))
        assert library.encode(rendered, add_special_tokens=False).ids == expected


def test_tinystories_names_what_it_cannot_express(assets):
    tokenizer = load_tokenizer(assets / "models/TinyStories-656K")
    expected = json.loads((assets / "models/TinyStories-656K/expected.json").read_text())
    prompt = tokenizer.encode(expected["prompt"])
    assert [tokenizer.token_id(tokenizer.bos_token), *prompt] == expected["prompt_ids"][: expected["prompt_len"]]
    assert tokenizer.unk_id == 0
    assert tokenizer.encode("é~", continuation=True).count(0) >= 1
    assert tokenizer.decode(expected["prompt_ids"][1:]) in expected["greedy_text"]


def test_tiktoken_ranks_are_refused(assets):
    with pytest.raises(DataError, match="holds tiktoken ranks"):
        load_tokenizer(assets / "tokenizers/llama3")


def read_gsm8k(assets, count=300):
    with (assets / "sft/gsm8k/test.jsonl").open() as rows:
        return [text for _, row in zip(range(count), rows, strict=False) for text in json.loads(row).values()]
