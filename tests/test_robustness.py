"""A short round of the robustness suite; ``python -m reward_lora.tests.robustness`` is the long one."""

import gc

import pytest
import torch
from reward_lora.benchmarks.common import fresh
from reward_lora.files import write_safetensors
from reward_lora.tests.robustness.fuzz import Found, Reader, fuzz
from reward_lora.tests.robustness.interrupts import cancel, soak
from reward_lora.tests.robustness.readers import readers
from reward_lora.training.compare import difference_picture, frame_picture, paired_difference, ranking_picture
from reward_lora.training.media import contact_sheet, reward_curve
from reward_lora.training.sweep import Sweep, SweepConfig, SweepPoint
from reward_lora.training.sweep_report import sweep_plot


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


CLIPS = torch.rand(1, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
SWEEP = Sweep(
    SweepConfig((0.0, 1.0), ("a", "b")),
    tuple(SweepPoint(strength, {"r": (strength, 2.0)}, (1.0, 1.0), torch.empty(0)) for strength in (0.0, 1.0)),
    ("r",),
)
MADE = {
    "curve": lambda folder: reward_curve([(1, 0.5), (2, 0.6)], [(0, 0.1), (2, 0.7)], "a reward"),
    "sheet": lambda folder: contact_sheet([CLIPS], ["before"]),
    "sweep": lambda folder: sweep_plot(SWEEP),
    "difference": lambda folder: difference_picture(paired_difference([0.0, 0.0], [1.0, 2.0]), "r"),
    "frames": lambda folder: frame_picture({"a": [0.1, 0.2]}, {"a": 0.15}),
    "ranking": lambda folder: ranking_picture([CLIPS[0]], [1.0], [0], "r"),
    "weights": lambda folder: write_safetensors(folder / "a", {f"{i}": torch.zeros(1) for i in range(200)}, {}),
}


@pytest.mark.parametrize("make", MADE.values(), ids=MADE.keys())
def test_pictures_and_weight_files_leave_nothing_behind(make, tmp_path):
    make(tmp_path)  # what is imported or made once for good
    assert gc.isenabled()
    gc.freeze()  # all there is stays out of the count
    gc.disable()
    try:
        make(tmp_path)
        assert gc.collect() < 100  # a figure is thousands, a weight file two a tensor
    finally:
        gc.enable()
        gc.unfreeze()


@pytest.mark.slow
def test_cancelled_and_long_runs_end_as_undisturbed_ones():
    cancelled = fresh(cancel, 2, 3, threads=1)
    assert cancelled["cancels"] == 2
    assert cancelled["different"] == cancelled["changed"] == cancelled["tensor bytes"] == 0
    assert fresh(soak, 10, 5, threads=1)["tensor bytes"] <= 1 << 16
