"""The compiler and the folder of the compiled loops: trusted, in time, and torch's operations wherever they fail."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from unittest import mock

import pytest
import torch

import implicitdl
from implicitdl import BackendWarning
from implicitdl.kernels import build, cache, compiler

pytestmark = pytest.mark.skipif(build.library(torch.float64) is None, reason="no C compiler")

FOLDER = Path(build.__file__).parent
# The smallest source, which is compiled in a moment.
NAME = "probe"


def forget() -> None:
    """As in a new process."""
    for function in (build.library, build.find, cache.workshop, compiler.known_options):
        function.cache_clear()
    compiler._hung.clear()
    build._said.clear()


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of this test's libraries."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a cache, ü"))
    monkeypatch.setenv("PYTHONPATH", str(Path(implicitdl.__file__).parents[1]))
    monkeypatch.delenv("CC", raising=False)
    forget()
    yield tmp_path / "a cache, ü" / "implicitdl"
    forget()


def library(dtype: torch.dtype = torch.float32) -> ctypes.CDLL | None:
    return build.library(dtype, NAME)


def finds_it() -> None:
    assert library() is not None


def why() -> str:
    """The cause, where there is no library; and that it is said once."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert library() is None
        assert library(torch.float64) is None
    assert [one.category for one in said] == [BackendWarning]
    assert "torch's operations do the work" in str(said[0].message)
    assert "IMPLICITDL_KERNELS=0 to silence" in str(said[0].message)
    found = build.find(torch.float32, NAME)
    assert found.why in str(said[0].message)
    return found.why


def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> Path:
    """A compiler that does this."""
    path = tmp_path / "compiler"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    monkeypatch.setenv("CC", str(path))
    return path


class TestTheCompiler:
    def test_its_work_is_kept(self, kept):
        assert library() is not None
        (file,) = kept.iterdir()
        written = file.stat().st_mtime_ns
        forget()
        with mock.patch.object(compiler, "compiled", side_effect=AssertionError("compiled twice")):
            assert library() is not None
        assert [*kept.iterdir()] == [file]
        assert file.stat().st_mtime_ns == written

    def test_switched_off(self, monkeypatch, kept):
        monkeypatch.setenv("IMPLICITDL_KERNELS", "0")
        monkeypatch.setenv("CC", "/nonexistent")
        assert library() is None  # and no warning, which would be an error
        assert not kept.exists()

    def test_no_kernel_for_half_precision(self):
        assert library(torch.bfloat16) is None

    @pytest.mark.parametrize("words", ["/nonexistent", "false", "true", "'", "cc --no-such-option", "/", "cat -"])
    def test_that_does_not_work(self, words, monkeypatch):
        monkeypatch.setenv("CC", words)
        assert why()

    def test_without_a_path(self, monkeypatch):
        monkeypatch.setenv("PATH", "")
        assert why() == "no C compiler was found"

    def test_with_arguments(self, monkeypatch):
        monkeypatch.setenv("CC", "env LANG=C cc -g0")
        assert library() is not None

    def test_that_knows_neither_threads_nor_the_processor(self, monkeypatch, tmp_path):
        refuse = "for a; do case $a in -march=native|-fopenmp) printf '\\377' >&2; exit 1;; esac; done"
        program(tmp_path, monkeypatch, f'{refuse}\nexec cc "$@"')
        assert library() is not None
        assert build.find(torch.float32, NAME).call[-1].startswith("-DINT")

    def test_that_fails_on_the_loop_alone_is_asked_once(self, monkeypatch, tmp_path):
        calls = tmp_path / "calls"
        refuse = f'echo "$@" >> {calls}\ncase "$*" in *STAMP=probe*) ;; *) echo "error: full" >&2; exit 1;; esac'
        program(tmp_path, monkeypatch, f'{refuse}\nexec cc "$@"')
        assert "error: full" in why()
        assert len(calls.read_text().splitlines()) == 3  # one probe, and the loop in two precisions

    def test_that_does_not_end_is_left_with_all_that_it_started(self, monkeypatch, tmp_path):
        monkeypatch.setattr(compiler, "_PATIENCE", 0.5)
        started = tmp_path / "started"
        program(tmp_path, monkeypatch, f"sleep 1000 &\necho $! >> {started}\nwait")
        assert "did not end" in why()
        (child,) = started.read_text().split()  # it was not tried again
        for _ in range(100):
            with suppress(OSError):
                state = Path(f"/proc/{child}/stat").read_text().rsplit(")", 1)[1].split()[0]
                if state != "Z":
                    time.sleep(0.05)
                    continue
            break
        else:
            raise AssertionError("still running")

    def test_that_asks_is_not_answered(self, monkeypatch, tmp_path):
        program(tmp_path, monkeypatch, 'read answer && exit 1\n(: < /dev/tty) 2> /dev/null && exit 1\nexec cc "$@"')
        assert library() is not None

    @pytest.mark.parametrize("signal", [KeyboardInterrupt, SystemExit])
    def test_an_interrupt_ends_it(self, signal, monkeypatch, tmp_path):
        program(tmp_path, monkeypatch, "sleep 1000")
        with mock.patch.object(subprocess.Popen, "communicate", side_effect=signal), pytest.raises(signal):
            library()

    @pytest.mark.parametrize("text", ["int nothing;", 'const char stamp[] = "another";'])
    def test_whose_library_is_another(self, text, monkeypatch, tmp_path):
        (tmp_path / "other.c").write_text(text)
        output = 'while [ $# -gt 1 ]; do [ "$1" = -o ] && to=$2; shift; done'
        program(tmp_path, monkeypatch, f'{output}\nexec cc -shared -fPIC {tmp_path}/other.c -o "$to"')
        assert "was compiled" in why()

    @pytest.mark.parametrize("real", ["float int32_t", "double int64_t"])
    @pytest.mark.parametrize("name", ["sweeps", "rows", "pull", "anderson", "probe"])
    def test_has_no_warnings(self, name, real):
        dtype, integer = real.split()
        strict = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-fopenmp", "-DSTAMP=1"]
        source = [f"-DREAL={dtype}", f"-DINT={integer}", "-fsyntax-only", str(FOLDER / f"{name}.c")]
        subprocess.run(["cc", *strict, *source], check=True)


class TestTheFolder:
    def test_is_the_users_alone_whatever_the_umask(self, kept):
        before = os.umask(0)
        try:
            assert library() is not None
        finally:
            os.umask(before)
        assert kept.stat().st_mode & 0o777 == kept.parent.stat().st_mode & 0o777 == 0o700
        (file,) = kept.iterdir()
        assert file.stat().st_mode & 0o777 == 0o700

    def refused(self, words: str, kept: Path) -> None:
        before = sorted(kept.rglob("*")) if kept.exists() else []
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            assert library() is not None  # compiled, and gone with the process
            assert library(torch.float64) is not None
        assert [one.category for one in said] == [BackendWarning]
        assert re.search(words, str(said[0].message))
        assert build.find(torch.float32, NAME).kept is None
        assert before == (sorted(kept.rglob("*")) if kept.exists() else [])

    @pytest.mark.parametrize("mode", [0o777, 0o770, 0o1777])
    def test_that_others_can_write_to(self, mode, kept):
        kept.mkdir(parents=True)
        kept.chmod(mode)
        self.refused("chmod go-w", kept)

    def test_above_which_others_can_write(self, kept):
        kept.mkdir(parents=True)
        kept.parent.chmod(0o777)
        self.refused("can be written by other users", kept)

    @pytest.mark.parametrize("link", [False, True])
    def test_of_another_user(self, link, kept, tmp_path):
        kept.mkdir(parents=True, mode=0o700)
        if link:
            kept.rename(tmp_path / "theirs")
            kept.symlink_to(tmp_path / "theirs")
        with mock.patch.object(cache, "_user", return_value=os.geteuid() + 1):
            kept.parent.chmod(0o755)
            with mock.patch.object(cache, "_folder", side_effect=Path.stat):
                self.refused("other users|another user", kept)

    def test_that_is_a_pipe(self, kept):
        kept.parent.mkdir()
        os.mkfifo(kept)
        self.refused("no folder", kept)

    @pytest.mark.parametrize("home", ["/proc/nowhere", "/dev/null"])
    def test_that_cannot_be_made(self, home, monkeypatch, tmp_path):
        monkeypatch.setenv("XDG_CACHE_HOME", home)
        self.refused("no folder to keep them in", tmp_path / "none")

    def test_no_home(self, monkeypatch, tmp_path):
        monkeypatch.delenv("XDG_CACHE_HOME")
        with mock.patch.object(Path, "home", side_effect=RuntimeError("no home")):
            self.refused("no home", tmp_path / "none")

    def test_a_place_relative_to_nothing_is_none(self, monkeypatch, tmp_path):
        monkeypatch.setenv("XDG_CACHE_HOME", "here")
        with mock.patch.object(Path, "home", return_value=tmp_path):
            assert library() is not None
        assert len(list((tmp_path / ".cache" / "implicitdl").iterdir())) == 1

    def test_that_is_full_or_runs_nothing(self, kept):
        try_ = cache._try

        def full(path: Path) -> None:
            if path == kept:
                raise build.BuildError(f"{path} has no room", "Make some")
            try_(path)

        with mock.patch.object(cache, "_try", full):
            self.refused("no room", kept)

    def test_nowhere_to_compile_is_decided_without_the_compiler(self):
        with (
            mock.patch.object(cache, "_try", side_effect=build.BuildError("no room", "Make some")),
            mock.patch.object(subprocess, "Popen", side_effect=AssertionError("compiled")),
        ):
            assert why() == "no room; no room"

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is full")
    def test_a_disk_without_room(self, tmp_path):
        with (
            open("/dev/full", "w+b") as full,
            mock.patch.object(cache.tempfile, "TemporaryFile", return_value=nullcontext(full)),
            pytest.raises(build.BuildError, match="No space"),
        ):
            cache._try(tmp_path)


class TestTheFiles:
    def spoil(self, kept: Path) -> Path:
        assert library() is not None
        (file,) = kept.iterdir()
        forget()
        return file

    def test_half_a_file_is_written_anew(self, kept):
        file = self.spoil(kept)
        whole = file.read_bytes()
        file.unlink()  # this process has it in its memory, and would run what is not there any more
        file.write_bytes(whole[: len(whole) // 4])
        assert library() is not None
        assert whole in [path.read_bytes() for path in kept.iterdir()]

    @pytest.mark.parametrize("kind", ["pipe", "folder", "link", "nothing"])
    def test_what_is_no_file_is_not_read(self, kind, kept, tmp_path):
        file = self.spoil(kept)
        file.rename(kept / "elsewhere")
        if kind == "pipe":
            os.mkfifo(file)
        elif kind == "folder":
            (kept / f"{file.stem[:32]}-folder.so").mkdir()
        elif kind == "link":
            file.with_name(f"{file.stem[:32]}-link.so").symlink_to("/dev/zero")
        assert library() is not None

    def test_one_that_others_may_have_written_is_not_loaded(self, kept):
        file = self.spoil(kept)
        file.chmod(0o777)
        with mock.patch.object(compiler, "load", side_effect=compiler.load) as load:
            assert library() is not None
        assert file not in [call.args[0] for call in load.mock_calls]

    @pytest.mark.parametrize("text", ["int nothing;", 'const char stamp[] = "another";', None])
    def test_a_whole_library_that_is_another_is_replaced(self, text, kept, tmp_path):
        file = self.spoil(kept)
        other = tmp_path / "other.so"
        if text is None:
            other.write_bytes(b"\x7fELF of another machine")
        else:
            (tmp_path / "other.c").write_text(text)
            subprocess.run(["cc", "-shared", "-fPIC", str(tmp_path / "other.c"), "-o", str(other)], check=True)
        key = file.name[:32]
        file.unlink()
        shutil.copy(other, kept / f"{key}-{cache.digest(other.read_bytes())}.so")
        for _ in range(2):
            assert hasattr(library(), "probe")
            assert len(list(kept.iterdir())) == 2  # made anew once
            forget()

    def test_what_decides_the_code_decides_the_name(self, tmp_path):
        names = set()
        for text, flag, processor in [("a", "-O1", "x"), ("b", "-O1", "x"), ("a", "-O2", "x"), ("a", "-O1", "y")]:
            (tmp_path / "k.c").write_text(text)
            with mock.patch.object(build, "_processor", lambda processor=processor: processor):
                names.add(build._key(tmp_path / "k.c", ("cc", flag)))
        assert len(names) == 4

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
    @pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
    def test_two_at_once(self, kept):
        both = [multiprocessing.get_context("fork").Process(target=finds_it) for _ in range(2)]
        for process in both:
            process.start()
        for process in both:
            process.join()
        assert [process.exitcode for process in both] == [0, 0]
        assert len(list(kept.iterdir())) == 1


class TestSolvesWithoutALibrary:
    def test_are_right_and_said_once(self, monkeypatch):
        monkeypatch.setenv("CC", "false")
        code = """
import torch, warnings
from implicitdl import Anderson, BackendWarning, ImplicitModel, fixed_point
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    model = ImplicitModel(input_dim=4, output_dim=2, hidden_dim=6)
    for _ in range(3):
        model(torch.randn(5, 4)).sum().backward()
    x = fixed_point(lambda x: torch.tanh(.9 * x + 1), torch.zeros(3, 4), solver=Anderson())
assert x.converged.all()
print([w.category.__name__ for w in said])
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "['BackendWarning']"

    def test_an_error_of_the_filter_is_raised_once(self, monkeypatch):
        monkeypatch.setenv("CC", "false")
        with warnings.catch_warnings():
            warnings.simplefilter("error", BackendWarning)
            with pytest.raises(BackendWarning):
                library()
            assert library() is None
