"""Memory as the allocators count it, on any device."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch


def peak_bytes(run: Callable[[], object], device: str = "cpu") -> int:
    """The most bytes allocated at a time, above those at the start, while ``run`` works.

    On a CPU the profiler sees every allocation of PyTorch's, those of its kernels included; nothing is sampled.
    """
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it complains of having no GPU
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    total = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            total += event.nbytes()
            most = max(most, total)
    return most
