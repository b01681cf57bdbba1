"""JSON from strangers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regrow_format.errors import FormatError
from regrow_format.fields import Fields, dump_json, parse_json

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(
        st.characters(exclude_categories=["Cs"]), max_size=5), inner, max_size=4),
    max_leaves=20,
)  # fmt: skip


@given(JSON)
def test_what_is_written_is_read_again(value):
    text = dump_json({"x": [value]})
    fields = parse_json(text.encode(), "file")
    assert dump_json({"x": fields.take("x", list)}) == text


def test_the_same_object_is_the_same_text():
    assert dump_json({"b": 1, "a": [1, "ö"]}) == '{"a":[1,"ö"],"b":1}'
    with pytest.raises(ValueError, match="Out of range"):
        dump_json({"x": float("nan")})


@pytest.mark.parametrize(
    "text", [b"", b"\xff\xfe{\0}\0", b"\xff", b"{'a': 1}", b'{"a": Infinity}', b'{"a": "\xed\xa0"}']
)
def test_what_is_no_json(text):
    with pytest.raises(FormatError, match=r"^the file must be JSON, got something else: "):
        parse_json(text, "the file")


@pytest.mark.parametrize(
    ("text", "paired"), [('{"a": "\\ud83d\\udc1d"}', True), ('{"a": "\\uD83D"}', False)]
)
def test_half_a_surrogate_pair_is_no_text(text, paired):
    if paired:
        assert parse_json(text, "file").take("a", str) == "🐝"
    else:
        with pytest.raises(FormatError, match="surrogates not allowed"):
            parse_json(text, "file")


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (1, str), ("1", int), (True, int), (1, bool), (1.5, int), ("1", float), (True, float),
        ([], dict), ({}, list), (None, str),
    ],
)  # fmt: skip
def test_a_field_has_its_type(value, kind):
    with pytest.raises(FormatError, match=f"^file: x must be of type {kind.__name__}, got "):
        Fields({"x": value}, "file").take("x", kind)


def test_a_long_value_is_cut_in_messages():
    with pytest.raises(FormatError) as caught:
        Fields({"x": "y" * 10_000}, "file").take("x", int)
    assert len(str(caught.value)) < 140


def test_an_int_serves_as_a_float():
    found = Fields({"x": 3}, "file").take("x", float)
    assert (found, type(found)) == (3.0, float)


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), 10**309, -(10**400)])
def test_a_float_is_finite(value):
    with pytest.raises(FormatError, match=r"^file: x must be a finite number, got"):
        Fields({"x": value}, "file").take("x", float)


def test_a_number_has_bounds():
    assert Fields({"x": 3}, "file").number("x", 3, 3) == 3
    for value in (2, 4):
        with pytest.raises(FormatError, match=f"^file: x must be from 3 to 3, got {value}$"):
            Fields({"x": value}, "file").number("x", 3, 3)


def test_defaults_are_for_what_is_not_there():
    fields = Fields({}, "file")
    assert fields.take("x", str, "y") == "y"
    assert fields.number("x", 0, 9, 5) == 5
    assert fields.objects("x") == []
    assert fields.strings("x") == ()
    assert fields.optional("x") is None
    assert not fields.has("x")
    fields.done()


def test_what_nobody_took_is_refused():
    fields = Fields({"b": 1, "a": 2, "c": 3, "n": None}, "file")
    fields.take("c", int)
    assert not fields.has("n")
    assert fields.has("a")
    assert fields.names() == ("b", "a")
    with pytest.raises(FormatError, match=r"^file: unknown fields a, b$"):
        fields.done()


def test_nested_messages_say_where():
    fields = Fields({"parts": [{}, 5]}, "file")
    with pytest.raises(FormatError, match=r"^file: parts\[1\] must be an object, got int$"):
        fields.objects("parts")
    with pytest.raises(FormatError, match=r"^file: names must be a list of strings, got"):
        Fields({"names": ["a", 1]}, "file").strings("names")
    with pytest.raises(FormatError, match=r"^file: part must be an object, got str$"):
        Fields({"part": "x"}, "file").optional("part")
