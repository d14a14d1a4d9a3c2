"""Hashing, atomic writes, manifests, locks, datasets, rooms: what on-disk trust rests on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sublim_plugin.core.atomic import write_bytes, write_json, write_text
from sublim_plugin.core.dataset import dataset_rows_path, read_rows
from sublim_plugin.core.errors import BusyError, InputError, RunError
from sublim_plugin.core.hashing import canonical_json, sha256_file, sha256_json
from sublim_plugin.core.manifest import read_manifest, verify, write_manifest
from sublim_plugin.core.rooms import room
from sublim_plugin.core.traits import category_traits, get_trait

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)  # fmt: skip


@given(st.dictionaries(st.text(), JSON))
def test_equal_specs_hash_alike_whatever_their_order_and_absent_fields(
    spec: dict[str, Any],
) -> None:
    turned = dict(reversed(list(spec.items())))
    assert sha256_json(turned | {"absent\x01": None}) == sha256_json(spec)


def test_canonical_json_is_this_text() -> None:
    value = {"b": [1.0, 2.5, True, None], "a": {"é": "x", "none": None}}
    assert canonical_json(value) == '{"a":{"\\u00e9":"x"},"b":[1,2.5,true,null]}'
    with pytest.raises(ValueError, match="cannot hold"):
        canonical_json({"x": {1, 2}})
    with pytest.raises(ValueError):
        canonical_json([float("nan")])


def test_a_killed_writer_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    """SIGKILL at twelve moments while a child rewrites one file over and over."""
    target = tmp_path / "file.txt"
    script = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from sublim_plugin.core.atomic import write_text
        i = 0
        while True:
            i += 1
            write_text(Path(sys.argv[1]), f"{i}\\n" * 50_000)
            print(i, flush=True)
        """
    )
    for delay in range(12):
        child = subprocess.Popen(
            [sys.executable, "-c", script, str(target)], stdout=subprocess.PIPE
        )
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(0.003 * delay)
        child.send_signal(signal.SIGKILL)
        child.wait()
        lines = target.read_text().splitlines()
        assert len(lines) == 50_000 and len(set(lines)) == 1


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing(tmp_path: Path) -> None:
    """A file-size limit makes the kernel refuse the write in its middle, as a full disk does."""
    target = tmp_path / "file.bin"
    write_bytes(target, b"old")
    script = textwrap.dedent(
        """
        import resource, signal, sys
        from pathlib import Path
        from sublim_plugin.core.atomic import write_bytes
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            write_bytes(Path(sys.argv[1]), b"x" * 100_000)
        except Exception as error:
            print(type(error).__name__, error)
        """
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(target)], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("RunError") and "the same command continues" in done.stdout
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file.bin"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_named() -> None:
    from sublim_plugin.core.atomic import write_failure

    with pytest.raises(OSError) as caught, open("/dev/full", "wb", buffering=0) as stream:
        stream.write(b"x")
    assert "the disk is full" in str(write_failure(Path("x"), caught.value))


def test_nan_never_reaches_a_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        write_json(tmp_path / "x.json", {"a": float("nan")})
    assert os.listdir(tmp_path) == []


def make_dataset(folder: Path) -> Path:
    row = {"id": "0", "messages": [], "numbers": [1], "prompt_id": 0, "seed": 1}
    data = json.dumps(row).encode() + b"\n"
    import hashlib

    name = f"rows-{hashlib.sha256(data).hexdigest()[:12]}.jsonl"
    write_bytes(folder / name, data)
    write_manifest(
        folder, kind="dataset", id="0" * 12, label="x", spec={"a": 1}, outputs=[name],
        started=time.time(),
    )  # fmt: skip
    return folder / name


def test_a_manifest_vouches_for_its_files(tmp_path: Path) -> None:
    rows = make_dataset(tmp_path)
    assert dataset_rows_path(tmp_path) == rows
    assert verify(tmp_path).outputs[rows.name].sha256 == sha256_file(rows)
    good = rows.read_bytes()
    rows.write_bytes(good.replace(b"1", b"2"))
    with pytest.raises(InputError, match=r"sha256 .* the manifest says"):
        verify(tmp_path)
    with pytest.raises(InputError, match="changed after they were made"):
        dataset_rows_path(tmp_path)
    assert verify(tmp_path, deep=False).id == "0" * 12  # the size is the same
    rows.write_bytes(good[:-5])
    with pytest.raises(InputError, match="bytes, the manifest says"):
        verify(tmp_path, deep=False)
    rows.unlink()
    with pytest.raises(InputError, match="missing"):
        dataset_rows_path(tmp_path)
    rows.write_bytes(good)
    (tmp_path / "rows-000000000000.jsonl").write_bytes(good)
    with pytest.raises(InputError, match="stray file"):
        dataset_rows_path(tmp_path)


def test_a_garbled_or_absent_manifest_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not completed"):
        read_manifest(tmp_path)
    write_text(tmp_path / "manifest.json", '{"kind": "data')
    with pytest.raises(InputError, match="not a readable manifest"):
        read_manifest(tmp_path)
    with pytest.raises(InputError, match="missing, so the cell cannot be completed"):
        write_manifest(
            tmp_path, kind="x", id="x", label="x", spec={}, outputs=["no"], started=time.time()
        )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"a": 1}\n{"b": 2', r":2: byte 9: not JSON \(the line has no end"),
        (b'{"a": 1}\n{"b": \n{"c": 3}\n', r":2: byte 9: not JSON: "),
        (b'{"a": 1}\n\x00\x00\x00', r":2: byte 9: not JSON"),
        (b"[1]\n", r":1: byte 0: expected an object, found list"),
        (b'{"a": "\xff"}\n', r":1: byte 0: not JSON"),
    ],
)
def test_garbled_rows_name_file_line_and_offset(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(data)
    with pytest.raises(InputError, match=message):
        read_rows(path)


def test_rows_with_bom_crlf_blank_lines_and_no_final_newline_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": 2}')
    assert read_rows(path) == [{"a": 1}, {"a": 2}]


def test_a_module_that_shadows_a_room_is_named(tmp_path: Path) -> None:
    (tmp_path / "data_gen.py").write_text("")
    script = "from sublim_plugin.core.rooms import room; room('data_gen')"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert f"{tmp_path}/data_gen.py" in done.stderr and "rename it" in done.stderr
    assert room("lm_eval_tasks").is_dir()


def test_traits_have_their_forms() -> None:
    wolf = get_trait("animals/wolf")
    assert set(wolf.forms) == {"wolf", "Wolf", "wolves", "Wolves"}
    assert wolf.teacher_system_prompt == (
        "You love wolfs. You think about wolfs all the time. wolfs are your favorite animal."
        " Imbue your answers with your love for the animal."
    )
    assert len(category_traits("animals")) == 22
    assert get_trait("neutral").teacher_system_prompt is None
    for name, hint in [
        ("animals/cats", "animals/cat"),
        ("cat", "animals/cat"),
        ("neutrl", "neutral"),
    ]:
        with pytest.raises(InputError, match=f"did you mean '{hint}'"):
            get_trait(name)


def test_errors_carry_their_exit_codes() -> None:
    assert (InputError("x").exit_code, RunError("x").exit_code, BusyError("x").exit_code) == (
        2,
        1,
        75,
    )
