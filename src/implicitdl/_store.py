"""Tensors and JSON on disk: one folder, two files, atomically, never a pickle.

A checkpoint is the folder that users of ``save_pretrained`` know::

    folder/model.safetensors    the tensors
    folder/config.json          everything else, and the SHA-256 of model.safetensors

Two files cannot be renamed in one step, and a rename over a folder that is not empty is refused. So both
files are first written next to their places (``*.new``) and brought to the disk, and then renamed, the
tensors first. That first rename is the commit. Before it, ``config.json`` is the one whose digest fits the
tensors; after it, ``config.json.new`` is, until the second rename puts it in its place. Whoever reads takes
the one that fits, so at any moment (a kill -9, a power cut) the folder holds either the old checkpoint or the
new one, whole, and a pair that comes from two different saves is found out.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ._checks import ArgumentError, wrong

TENSORS = "model.safetensors"
CONFIG = "config.json"
FORMAT = 1
# What this module writes into config.json next to the caller's own entries.
_OWN = ("format", "sha256")
_PICKLES = {".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth"}


class CheckpointError(ArgumentError):
    """A checkpoint that cannot be read, is not the one asked for, or cannot be written."""


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
    folder = Path(folder)
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
                path.unlink(missing_ok=True)
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
            or a checkpoint of another kind.
    """
    folder = Path(folder)
    _refuse_what_is_no_checkpoint(folder)
    # A writer may put a new checkpoint in place between our reading of the two files: then look again.
    for _ in range(3):
        data = _read(folder / TENSORS)
        digest = hashlib.sha256(data).hexdigest()
        config = _fitting_config(folder, digest)
        if config is not None:
            return _parse(folder, data), _checked(folder, config, kind)
    _parse(folder, data)  # A truncated file is said to be truncated, not to be of another save.
    raise _wrong(folder, *_why_no_config_fits(folder, digest))


def exists(folder: str | os.PathLike[str]) -> bool:
    """Whether `folder` holds a checkpoint: its tensors are renamed into place last, so they alone decide."""
    return (Path(folder) / TENSORS).is_file()


def write_file(path: Path, data: bytes) -> None:
    """Replace one file atomically: its old or its new content is there, whole, at any moment."""
    with writing(path.parent):
        _make(path.parent)
        fresh = _fresh(path)
        try:
            _write(fresh, data)
            os.replace(fresh, path)
        except OSError:
            fresh.unlink(missing_ok=True)
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
    if error.errno in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
        return (
            "a folder, or a path where one can be made",
            got,
            "A file is in the way: choose another folder.",
        )
    return "a folder that can be written", got, "What was saved there before is unchanged."


def _wrong(folder: Path, expected: str, got: str, do: str) -> CheckpointError:
    return CheckpointError(str(wrong(f"checkpoint '{folder}'", expected, got, do)))


def _serialise(folder: Path, tensors: Mapping[str, Tensor]) -> bytes:
    plain = {}
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type == "meta":
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
        text = json.dumps({**meta, "format": FORMAT, "sha256": digest}, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise _wrong(folder, "settings that JSON can hold", str(error), "Use numbers, text and lists.") from error
    return (text + "\n").encode()


def _fresh(path: Path) -> Path:
    return path.with_name(path.name + ".new")


def _make(folder: Path) -> bool:
    """Make the folder; whether it was missing."""
    if folder.is_dir():
        return False
    folder.mkdir(parents=True, exist_ok=True)
    return True


def _write(path: Path, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


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
    if fresh.is_file() and exists(folder):
        entries = _entries(fresh)
        if entries is not None and entries.get("sha256") == hashlib.sha256(_read(folder / TENSORS)).hexdigest():
            os.replace(fresh, folder / CONFIG)
            _sync(folder)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise _wrong(path.parent, f"the file {path.name}", "none", "Save it again, or copy it whole.") from error
    except OSError as error:
        raise _wrong(path.parent, f"a readable {path.name}", f"{error.strerror or error}", "") from error


def _refuse_what_is_no_checkpoint(folder: Path) -> None:
    expected = f"a folder with {TENSORS} and {CONFIG}"
    if folder.is_file():
        if folder.suffix in _PICKLES or _is_pickle(folder):
            raise _pickle(folder, folder.name)
        raise _wrong(folder, expected, "a file", "Give the folder that the file is in.")
    if not folder.is_dir():
        raise _wrong(folder, expected, "nothing there", "Check the path.")
    if not exists(folder):
        for path in sorted(folder.iterdir()):
            if path.suffix in _PICKLES:
                raise _pickle(folder, path.name)
        raise _wrong(folder, expected, f"no {TENSORS} in it", "Check the path.")
    if _is_pickle(folder / TENSORS):
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
    except (SafetensorError, ValueError, KeyError) as error:
        raise _wrong(
            folder,
            f"a whole {TENSORS}",
            f"{len(data)} bytes that are not one ({error})",
            "The file is truncated or damaged: copy it again, or take another checkpoint.",
        ) from error


def _entries(path: Path) -> dict[str, Any] | None:
    """What a JSON file holds; None when it is missing or is no JSON object."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return entries if isinstance(entries, dict) else None


def _fitting_config(folder: Path, digest: str) -> dict[str, Any] | None:
    for path in (folder / CONFIG, _fresh(folder / CONFIG)):
        entries = _entries(path)
        if entries is not None and entries.get("sha256") == digest:
            return entries
    return None


def _why_no_config_fits(folder: Path, digest: str) -> tuple[str, str, str]:
    if not (folder / CONFIG).is_file():
        return f"{CONFIG} beside {TENSORS}", "none", "Copy both files of one checkpoint."
    entries = _entries(folder / CONFIG)
    if entries is None:
        return (
            f"a whole {CONFIG}",
            "text that is no JSON object",
            "It is truncated or damaged: copy it again.",
        )
    written = entries.get("sha256")
    if written is None:
        return (
            f"{CONFIG} with the SHA-256 of {TENSORS}",
            "one without it",
            "Another library wrote it: load the tensors with safetensors.torch.load_file.",
        )
    return (
        f"{TENSORS} with the SHA-256 {str(written)[:12]}… that {CONFIG} names",
        f"{digest[:12]}…",
        "The two files come from different saves, or one is damaged: copy both from one folder.",
    )


def _checked(folder: Path, config: dict[str, Any], kind: str | None) -> dict[str, Any]:
    version = config.get("format")
    if version != FORMAT:
        raise _wrong(folder, f"format {FORMAT}", f"format {version!r}", "Update implicitdl to read it.")
    if kind is not None and config.get("kind") != kind:
        raise _wrong(folder, f"a checkpoint of kind '{kind}'", f"'{config.get('kind')}'", "Check the path.")
    return {name: value for name, value in config.items() if name not in _OWN}
