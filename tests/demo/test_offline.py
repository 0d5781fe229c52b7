"""The offline world in the cache, in a folder of the user, and by command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from graftwork.cli.app import run
from graftwork.demo import offline, offline_world, shipped_model
from graftwork.errors import StorageError


def contents(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


@pytest.mark.long
def test_the_command_writes_what_the_function_returns(cached_world, tmp_path, capsys):
    assert run(["demo", "--only", "world", "-o", str(tmp_path / "deep"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["data"] == (tmp_path / "deep" / "world" / "unifiedqa").as_posix()
    assert {name for name, path in found.items() if (Path(path) / "model.safetensors").is_file()} == {*offline.MODELS}
    assert contents(Path(found["world"])) == contents(cached_world)
    weights = Path("model.safetensors")
    for name in offline.MODELS:
        assert (Path(found[name]) / weights).read_bytes() == (Path(shipped_model(name)) / weights).read_bytes()
    # nothing else: no runs, no report
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["world"]
    assert run(["demo", "world", "-o", str(tmp_path / "deep")]) == 0
    assert f"decoder: {found['decoder']}\n" in capsys.readouterr().out


def test_the_cache_is_written_once_and_anew_for_another_definition(cached_world, monkeypatch):
    monkeypatch.setenv("GRAFTWORK_CACHE", str(cached_world.parent))
    marker = cached_world / "marker"
    marker.touch()
    assert offline_world() == cached_world
    assert marker.exists()
    marker.unlink()
    monkeypatch.setattr(offline, "_definition", lambda: "other")
    written = []
    monkeypatch.setattr(offline, "_write", lambda folder: written.append(folder) or folder)
    assert offline_world() == cached_world.with_name("world-other")
    assert len(written) == 1


def test_an_interrupted_first_call_leaves_no_half_world(tmp_path, monkeypatch):
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path))

    def stop(folder):
        (folder / "half").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(offline, "_write", stop)
    with pytest.raises(KeyboardInterrupt):
        offline_world()
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("GRAFTWORK_CACHE", str(tmp_path / "file"))
    with pytest.raises(StorageError, match=str(tmp_path / "file")):
        offline_world()
