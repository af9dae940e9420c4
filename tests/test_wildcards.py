"""Drawing prompts: in sequence, at random, and with wildcards in them."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from reward_lora.training.prompts import PromptFileError
from reward_lora.training.wildcards import draw, expand

LINES = ["one", "two", "three"]


def test_in_sequence_the_seed_is_where_it_begins():
    assert draw(LINES, "sequential", 0) == LINES
    assert draw(LINES, "sequential", 1, 4) == ["two", "three", "one", "two"]
    assert [draw(LINES, "sequential", seed, 1)[0] for seed in range(4)] == ["one", "two", "three", "one"]


def test_at_random_nothing_comes_twice_before_all_have_come():
    drawn = draw(LINES, "random", 5, 9)
    assert all(sorted(drawn[i : i + 3]) == sorted(LINES) for i in (0, 3, 6))
    assert drawn == draw(LINES, "random", 5, 9)
    assert len({tuple(draw(LINES, "random", seed)) for seed in range(20)}) > 3


def test_alternatives_are_drawn_anew_for_every_prompt(tmp_path):
    drawn = draw(["a {red|blue|} {circle|{big|small} square}"], "sequential", 0, 200)
    counted = Counter(drawn)
    assert len(counted) == 9
    assert {"a red circle", "a big square", "a blue small square"} <= counted.keys()
    assert counted["a red circle"] > 10
    assert draw(["{a|b|c|d}"] * 9, "sequential", 4, 1)[0] == draw(["{a|b|c|d}"] * 9, "sequential", 0, 9)[4]


def test_files_of_wildcards(tmp_path):
    (tmp_path / "more").mkdir()
    (tmp_path / "shape.txt").write_text("# shapes\ncircle\n\n  square\n", encoding="utf-8")
    (tmp_path / "more" / "thing_1.txt").write_text("{red|blue} __shape__\n", encoding="utf-8")
    seen = {expand("a __more/thing_1__ and a __shape__", random.Random(i), tmp_path) for i in range(60)}
    assert len(seen) == 8
    assert "a red circle and a square" in seen
    assert expand("snake_case and __ are left alone", random.Random(0), tmp_path) == "snake_case and __ are left alone"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a {red|blue", "a brace without its other"),
        ("a red} circle", "a brace without its other"),
        ("__size__", r"no wildcard file size.txt in .*; there are empty, loop"),
        ("__loop__", "without end"),
        ("__empty__", "holds no line"),
    ],
)
def test_bad_wildcards(tmp_path, text, words):
    (tmp_path / "loop.txt").write_text("again __loop__")
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(PromptFileError, match=words):
        expand(text, random.Random(0), tmp_path)


def test_a_name_cannot_leave_the_folder(tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    inside = tmp_path / "inside"
    inside.mkdir()
    for text in ("__../secret__", f"__{tmp_path}/secret__"):
        assert expand(text, random.Random(0), inside) == text
    for lines, order in (([], "random"), (["a"], "best")):
        with pytest.raises(ValueError, match="no prompt to draw|sequential, random"):
            draw(lines, order, 0)
