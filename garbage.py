"""Memory that Python would find only much later."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def garbage_freed() -> Iterator[None]:
    """Free at the end what objects made inside leave in circles; as a decorator, what a call leaves.

    A matplotlib figure is thousands of objects around a canvas of megabytes, and they hold each other. In a process
    with millions of objects Python looks for such circles seldom: after dozens of evaluations of a long run. Here it
    does not look on the way, so that all of it is still among the youngest objects, and these alone are searched:
    some milliseconds.
    """
    searching = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if searching:
            gc.enable()
        gc.collect(0)
