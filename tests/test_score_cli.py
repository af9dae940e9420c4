"""``reward-lora score``: files, folders and patterns to a table and a CSV file; prompts; comparisons."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
import torch
from reward_lora import cli
from reward_lora.cli.clips import Clip, gather, pair, prompt_of_name
from reward_lora.reward_models.judging import Scored, best_first, score_clip, table
from reward_lora.training.media import read_video, write_png, write_video

REWARDS = '''
class Red:
    """How red; may be negated."""
    name, differentiable, needs = "red", True, frozenset()
    def score(self, frames, prompts, *, reference=None):
        return frames[:, 0].flatten(1).mean(1).float()

class Dark(Red):
    name = "dark"
    def score(self, frames, prompts, *, reference=None):
        return 1 - frames.flatten(1).mean(1).float()

class Longest(Red):
    """As many points as the prompt has words."""
    name, needs = "words", frozenset({"prompt"})
    def score(self, frames, prompts, *, reference=None):
        return frames.new_tensor([len(p.split()) for p in prompts]).float()

class Moves(Red):
    name, per_frame = "moves", False
    def score(self, frames, prompts, *, reference=None):
        return frames.diff(dim=2).abs().flatten(1).mean(1).float()

class Like(Red):
    name, needs = "like", frozenset({"reference"})
    def score(self, frames, prompts, *, reference=None):
        return -(frames.mean((2, 3, 4)) - reference.mean((2, 3, 4))).abs().sum(1).float()
'''


def run(capsys, *arguments):
    try:
        status = cli.main(["score", *map(str, arguments)])
    except SystemExit as exit:
        status = exit.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def rows(path="outputs/scores.csv") -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Clips of growing redness in ``a`` and ``b``, pictures in ``stills``, rewards in ``own.py``."""
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(REWARDS, encoding="utf-8")
    for side, more in (("a", 0.0), ("b", 0.2)):
        for index in range(4):
            frames = torch.zeros(3, 3, 32, 32)
            frames[0] = (0.2 + 0.1 * index + more) * torch.tensor([0.9, 1.0, 1.1]).view(3, 1, 1)
            write_video(Path(side, f"a_red_square-{index:03d}.mp4"), frames, 8)
    Path("a", "notes.txt").write_text("not a clip")
    for index in range(3):
        picture = torch.zeros(40, 24, 3, dtype=torch.uint8)
        picture[..., 0] = 40 * (index + 1)
        write_png(Path("stills", f"{index}.png"), picture.numpy())
    return tmp_path


def test_patterns_folders_and_files_reach_the_same_clips(folder):
    named = [Clip(Path("a", f"a_red_square-{index:03d}.mp4")) for index in range(4)]
    assert gather(["a"]) == gather(["a/*"]) == gather(["a/*.mp4", "a"]) == named
    assert gather(["**/*.mp4"]) == named + gather(["b"])
    assert gather(["a/a_red_square-002.mp4"]) == named[2:3]
    assert [clip.path.name for clip in gather(["stills"])] == ["0.png", "1.png", "2.png"]
    (frames,) = gather(["stills"], as_clip=True)
    assert frames.read().shape == (1, 3, 3, 40, 24)
    torch.testing.assert_close(frames.read()[0, 0].mean((1, 2)), torch.tensor([40.0, 80.0, 120.0]) / 255)


def test_scores_go_into_a_table_and_a_csv_file(capsys, folder):
    status, out, err = run(capsys, "a", "stills/0.png", "--reward", "own.py:Red", "--reward", "own.py:Dark")
    assert status == 0, err
    written = rows()
    assert [row["file"] for row in written] == [str(clip.path) for clip in gather(["a", "stills/0.png"])]
    for row in written:
        clip = read_video(row["file"])
        assert float(row["red"]) == pytest.approx(float(clip[0].mean()))
        assert float(row["dark"]) == pytest.approx(1 - float(clip.mean()))
        assert re.search(rf"{float(row['red']):.4f} \| +{float(row['dark']):.4f} \| {re.escape(row['file'])}", out)


def test_rank_puts_the_best_first(capsys, folder):
    status, out, err = run(capsys, "a", "--rank", "--reward", "own.py:Red", "--reward", "own.py:Dark")
    assert status == 0, err
    assert [row["file"][-5] for row in rows()] == ["3", "2", "1", "0"]
    assert out.index("003.mp4") < out.index("000.mp4")
    scored = [Scored({"a": value}) for value in (1.0, float("nan"), 2.0, 1.0, -float("inf"))]
    assert best_first(scored) == [2, 0, 3, 4, 1]


def test_a_mixture_writes_its_terms_too(capsys, folder):
    status, _, err = run(capsys, "a", "--reward", "own.py:Red*2+own.py:Dark*-0.5")
    assert status == 0, err
    for row in rows():
        assert float(row["red*2+dark*-0.5"]) == pytest.approx(2 * float(row["red"]) - 0.5 * float(row["dark"]))


def test_every_frame_has_a_row_and_motion_has_none(capsys, folder):
    clip = "a/a_red_square-001.mp4"
    status, out, err = run(capsys, clip, "--per-frame", "--reward", "own.py:Red", "--reward", "own.py:Moves")
    assert status == 0, err
    assert "moves judges what happens between frames" in out
    assert "red judges" not in out
    whole, *frames = rows()
    assert [row["frame"] for row in (whole, *frames)] == ["", "1", "2", "3"]
    expected = read_video(clip)[0].mean((1, 2)).tolist()
    assert [float(row["red"]) for row in frames] == pytest.approx(expected)
    assert float(whole["red"]) == pytest.approx(sum(expected) / 3)
    assert float(whole["moves"]) > 0.01
    assert {row["moves"] for row in frames} == {""}
    assert out.count(clip) == 4


def test_frames_are_scored_in_batches_with_their_own_terms():
    """More frames than one batch takes, and a mixture."""
    from reward_lora.reward_models.mixture import Mixture

    class Mean:
        name, differentiable, needs = "mean", True, frozenset()

        def score(self, frames, prompts, *, reference=None):
            assert len(prompts) == len(frames)
            return frames.flatten(1).mean(1)

    frames, ticks = torch.rand(1, 3, 37, 4, 4), []
    scored = score_clip(Mixture([Mean()], [3.0]), frames, "", every_frame=True, tick=ticks.append)
    singles = frames[0].mean((0, 2, 3))
    torch.testing.assert_close(torch.tensor(scored.frames["mean"]), singles)
    torch.testing.assert_close(torch.tensor(scored.frames["mean*3"]), 3 * singles)
    assert scored.score == pytest.approx(3 * float(frames.mean()))
    assert len(ticks) == 4


def test_prompts_come_from_a_file_a_table_or_the_name(capsys, folder):
    Path("p.txt").write_text("one\none two\none two three\nfour words are here\n")
    Path("p.jsonl").write_text('{"prompt": "x y"}\n')
    Path("p.csv").write_text(
        "file,prompt\na_red_square-003.mp4,c\na/a_red_square-001.mp4,a b\n"
        "a_red_square-000,\"a, b, c\"\na_red_square-002,z z\nunused.mp4,q\n"
    )  # fmt: skip

    def words(*arguments):
        status, _, err = run(capsys, "a", "--reward", "own.py:Longest", *arguments)
        assert status == 0, err
        return [float(row["words"]) for row in rows()]

    assert words("--prompt", "a b") == [2, 2, 2, 2]
    assert words("--prompts", "p.txt") == [1, 2, 3, 4]
    assert words("--prompts", "p.jsonl") == [2, 2, 2, 2]
    assert words("--prompts", "p.csv") == [3, 2, 2, 1]
    assert words("--prompts", "filename") == [3, 3, 3, 3]
    assert rows()[0]["prompt"] == "a red square"


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("a_red_circle-003.mp4", "a red circle"),
        ("a red circle-seed-7.png", "a red circle"),
        ("a red-hot iron_00012_.mp4", "a red-hot iron"),
        ("a-red-circle.gif", "a red circle"),
        ("2 cats seed 11 step 20.mp4", "2 cats"),
    ],
)
def test_prompt_of_a_file_name(name, prompt):
    assert prompt_of_name(Path(name)) == prompt


def test_reference(capsys, folder):
    status, out, err = run(capsys, "a", "--reward", "own.py:Like")
    assert status == 2
    assert "needs --reference FILE" in err
    status, _, err = run(capsys, "a", "--per-frame", "--reward", "own.py:Like", "--reference", "a/a_red_square-002.mp4")
    assert status == 0, err
    whole = {Path(row["file"]).stem[-1]: float(row["like"]) for row in rows() if not row["frame"]}
    assert max(whole, key=whole.get) == "2"
    assert whole["2"] == pytest.approx(0, abs=1e-6)


def test_comparison_pairs_by_name_and_says_how_sure_it_is(capsys, folder):
    Path("b/a_red_square-000.mp4").rename("b/a_red_square-003b.mp4")  # the order alone would mislead
    Path("a/a_red_square-000.mp4").rename("a/a_red_square-003b.mp4")
    status, out, err = run(capsys, "--compare", "a", "b/*.mp4", "--reward", "own.py:Red", "--reward", "own.py:Dark")
    assert status == 0, err
    assert re.search(r"red: 4 pairs are too few to tell; A .* B ahead in 4 of 4 pairs", out)
    assert re.search(r"dark: 4 pairs .* B ahead in 0 of 4", out)
    scores = {row["file"]: float(row["red"]) for row in rows()}
    assert len(scores) == 8
    gaps = [scores[name.replace("a/", "b/", 1)] - value for name, value in scores.items() if name.startswith("a/")]
    assert f"B - A {sum(gaps) / 4:+.4f}" in out
    for name in ("red", "dark"):
        assert read_video(Path("outputs", f"compare-{name}.png")).shape[-1] > 500


def test_pairs_without_a_shared_name_are_those_of_the_same_place(folder):
    a, b = [Clip(Path("x1.mp4")), Clip(Path("x2.mp4"))], [Clip(Path("y1.mp4")), Clip(Path("y2.mp4"))]
    assert pair(a, b) == (a, b)
    with pytest.raises(ValueError, match="A has 2 clips and B 1"):
        pair(a, b[:1])
    with pytest.raises(ValueError, match="x1 is on one side only"):
        pair(a, a[1:])
    with pytest.raises(ValueError, match="twice"):
        pair(a, [*a, Clip(Path("other/x1.mp4"))])


def test_mixtures_can_be_trained_from_the_command_line(folder):
    reward = cli.shared.find_reward("min(own.py:Red+own.py:Dark*2)", None, "cpu")
    frames = torch.rand(2, 3, 1, 4, 4)
    red, dark = frames[:, 0].flatten(1).mean(1), 1 - frames.flatten(1).mean(1)
    torch.testing.assert_close(reward.score(frames, ["", ""]), torch.minimum(red, 2 * dark))


BAD = {
    "nothing": ((), "or else --compare A B"),
    "both": (("a", "--compare", "a", "b"), "or else --compare A B"),
    "empty pattern": (("c/*.mp4",), "c/\\*.mp4 leads to no video or picture; known are .mp4"),
    "missing file": (("c.mp4", "--prompt", "x"), "c.mp4: there is no such video"),
    "not a video": (("a/notes.txt", "--prompt", "x"), "notes.txt cannot be read as a video"),
    "no prompt": (("a",), "tiny_clip needs --prompt"),
    "two sources": (("a", "--prompt", "x", "--prompts", "filename"), "--prompt or --prompts, not both"),
    "prompts do not fit": (("a", "--prompt", "x", "--prompt", "y"), "4 files, 2 prompts"),
    "no such table": (("a", "--prompts", "none.csv"), "none.csv cannot be read"),
    "table without a column": (("a", "--prompts", "bad.csv"), "needs the columns file and prompt.* has name, prompt"),
    "table without the file": (("a", "--prompts", "other.csv"), "no row whose file is a_red_square-000.mp4"),
    "sizes differ": (("mixed", "--as-clip", "--prompt", "x"), "differ in size .*leave --as-clip out"),
    "bad mixture": (("a", "--reward", "own.py:Red*x"), "'x' in the reward 'own.py:Red\\*x' is no number"),
    "unknown term": (("a", "--reward", "own.py:Red+beauty"), "unknown reward 'beauty'"),
    "unlike sides": (("--compare", "a", "a/*[01].mp4", "--prompt", "x"), "a_red_square-002 is on one side only"),
    "one pair": (("--compare", "stills/0.png", "stills/1.png", "--reward", "own.py:Red"), "at least 2 pairs"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_gets_a_sentence(capsys, folder, case):
    Path("bad.csv").write_text("name,prompt\nx,y\n")
    Path("other.csv").write_text("file,prompt\nx,y\n")
    write_png("mixed/a.png", torch.zeros(8, 8, 3, dtype=torch.uint8).numpy())
    write_png("mixed/b.png", torch.zeros(8, 6, 3, dtype=torch.uint8).numpy())
    arguments, words = BAD[case]
    status, out, err = run(capsys, *arguments)
    assert status == 2
    assert re.search(words, err), err
    assert "Traceback" not in out + err


def test_table_keeps_numbers_right_and_words_left():
    assert table(["a", "file"], [["1.5", "x"], ["-10.25", "long"]]) == (
        "|      a | file |\n|--------|------|\n|    1.5 | x    |\n| -10.25 | long |"
    )
