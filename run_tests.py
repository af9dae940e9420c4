"""Sets up the environment, checks the code's form and layering, and runs the tests.

python run_tests.py [arguments of pytest]
"""

import sys

import bootstrap

if __name__ == "__main__":
    failed = bootstrap.run("ruff", ["check", "."], "test")
    failed |= bootstrap.run("ruff", ["format", "--check", "."], "test")
    failed |= bootstrap.run("lint-imports", ["--no-cache"], "test")
    failed |= bootstrap.run("pytest", sys.argv[1:], "test")
    sys.exit(1 if failed else 0)
