"""Mutated inputs for every reader: only errors of Graftwork may be raised, and no record may be lost.

    python tests/fuzz_readers.py --count 100000

Inputs depend on seed, reader and number only; a failure prints the command that repeats it.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import random
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuzz_inputs import readers
from fuzz_own_data import own_readers
from fuzz_reader import Reader
from fuzz_records import record_readers
from graftwork.errors import GraftworkError

SECONDS = 20.0
"""Longest time for one input."""

WORDS: tuple[bytes, ...] = (
    b"null",
    b"true",
    b"-1",
    b"0",
    b"1e999",
    b"NaN",
    b"Infinity",
    b'""',
    b"[]",
    b"{}",
    b"9" * 5000,
    b"1" * 40,
    b'"\\ud800"',
    b'"\\u0000"',
    b"\\ud83d",
    b"\x00",
    b"\xff\xfe",
    b"\xef\xbb\xbf",
    b"\r",
    b"\r\n",
    b"\n",
    b"\t",
    b'"',
    "\u2028".encode(),
    "\u00b2".encode(),
    "\U0001f600".encode(),
    b"../../../etc/passwd",
    b"/etc/passwd",
    b"[" * 3000,
    b'{"a":' * 3000,
    b"&a [*a]",
    b"*a",
    b"2024-01-01",
    b"2024-13-45",
    b"!!int x",
    b"!!python/none x",
    b"---\n",
    b"%",
    b",",
    b":",
    b"'",
    b"a" * 300,
    b"\x1b[2J",
    b"{{",
    b"{% for",
    b"0x",
    b"!!binary x",
    b"!!timestamp x",
)
VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1e308,
    float("inf"),
    float("nan"),
    "",
    [],
    {},
    10**30,
    "\ud800",
    "a\0b",
    "x" * 300,
    [[]],
    [None],
    {"a": 1},
    ["a"],
    [1],
    "../../x",
    "/etc/passwd",
    "2024-01-01",
    0.5,
    -(10**20),
    {"": {}},
    "\u00b2",
    "1e5",
    [{}],
    "\n",
)
STRUCTURED = (".json", ".jsonl")
COMPRESSED = ".gz"


@dataclass(frozen=True)
class Failure:
    """One input that a reader treats wrongly."""

    reader: str
    number: int
    kind: str
    """Exception and place, lost records, an error that does not name the file, or time."""
    detail: str


def mutated(reader: Reader, name: str, number: int, seed: int = 0) -> bytes:
    """Return the mutated input with this number."""
    draw = random.Random(f"{seed}:{name}:{number}")
    content = reader.content
    if reader.file.endswith(COMPRESSED) and draw.random() < 0.4:
        import gzip

        return gzip.compress(_bytes(gzip.decompress(content), draw), 1)
    if reader.file.endswith(STRUCTURED) and draw.random() < 0.6:
        return _structure(content, reader.file, draw)
    return _bytes(content, draw)


def _bytes(content: bytes, draw: random.Random) -> bytes:
    """Flip, insert, delete, repeat or truncate bytes, or insert a word that readers stumble over."""
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 3, 8))):
        place = draw.randrange(len(data) + 1)
        kind = draw.randrange(7)
        if kind == 0 and data:
            data[min(place, len(data) - 1)] ^= 1 << draw.randrange(8)
        elif kind == 1:
            data[place:place] = bytes(draw.randrange(256) for _ in range(draw.choice((1, 2, 5))))
        elif kind == 2:
            del data[place : place + draw.choice((1, 2, 10, 50))]
        elif kind == 3:
            data[place:place] = data[place : place + draw.choice((1, 10, 100))]
        elif kind == 4:
            del data[place:]
        else:
            end = place + draw.choice((0, 0, 1, 3))
            data[place:end] = draw.choice(WORDS)
    return bytes(data)


def _structure(content: bytes, file: str, draw: random.Random) -> bytes:
    """Replace, remove or add values inside JSON."""
    many = file.endswith(".jsonl") or content.count(b"\n") > 1
    values = [json.loads(line) for line in content.splitlines()] if many else [json.loads(content)]
    for _ in range(draw.choice((1, 1, 2, 4))):
        places: list[tuple[Any, Any]] = [(values, index) for index in range(len(values))]
        for holder, key in places:
            inner = holder[key]
            if isinstance(inner, dict | list):
                places += [(inner, each) for each in (inner if isinstance(inner, dict) else range(len(inner)))]
        if not places:
            break
        holder, key = draw.choice(places)
        kind = draw.randrange(4)
        if kind == 0 and isinstance(holder, dict):
            holder[draw.choice(("x", "", "id", "text", "\u00e9"))] = holder.pop(key)
        elif kind == 1:
            del holder[key]
        else:
            holder[key] = copy.deepcopy(draw.choice(VALUES))
    escaped = draw.random() < 0.8
    parts = [json.dumps(value, ensure_ascii=escaped).encode(errors="surrogatepass") for value in values]
    return b"".join(part + b"\n" for part in parts)


def run(reader: Reader, name: str, content: bytes, number: int, folder: Path) -> Failure | None:
    """Read one input and return its failure, or None.

    Args:
        reader: Reader to call.
        name: Name of the reader, for the failure.
        content: Mutated input.
        number: Number of the input, for the failure.
        folder: Folder of the input and of the reader's other files.
    """
    path = folder / reader.file
    path.write_bytes(content)
    started = time.monotonic()
    try:
        count = reader.read(path)
    except GraftworkError as error:
        named = path.name in str(error) or str(path.parent) in str(error)
        failure = None if named else Failure(name, number, f"unnamed {type(error).__name__}", str(error)[:300])
    except MemoryError:
        raise
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        place = traceback.extract_tb(error.__traceback__)[-1]
        kind = f"{type(error).__name__} in {Path(place.filename).stem}:{place.lineno}"
        failure = Failure(name, number, kind, "".join(traceback.format_exception(error))[-1500:])
    else:
        expected = reader.records(content) if reader.records else None
        lost = expected is not None and count != expected
        failure = Failure(name, number, "lost records", f"{count} of {expected}") if lost else None
    seconds = time.monotonic() - started
    if failure is None and seconds > SECONDS:
        return Failure(name, number, "too slow", f"{seconds:.0f} s")
    return failure


def fuzz(count: int, seed: int = 0, names: Iterable[str] = (), number: int | None = None) -> list[Failure]:
    """Run `count` mutated inputs, spread over the readers.

    Args:
        count: Number of inputs over all readers.
        seed: Seed of the mutations.
        names: Readers to run; all by default.
        number: Run only the input with this number.
    """
    known = {**readers(), **own_readers(), **record_readers()}
    table = {name: reader for name, reader in known.items() if not names or name in names}
    each = -(-count // len(table))
    failures: list[Failure] = []
    for name, reader in table.items():
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            for file, content in ((reader.file, reader.content), *reader.others):
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                (folder / file).write_bytes(content)
            valid = run(reader, name, reader.content, -1, folder)
            if valid is not None:
                failures.append(valid)
            numbers: Sequence[int] = range(each) if number is None else (number,)
            for index in numbers:
                failure = run(reader, name, mutated(reader, name, index, seed), index, folder)
                if failure is not None:
                    failures.append(failure)
    return failures


def main() -> int:
    """Run the command line and return its exit code: 1 if any input fails."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--count", type=int, default=100_000, help="inputs over all readers")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reader", action="append", default=[], help="only these readers")
    parser.add_argument("--number", type=int, help="only the input with this number, with a traceback")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable()
    started = time.monotonic()
    failures = fuzz(options.count, options.seed, options.reader, options.number)
    kinds: dict[tuple[str, str], list[Failure]] = {}
    for failure in failures:
        kinds.setdefault((failure.reader, failure.kind), []).append(failure)
    for (name, kind), found in sorted(kinds.items()):
        print(f"{len(found)} × {name}: {kind}; repeat with --reader {name} --number {found[0].number}")
        print(
            f"    {found[0].detail if options.number is not None else found[0].detail.strip().splitlines()[-1][:200]}"
        )
    print(f"{options.count} inputs, {len(failures)} failures, {time.monotonic() - started:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
