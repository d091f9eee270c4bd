"""Tensors in safetensors files: where each lies, how it is read straight to its place, quantised
ones included, and how it is written. Which belong to a checkpoint is in checkpoint.py."""

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    "I4": torch.uint8,  # two integers a byte, the first in the lower half, each plus 8
}
READ_BYTES = 2**23  # what one thread reads and converts at a time
WRITE_BYTES = 2**18  # what is hashed and written at a time: it is still in the cache when written


@dataclass
class StoredTensor:
    """Where a safetensors file holds a tensor, or a part of one. Data are read when asked for."""

    path: Path
    name: str
    dtype: str  # a key of DTYPES, or a dtype that is not supported
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file
    scale: "StoredTensor | None" = None  # F8_E4M3 and I4 have one factor a block
    block: tuple[int, int] = (0, 0)  # rows and columns of a block

    def check(self, shape, dtypes: tuple[str, ...] = ("BF16", "F16", "F32")) -> None:
        """Raises ValueError for another shape, or a dtype that is none of `dtypes`."""
        where = f"{self.path}: tensor {self.name}"
        if self.shape != tuple(shape):
            raise ValueError(
                f"{where} has shape {list(self.shape)}; the config asks for {list(shape)}"
            )
        if self.dtype not in dtypes and self.scale is None:
            raise ValueError(f"{where} is {self.dtype}; supported: {', '.join(dtypes)}")

    def bytes_of(self, count: int) -> int:
        return count // 2 if self.dtype == "I4" else count * DTYPES[self.dtype].itemsize

    def part(self, skipped: int, shape: tuple[int, ...]) -> "StoredTensor":
        """Returns the tensor of that shape that begins `skipped` elements later."""
        return replace(self, shape=shape, offset=self.offset + self.bytes_of(skipped))

    def read(self, out: Tensor | None = None) -> Tensor:
        """Returns the stored values on the CPU, in the stored dtype, I4 as int8. `out`, if given,
        is a contiguous tensor of that shape and dtype that receives them."""
        if out is None:
            memory = torch.empty(self.bytes_of(math.prod(self.shape)), dtype=torch.uint8)
        else:
            memory = out.view(-1).view(torch.uint8)
        self.read_bytes(memory)
        return self.values(memory)

    def values(self, memory: Tensor) -> Tensor:
        """Returns the tensor that the file's bytes mean, on the device of `memory`."""
        if self.dtype == "I4":
            halves = torch.stack([memory & 15, memory >> 4], -1)
            return (halves.to(torch.int8) - 8).view(self.shape)
        return memory.view(DTYPES[self.dtype]).view(self.shape)

    def read_bytes(self, memory: Tensor) -> None:
        """Fills uint8 memory on the CPU."""
        view = memoryview(memory.numpy())
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.offset)
            while view:
                if not (count := file.readinto(view)):
                    raise ValueError(f"{self.path}: ends within tensor {self.name}")
                view = view[count:]

    def read_scale(self) -> Tensor:
        """Returns the factors of quantised weights. Raises ValueError that names one that cannot
        be."""
        scale = self.scale.read()
        if not (scale.isfinite() & (scale >= 0)).all():
            raise ValueError(
                f"{self.scale.path}: tensor {self.scale.name} holds a scale that is negative or "
                "not finite"
            )
        return scale

    def copy_to(self, target: Tensor, buffer: Tensor | None = None) -> None:
        """Fills `target`, on any device and in any dtype, by blocks of rows. Quantised weights are
        multiplied by their scales in float32. `buffer` is uint8 memory to read into."""
        if not self.shape or 0 in self.shape:  # one number, or none
            target.copy_(self.read())
            return
        rows, width = self.shape[0], math.prod(self.shape[1:])
        row_bytes = self.bytes_of(width)
        step = max(READ_BYTES // row_bytes, 1)
        scale = None
        if self.scale is not None:  # a step takes more memory in float32; blocks stay whole
            high = self.block[0] if self.block[0] < rows else 1
            step = max(step // (4 * high), 1) * high
            scale = self.read_scale().to(target.device)
        in_place = target.dtype == DTYPES[self.dtype] and target.device.type == "cpu"
        in_place = in_place and target.is_contiguous()
        for first in range(0, rows, step):
            shape = (min(step, rows - first), *self.shape[1:])
            stored = self.part(first * width, shape)
            goal = target[first : first + step]
            if in_place:
                stored.read(goal)
                continue
            size = shape[0] * row_bytes
            fits = buffer is not None and size <= len(buffer)
            memory = buffer[:size] if fits else torch.empty(size, dtype=torch.uint8)
            stored.read_bytes(memory)
            values = stored.values(memory.to(target.device))
            if scale is not None:
                start = first // self.block[0]
                values = dequantise(values, scale[start:], self.block)
            goal.copy_(values)


def spread(scale: Tensor, rows: int, columns: int, block: tuple[int, int]) -> Tensor:
    """scale (..., blocks of rows, blocks of columns) -> the factor of each value (..., rows,
    columns). A block is block[0] x block[1] values; the last ones are cut off."""
    row = torch.arange(rows, device=scale.device) // block[0]
    column = torch.arange(columns, device=scale.device) // block[1]
    return scale[..., row[:, None], column]


def dequantise(values: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """values (..., rows, columns), FP8 or integers, times scale -> float32; see `spread`.

    Files call the factor `weight_scale_inv`, but weights are multiplied by it."""
    return values.float().mul_(spread(scale, *values.shape[-2:], block))


@contextmanager
def open_tensors(path: Path) -> Iterator:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path}: {error}") from None
    except OSError as error:  # the library does not name the file
        raise OSError(f"{path}: {error}") from None


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Returns what a safetensors file holds. Raises ValueError that names the file."""
    with open_tensors(path):  # the library checks the header: sizes, gaps, the file's end
        pass
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return {
        name: StoredTensor(
            path, name, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0]
        )
        for name, entry in header.items()
        if name != "__metadata__"
    }


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> str:
    """Writes a safetensors file and returns its sha256, without reading the file again. Tensors of
    a GPU come to the host one at a time. Raises OSError."""
    names = {dtype: name for name, dtype in DTYPES.items() if name != "I4"}  # is only read
    header, end = {}, 0
    for name, tensor in tensors.items():
        place = [end, end := end + tensor.nbytes]
        shape = list(tensor.shape)
        header[name] = {"dtype": names[tensor.dtype], "shape": shape, "data_offsets": place}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the format aligns data to 8 bytes
    digest = hashlib.sha256()
    with open(path, "wb") as file:

        def write(data: bytes | memoryview) -> None:
            for start in range(0, len(data), WRITE_BYTES):
                piece = data[start : start + WRITE_BYTES]
                digest.update(piece)
                file.write(piece)

        write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            write(memoryview(tensor.cpu().view(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()
