"""Text from tables and files: columns, tokens, and one error that names the line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from regrow_format.errors import FormatError, RegrowError, UsageError
from regrow_toolchain.data import Dataset, by_user, load_data
from regrow_toolchain.models import Backbone, load_backbone, logits_of

_WORDS = ["hot", "cold", "warm", "red", "blue", "green", "round", "flat", "tall", "small"]
_WORDS += ["the", "a", "is", "it", "not"]
_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def _bert_tokenizer(folder: Path) -> Path:
    from transformers import BertTokenizerFast

    (folder / "words.txt").write_text("\n".join(_SPECIAL + _WORDS), encoding="utf-8")
    BertTokenizerFast(str(folder / "words.txt")).save_pretrained(folder)
    (folder / "words.txt").unlink()
    return folder


def _word_tokenizer(folder: Path) -> Path:
    """Words alone, with an end of text and no padding, as GPT-2's has it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<end>", "<unk>", *_WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<end>", unk_token="<unk>")
    made.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bert_text(bert_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text") / "bert"
    return _bert_tokenizer(Path(shutil.copytree(bert_folder, folder)))


@pytest.fixture(scope="session")
def bert(bert_text: Path) -> Backbone:
    """24 positions, 4 classes."""
    return load_backbone(bert_text)


@pytest.fixture(scope="session")
def gpt2(gpt2_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    folder = tmp_path_factory.mktemp("text") / "gpt2"
    return load_backbone(_word_tokenizer(Path(shutil.copytree(gpt2_folder, folder))))


Load = Callable[..., Dataset]


@pytest.fixture
def load(bert: Backbone, tmp_path: Path) -> Load:
    """load(text, "d.csv", **options)"""

    def call(text: str | bytes, name: str = "d.csv", /, **options: object) -> Dataset:
        data = text.encode() if isinstance(text, str) else text
        (tmp_path / name).write_bytes(data)
        return load_data(tmp_path / name, options.pop("backbone", bert), **options)

    return call


def _words_of(data: Dataset) -> list[str]:
    vocabulary = _SPECIAL + _WORDS
    return [
        " ".join(vocabulary[i] for i in row[mask == 1])
        for row, mask in zip(data.inputs["input_ids"], data.inputs["attention_mask"], strict=True)
    ]


# -- tables --------------------------------------------------------------------------------------

_CSV = 'text,category\nthe red,colour\n"hot, not cold",heat\n\nit is blue,colour\n'


def test_a_csv(load: Load, bert: Backbone) -> None:
    data = load(_CSV)
    assert data.names == ("colour", "heat")
    assert data.named
    assert data.labels.tolist() == [0, 1, 0]
    assert _words_of(data) == [
        "[CLS] the red [SEP]", "[CLS] hot [UNK] not cold [SEP]", "[CLS] it is blue [SEP]",
    ]  # fmt: skip
    assert {a.dtype.name for a in data.inputs.values()} == {"int64"}
    assert sorted(data.inputs) == ["attention_mask", "input_ids", "token_type_ids"]
    assert data.inputs["input_ids"].shape == (3, 6)  # the longest's
    assert data.inputs["input_ids"][0, 4:].tolist() == [0, 0]
    inputs = {name: torch.from_numpy(array) for name, array in data.inputs.items()}
    with torch.no_grad():
        assert logits_of(bert.model, inputs).shape == (3, 4)


def test_the_same_in_every_form(load: Load) -> None:
    rows = [("the red", "colour"), ('say "hot"', "heat"), ("blue", "colour")]
    lines = [json.dumps({"category": c, "text": t, "more": [1, None]}) for t, c in rows]
    quoted = "".join('"{}",{}\r\n'.format(t.replace('"', '""'), c) for t, c in rows)
    found = [
        load(quoted.join(["\ufefftext , category\r\n", ""])),
        load("category\ttext\n" + "".join(f"{c}\t{t}\n" for t, c in rows), "d.tsv"),
        load("\n".join(lines) + "\n\n", "d.jsonl"),
        load("\r\n".join(lines), "d.JSONL"),
    ]
    for data in found[1:]:
        assert data.names == found[0].names
        assert data.labels.tolist() == found[0].labels.tolist()
        assert _words_of(data) == _words_of(found[0])


def test_columns_by_name(load: Load) -> None:
    table = "id,line,kind,who\n1,the red,x,ann\n2,blue,y, 007 \n3,hot,x,7\n"
    data = load(table, text="line", label="kind", users="who")
    assert data.names == ("x", "y")
    assert data.users.tolist() == ["ann", "007", "7"]
    assert list(by_user(data)) == ["007", "7", "ann"]
    with_text = load("id,what,kind\n1,red,x\n2,blue,y\n", label="kind")  # the only words
    assert _words_of(with_text) == ["[CLS] red [SEP]", "[CLS] blue [SEP]"]


def test_pairs(load: Load) -> None:
    table = "one,two,score\nred,blue,0.5\nhot,it is hot,1\n"
    data = load(table, text="one,two", label="score")
    assert _words_of(data) == ["[CLS] red [SEP] blue [SEP]", "[CLS] hot [SEP] it is hot [SEP]"]
    assert data.inputs["token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1, 1]]
    assert data.kind == "values"
    assert data.labels.tolist() == [0.5, 1]
    assert data.names == ()


@pytest.mark.parametrize("cells", [("0", "3", " 1 "), ("+0", "03", "1")])
def test_whole_numbers_are_the_backbones_outputs(load: Load, cells: tuple[str, ...]) -> None:
    data = load("text,label\n" + "".join(f"red,{cell}\n" for cell in cells))
    assert (data.kind, data.named) == ("classes", False)
    assert data.labels.tolist() == [0, 3, 1]
    assert data.names == ("0", "1", "2", "3")


def test_whole_numbers_are_values_for_one_output(load: Load, bert: Backbone) -> None:
    one = replace(bert, labels=("score",))
    data = load("text,label\nred,5\nblue,-2\n", backbone=one)
    assert data.labels.tolist() == [5, -2]
    assert data.kind == "values"


def test_json_says_what_is_a_name(load: Load) -> None:
    rows = [{"text": "red", "label": "1"}, {"text": "hot", "label": "0"}]
    data = load("\n".join(map(json.dumps, rows)), "d.jsonl")
    assert (data.named, data.names) == (True, ("0", "1"))
    rows = [{"text": "red", "label": 1}, {"text": "hot", "label": 0.5}]
    data = load("\n".join(map(json.dumps, rows)), "d.jsonl")
    assert data.labels.tolist() == [1, 0.5]


def test_long_texts_are_cut(load: Load, bert: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    table = "text,label\n" + "red " * 50 + ",a\nblue,b\n"
    assert load(table).inputs["input_ids"].shape == (2, 24)  # what the model takes
    data = load(table, max_length=5)
    assert _words_of(data) == ["[CLS] red red red [SEP]", "[CLS] blue [SEP]"]
    monkeypatch.setattr("regrow_toolchain.data.text.AT_ONCE", 1)
    assert np.array_equal(load(table).inputs["input_ids"][:, :4], [[2, 8, 8, 8], [2, 9, 3, 0]])


_GOOD = "text,label\nred,x\nblue,y\n"


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        ("", {}, "must have a row of names and rows below it, got none"),
        ("text,label\n\n", {}, "must have a row of names and rows below it, got none"),
        (
            "text,kind\nred,x\n",
            {},
            r"column of labels \(label.*got text, kind: name one with --label",
        ),
        (_GOOD, {"label": ""}, r"must have a column of labels"),
        (_GOOD, {"label": "kind"}, "label must name a column of text, label, got 'kind'"),
        (_GOOD, {"text": "line"}, "text must name a column of text, label, got 'line'"),
        (_GOOD, {"text": "text,line"}, "text must name a column of text, label, got 'line'"),
        (_GOOD, {"text": "text,label,text"}, "text must be at most two, got 'text,label,text'"),
        (_GOOD, {"users": "who"}, "users must name a column of text, label, got 'who'"),
        ("a,b,label\nred,blue,x\n", {}, "one of words besides labels and users, got a, b, label"),
        ("a,label\n1,x\n", {}, "one of words besides labels and users, got a, label"),
        (_GOOD, {"max_length": 1}, "max_length must be at least 2, got 1"),
        (_GOOD, {"max_length": 2}, "leave room for text, got 2 tokens, 2 of them special"),
    ],
)
def test_requests_that_make_no_sense(load: Load, text: str, options: dict, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        load(text, **options)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("text,label\nred,x\nblue\n", "line 3: a row must have 2 columns, got 1"),
        ('text,label\n"a\nb",x\nblue,y,z\n', "line 4: a row must have 2 columns, got 3"),
        ('text,label\nred,x\n"blue,y\n', "line 3 must be a row of cells: unexpected end"),
        ('text,label\nred,x\n"blue"s,y\n', "line 3 must be a row of cells"),
        (f"text,label\nred,x\n{'y' * 200000},y\n", "line 3 must be a row of cells: field larger"),
        ("text,text\nred,x\n", "line 1 must have a name of its own per column, got 'text' twice"),
        ("text,\nred,x\n", "line 1 must have a name of its own per column, got a column without"),
        ("text,label\nred,x\n  ,y\n", "line 3: text must be a text that is not empty, got '  '"),
        ("text,label\nred,x\nblue, \n", "line 3: label must be a name or a number, got ''"),
        ("text,label\nred,1\nhot,2\nblue,y\n", "line 4: label must be a number, like those before"),
        ("text,label\nred,y\nblue,0.5\n", "line 3: label must be a name, like .*the number 0.5"),
        ("text,label\nred,1.0\nblue,1e99\n", "line 3: label must be a finite number, got 1e"),
        ("text,label\nred,1e999\n", "line 2: label must be a finite number, got inf"),
        ("text,label\nred,1\nblue,-1\n", "line 3: label: labels must be 0 or more, got -1"),
        ("text,label\nred,99999999\n", "line 2: label: labels must be below 1048576"),
        (b"text,label\nred,x\nbl\xfce,y\n", "line 3 must be UTF-8, got byte 0xfc"),
    ],
)
def test_broken_rows_are_named(load: Load, text: str | bytes, words: str) -> None:
    with pytest.raises(RegrowError, match=words) as error:
        load(text)
    assert "d.csv" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2 must be a JSON object, got something else"),
        ("[1]", "line 2 must be a JSON object, got list"),
        ("[" * 100000, "line 2 must be a JSON object, got something else"),
        ('{"text": "red"}', "line 2: label must be a name or a number, got None"),
        ('{"label": "x"}', "line 2: text must be a text that is not empty, got None"),
        ('{"text": 5, "label": "x"}', "line 2: text must be a text that is not empty, got 5"),
        ('{"text": "red", "label": true}', "line 2: label must be a name or a number, got True"),
        ('{"text": "red", "label": NaN}', "line 2: label must be a finite number, got nan"),
        ('{"text": "red", "label": 1e999}', "line 2: label must be a finite number, got inf"),
        ('{"text": "red", "label": ["x"]}', "line 2: label must be a name or a number"),
        ('{"text": "red", "label": 3}', "line 2: label must be a name, like those before it"),
        (r'{"text": "\ud800", "label": "x"}', "line 2: text must be a text that is not empty"),
        ('{"text": "red", "label": 1' + "0" * 5000 + "}", "line 2 must be a JSON object"),
        ('{"text": "red", "label": 1' + "0" * 400 + "}", "line 2: label must be a finite number"),
    ],
)
def test_broken_objects_are_named(load: Load, line: str, words: str) -> None:
    with pytest.raises(FormatError, match=words) as error:
        load('{"text": "red", "label": "x"}\n' + line + "\n", "d.jsonl")
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("user", ["", " ", "x" * 201, "a\0", "true", "1.5", "null"])
def test_ids_that_are_none(load: Load, user: str) -> None:
    value = user if user in ("true", "1.5", "null") else json.dumps(user)
    rows = (
        f'{{"text": "red", "label": "x", "who": 7}}\n{{"text": "a", "label": "y", "who": {value}}}'
    )
    with pytest.raises(FormatError, match=r"line 2: who must be a user's id"):
        load(rows, "d.jsonl", users="who")


def test_sizes_are_bounded(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regrow_toolchain.data.tables.MAX_ROWS", 2)
    load(_GOOD)
    with pytest.raises(UsageError, match="must have at most 2 rows, got more"):
        load(_GOOD + "hot,x\n")
    monkeypatch.setattr("regrow_toolchain.data.tables.MAX_FILE", 10)
    with pytest.raises(FormatError, match="must be at most 10 bytes for text, got more"):
        load(_GOOD)
    monkeypatch.undo()
    monkeypatch.setattr("regrow_toolchain.data.text.MAX_VALUES", 4)
    with pytest.raises(UsageError, match="data must come to at most 4 tokens"):
        load(_GOOD)


@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.one_of(st.binary(max_size=80), st.text(max_size=80).map(str.encode)))
def test_no_file_is_a_traceback(load: Load, data: bytes) -> None:
    for name, start in (
        ("d.csv", b"text,label\n"), ("d.tsv", b"text\tlabel\n"), ("d.jsonl", b""),
        ("d.jsonl", b'{"text": "a", "label": "b"}\n'), ("d.csv", b""), ("d.txt", b""),
    ):  # fmt: skip
        try:
            found = load(start + data, name)
        except RegrowError:
            continue
        assert len(found) > 0


def test_the_command_line_takes_a_table(
    cli: Callable[..., Any], bert_text: Path, tmp_path: Path
) -> None:
    rows = ["one,two,kind,who"]
    rows += [f"{_WORDS[i % 7]},it is not,{'ab'[i % 2]},{i}" for i in range(20)]
    (tmp_path / "d.csv").write_text("\n".join(rows))
    options = ("--label", "kind", "--max-length", 8, "--keep-anyway", "--steps", 2, "--json")
    command = ("adapt", bert_text, "-o", tmp_path / "a.safetensors", "--data", tmp_path / "d.csv")
    done = cli(*command, "--text", "one,two", *options)
    assert done.code == 0, done.err
    assert done.json["labels"] == ["a", "b"]
    done = cli(*command, "--force", *options)
    assert (done.code, "got one, two, kind, who: name one with --text" in done.err) == (2, True)


# -- tokenizers ----------------------------------------------------------------------------------


def test_a_backbone_without_a_tokenizer(load: Load, bert_folder: Path) -> None:
    for backbone in (
        load_backbone(bert_folder),
        Backbone(nn.Linear(2, 2), "sha256:x", "other", (), ()),
    ):
        with pytest.raises(
            UsageError, match=r"must have a tokenizer .*ready input_ids in an \.npz"
        ):
            load(_GOOD, backbone=backbone)


def test_a_tokenizer_of_another_model(load: Load, bert_text: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bert_text, tmp_path / "bert"))
    data = json.loads((folder / "tokenizer.json").read_text())
    data["model"]["vocab"]["red"] = 60
    (folder / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(FormatError, match="must give tokens below the backbone's 60, got 60"):
        load(_GOOD, backbone=load_backbone(folder))


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"model": {"type": "BPE"}}', ""])
def test_a_broken_tokenizer(load: Load, bert_text: Path, tmp_path: Path, content: str) -> None:
    folder = Path(shutil.copytree(bert_text, tmp_path / "bert"))
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(FormatError, match="must have a whole tokenizer"):
        load(_GOOD, backbone=load_backbone(folder))


def test_no_code_of_the_tokenizer_is_run(load: Load, bert_text: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bert_text, tmp_path / "bert"))
    flag = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(flag)!r}, 'w').close()\n")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}, "tokenizer_class": "T"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with suppress(RegrowError):
        load(_GOOD, backbone=load_backbone(folder))
    assert not flag.exists()


def test_images_backbones_take_no_text(load: Load, vit_folder: Path, tmp_path: Path) -> None:
    folder = _bert_tokenizer(Path(shutil.copytree(vit_folder, tmp_path / "vit")))
    with pytest.raises(
        UsageError, match=r"backbone must take text \(input_ids\), got one of pixel"
    ):
        load(_GOOD, backbone=load_backbone(folder))


def test_tokens_with_labels_need_arrays(load: Load, bert: Backbone) -> None:
    with pytest.raises(UsageError, match="token-classification takes ready input_ids and labels"):
        load(_GOOD, backbone=replace(bert, task="token-classification"))


def test_positions_begin_behind_the_padding(tmp_path: Path, load: Load) -> None:
    """RoBERTa: of 12 positions, 2 come before the first token's."""
    from transformers import RobertaConfig, RobertaForSequenceClassification

    config = RobertaConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        vocab_size=60, max_position_embeddings=12, type_vocab_size=1, pad_token_id=1,
    )  # fmt: skip
    RobertaForSequenceClassification(config).save_pretrained(tmp_path / "roberta")
    backbone = load_backbone(_bert_tokenizer(tmp_path / "roberta"))
    data = load("text,label\n" + "red " * 50 + ",a\nblue,b\n", backbone=backbone)
    assert data.inputs["input_ids"].shape == (2, 10)
    assert "token_type_ids" not in data.inputs  # this model has one type only
    inputs = {name: torch.from_numpy(array) for name, array in data.inputs.items()}
    assert logits_of(backbone.model, inputs).shape == (2, 2)


# -- language models -----------------------------------------------------------------------------


def test_a_language_model_learns_the_text(load: Load, gpt2: Backbone) -> None:
    data = load("text,label,who\nthe red,x,a\nit is hot,y,b\n", backbone=gpt2, users="who")
    ids = {word: i for i, word in enumerate(["<end>", "<unk>", *_WORDS])}
    red = [ids["the"], ids["red"]]
    assert data.labels.tolist() == [[*red, -100], [ids["it"], ids["is"], ids["hot"]]]
    assert data.inputs["input_ids"][0].tolist() == [*red, ids["<end>"]]  # it has no padding token
    assert data.inputs["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert sorted(data.inputs) == ["attention_mask", "input_ids"]
    assert data.kind == "tokens"
    assert data.users.tolist() == ["a", "b"]
    with pytest.raises(UsageError, match="label must be left out for a language model"):
        load("text,label\nthe red,x\n", backbone=gpt2, label="label")
    with pytest.raises(UsageError, match="text must be one column for a language model"):
        load("a,b\nthe red,hot\n", backbone=gpt2, text="a,b")
    with pytest.raises(FormatError, match=r"line 3: text must have two tokens or more .*got 1"):
        load("text\nthe red\nhot\n", backbone=gpt2)


def test_a_text_is_cut_into_windows(load: Load, gpt2: Backbone) -> None:
    text = " ".join(_WORDS)  # 15 words, numbered from 2
    data = load(text, "d.txt", backbone=gpt2, max_length=4)
    numbers = np.arange(2, 17)
    assert data.inputs["input_ids"].tolist() == [
        *numbers[:12].reshape(3, 4).tolist(),
        [14, 15, 16, 0],
    ]
    assert data.labels.tolist()[-1] == [14, 15, 16, -100]
    assert data.inputs["attention_mask"].sum() == 15
    last_alone = load(text, "d.txt", backbone=gpt2, max_length=7)
    assert last_alone.labels.tolist() == numbers[:14].reshape(2, 7).tolist()
    assert load(text * 4, "d.txt", backbone=gpt2).labels.shape[1] == 24  # what the model takes
    torch_inputs = {name: torch.from_numpy(a) for name, a in data.inputs.items()}
    assert logits_of(gpt2.model, torch_inputs).shape == (4, 4, 60)


def test_texts_that_are_none(load: Load, gpt2: Backbone) -> None:
    with pytest.raises(UsageError, match=r"must be a language model .*one for text-classification"):
        load("red blue", "d.txt")
    for text in ("", "red", " \n "):
        with pytest.raises(UsageError, match="must have two tokens or more"):
            load(text, "d.txt", backbone=gpt2)
    with pytest.raises(FormatError, match=r"line 2 must be UTF-8, got byte 0xff"):
        load(b"red\n\xff", "d.txt", backbone=gpt2)
    for option in ("users", "text", "label"):
        with pytest.raises(UsageError, match=f"{option} must be left out for .*d.txt"):
            load("red blue", "d.txt", backbone=gpt2, **{option: "x"})
