"""Files: nothing already written is lost, whatever happens while the next one is being written."""

import os
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch

from hiernb.errors import FileFormatError
from hiernb.files import atomic_folder, atomic_write, read_json, read_tensors, write_json, write_tensors

ENDLESS = """
import sys, torch
from hiernb.files import write_tensors
i = 0
while True:
    i += 1
    write_tensors(sys.argv[1], {"x": torch.full((1 << 18,), float(i))}, kind="demo", meta=i)
"""


def limited(path, code: str):
    "Runs code in a process that may write files of at most 64 KiB: what a full disk does, done for real."
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
    return subprocess.run([sys.executable, "-c", code, str(path)], preexec_fn=limit, capture_output=True, text=True)


@pytest.mark.parametrize("delay", [0.0, 0.01, 0.03, 0.07])
def test_a_killed_writer_leaves_a_whole_file(tmp_path, delay):
    path = tmp_path / "x.safetensors"
    process = subprocess.Popen([sys.executable, "-c", ENDLESS, str(path)])
    while not path.exists():
        time.sleep(0.005)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()
    tensors, meta = read_tensors(path, kind="demo")
    assert (tensors["x"] == meta).all()


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"x": torch.ones(3)}, kind="demo")
    done = limited(path, 'import sys, torch; from hiernb.files import write_tensors; write_tensors(sys.argv[1], {"x": torch.zeros(1 << 16)}, kind="demo")')
    assert done.returncode != 0 and "OSError" in done.stderr
    assert torch.equal(read_tensors(path, kind="demo")[0]["x"], torch.ones(3))
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_failing_rename_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        write_json(path, {"a": 2})
    monkeypatch.undo()
    assert read_json(path) == {"a": 1} and [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    for content in ("old", "new"):
        with atomic_folder(tmp_path / "set") as folder:
            (folder / "x").write_text(content)
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "set") as folder:
        (folder / "x").write_text("half")
        raise RuntimeError
    assert (tmp_path / "set" / "x").read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize("keep", [0, 1, 8, 100, -1])
def test_a_truncated_file_is_refused_by_name(tmp_path, keep):
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"x": torch.ones(300)}, kind="demo")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(FileFormatError, match="x.safetensors"):
        read_tensors(path, kind="demo")


def test_unicode_paths_and_permissions(tmp_path):
    path = tmp_path / "日本 é" / "ü.txt"
    with atomic_write(path, "w") as f:
        f.write("straße")
    assert path.read_text(encoding="utf8") == "straße"
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask
