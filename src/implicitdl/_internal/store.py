"""Tensors and JSON on disk: one folder, two files, atomically, never a pickle.

A checkpoint is the folder that users of ``save_pretrained`` know::

    folder/model.safetensors    the tensors
    folder/config.json          everything else, the SHA-256 of model.safetensors, and that of itself

Two files cannot be renamed in one step, and a rename over a folder that is not empty is refused. So both
files are first written next to their places (``*.new``) and brought to the disk, and then renamed, the
tensors first. That first rename is the commit. Before it, ``config.json`` is the one whose digest fits the
tensors; after it, ``config.json.new`` is, until the second rename puts it in its place. Whoever reads takes
the one that fits, so at any moment (a kill -9, a power cut) the folder holds either the old checkpoint or the
new one, whole, and a pair that comes from two different saves is found out.

The second digest, over the entries of ``config.json`` in one fixed spelling, finds a configuration that was
changed after the save: the weights would belong to another model. Digests find accidents and honest edits;
they are no signature, so whoever reads a configuration checks every entry of it all the same.

Checkpoints of format 1 had no digest of the configuration. They are refused, with the way to their tensors.

Symbolic links in the folder are neither read nor written through; the folder itself may be reached by one.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, NamedTuple

import msgspec
import safetensors.torch
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from torch import Tensor

from .errors import ArgumentError, wrong

TENSORS = "model.safetensors"
CONFIG = "config.json"
LOCK = ".lock"
FORMAT = 2
# What this module writes into config.json next to the caller's own entries.
_OWN = ("format", "sha256", "config_sha256")
_PICKLES = {".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"}
# The longest header that safetensors itself reads.
_LONGEST_HEADER = 100_000_000
_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool", "C64": "complex64",
}  # fmt: skip


class CheckpointError(ArgumentError):
    """A checkpoint that cannot be read, is not the one asked for, or cannot be written."""


class Form(NamedTuple):
    """What a tensor is but for its numbers."""

    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, tensor: Tensor) -> Form:
        return cls(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))

    def __str__(self) -> str:
        return f"{self.shape} {self.dtype}"


class _Entry(msgspec.Struct, forbid_unknown_fields=True):
    """A tensor in the header of model.safetensors."""

    dtype: str
    shape: tuple[Annotated[int, msgspec.Meta(ge=0)], ...]
    data_offsets: tuple[int, int]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that is open: what it holds is known, and no tensor is in memory yet."""

    folder: Path
    meta: dict[str, Any]
    forms: dict[str, Form]
    file: BinaryIO

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name, on the CPU."""
        self.file.seek(0)
        return _parse(self.folder, self.file.read())

    def wrong(self, expected: str, got: str, do: str = "") -> CheckpointError:
        """An error about it, to be raised."""
        return _wrong(self.folder, expected, got, do)


def save(folder: str | os.PathLike[str], tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write a checkpoint so that at any moment either the old one or the new one is there, whole.

    Arguments:
        folder: where; made if it is missing. Other files in it are left alone.
        tensors: by name; dense, any shape, dtype and device. Tied tensors are written once each.
        meta: what JSON can hold; ``meta["kind"]`` says what it is, "format" and "sha256" are taken.

    Raises:
        CheckpointError: the folder cannot be written, the disk is full; what was there before stays.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(folder, {"A": torch.eye(2)}, {"kind": "model", "n": 2})
        ...     tensors, meta = load(folder, kind="model")
        >>> tensors["A"].shape, meta
        (torch.Size([2, 2]), {'kind': 'model', 'n': 2})
    """
    folder = _path(folder)
    data = _serialise(folder, tensors)
    config = _config(folder, meta, hashlib.sha256(data).hexdigest())
    final = folder / TENSORS, folder / CONFIG
    fresh = _fresh(final[0]), _fresh(final[1])
    with writing(folder):
        made = _make(folder)
        try:
            _finish_interrupted(folder)
            _write(fresh[0], data)
            _write(fresh[1], config)
            _sync(folder)
            os.replace(fresh[0], final[0])
        except OSError:
            for path in fresh:
                _discard(path)
            if made:
                with contextlib.suppress(OSError):
                    folder.rmdir()
            raise
        # From here the new checkpoint is the one that is read, with config.json.new if it must be.
        os.replace(fresh[1], final[1])
        _sync(folder)


def load(folder: str | os.PathLike[str], kind: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint: nothing in it is ever executed.

    Arguments:
        folder: the folder that `save` wrote.
        kind: what ``meta["kind"]`` has to be; None takes any.

    Returns:
        ``(tensors, meta)``: the tensors by name on the CPU, and what `save` was given beside them.

    Raises:
        CheckpointError: no checkpoint there, a damaged one, two files that do not belong together, a pickle,
            a checkpoint of another kind, or one of format 1.
    """
    with opened(folder, kind) as checkpoint:
        return checkpoint.tensors(), checkpoint.meta


@contextlib.contextmanager
def opened(folder: str | os.PathLike[str], kind: str | None = None) -> Iterator[Checkpoint]:
    """The same before its tensors are read, so that what does not fit is refused while it still takes no memory."""
    folder = _path(folder)
    _refuse_what_is_no_checkpoint(folder)
    # A writer may put a new checkpoint in place between our reading of the two files: then look again.
    for last in (False, False, True):
        with _open(folder / TENSORS) as file:
            digest = _digest(file)
            config = _fitting_config(folder, digest)
            if config is None and not last:
                continue
            forms = _forms(folder, file)  # A truncated file is said to be truncated, not to be of another save.
            if config is None:
                raise _wrong(folder, *_why_no_config_fits(folder, digest))
            yield Checkpoint(folder, _checked(folder, config, kind), forms, file)
            return


def exists(folder: str | os.PathLike[str]) -> bool:
    """Whether `folder` holds a checkpoint: its tensors are renamed into place last, so they alone decide."""
    return os.path.isfile(os.path.join(folder, TENSORS))


def parse(data: bytes) -> dict[str, Any]:
    """A JSON object in which every name stands once and every number is finite; ValueError says what is wrong."""
    try:
        entries = json.loads(data.decode(), object_pairs_hook=_once, parse_float=_finite, parse_constant=_finite)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(entries, dict):
        raise ValueError("no JSON object")
    return entries


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{quoted(max(names, key=names.count))} twice")
    return entries


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {quoted(text)}")
    return value


def quoted(value: Any, most: int = 60) -> str:
    """Something from a file as a message shows it: on one line, and short."""
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 4]}...{text[-1]}"


@contextlib.contextmanager
def owned(folder: Path) -> Iterator[None]:
    """Be the only run in a folder, which is made; a run that was killed owns nothing.

    A folder that was made for it and is empty at the end is removed, with its parents.

    Raises:
        CheckpointError: another process, or another thread of this one, owns it, or it cannot be written.
    """
    absent = [path for path in (folder, *folder.parents) if not os.path.lexists(path)]
    with writing(folder):
        _make(folder)
        lock = FileLock(folder / LOCK, timeout=0, is_singleton=True)  # one for all owners inside one another
        try:
            lock.acquire()
        except Timeout:
            do = "Wait until it ends, or choose another folder."
            raise _wrong(folder, "a folder that no run is writing to", "one that another run owns", do) from None
    try:
        yield
    finally:
        if lock.lock_counter == 1:  # who waits for this file sees that it is gone, and makes another
            _discard(folder / LOCK)
        lock.release()
        with contextlib.suppress(OSError):
            for path in absent:
                path.rmdir()


def refuse_owned(folder: Path) -> None:
    """Raise where another run owns the folder; nothing is made."""
    if os.path.lexists(folder / LOCK):
        with owned(folder):
            pass


def append_to(path: Path, data: bytes) -> None:
    """Write at the end of a file, which is no link; a full disk leaves no half of it."""
    with writing(path.parent):
        if os.path.islink(path):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        with open(path, "ab", buffering=0) as file:
            size = file.tell()
            try:
                while data:
                    data = data[file.write(data) :]
            except OSError:
                file.truncate(size)
                raise


def write_file(path: Path, data: bytes) -> None:
    """Replace one file atomically: its old or its new content is there, whole, at any moment."""
    with writing(path.parent):
        _make(path.parent)
        fresh = _fresh(path)
        try:
            _write(fresh, data)
            os.replace(fresh, path)
        except OSError:
            _discard(fresh)
            raise
        _sync(path.parent)


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Word what the operating system says when it refuses to write into `folder`."""
    try:
        yield
    except OSError as error:
        raise _wrong(folder, *_words_for(error)) from error


def _words_for(error: OSError) -> tuple[str, str, str]:
    got = f"{error.strerror or error}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "room on the disk", got, "Free some space; what was saved there before is unchanged."
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "a folder that can be written", got, "Change its permissions or choose another folder."
    if error.errno == errno.ENAMETOOLONG:
        return "a path that the system takes", got, "Choose a shorter name."
    if error.errno == errno.ELOOP:
        return "files that are no symbolic links", got, "Links are not followed: remove it, or choose another folder."
    if error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
        return (
            "a folder, or a path where one can be made",
            got,
            "A file is in the way: choose another folder.",
        )
    return "a folder that can be written", got, "What was saved there before is unchanged."


def _path(folder: str | os.PathLike[str]) -> Path:
    if not isinstance(folder, (str, os.PathLike)) or "\0" in os.fspath(folder):
        raise wrong("checkpoint", "the path of a folder", quoted(folder))
    return Path(folder)


def _wrong(folder: Path, expected: str, got: str, do: str) -> CheckpointError:
    return CheckpointError(str(wrong(f"checkpoint '{folder}'", expected, got, do)))


def _serialise(folder: Path, tensors: Mapping[str, Tensor]) -> bytes:
    plain = {}
    for name, tensor in tensors.items():
        if tensor.device.type == "meta":
            do = "Load its weights, or make them with model.to_empty(device='cpu') and draw them, before saving."
            raise _wrong(folder, "tensors with numbers in them", f"'{name}' on the meta device", do)
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise _wrong(folder, "dense tensors", f"'{name}' of {tensor.layout} on {tensor.device}", "Densify it.")
        # safetensors refuses two names for one memory, which is what tied weights are: each gets its own.
        plain[name] = tensor.detach().to("cpu", copy=True).contiguous()
    try:
        # Bytes, not save_file: Python's own write says ENOSPC and friends as an OSError.
        return safetensors.torch.save(plain)
    except (KeyError, ValueError, SafetensorError) as error:
        dtypes = ", ".join(sorted({str(tensor.dtype) for tensor in plain.values()}))
        raise _wrong(folder, "dtypes that safetensors knows", dtypes, "Cast the others before saving.") from error


def _config(folder: Path, meta: Mapping[str, Any], digest: str) -> bytes:
    taken = [name for name in _OWN if name in meta]
    assert not taken, f"{taken} are written by the store itself"
    try:
        # As it will be read: names of entries are text, and tuples are lists.
        entries = parse(json.dumps({**meta, "format": FORMAT, "sha256": digest}, allow_nan=False).encode())
        return (json.dumps({**entries, "config_sha256": _digest_of(entries)}, indent=1) + "\n").encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise _wrong(folder, "settings that JSON can hold", str(error), "Use numbers, text and lists.") from error


def _digest_of(entries: dict[str, Any]) -> str:
    """Of a configuration, however it is spaced and ordered."""
    content = {name: value for name, value in entries.items() if name != "config_sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _fresh(path: Path) -> Path:
    return path.with_name(path.name + ".new")


def _make(folder: Path) -> bool:
    """Make the folder; whether it was missing."""
    if os.path.isdir(folder):
        return False
    folder.mkdir(parents=True, exist_ok=True)
    return True


def _write(path: Path, data: bytes) -> None:
    if os.path.lexists(path):
        path.unlink()
    with open(path, "xb") as file:  # made anew: a link that is put in its place meanwhile is not followed
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _discard(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()


def _sync(folder: Path) -> None:
    """Bring the names in a folder to the disk, where the system can (Windows cannot open a folder)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _finish_interrupted(folder: Path) -> None:
    """Do the second rename that an interrupted save left undone: the next save would write over its file."""
    fresh = _fresh(folder / CONFIG)
    if _is_plain(fresh) and _is_plain(folder / TENSORS):
        with _open(folder / TENSORS) as file:
            finished = (_entries(fresh) or {}).get("sha256") == _digest(file)
        if finished:
            os.replace(fresh, folder / CONFIG)
            _sync(folder)


def read(path: Path) -> bytes:
    """A file of a run, which is no link."""
    with _open(path) as file:
        return file.read()


def _is_plain(path: Path) -> bool:
    """Whether it is a file: no link, no pipe, no folder."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def _open(path: Path) -> BinaryIO:
    if os.path.lexists(path) and not _is_plain(path):
        got = "a symbolic link" if path.is_symlink() else "something else"
        raise _wrong(path.parent, f"{path.name} to be a file", got, "Copy the file itself into the folder.")
    try:
        return path.open("rb")
    except FileNotFoundError as error:
        raise _wrong(path.parent, f"the file {path.name}", "none", "Save it again, or copy it whole.") from error
    except OSError as error:
        raise _wrong(path.parent, f"a readable {path.name}", f"{error.strerror or error}", "") from error


def _digest(file: BinaryIO) -> str:
    file.seek(0)
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _forms(folder: Path, file: BinaryIO) -> dict[str, Form]:
    """The tensors as the header describes them, by name; `_parse` compares that with the numbers that follow.

    The header is JSON, and its length stands before it in eight bytes.
    """
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    try:
        if not 0 < length <= min(size - 8, _LONGEST_HEADER):
            raise ValueError(f"a header of {length} bytes")
        header = parse(file.read(length))
        header.pop("__metadata__", None)
        entries = msgspec.convert(header, dict[str, _Entry])
        end = 8 + length + max((entry.data_offsets[1] for entry in entries.values()), default=0)
        if end != size:
            raise ValueError(f"the header tells of {end}")
        for name, entry in entries.items():
            if math.prod(entry.shape) > size:
                raise ValueError(f"more numbers in {quoted(name)} than bytes")
    except (ValueError, msgspec.ValidationError) as error:
        raise _damaged(folder, size, error) from error
    # In order: safetensors gives them in another one each time.
    return {name: Form(e.shape, _DTYPES.get(e.dtype, quoted(e.dtype))) for name, e in sorted(entries.items())}


def _damaged(folder: Path, size: int, error: Exception) -> CheckpointError:
    return _wrong(
        folder,
        f"a whole {TENSORS}",
        f"{size} bytes that are not one ({quoted(str(error))[1:-1]})",
        "The file is truncated or damaged: copy it again, or take another checkpoint.",
    )


def _refuse_what_is_no_checkpoint(folder: Path) -> None:
    expected = f"a folder with {TENSORS} and {CONFIG}"
    if os.path.isfile(folder):
        if folder.suffix in _PICKLES or _is_pickle(folder):
            raise _pickle(folder, folder.name)
        raise _wrong(folder, expected, "a file", "Give the folder that the file is in.")
    if not os.path.isdir(folder):
        raise _wrong(folder, expected, "nothing there", "Check the path.")
    if not exists(folder):
        for path in sorted(folder.iterdir()):
            if path.suffix in _PICKLES:
                raise _pickle(folder, path.name)
        raise _wrong(folder, expected, f"no {TENSORS} in it", "Check the path.")
    if _is_plain(folder / TENSORS) and _is_pickle(folder / TENSORS):
        raise _pickle(folder, TENSORS)


def _is_pickle(path: Path) -> bool:
    # torch.save writes a zip, its older form and pickle.dump a PROTO opcode; safetensors' header opens at
    # byte 8.
    with path.open("rb") as file:
        head = file.read(9)
    return head[8:9] != b"{" and (head.startswith(b"PK\x03\x04") or head[:1] == b"\x80")


def _pickle(folder: Path, name: str) -> CheckpointError:
    return _wrong(
        folder,
        f"{TENSORS} and {CONFIG}",
        f"the pickle {name}",
        "Pickles run code when they are read and are never loaded here. If you trust its source, convert it: "
        "model.load_state_dict(torch.load(path, weights_only=True)), then model.save_pretrained(folder).",
    )


def _parse(folder: Path, data: bytes) -> dict[str, Tensor]:
    try:
        # In order: safetensors gives them in another one each time.
        return dict(sorted(safetensors.torch.load(data).items()))
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise _damaged(folder, len(data), error) from error


def _entries(path: Path) -> dict[str, Any] | None:
    """What a JSON file holds; None when it is missing or is no such file."""
    try:
        return parse(read(path))
    except (CheckpointError, OSError, ValueError):
        return None


def _fitting_config(folder: Path, digest: str) -> dict[str, Any] | None:
    for path in (folder / CONFIG, _fresh(folder / CONFIG)):
        entries = _entries(path)
        if entries is not None and entries.get("sha256") == digest:
            return entries
    return None


def _why_no_config_fits(folder: Path, digest: str) -> tuple[str, str, str]:
    if not os.path.lexists(folder / CONFIG):
        return f"{CONFIG} beside {TENSORS}", "none", "Copy both files of one checkpoint."
    text = read(folder / CONFIG)
    try:
        written = parse(text).get("sha256")
    except ValueError as error:
        got = f"one that cannot be read ({quoted(str(error))[1:-1]})"
        return f"a whole {CONFIG}", got, "It is truncated or damaged: copy it again."
    if written is None:
        return (
            f"{CONFIG} with the SHA-256 of {TENSORS}",
            "one without it",
            "Another library wrote it: load the tensors with safetensors.torch.load_file.",
        )
    return (
        f"{TENSORS} with the SHA-256 {quoted(written)[1:13]}… that {CONFIG} names",
        f"{digest[:12]}…",
        "The two files come from different saves, or one is damaged: copy both from one folder.",
    )


def _checked(folder: Path, config: dict[str, Any], kind: str | None) -> dict[str, Any]:
    version = config.get("format")
    if version == 1:
        do = "Build the model and give it the tensors of safetensors.torch.load_file, then save it again."
        raise _wrong(folder, f"format {FORMAT}", "format 1, whose settings nothing vouches for", do)
    if version != FORMAT:
        raise _wrong(folder, f"format {FORMAT}", f"format {quoted(version)}", "Update implicitdl to read it.")
    try:
        changed = config.get("config_sha256") != _digest_of(config)
    except RecursionError:
        changed = True
    if changed:
        do = "Take an unchanged copy; what may differ is given to from_pretrained, and a changed model is saved anew."
        raise _wrong(folder, f"the {CONFIG} that was saved with the weights", "one that was changed since", do)
    if kind is not None and config.get("kind") != kind:
        raise _wrong(folder, f"a checkpoint of kind '{kind}'", quoted(config.get("kind")), "Check the path.")
    return {name: value for name, value in config.items() if name not in _OWN}
