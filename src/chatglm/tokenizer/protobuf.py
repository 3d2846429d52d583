"""Just enough of the protobuf wire format to list and edit the fields of a SentencePiece file.

A message is a run of fields; a field is a key (number * 8 + wire type) and a value. Wire types: 0 varint, 1 eight
bytes, 2 a length and that many bytes, 5 four bytes. Source: https://protobuf.dev/programming-guides/encoding
"""

from __future__ import annotations

from typing import NamedTuple

VARINT, EIGHT_BYTES, BYTES, FOUR_BYTES = 0, 1, 2, 5
_SIZES = {EIGHT_BYTES: 8, FOUR_BYTES: 4}


class Field(NamedTuple):
    """Where one field lies in the data: the whole field from `start`, its value from `value` to `end`."""

    number: int
    start: int
    value: int
    end: int


class WireError(ValueError):
    """The data stops being protobuf at byte `offset`; `fields` were read before."""

    def __init__(self, offset: int, fields: list[Field]) -> None:
        super().__init__(f"not protobuf at byte {offset}")
        self.offset = offset
        self.fields = fields


def read_varint(data: bytes, offset: int) -> tuple[int, int]:
    """The number at `offset` and the offset behind it. Raises IndexError at the end of the data."""
    value = shift = 0
    while True:
        byte = data[offset]
        offset += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, offset
        shift += 7


def scan(data: bytes, start: int, end: int) -> list[Field]:
    """The fields of the message in `data[start:end]`, values unread.

    Raises WireError where a field crosses `end` or has an impossible key: the data was cut or is something else.
    """
    fields: list[Field] = []
    offset = start
    while offset < end:
        first = offset
        try:
            # Nearly every key and length is one byte, and there are 130,000 pieces: those are read in place.
            key = data[offset]
            offset += 1
            if key > 0x7F:
                key, offset = read_varint(data, first)
            wire = key & 7
            if wire == BYTES:
                size = data[offset]
                value = offset + 1
                if size > 0x7F:
                    size, value = read_varint(data, offset)
                offset = value + size
            elif wire == VARINT:
                value = offset
                _, offset = read_varint(data, offset)
            else:
                value = offset
                offset += _SIZES[wire]
        except (IndexError, KeyError):
            raise WireError(first, fields) from None
        if offset > end or key < 8:  # there is no field 0
            raise WireError(first, fields)
        fields.append(Field(key >> 3, first, value, offset))
    return fields


def varint(value: int) -> bytes:
    """The wire form of a number that is not negative."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def bytes_field(number: int, value: bytes) -> bytes:
    """The wire form of a string, bytes or message field."""
    return varint(number << 3 | BYTES) + varint(len(value)) + value


def number_field(number: int, value: int) -> bytes:
    """The wire form of an integer, bool or enum field."""
    return varint(number << 3 | VARINT) + varint(value)
