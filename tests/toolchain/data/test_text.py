"""Texts come out as transformers' fast tokenizers have them; broken ones are one error."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from regrow_format.errors import FormatError, UsageError
from regrow_inputs import TextPreprocessor
from regrow_toolchain.models import quiet_transformers

with quiet_transformers():
    from transformers import (
        AutoTokenizer,
        BertTokenizerFast,
        GPT2TokenizerFast,
        LlamaTokenizerFast,
        RobertaTokenizerFast,
    )

CORPUS = [
    "the cat sat on the mat", "a small dog ran over the hill", "what is the time?",
    "numbers 1 2 3 and 45", "The Weather, today: fine!", "über naïve façade — 東京 🙂",
]  # fmt: skip
TEXTS = [
    "The cat's mat",
    "a",
    "what? 東京 🙂 naïve",
    "the dog ran " * 20,
    "  spaced   out \n twice ",
]


def _bert(folder: Path):
    letters = [chr(i) for i in range(33, 127)]
    words = ["the", "cat", "mat", "dog", "ran", "what", "##s", "##at", "naive", "spaced", "out"]
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters)]
    (folder / "vocab.txt").write_text("\n".join(dict.fromkeys(vocab + words)), encoding="utf-8")
    return BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=24)


def _byte_level(folder: Path, special: list[str]) -> dict[str, str]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(CORPUS, trainer)
    vocab, merges = tokenizer.model.save(str(folder))
    return {"vocab_file": vocab, "merges_file": merges}


def _gpt2(folder: Path):
    files = _byte_level(folder, ["<|endoftext|>"])
    return GPT2TokenizerFast(**files, model_max_length=24)


def _roberta(folder: Path):
    files = _byte_level(folder, ["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    return RobertaTokenizerFast(**files, model_max_length=24)


def _llama(folder: Path):
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)]
    )  # fmt: skip
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return LlamaTokenizerFast(tokenizer_object=tokenizer, model_max_length=24, padding_side="left")


MAKERS = {"bert": _bert, "gpt2": _gpt2, "roberta": _roberta, "llama": _llama}


@pytest.fixture(params=MAKERS)
def both(request, tmp_path):
    """(transformers' tokenizer, ours), from one folder."""
    made = MAKERS[request.param](tmp_path)
    if made.pad_token is None:
        made.pad_token = made.eos_token
    folder = tmp_path / "saved"
    made.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder, local_files_only=True), folder


def _same(found: dict, expected: dict) -> None:
    assert expected.keys() <= found.keys()
    for name, array in expected.items():
        assert found[name].dtype == np.int64
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_texts(both):
    theirs, folder = both
    ours = TextPreprocessor.from_folder(folder)
    assert ours.length == 24
    for texts in (TEXTS, TEXTS[:1]):
        expected = theirs(texts, truncation=True, padding=True, return_tensors="np")
        _same(ours(texts), expected)
    expected = theirs(TEXTS, truncation=True, padding="max_length", max_length=24)
    _same(ours(TEXTS, fill=24), {name: np.array(rows) for name, rows in expected.items()})


def test_pairs(both):
    theirs, folder = both
    pairs = TEXTS[::-1]
    expected = theirs(TEXTS, pairs, truncation=True, padding=True, return_tensors="np")
    _same(TextPreprocessor.from_folder(folder)(TEXTS, pairs), expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_sides(both, side):
    _, folder = both
    sides = {"padding_side": side, "truncation_side": side, "local_files_only": True}
    theirs = AutoTokenizer.from_pretrained(folder, **sides)
    theirs.save_pretrained(folder)
    expected = theirs(TEXTS, truncation=True, padding=True, return_tensors="np")
    _same(TextPreprocessor.from_folder(folder)(TEXTS), expected)


def test_a_prompt_and_what_follows(both):
    """The text of new tokens is what they add; a prompt is not cut."""
    theirs, folder = both
    ours = TextPreprocessor.from_folder(folder)
    prompt = ours.prompt("the cat ran")
    np.testing.assert_array_equal(prompt, theirs(["the cat ran"], return_tensors="np")["input_ids"])
    words = theirs("the cat ran over", add_special_tokens=False)["input_ids"]
    start = theirs("the cat ran", add_special_tokens=False)["input_ids"]
    if words[: len(start)] == start:
        assert ours.decode(words[len(start) :], start) == " over"
    assert ours.decode([*words, theirs.eos_token_id or 0]) == ours.decode(words)
    with pytest.raises(UsageError, match="text must be 1 to 23 tokens, got"):
        ours.prompt("the cat " * 100)


def test_what_a_file_keeps_is_set_anew(both):
    """A tokenizer.json may come with truncation and padding of its own."""
    theirs, folder = both
    data = json.loads((folder / "tokenizer.json").read_text())
    backend = Tokenizer.from_str(json.dumps(data))
    backend.enable_truncation(5)
    backend.enable_padding(length=50)
    backend.save(str(folder / "tokenizer.json"))
    expected = theirs(TEXTS, truncation=True, padding=True, return_tensors="np")
    _same(TextPreprocessor.from_folder(folder)(TEXTS), expected)


def test_lengths(both):
    _, folder = both
    assert TextPreprocessor.from_folder(folder, length=7)(TEXTS)["input_ids"].shape == (5, 7)
    assert TextPreprocessor.from_folder(folder, length=100).length == 24
    (folder / "tokenizer_config.json").unlink()
    assert TextPreprocessor.from_folder(folder).length == 1 << 17


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "text must be a list of at least one, got none"),
        ("hello", "text must be a list of at least one, got one string"),
        ([""], "text must not be empty, got ''"),
        (["a", " \n"], r"text must not be empty, got ' \\n'"),
        ([b"bytes"], "text must not be empty"),
        (["\ud800"], "text must be Unicode"),
        (["a" * ((1 << 20) + 1)], "text must be at most 1048576 characters"),
    ],
)
def test_texts_that_are_none(tmp_path, texts, message):
    _bert(tmp_path).save_pretrained(tmp_path)
    ours = TextPreprocessor.from_folder(tmp_path)
    with pytest.raises(UsageError, match=message):
        ours(texts)
    with pytest.raises(UsageError, match="text pairs must be one per text, got 1 for 2"):
        ours(["a", "b"], ["c"])
    with pytest.raises(UsageError, match="text pair must not be empty"):
        ours(["a"], [" "])


def test_no_room_for_text(tmp_path):
    _bert(tmp_path).save_pretrained(tmp_path)
    with pytest.raises(
        UsageError, match="must take more than 2 tokens, all of them special, got 2"
    ):
        TextPreprocessor.from_folder(tmp_path, length=2)(["a"])


@pytest.mark.parametrize("data", [b"", b"{}", b"not json", b'{"model": {"type": "BPE"}}', b"\xff"])
def test_a_broken_tokenizer(tmp_path, data):
    (tmp_path / "tokenizer.json").write_bytes(data)
    with pytest.raises(
        FormatError, match=r"tokenizer\.json must be a whole tokenizer\.json"
    ) as error:
        TextPreprocessor.from_folder(tmp_path)
    assert "\n" not in str(error.value)


def test_no_tokenizer(tmp_path):
    with pytest.raises(UsageError, match=r"model must have tokenizer\.json to take text, got none"):
        TextPreprocessor.from_folder(tmp_path)


def test_a_tokenizer_of_gigabytes(tmp_path, monkeypatch):
    monkeypatch.setattr("regrow_inputs.text.MAX_BYTES", 100)
    (tmp_path / "tokenizer.json").write_bytes(bytes(101))
    with pytest.raises(FormatError, match="must be at most 100 bytes for a tokenizer"):
        TextPreprocessor.from_folder(tmp_path)
