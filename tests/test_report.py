"""The report says in words what a run gained and what it cost, and needs nothing but itself."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image
from reward_lora.selfcheck.exactness import ToyReward
from reward_lora.training.config import TrainConfig
from reward_lora.training.media import write_png, write_preview
from reward_lora.training.report import page
from reward_lora.training.run_folder import RunFolder
from reward_lora.training.run_log import COLUMNS, RunLog, advice, deeds
from reward_lora.training.trainer import Trainer

CONFIG = TrainConfig(guards="standard")


def record(step, reward, judge=None, motion=1.0, words="", best=False, unsound=(), **others):
    clips = [reward + 0.01 * n for n in range(6)]
    heldout = {} if judge is None else {"PickScore": [judge + 0.01 * n for n in range(6)]}
    guards = {"rewards": clips, "heldout": heldout, "motion": motion, "sharpness": 1.0, "words": words}
    return {"step": step, "reward": reward, "evaluation": reward, "guards": guards | {"best": best, "unsound": unsound},
            **others}  # fmt: skip


HACKED = [
    record(0, 0.80, 21.0),
    record(300, 0.82, 21.2, best=True),
    record(600, 0.84, 20.7, 0.71, "the trained reward rose, while motion fell", unsound=["motion"]),
]


def swept(step, rows, floor=0.9):
    """A sweep of (strength, trained, held out, motion), of six clips with a little spread in what they gain."""
    points = [
        {"strength": s, "rewards": [r + 0.01 * n for n in range(6)], "motion": [m] * 6, "sharpness": [1.0] * 6,
         "heldout": {"PickScore": [j + 0.01 * n + s * 0.01 * (n % 2) for n in range(6)]}}
        for s, r, j, m in rows
    ]  # fmt: skip
    return {"step": step, "reward": "trained one", "motion_floor": floor, "points": points}


ROWS = [(0, 0.8, 21.0, 1.0), (0.5, 0.81, 21.1, 0.99), (0.7, 0.815, 21.3, 0.95), (1, 0.82, 21.2, 0.91)]


class Loaded(HTMLParser):
    """Everything a page would fetch, and whether its tags close."""

    def __init__(self):
        super().__init__()
        self.sources, self.open, self.scripts = [], [], 0

    def handle_starttag(self, tag, attributes):
        self.scripts += tag == "script"
        self.sources += [value for name, value in attributes if name in ("src", "href", "poster", "data")]
        if tag not in ("img", "meta", "br", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def loaded(text):
    parser = Loaded()
    parser.feed(text)
    assert parser.open == []
    return parser


def test_a_hacked_run_is_told_with_its_cost_and_what_to_use():
    warns, (first, *others) = advice(RunLog.of(HACKED), "run")
    assert warns
    assert first == (
        "The trained reward rose 0.04 while PickScore fell 0.3 and motion fell to 0.71 of the base: "
        "use step 300 (run_best.safetensors), and try strength 0.7 first."
    )
    assert others == []
    assert "train 300 steps instead" in advice(RunLog.of(HACKED), "run", kept=False)[1][0]


def test_the_strength_to_use_comes_from_the_sweep_of_the_lora_to_use():
    def said(sweep, records=HACKED, **others):
        return advice(RunLog.of([*records[:-1], records[-1] | {"sweep": sweep}]), "run", **others)[1]

    first, why, *_ = said(swept(300, ROWS))
    assert first.endswith("motion fell to 0.71 of the base: use step 300 (run_best.safetensors) at strength 0.7.")
    assert why == (
        "Strength 0.7 by PickScore: +0.3035 (+0.3012 to +0.3058) with motion at 0.95 of the base; full strength: "
        "+0.205 (+0.2017 to +0.2083) with motion at 0.91 of the base."
    )
    still = [row if row[0] != 0.7 else (0.7, 0.9, 21.9, 0.8) for row in ROWS]
    assert "at strength 0.5." in said(swept(300, still))[0], "too little moves at 0.7"
    assert "try strength 0.7 first" in said(swept(600, ROWS))[0], "that was another LoRA"
    assert "train 300 steps instead" in said(swept(300, ROWS), kept=False)[0]
    worse = [record(0, 0.5, 21.0), record(10, 0.4, 20.0)]
    assert "use run.safetensors at strength 0.7" in said(swept(10, ROWS), worse)[0]
    nothing = [(s, r, 21.0 - s, m) for s, r, _, m in ROWS]
    first, why, *_ = said(swept(10, nothing), worse)
    assert "use no LoRA of this run" in first
    assert why.startswith("Of the strengths tried none gains by PickScore")


GENTLER = [HACKED[0], HACKED[1], record(600, 0.84, 21.9, 0.71, "while motion fell", True, ["motion"])]
GENTLER[2]["guards"] |= {"strength": 0.7, "gentler": record(600, 0.83, 21.6)["guards"] | {"strength": 0.7}}
GENTLER[2]["guards"]["gentler"]["reward"] = GENTLER[2]["guards"]["gentler"]["rewards"]


def test_a_step_kept_at_a_lower_strength_is_told_with_it(tmp_path):
    log = RunLog.of(GENTLER)
    assert (log.best, log.strength) == (600, 0.7)
    assert log.kept["guards"]["heldout"]["PickScore"][0] == 21.6
    first, *_ = advice(log, "run")[1]
    assert first == (
        "The trained reward rose 0.04 while motion fell to 0.71 of the base: "
        "use step 600 at strength 0.7, which is run_best.safetensors at strength 1."
    )
    still_gentler = [*GENTLER[:2], GENTLER[2] | {"sweep": swept(600, ROWS)}]
    assert (
        "use step 600 at strength 0.49, which is run_best.safetensors at strength 0.7."
        in (advice(RunLog.of(still_gentler), "run")[1][0])
    )
    told = " ".join(deeds(RunLog.of(still_gentler), CONFIG.to_dict() | {"keep_best": True, "patience": 3}))
    assert "keep_best kept step 600 at strength 0.7." in told
    assert "at strength 0.7 it was, and still the best: kept." in told
    assert "The LoRA of step 600, kept at 0.7, was painted at" in told
    later = [*GENTLER, record(900, 0.8, 21.0)]
    assert (
        "Step 600 was the best: use step 600 at strength 0.7, which is run_best"
        in advice(RunLog.of(later), "run")[1][0]
    )
    picture = write_png(tmp_path / "reward.png", torch.zeros(4, 4, 3, dtype=torch.uint8).numpy())
    for name in ("step-000000", "step-000600", "step-000600-at-0.7"):
        write_preview(tmp_path / "samples" / f"00-{name}.webp", torch.rand(3, 5, 8, 8), 8)
    text = page("run", "reward", still_gentler, FILLED, ["one"], picture)
    shown = base64.b64encode((tmp_path / "samples" / "00-step-000600-at-0.7.webp").read_bytes()).decode()
    assert text.count(shown) == 2, "among the evaluations, and as the file's full strength"
    assert "step 600 at 0.7, best" in text
    assert "best at strength 0.7" in text


def test_the_page_shows_the_sweep_beside_its_videos(tmp_path):
    picture = write_png(tmp_path / "reward.png", torch.zeros(4, 4, 3, dtype=torch.uint8).numpy())
    for name in ("step-000000", "strength-0.5", "strength-0.7", "step-000300"):
        write_preview(tmp_path / "samples" / f"00-{name}.webp", torch.rand(3, 5, 8, 8), 8)
    text = page("run", "reward", [*HACKED[:-1], HACKED[-1] | {"sweep": swept(300, ROWS)}], FILLED, ["one"], picture)
    part = text[text.index("The LoRA of step 300 at several strengths") : text.index("<h2>Evaluations")]
    assert part.count("data:image/webp") == 4
    assert part.count("data:image/png") == 1
    rows = re.findall(r"<tr class='(\w*)'><td>([\d.]+)</td>", part)
    assert rows == [("", "0"), ("", "0.5"), ("best", "0.7"), ("", "1")]
    assert "strength 0.7, use this" in part
    loaded(text)


def test_a_good_run_is_told_so_and_an_unproven_one_too():
    good = [record(0, 0.5, 1.0), record(10, 0.6, 1.1, best=True)]
    warns, said = advice(RunLog.of(good), "run")
    assert not warns
    assert said[0].startswith("The last evaluation is the best: use run.safetensors")
    over = [*good, record(20, 0.59, 1.05)]
    assert advice(RunLog.of(over), "run")[1][0].startswith("Step 10 was the best: use step 10 (run_best.safetensors)")
    over[2]["guards"]["heldout"]["PickScore"] = [1.3, 0.9, 1.2, 1.0, 1.3, 0.9]
    assert "either may do" in advice(RunLog.of(over), "run")[1][1]
    chance = [record(0, 0.5), record(10, 0.5, best=True)]
    chance[1]["guards"]["rewards"] = [0.9, 0.1, 0.8, 0.3, 0.7, 0.5]
    _, said = advice(RunLog.of(chance), "run")
    assert any("is not shown: the interval" in text for text in said)
    assert any("No held-out judge" in text for text in said)
    warns, said = advice(RunLog.of([record(0, 0.5), record(10, 0.4)]), "run")
    assert warns
    assert "No evaluation was better than the base model" in said[0]


def test_what_the_guards_did_is_told():
    config = replace(CONFIG, keep_best=True, patience=2, motion_guard=1.0, motion_floor=0.9, augment=2, anchor=1.0,
                     anchor_target=0.5).to_dict()  # fmt: skip
    steps = [{"step": n, "reward": 0.5, "motion": m, "anchor": a, "drift": d, "stop": ""}
             for n, m, a, d in ((1, 1.0, 1.0, 0.1), (2, 0.8, 1.5, 0.4))]  # fmt: skip
    last = HACKED[2] | {"stop": "stopped at step 600: 2 bad evaluations in a row", "motion": 0.7, "anchor": 2.0,
                        "drift": 0.6, "conflicts": {"a, b": -0.5}}  # fmt: skip
    told = " ".join(deeds(RunLog.of([HACKED[0], *steps, HACKED[1], last]), config))
    for part in (
        "Preset standard",
        "kept step 300",
        "stopped at step 600",
        "Step 600: the trained reward rose",
        "2 of 3 batches under 0.9",
        "from 1 to 2, the distance from 0.1 to 0.6 towards 0.5",
        "2 random views",
        "a, b pull against each other at the frames (cosine -0.50)",
    ):
        assert part in told
    painted = deeds(RunLog.of([HACKED[0], last | {"sweep": swept(300, ROWS)}]), config)
    assert "The LoRA of step 300 was painted at the strengths 0, 0.5, 0.7, 1." in painted
    off = " ".join(deeds(RunLog.of(HACKED), replace(CONFIG, keep_best=False, patience=0).to_dict()))
    assert "keep_best is off" in off
    assert "patience 0" in off


def test_first_best_and_last_are_among_the_evaluations_shown():
    many = [record(step, step / 100, best=step == 30) for step in range(0, 200, 10)]
    shown = RunLog.of(many).columns()
    assert len(shown) == COLUMNS
    assert {0, 30, 190} <= set(shown)
    assert RunLog.of(many[:2]).columns() == [0, 10]


def test_intervals_are_those_of_the_paired_gains():
    log = RunLog.of(HACKED)
    assert log.gains("PickScore")[1] == pytest.approx((300, 0.2, 0.2, 0.2))
    step, mean, low, high = log.rewards()[0]
    half = 1.96 * torch.arange(6.0).mul(0.01).std().item() / 6**0.5
    assert (step, mean, low, high) == pytest.approx((0, 0.825, 0.825 - half, 0.825 + half))


def test_the_page_is_whole_and_escapes_what_users_write(tmp_path):
    picture = write_png(tmp_path / "reward.png", torch.zeros(4, 4, 3, dtype=torch.uint8).numpy())
    for step in (0, 300, 600):
        write_preview(tmp_path / "samples" / f"00-step-{step:06d}.webp", torch.rand(3, 5, 8, 8), 8)
    text = page("<run>", "a & b", HACKED, FILLED,
                ["<script>alert(1)</script>", "two"], picture)  # fmt: skip
    found = loaded(text)
    assert found.scripts == 0
    assert all(source.startswith("data:image/") for source in found.sources)
    assert len(found.sources) == 1 + 3
    assert "&lt;script&gt;" in text
    assert "http" not in text
    empty = page("run", "reward", [], FILLED, [], picture)
    assert "not yet two evaluations" in empty
    loaded(empty)


FILLED = replace(CONFIG, keep_best=True, patience=3, motion_floor=0.9, motion_guard=0.0, anchor=0.0, anchor_target=0.0,
                 augment=0).to_dict()  # fmt: skip


def test_previews_move_and_are_small(tmp_path):
    frames = torch.rand(3, 60, 300, 200, generator=torch.Generator().manual_seed(0))
    with Image.open(write_preview(tmp_path / "clip.webp", frames, 30)) as image:
        assert image.n_frames == 20
        assert max(image.size) == 192
        assert image.info["loop"] == 0
        image.seek(1)
        image.load()
        assert image.info["duration"] == 100


def test_a_run_writes_its_report_as_it_goes(wan, config, tmp_path):
    trainer = Trainer(wan, ToyReward(), ["one", "two"], replace(config, sweep=True), tmp_path / "run")
    shown = []
    for event in trainer:
        if event.evaluation:
            text = (trainer.folder / "report.html").read_text(encoding="utf-8")
            shown.append(text.count("data:image/webp"))
    assert shown == [2, 4, 6]
    text = (trainer.folder / "report.html").read_text(encoding="utf-8")
    assert text.count("data:image/webp") == 6 + 5 * 2, "and when it has ended, its LoRA at five strengths"
    found = loaded(text)
    pictures = [base64.b64decode(s.partition(",")[2]) for s in found.sources]
    assert all(Image.open(io.BytesIO(data)).verify() is None for data in pictures)
    assert re.search(r"<tr class='\w*'><td>4</td>", text)
    assert "learning_rate" in text
    assert not list(trainer.folder.glob(".*partial"))


def test_a_log_of_a_run_without_evaluations_draws(tmp_path):
    files = RunFolder(tmp_path / "run", "reward")
    files.open(0, FILLED, ["one"])
    files.draw()
    assert (tmp_path / "run" / "report.html").stat().st_size > 1000
