"""The benchmarks' shared parts, and that the page of results is made of the results."""

import argparse
import json
import os

import pytest
from reward_lora.benchmarks import all as every
from reward_lora.benchmarks import common, gpu


def test_calls_take_turns_and_the_first_round_does_not_count():
    made = []
    found = common.in_turns({"a": lambda: made.append("a"), "b": lambda: made.append("b")}, 2)
    assert made == ["a", "b"] * 3
    assert {name: len(times) for name, times in found.items()} == {"a": 2, "b": 2}


def test_a_spread_is_the_median_between_the_extremes():
    assert common.spread([3.0, 1.0, 2.0]) == "2.00 (1.00..3.00)"
    assert common.spread([1.5], 1) == "1.5"
    assert common.ratio([2.0, 4.0, 3.0], [6.0]) == "0.50"


@pytest.mark.slow
def test_a_call_in_a_process_of_its_own_answers_or_raises():
    assert common.fresh(os.getpid) != os.getpid()
    with pytest.raises(ZeroDivisionError):
        common.fresh(divmod, 1, 0)


def measured(options: argparse.Namespace) -> common.Result:
    table = common.Table(("way", "seconds"), [["ours", common.spread([1.0, 2.0])]])
    return common.Result("a test", [table], ["It is quick."], {"quick": options.quick})


def test_a_benchmark_writes_what_it_shows(tmp_path, capsys):
    file = tmp_path / "replay.json"
    assert common.command("replay", "doc", measured, arguments=["--quick", "--json", str(file)]) == 0
    assert "ours  1.50 (1.00..2.00)" in capsys.readouterr().out
    record = json.loads(file.read_text())
    assert record["command"] == "python -m reward_lora.benchmarks.replay --quick"
    assert record["figures"] == {"quick": True}
    page = every.document(tmp_path)
    assert "| ours | 1.50 (1.00..2.00) |" in page
    assert "- It is quick." in page
    assert "Not measured. `python -m reward_lora.benchmarks.gpu`" in page


def test_the_page_is_made_of_the_results():
    page = (every.HERE / "RESULTS.md").read_text(encoding="utf-8")
    assert page == every.document(), "python -m reward_lora.benchmarks.all --only-table"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Wan2.1-Fun-1.3B-InP", "CogVideoX-Fun-V1.1-2b-InP", "EasyAnimateV5.1-12b-zh-InP"])
def test_the_gpu_benchmark_runs_on_tiny_networks(name):
    found = gpu.cell(name, "fast", False, True, "cpu", 0.0)
    assert found["skipped"] == ""
    assert len(found["seconds"]) == 1
    assert found["bytes"] > 0


def test_without_a_gpu_the_gpu_benchmark_says_so():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    options = argparse.Namespace(tiny=False, quick=False, models=None, plans=None, cap=0.0)
    with pytest.raises(SystemExit, match="there is no GPU here"):
        gpu.measure(options)
