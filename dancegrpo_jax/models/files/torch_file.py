"""Reads the tensors of a `torch.save` file without torch, and without executing anything that the file asks for.

A torch file is a zip with a pickle of the structure and one raw record a storage. A pickle may name any function to be
called while it is read; here only the few that rebuild tensors and dictionaries are known, all of them our own or
harmless, and any other name is refused.
"""

import io
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import ml_dtypes
import numpy as np

from dancegrpo_jax.models.files.convert import CheckpointError

STORAGES = {"DoubleStorage": np.float64, "FloatStorage": np.float32, "HalfStorage": np.float16,
            "BFloat16Storage": ml_dtypes.bfloat16, "LongStorage": np.int64, "IntStorage": np.int32, "ShortStorage": np.int16,
            "CharStorage": np.int8, "ByteStorage": np.uint8, "BoolStorage": np.bool_}


def read_torch(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint as read-only views of the mapped file: {key: array}.

    A checkpoint that keeps them under `state_dict`, `model` or `module` among other things is opened there; a prefix
    `module.` common to all keys is dropped; what is no tensor is left out.
    Raises: CheckpointError if the file is no such checkpoint, is damaged, or names anything but tensors.
    """
    path = Path(path)
    try:
        content = _load(path)
    except CheckpointError:
        raise
    except (OSError, zipfile.BadZipFile, struct.error, KeyError, ValueError, EOFError, AttributeError, TypeError, IndexError,
            pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path}: cannot be read as a torch checkpoint ({error}); copy the file again, or convert "
                              "it to safetensors") from error
    for key in ("state_dict", "model", "module"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    items = content.items() if isinstance(content, Mapping) else ()
    tensors = {key: value for key, value in items if isinstance(value, np.ndarray)}
    if not tensors:
        raise CheckpointError(f"{path}: no tensors in it; expected a state dict")
    if all(key.startswith("module.") for key in tensors):
        tensors = {key.removeprefix("module."): value for key, value in tensors.items()}
    return tensors


def _load(path: Path):
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        names = archive.namelist()
        root = next((name.removesuffix("data.pkl") for name in names if name.endswith("data.pkl") and name.count("/") <= 1),
                    None)
        if root is None:
            raise CheckpointError(f"{path}: a zip without data.pkl; expected a torch checkpoint")
        if root + "constants.pkl" in names or any(name.startswith(root + "code/") for name in names):
            raise CheckpointError(f"{path}: a TorchScript program; take the weights as safetensors or as a state dict")
        order = root + "byteorder"
        if order in names and archive.read(order).strip() != b"little":
            raise CheckpointError(f"{path}: big-endian tensors; save it again on a common machine")
        places = {}
        for info in archive.infolist():
            if info.filename.startswith(root + "data/"):
                if info.compress_type != zipfile.ZIP_STORED:
                    raise CheckpointError(f"{path}: {info.filename} is compressed, which torch never does")
                file.seek(info.header_offset + 26)  # the local header's name and extra field may differ from the directory's
                name_length, extra_length = struct.unpack("<HH", file.read(4))
                places[info.filename.removeprefix(root + "data/")] = (info.header_offset + 30 + name_length + extra_length,
                                                                      info.file_size)
        structure = archive.read(root + "data.pkl")
    return _Unpickler(path, structure, places).load()


class _Storage:
    """One record of the file: where it is and what it holds."""

    def __init__(self, path: Path, dtype, offset: int, size: int):
        self.path, self.dtype, self.offset, self.size = path, np.dtype(dtype), offset, size

    def tensor(self, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> np.ndarray:
        """A view; raises ValueError if it would reach outside the record."""
        if min((offset, *shape, *strides), default=0) < 0 or len(shape) != len(strides):
            raise ValueError(f"impossible tensor of shape {shape}, strides {strides}, offset {offset}")
        last = offset + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) if 0 not in shape else -1
        if (last + 1) * self.dtype.itemsize > self.size:
            raise ValueError(f"tensor of shape {shape} exceeds its record")
        if 0 in shape:
            return np.zeros(shape, self.dtype)
        flat = np.memmap(self.path, np.uint8, "r", self.offset, self.size)
        flat = flat[:self.size // self.dtype.itemsize * self.dtype.itemsize].view(self.dtype)[offset:last + 1]
        return np.lib.stride_tricks.as_strided(flat, shape, [s * self.dtype.itemsize for s in strides], writeable=False)


class _StorageType:
    """Stands for torch.FloatStorage and its kin."""

    def __init__(self, dtype):
        self.dtype = dtype


def _rebuild_tensor(storage, offset, shape, strides, *unused):
    if not isinstance(storage, _Storage):
        raise ValueError("a tensor without storage")
    return storage.tensor(int(offset), tuple(map(int, shape)), tuple(map(int, strides)))


def _rebuild_parameter(tensor, *unused):
    return tensor


class _Unpickler(pickle.Unpickler):
    KNOWN: ClassVar = {
        ("collections", "OrderedDict"): OrderedDict, ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
        ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
        **{("torch", name): _StorageType(dtype) for name, dtype in STORAGES.items()}}

    def __init__(self, path: Path, structure: bytes, places: dict):
        super().__init__(io.BytesIO(structure))
        self.path, self.places = path, places

    def find_class(self, module, name):
        if (module, name) not in self.KNOWN:
            raise CheckpointError(f"{self.path}: refused, it asks for {module}.{name} while being read, which is no tensor; a "
                                  "checkpoint from a trusted source can be saved again as safetensors")
        return self.KNOWN[module, name]

    def persistent_load(self, identity):
        kind, storage_type, key, _, _ = identity
        if kind != "storage" or not isinstance(storage_type, _StorageType):
            raise ValueError(f"unknown reference {kind!r}")
        return _Storage(self.path, storage_type.dtype, *self.places[key])
