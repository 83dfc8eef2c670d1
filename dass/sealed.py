"""safetensors files with a checksum over every byte, written whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from dass.encoding import CorruptFileError, FileError

__all__ = [
    "ENGINE",
    "MODEL",
    "Kind",
    "VersionError",
    "kind_of",
    "read_header",
    "read_tensors",
    "write_sealed",
    "write_whole",
]

_NO_SUM = "0" * 64
_MOST_HEADER = 100_000_000  # safetensors' own limit


class VersionError(FileError):
    """Written by a later version of the format."""


@dataclass(frozen=True)
class Kind:
    """What a file holds: the metadata's key with its version, the newest one known, who writes and
    who reads it."""

    key: str
    newest: int
    writer: str
    reader: str


MODEL = Kind("dass.format", 1, "dass.save", "dass.load")
ENGINE = Kind("dass.engine", 1, "engine.save", "dass.load_engine")


def write_sealed(
    path: str | os.PathLike, kind: Kind, tensors: dict[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Writes tensors and metadata with the kind's version and a SHA-256 of the whole file.

    Raises:
        OSError: the disk is full or not writable; the old file is then untouched.
    """
    sealed = {kind.key: str(kind.newest), "dass.sha256": _NO_SUM, **metadata}
    data = to_bytes(tensors, sealed)
    digest = hashlib.sha256(data).hexdigest().encode()
    place = data.index(_sum_field(_NO_SUM)) + len(_sum_field(""))
    write_whole(path, (data[:place], digest, data[place + len(digest) :]))


def read_header(path: str | os.PathLike, kind: Kind) -> dict[str, str]:
    """The metadata of a file whose every byte is as it was written.

    Raises:
        CorruptFileError: truncated, altered, or of another kind. VersionError. OSError.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _MOST_HEADER):
            raise CorruptFileError(
                f"{path}: truncated, or no file of {kind.writer}: {size} bytes, header of {length}"
            )
        header = file.read(length)
        metadata = _metadata(path, kind, header)
        digest = str(metadata.get("dass.sha256"))
        blank = header.replace(_sum_field(digest), _sum_field(_NO_SUM), 1)
        total = hashlib.sha256(length.to_bytes(8, "little") + blank)
        while chunk := file.read(1 << 20):
            total.update(chunk)
    if total.hexdigest() != digest:
        raise CorruptFileError(f"{path}: truncated or altered: its checksum does not fit")
    return metadata


def kind_of(path: str | os.PathLike) -> Kind | None:
    """Which kind a file says it is, whole or not; None: of neither. OSError."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length) if length <= min(size, _MOST_HEADER) else b""
    try:
        metadata = json.loads(header)["__metadata__"]
        return next((kind for kind in (MODEL, ENGINE) if kind.key in metadata), None)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _metadata(path: str | os.PathLike, kind: Kind, header: bytes) -> dict[str, str]:
    """Of a header whose version is known."""
    try:
        metadata = json.loads(header)["__metadata__"]
        for other in (MODEL, ENGINE):
            if other is not kind and other.key in metadata:
                raise CorruptFileError(
                    f"{path}: a file of {other.writer}, not of {kind.writer}: read it with "
                    f"{other.reader}"
                )
        version = int(metadata[kind.key])
    except CorruptFileError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError):
        raise CorruptFileError(f"{path}: altered, or no file of {kind.writer}") from None
    if version > kind.newest:
        raise VersionError(
            f"{path}: written in format {version}, this version reads up to {kind.newest}: "
            "a newer dass can load it"
        )
    return metadata


def read_tensors(path: str | os.PathLike) -> dict[str, Tensor]:
    """All tensors of the file, as they are stored."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CorruptFileError(f"{path}: {error}") from None


def _sum_field(digest: str) -> bytes:
    return f'"dass.sha256":"{digest}'.encode()


def write_whole(path: str | os.PathLike, parts: tuple[bytes, ...]) -> None:
    """Writes a file under another name beside it, flushes it to the disk and renames it."""
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name[:200]}.{secrets.token_hex(8)}.tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with open(fd, "wb") as file:
            with contextlib.suppress(FileNotFoundError):
                os.chmod(temporary, stat.S_IMODE(os.stat(path).st_mode))
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(fd)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    with contextlib.suppress(OSError):  # not every system can flush a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
