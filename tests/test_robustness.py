"""A short round of the robustness suite; ``python -m reward_lora.tests.robustness`` is the long one."""

import pytest
from reward_lora.benchmarks.common import fresh
from reward_lora.tests.robustness.fuzz import Found, Reader, fuzz
from reward_lora.tests.robustness.interrupts import cancel, soak
from reward_lora.tests.robustness.readers import readers


@pytest.mark.parametrize("reader", readers(quick=True), ids=lambda reader: reader.name)
def test_a_spoiled_file_is_read_or_refused_in_a_sentence(reader, tmp_path):
    found = fuzz(reader, tmp_path / "files", 20, 1)
    assert sum(found.values()) >= 15
    assert found["refused"]


def reader_that(does):
    return Reader("x", lambda folder: (folder.mkdir(), (folder / "a.txt").write_text("sound")), ["*.txt"], does)


def careless(folder):
    int((folder / "a.txt").read_text(errors="replace") == "sound") or {}["missing"]


def raw(folder):
    (folder / "a.txt").read_bytes().decode("ascii")


def wanders(folder):
    (folder.parent / "outside.txt").write_text("x")


def unpickles(folder):
    import pickle

    pickle.loads(b"ccollections\nOrderedDict\n.")


@pytest.mark.parametrize(
    ("does", "says"),
    [(careless, "KeyError"), (raw, "no sentence"), (wanders, "wrote to"), (unpickles, "pickle.find_class")],
)
def test_the_suite_sees_what_must_not_happen(does, says, tmp_path):
    with pytest.raises(Found, match=says):
        fuzz(reader_that(does), tmp_path / "files", 60, 1)


@pytest.mark.slow
def test_cancelled_and_long_runs_end_as_undisturbed_ones():
    cancelled = fresh(cancel, 2, 3, threads=1)
    assert cancelled["cancels"] == 2
    assert cancelled["different"] == cancelled["changed"] == cancelled["tensor bytes"] == 0
    assert fresh(soak, 10, 5, threads=1)["tensor bytes"] <= 1 << 16
