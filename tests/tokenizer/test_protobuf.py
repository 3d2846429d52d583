"""The little of protobuf's wire format that the SentencePiece file needs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatglm.tokenizer.protobuf import Field, WireError, bytes_field, number_field, read_varint, scan, varint


@given(value=st.integers(0, 2**63))
def test_numbers_come_back_from_their_wire_form(value: int) -> None:
    assert read_varint(b"\xff" + varint(value) + b"\x01", 1) == (value, 1 + len(varint(value)))


def test_wire_form_of_numbers_is_the_documented_one() -> None:
    assert varint(150) == b"\x96\x01"  # the example of protobuf's own documentation
    assert number_field(1, 150) == b"\x08\x96\x01"
    assert bytes_field(2, b"testing") == b"\x12\x07testing"


def test_fields_of_every_wire_type_are_listed_with_their_places() -> None:
    data = number_field(1, 150) + b"\x11" + bytes(8) + bytes_field(3, b"abc") + b"\x25" + bytes(4) + number_field(35, 1)
    assert scan(data, 0, len(data)) == [
        Field(1, 0, 1, 3), Field(2, 3, 4, 12), Field(3, 12, 14, 17), Field(4, 17, 18, 22), Field(35, 22, 24, 25),
    ]  # fmt: skip


def test_long_values_have_a_size_of_several_bytes() -> None:
    data = bytes_field(1, b"x" * 300)
    assert scan(data, 0, len(data)) == [Field(1, 0, 3, 303)]


@pytest.mark.parametrize(
    "broken",
    [
        b"\x0a\x05abc",  # longer than the data
        b"\x0a",  # no size
        b"\x08\xff",  # a number that does not end
        b"\x0b",  # a group: not used since proto2
        b"\x02\x00",  # field 0
        b"\x0d\x00",  # four bytes cut short
    ],
)
def test_data_that_is_cut_or_foreign_is_refused_at_its_place(broken: bytes) -> None:
    good = number_field(1, 7)
    with pytest.raises(WireError) as caught:
        scan(good + broken, 0, len(good + broken))
    assert caught.value.offset == 2
    assert caught.value.fields == [Field(1, 0, 1, 2)]
