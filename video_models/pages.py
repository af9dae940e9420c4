"""Memory of files that are mapped: given back as soon as what was read has been converted."""

from __future__ import annotations

import bisect
import mmap
from pathlib import Path

from torch import Tensor

MAPS = Path("/proc/self/maps")
"""Where Linux tells which addresses are which files."""


class FilePages:
    """The addresses at which files are mapped now.

    Without it a file that is converted to another dtype stays in memory beside the result: half as much again for
    float32 to bfloat16. Where the system does not tell (only Linux does) nothing is given back.
    """

    def __init__(self) -> None:
        self._ranges: list[tuple[int, int]] = []
        try:
            lines = MAPS.read_text(errors="replace").splitlines()
        except OSError:
            return
        for line in lines:  # start-end rights offset device inode path
            fields = line.split(maxsplit=5)
            if len(fields) == 6 and fields[5].startswith("/") and "x" not in fields[1]:
                start, end = (int(part, 16) for part in fields[0].split("-"))
                self._ranges.append((start, end))
        self._ranges.sort()

    def release(self, tensor: Tensor) -> None:
        """Drop the pages of a contiguous tensor on the CPU that lies in a file; the next access reads them again."""
        if not self._ranges or tensor.device.type != "cpu" or not tensor.is_contiguous():
            return
        start, size = tensor.data_ptr(), tensor.numel() * tensor.element_size()
        index = bisect.bisect_right(self._ranges, (start, 2**64)) - 1
        if index < 0 or start + size > self._ranges[index][1]:
            return  # ordinary memory, whose content would be lost
        first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, (start + size) // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first:
            import ctypes

            advise = ctypes.CDLL(None).madvise
            advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
            advise(first, last - first, mmap.MADV_DONTNEED)
