"""Readers of foreign content: each fault is one error of Graftwork with file, line and field."""

from __future__ import annotations

import gzip
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from graftwork.core.files import append_line, read_json, read_lines, to_json, write_json
from graftwork.core.readers import (
    fields_of,
    join_inside,
    parse_json,
    read_json_file,
    read_tensors,
    read_text,
    reading,
    require,
)
from graftwork.errors import CheckpointMismatchError, DataError, IncompleteRunError

FAULTS = {
    "syntax": (b'{"a": 1}\n{', "line 2"),
    "depth": (b'{"a":' * 100_000, "nested too deeply"),
    "digits": (b"9" * 5000, "too many digits"),
    "bytes": (b'\n"\xff"', "line 2: found byte 0xff"),
    "surrogate": (b'{"a": ["\\ud800"]}', r"a\[0\] contains half a character, \\ud800"),
    "surrogate in a name": (b'{"\\udfff": 1}', "the name of field"),
    "NUL": (b'{"a": {"b": "\\u0000"}}', "a.b contains a NUL character"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_json_names_file_and_place(name, tmp_path):
    content, place = FAULTS[name]
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"x\.json.*{place}"):
        read_json_file(path)


@pytest.mark.parametrize("name", ["depth", "digits", "bytes", "syntax"])
def test_a_damaged_file_of_a_run_is_an_error_of_ours(name, tmp_path):
    path = tmp_path / "results.json"
    path.write_bytes(FAULTS[name][0])
    with pytest.raises(CheckpointMismatchError, match=r"results\.json.*not readable as JSON"):
        read_json(path)
    path.write_bytes(FAULTS[name][0].replace(b"\n", b"") + b"\n")
    with pytest.raises(DataError, match=r"results\.json, line 1: not readable as JSON"):
        list(read_lines(path))


def test_a_line_of_a_log_that_is_no_object_and_a_missing_file_are_errors_of_ours(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"a": 1}\n[1]\n')
    with pytest.raises(DataError, match="line 2: found a list"):
        list(read_lines(tmp_path / "log.jsonl"))
    with pytest.raises(IncompleteRunError, match=r"Found no .*absent\.json"):
        read_json(tmp_path / "absent.json")


def test_written_json_is_valid_for_every_number_and_file_name(tmp_path):
    value = {"a": [float("nan"), 1.5], "b": {"c": float("-inf")}, "name": "x\udc80"}
    write_json(tmp_path / "x.json", value)
    content = (tmp_path / "x.json").read_text()

    def refuse(word: str) -> None:
        raise AssertionError(word)

    assert json.loads(content, parse_constant=refuse) == {"a": [None, 1.5], "b": {"c": None}, "name": "x\udc80"}
    append_line(tmp_path / "x.jsonl", {"name": "x\udc80"})
    assert next(read_lines(tmp_path / "x.jsonl")) == {"name": "x\udc80"}
    assert to_json({"é": "\u2028"}) == '{"é": "\u2028"}'


def test_json_of_a_file_that_graftwork_wrote_may_contain_any_text():
    assert parse_json(b'"\\u0000"', any_text=True) == "\0"
    assert parse_json("\ufeff[1]") == [1]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda content: content[:-20],
    "header": lambda content: b"\x1f\x8b\x09" + content[3:],
    "no gzip": lambda content: b"plain text",
    "data": lambda content: content[:30] + bytes(byte ^ 0xFF for byte in content[30:60]) + content[60:],
    "checksum": lambda content: content[:-8] + b"\0" * 8,
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_compressed_data_names_the_file(name, tmp_path):
    path = tmp_path / "x.gz"
    path.write_bytes(DAMAGE[name](gzip.compress(bytes(range(256)) * 20)))
    with pytest.raises(DataError, match=r"x\.gz: found "), reading(path), gzip.open(path) as file:
        file.read()


def message_of(path: Path) -> str | None:
    try:
        read_tensors(path)
    except DataError as error:
        return str(error)
    return None


def test_every_flipped_bit_of_a_file_of_tensors_gives_tensors_or_an_error_of_ours(tmp_path):
    buffer = io.BytesIO()
    torch.save({"0_0": {"w": torch.arange(6.0).reshape(2, 3)}, "names": ["a", "b"]}, buffer)
    content = buffer.getvalue()
    path = tmp_path / "gradients.pt"
    refused = 0
    for index in range(0, len(content), 2):
        path.write_bytes(content[:index] + bytes([content[index] ^ 1 << index % 8]) + content[index + 1 :])
        message = message_of(path)
        refused += message is not None
        assert message is None or "gradients.pt is not readable as tensors" in message
        assert message is None or "weights_only" not in message
    assert refused > 50


class Hostile:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("executed",))


def test_pickled_code_is_refused_without_advice_to_run_it(tmp_path, capsys):
    path = tmp_path / "x.pt"
    torch.save({"a": Hostile()}, path)
    with pytest.raises(DataError, match=r"contains print, which would run code") as caught:
        read_tensors(path)
    assert "weights_only" not in str(caught.value)
    path.write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(DataError, match="not readable as tensors"):
        read_tensors(path)
    assert "executed" not in capsys.readouterr().out


def test_a_tensor_larger_than_its_data_is_refused(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"a": torch.zeros(1).expand(10**12)}, path)
    with pytest.raises(DataError, match="not readable as tensors"):
        read_tensors(path)


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a/../../x", "C:\\x", "..\\x", "", "a\0", "\ud800", "x" * 300, 3, None]
)
def test_a_name_from_a_file_cannot_leave_its_folder(name, tmp_path):
    with pytest.raises(DataError, match=r"report\.json: found the file name .*; expected a name inside"):
        join_inside(tmp_path, name, "report.json")


def test_a_name_inside_the_folder_is_joined(tmp_path):
    assert join_inside(tmp_path, "a/b..c", "x") == tmp_path / "a" / "b..c"


def test_fields_of_a_wrong_type_name_record_and_field(tmp_path):
    with pytest.raises(DataError, match="x, line 3: found no field 'a' but 'b'; expected a text"):
        require({"b": 1}, "a", str, "x, line 3")
    with pytest.raises(DataError, match="found True as field 'a'; expected a whole number"):
        require({"a": True}, "a", int, "x, line 3")
    with pytest.raises(DataError, match="found a list; expected an object with the field 'a'"):
        require([], "a", int, "x")
    for fault in (KeyError("k"), TypeError("t"), AttributeError("x"), IndexError(), OverflowError(), RecursionError()):
        with pytest.raises(DataError, match=r"x, line 1: found .*; expected a pair"), fields_of("x, line 1", "a pair"):
            raise fault


def test_a_text_file_of_another_encoding_names_the_line(tmp_path):
    (tmp_path / "x.txt").write_bytes("a\nb\nÄ".encode("latin-1"))
    with pytest.raises(DataError, match=r"x\.txt, line 3: found byte 0xc4"):
        read_text(tmp_path / "x.txt")
    with pytest.raises(DataError, match="found Is a directory"):
        read_text(tmp_path)
    with pytest.raises(DataError, match="embedded null byte"):
        read_text(Path("a\0b"))
