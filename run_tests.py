"""Sets up the environment, checks the code's form and layering, and runs the tests.

python run_tests.py [arguments of pytest]
"""

import sys

import bootstrap

PARALLEL = ["-n", "auto", "--maxprocesses", "4", "--dist", "loadscope", "--no-loadscope-reorder"]
"""A file of tests to each core, in the order of ``tests/conftest.py``, and one thread to each: PyTorch's own threads
would only stand in each other's way."""

if __name__ == "__main__":
    failed = bootstrap.run("ruff", ["check", "."], "test")
    failed |= bootstrap.run("ruff", ["format", "--check", "."], "test")
    failed |= bootstrap.run("lint-imports", ["--no-cache"], "test")
    failed |= bootstrap.run("pytest", [*PARALLEL, *sys.argv[1:]], "test", OMP_NUM_THREADS="1")
    sys.exit(1 if failed else 0)
