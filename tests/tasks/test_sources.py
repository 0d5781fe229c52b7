import json
from hashlib import blake2b
from pathlib import Path

import pytest

from graftwork.core.files import replace_file
from graftwork.errors import DataError
from graftwork.tasks.prepared_files import read_prepared
from graftwork.tasks.sources import (
    HubSource,
    read_csv,
    read_json_lines,
    read_lines,
    read_tsv,
    subset_order,
    write_json_lines,
)

DIRTY = (
    b'"starts with a quote \\n rest\tyes\n'
    b'an "unbalanced quote\tno\n'
    b"three\tcolumns\there\n"
    b"\n"
    b"next\xc2\x85line, \xe2\x80\xa8 separator, \x0c form feed\tkept\n"
    b"lone \r return\tkept too\n"
    b"windows line\tends here\r\n"
    b"no separator\tlast, without line feed"
)


def test_only_a_line_feed_ends_a_line(write):
    lines = list(read_lines(write("dirty.tsv", DIRTY)))
    assert len(lines) == DIRTY.count(b"\n") + 1
    assert lines[4] == "next\x85line, \u2028 separator, \x0c form feed\tkept"
    assert lines[5] == "lone \r return\tkept too"
    assert lines[6] == "windows line\tends here"


def test_a_byte_order_mark_and_a_final_line_feed_are_dropped(write):
    assert list(read_lines(write("marked", b"\xef\xbb\xbfone\ntwo\n"))) == ["one", "two"]
    assert list(read_lines(write("empty", b""))) == []


def test_a_final_carriage_return_without_line_feed_is_kept(write):
    assert list(read_lines(write("old", b"one\r"))) == ["one\r"]


def test_rows_keep_their_line_numbers_and_quotes(write):
    table = read_tsv(write("dirty.tsv", DIRTY), ("input", "ans"))
    assert [index for index, _ in table.rows] == [0, 1, 4, 5, 6, 7]
    assert (table.lines, table.ignored) == (8, 2)
    assert table.rows[0][1] == {"input": '"starts with a quote \\n rest', "ans": "yes"}
    assert table.rows[1][1]["input"] == 'an "unbalanced quote'
    assert table.rows[5][1]["ans"] == "last, without line feed"


def test_a_header_names_the_columns(write):
    table = read_tsv(write("glue.tsv", "sentence\tlabel\ngood\t1\nbad\t0\n"))
    assert table.rows == ((0, {"sentence": "good", "label": "1"}), (1, {"sentence": "bad", "label": "0"}))


@pytest.mark.parametrize("header", ["", "a\ta"])
def test_an_invalid_header_is_refused(write, header):
    with pytest.raises(DataError, match=r"bad\.tsv, line 1: found .*; expected a header of distinct names"):
        read_tsv(write("bad.tsv", header + "\n1\t2\n"))


def test_an_invalid_byte_error_names_the_line(write):
    path = write("latin.tsv", b"fine\tyes\ncaf\xe9\tno\n")
    with pytest.raises(DataError, match=r"latin\.tsv, line 2: found byte 0xe9 at position 3; expected UTF-8"):
        read_tsv(path, ("input", "ans"))


def test_a_missing_file_is_named(tmp_path: Path):
    with pytest.raises(DataError, match=r"nowhere\.tsv: found No such file or directory; expected a readable file"):
        list(read_lines(tmp_path / "nowhere.tsv"))


def test_csv_cells_may_contain_commas_quotes_and_line_breaks(write):
    path = write("nli.csv", 'id,text\r\n1,"a, ""quoted"" word"\r\n2,"two\nlines"\r\n3,too,many\r\n')
    table = read_csv(path, ["id", "text"])
    assert [cells["text"] for _, cells in table.rows] == ['a, "quoted" word', "two\nlines"]
    assert (table.lines, table.ignored) == (3, 1)


def test_csv_without_a_required_column_is_refused(write):
    with pytest.raises(DataError, match=r"found the columns id, text; expected also pairID"):
        read_csv(write("nli.csv", "id,text\n"), ["id", "pairID"])


def test_an_unclosed_csv_quote_is_an_error(write):
    with pytest.raises(DataError, match=r"nli\.csv, line \d: found broken quoting"):
        read_csv(write("nli.csv", 'id,text\n1,"open\n2,b\n3,c\n'))


def test_invalid_json_error_names_the_line(write):
    path = write("rows.jsonl", '{"input": "a"}\n\n{"input": "b"\n')
    with pytest.raises(DataError, match=r"rows\.jsonl, line 3: found .*, not JSON .* expected one JSON value on each"):
        list(read_json_lines(path))


def test_blank_json_lines_are_skipped_by_default_only(write):
    path = write("rows.jsonl", "1\n\n2\n")
    assert list(read_json_lines(path)) == [(1, 1), (3, 2)]
    with pytest.raises(DataError, match="line 2"):
        list(read_json_lines(path, skip_blank=False))


def test_written_lines_are_read_back_unchanged(tmp_path: Path):
    rows = [{"input": "a\nb \u2028 c \r d"}, {"input": "é 𝄞"}]
    write_json_lines(tmp_path / "new" / "rows.jsonl", rows)
    assert [value for _, value in read_json_lines(tmp_path / "new" / "rows.jsonl")] == rows
    assert len((tmp_path / "new" / "rows.jsonl").read_text().splitlines()) == 2


def test_a_failed_write_keeps_the_old_file(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text("old\n")

    def break_off() -> None:
        with replace_file(path) as file:
            file.write("new\n")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        break_off()
    assert path.read_text() == "old\n"
    assert list(tmp_path.iterdir()) == [path]


def test_prepared_rows_are_grouped_by_data_set_and_split(write):
    rows = [
        {"dataset": "b", "split": "dev", "id": 4, "input": "q", "ans": "x", "all_answers": ["x", "y"], "split_size": 9},
        {"dataset": "a", "split": "test", "id": 0, "input": "q", "ans": "x", "all_answers": ["x"], "split_size": 1},
        {"dataset": "b", "split": "dev", "id": 7, "input": "r", "ans": "z", "all_answers": ["z"], "split_size": 9},
    ]
    groups = read_prepared(write("rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows)))
    assert [(group.name, group.split, group.size, [row.key for row in group.rows]) for group in groups] == [
        ("b", "dev", 9, ["4", "7"]),
        ("a", "test", 1, ["0"]),
    ]
    assert groups[0].rows[0].fields["all_answers"] == ("x", "y")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1]", "found a list; expected an object"),
        ('{"text": "a"}', r"found no field 'input' but 'text'; expected a text field 'input'"),
        ('{"input": 3}', "found 3 as 'input'; expected a text"),
        ('{"input": "a", "target": 3}', "found 3 as 'ans'; expected a text"),
        ('{"input": "a", "target": "b", "dataset": 1}', "found 1 as 'dataset'; expected a text"),
        ('{"input": "a", "ans": "b", "all_answers": []}', "'all_answers'; expected a list of at least one text"),
        ('{"input": "a", "ans": "b", "all_answers": "b"}', "'all_answers'; expected a list"),
        ('{"input": "a", "ans": "b", "split_size": "2"}', "'split_size'; expected a number of rows"),
        ('{"input": "a", "ans": "b", "split_size": 4}', "found split_size 4 after 0"),
    ],
)
def test_a_malformed_prepared_line_error_names_the_line(write, line, message):
    path = write("rows.jsonl", f'{{"input": "fine", "target": "yes"}}\n{line}\n')
    with pytest.raises(DataError, match=rf"rows\.jsonl, line 2: .*{message}"):
        read_prepared(path)


def test_the_hashed_order_is_the_documented_one():
    keys = ["a", "b", "c", "d"]
    expected = sorted(range(4), key=lambda i: blake2b(f"7:train:{keys[i]}".encode(), digest_size=8).digest())
    assert subset_order(keys, split="train", seed=7) == expected


def test_equal_keys_keep_their_order():
    order = subset_order(["same"] * 5 + ["other"], split="train")
    assert [index for index in order if index < 5] == [0, 1, 2, 3, 4]


def test_hub_split_names_are_mapped(tmp_path: Path):
    write_json_lines(tmp_path / "validation.jsonl", [{"id": "x", "text": "a"}, {"id": "y", "text": "b"}])
    source = HubSource(
        "json",
        splits={"dev": "validation"},
        key="id",
        options={
            "data_files": {"validation": str(tmp_path / "validation.jsonl")},
            "cache_dir": str(tmp_path / "cache"),
        },
    )
    records = source(tmp_path, "dev")
    assert [(row.key, row.fields["text"]) for row in records.rows] == [("x", "a"), ("y", "b")]
    assert (records.split, records.size) == ("dev", 2)
    with pytest.raises(DataError, match="json: found no split 'test' to load"):
        source(tmp_path, "test")
