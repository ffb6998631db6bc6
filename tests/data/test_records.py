"""Records come back as they were, or are refused; test_checkpoint.py damages a file all over."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from edgeml.core.errors import Malformed, NotEncodable
from edgeml.data.records import RecordReader, RecordWriter

VALUES = [None, {"x": np.arange(100_000)}, "text", [np.zeros(0), b""]]


def write(path: Path) -> list[int]:
    with open(path, "wb") as file:
        writer = RecordWriter(file.fileno(), path, "")
        places = [writer.append(value) for value in VALUES]
        assert writer.append_index({"at": places}) > places[-1]
        assert writer.at == os.fstat(file.fileno()).st_size
    return places


def test_records_are_found_by_the_index(tmp_path: Path) -> None:
    places = write(tmp_path / "records")
    with open(tmp_path / "records", "rb") as file:
        reader = RecordReader(file.fileno(), "it", "log")
        assert reader.index == {"at": places}
        for at, value in zip(places, VALUES, strict=True):
            np.testing.assert_equal(reader.read(at), value)
        assert not reader.read(places[1])["x"].flags.writeable
        reader.read(places[1], writable=True)["x"][:] = 0
        with pytest.raises(Malformed, match="it has an index that is none: no record is at byte 1"):
            reader.read(1)


def test_a_value_that_no_codec_carries_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "records"
    with open(path, "wb") as file:
        writer = RecordWriter(file.fileno(), path, "")
        with pytest.raises(NotEncodable):
            writer.append(object())
        writer.append_index("whole")
    with open(path, "rb") as file:
        assert RecordReader(file.fileno(), "it", "log").index == "whole"


def test_errors_call_the_file_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "records"
    write(path)
    for content, text in (
        (path.read_bytes()[:-1], "it is cut off.*take an older log"),
        (b"hello", "it is no log of edgeml"),
    ):
        path.write_bytes(content)
        with open(path, "rb") as file, pytest.raises(Malformed, match=text):
            RecordReader(file.fileno(), "it", "log")
