"""Every guard changes the outcome that it is for; a resumed run is guarded as the uninterrupted one."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import replace

import pytest
import torch
from reward_lora.lora.adapter import LoraUse, applied
from reward_lora.lora.files import read_lora
from reward_lora.reward_models.mixture import Mixture
from reward_lora.selfcheck.exactness import ToyReward
from reward_lora.training import augment, guards
from reward_lora.training.augment import augmented
from reward_lora.training.checkpoint import list_checkpoints
from reward_lora.training.config import TrainConfig
from reward_lora.training.gradient import Walk
from reward_lora.training.guards import Guards, MotionGuard, Reading, conflicts, sharpness, speed
from reward_lora.training.judge import Objective, View, judge
from reward_lora.training.run_folder import best_path
from reward_lora.training.trainer import Trainer

PROMPTS = ["one", "two", "three", "four", "five"]


class Bright(ToyReward):
    """Linear in the pixels; ``sign`` -1 is the judge that sees through it."""

    def __init__(self, name="bright", sign=1.0):
        self.name, self.sign = name, sign

    def score(self, frames, prompts, *, reference=None):
        return self.sign * frames.flatten(1).mean(1)


class Still(ToyReward):
    """Pays for standing still."""

    name = "still"

    def score(self, frames, prompts, *, reference=None):
        return -speed(frames)


@pytest.fixture
def fast(config):
    return replace(config, learning_rate=3e-2, max_grad_norm=1.0, judged_latents=0, sample_count=5)


def moving_square(pixels, contrast=0.8, count=6, size=24):
    frames = torch.full((1, 3, count, size, size), 0.1)
    for t in range(count):
        frames[:, :, t, 8:16, 2 + pixels * t : 8 + pixels * t] += contrast
    return frames


def reading(step, reward, heldout=None, motion=1.0, detail=1.0):
    clips = 4
    heldout = {} if heldout is None else {"held out": [heldout + 0.01 * n for n in range(clips)]}
    return Reading(step, [reward + 0.01 * n for n in range(clips)], heldout, [motion] * clips, [detail] * clips)


def test_speed_is_that_of_what_moves_whatever_its_contrast():
    slow, fast, pale = (speed(clip).item() for clip in (moving_square(1), moving_square(2), moving_square(1, 0.2)))
    assert slow < fast
    assert pale == pytest.approx(slow, rel=1e-3)
    assert speed(moving_square(0)).item() < 1e-3
    still = moving_square(0).requires_grad_()
    speed(still).sum().backward()
    assert still.grad.isfinite().all()


def test_sharpness_tells_blur_and_texture():
    clip = moving_square(1)
    blurred = torch.nn.functional.avg_pool3d(clip, (1, 3, 3), 1, (0, 1, 1))
    noisy = clip + 0.1 * torch.randn(clip.shape, generator=torch.Generator().manual_seed(0))
    assert sharpness(blurred) < 0.5 * sharpness(clip) < 0.5 * sharpness(noisy)


def test_the_best_step_is_the_highest_held_out_score_and_patience_ends_the_run():
    guards = Guards(2, 0.9, "reward", ["prompts"])
    rows = [(0, 0.5, 0.5), (10, 0.6, 0.6), (20, 0.7, 0.7), (30, 0.8, 0.6), (40, 0.9, 0.5)]
    found = [guards.observe(reading(*row)) for row in rows]
    assert [f.best for f in found] == [False, True, True, False, False]
    assert [bool(f.stop) for f in found] == [False, False, False, False, True]
    assert guards.best.step == 20
    assert "rose by 0.4000" in guards.stopped
    assert "held out fell by 0.2000" in guards.stopped
    assert "step 20" in guards.stopped


def test_one_bad_evaluation_is_forgiven():
    guards = Guards(2, 0.9, "reward", [])
    for step, heldout in ((0, 0.5), (1, 0.7), (2, 0.6), (3, 0.71), (4, 0.6)):
        assert not guards.observe(reading(step, 0.5 + step / 10, heldout)).stop


@pytest.mark.parametrize(("spoiled", "what"), [({"motion": 0.8}, "motion"), ({"detail": 1.7}, "texture")])
def test_without_a_held_out_judge_motion_and_sharpness_decide(spoiled, what):
    guards = Guards(2, 0.9, "reward", [])
    guards.observe(reading(0, 0.5))
    assert guards.observe(reading(1, 0.6)).best
    spoiled_one = guards.observe(reading(2, 0.9, **spoiled))
    assert not spoiled_one.best
    assert what in spoiled_one.words
    assert guards.observe(reading(3, 0.95, **spoiled)).stop
    assert guards.best.step == 1


def test_few_prompts_leave_little_room_above_the_motion_floor():
    """The same mean, 0.93 of the base model's: shown by even clips, not by two that move and two that do not."""
    for motions, best in (([0.93] * 4, True), ([1.1, 0.76, 1.1, 0.76], False), ([1.1, 0.76] * 40, True)):
        guards, clips = Guards(1, 0.9, "reward", []), len(motions)
        guards.observe(Reading(0, [0.5] * clips, {}, [1.0] * clips, [1.0] * clips))
        found = guards.observe(Reading(1, [0.6] * clips, {}, motions, [1.0] * clips))
        assert found.best == best
        assert not found.words, "a doubt is no complaint"


@pytest.mark.parametrize(
    ("gentle", "kept"),
    [
        ({"reward": 0.8}, (2, 0.7)),
        ({"reward": 0.8, "motion": 0.85}, (1, 1.0)),
        ({"reward": 0.55}, (1, 1.0)),
    ],
    ids=["sound and better", "not sound either", "not better"],
)
def test_a_step_that_goes_too_far_is_kept_at_the_strength_at_which_it_does_not(gentle, kept):
    asked = []

    def gentler(strength):
        asked.append(strength)
        return replace(reading(2, **gentle), strength=strength)

    guards = Guards(1, 0.9, "reward", [])
    guards.observe(reading(0, 0.5), gentler)
    guards.observe(reading(1, 0.6), gentler)
    assert asked == [], "a sound step is taken as it is"
    found = guards.observe(reading(2, 0.9, motion=0.8), gentler)
    assert asked == [0.7]
    assert (guards.best.step, guards.best.strength) == kept
    assert found.best == (kept[0] == 2)
    assert found.strength == kept[1]
    assert found.words, "at full strength it is bad all the same"
    assert ("use the LoRA of step 2 at strength 0.7" in found.stop) == found.best
    assert Guards(1, 0.9, "reward", [], json.loads(json.dumps(guards.state))).best == guards.best
    guards.observe(reading(3, 0.5, motion=0.8), gentler)
    assert asked == [0.7], "one that scores lower is not worth another look"


def test_a_reward_worse_than_the_base_has_no_best_step():
    guards = Guards(0, 0.9, "reward", [])
    found = [guards.observe(reading(step, value)) for step, value in ((0, 0.5), (1, 0.4), (2, 0.3))]
    assert not any(f.best for f in found)


def test_a_held_out_judge_stops_a_run_and_the_best_lora_is_kept(wan, fast, tmp_path):
    """Towards brightness, watched by a judge of darkness: every gain is a loss, and the run ends itself."""
    config = replace(fast, steps=30, patience=1, sample_every=4, motion_floor=0.0)
    trainer = Trainer(wan, Bright(), PROMPTS, config, tmp_path / "run", heldout=[Bright("dark", -1.0)])
    events = list(trainer)
    assert events[-1].step < 30
    assert "dark fell" in events[-1].stop
    assert list(Trainer(wan, Bright(), PROMPTS, config, trainer.folder, heldout=[Bright("dark", -1.0)])) == []
    unwatched = replace(config, guards="off", patience=0, steps=events[-1].step + 2)
    assert len(list(Trainer(wan, Bright(), PROMPTS, unwatched, trainer.folder, heldout=[Bright("dark", -1.0)]))) == 2


def test_the_best_lora_is_that_of_its_step(wan, fast, tmp_path):
    """A judge that wants just the brightness there is after four steps."""

    class Enough(Bright):
        def score(self, frames, prompts, *, reference=None):
            return -(super().score(frames, prompts) - torch.tensor([target[p] for p in prompts])).abs()

    config = replace(fast, steps=8, patience=0, motion_floor=0.0, sample_every=4)
    plain = list(Trainer(wan, Bright(), PROMPTS, replace(config, steps=4), tmp_path / "plain" / "run"))
    target = dict(zip(PROMPTS, plain[-1].evaluation.rewards, strict=True))
    trainer = Trainer(wan, Bright(), PROMPTS, config, tmp_path / "run", heldout=[Enough("enough")])
    events = list(trainer)
    best = [e.step for e in events if e.evaluation and e.evaluation.findings["best"]][-1]
    assert best == 4
    assert read_lora(best_path(trainer.lora_path)).metadata["step"] == str(best)
    kept, made = read_lora(best_path(trainer.lora_path)), read_lora(tmp_path / "plain" / "run" / "run.safetensors")
    assert all(torch.equal(kept.modules[key].up, made.modules[key].up) for key in made.modules)


def test_a_run_that_ends_badly_gives_its_best_lora(wan, fast, tmp_path):
    """One bad evaluation at the end: patience is not used up, so the run is not stopped."""
    config = replace(fast, steps=4, sample_every=2, patience=5, motion_floor=0.0, keep_best=True, sweep=False)
    trainer = Trainer(wan, Bright(), PROMPTS, config, tmp_path / "run", heldout=[Turning("turning")])
    events = list(trainer)
    assert [bool(e.evaluation.findings["words"]) for e in events if e.evaluation] == [False, False, True]
    assert trainer.result_paths == [best_path(trainer.lora_path)]
    good = Trainer(wan, Bright(), PROMPTS, config, tmp_path / "good")
    list(good)
    assert good.result_paths == [good.lora_path]


def test_the_file_of_a_step_kept_at_a_lower_strength_is_that(wan, fast, tmp_path, monkeypatch):
    """Paid for standing still, with a floor between the motion at full strength and that at 0.7."""
    monkeypatch.setattr(guards, "SHARPNESS", 1e3)  # a random decoder's clips gain texture as they slow down
    config = replace(fast, steps=8, sample_every=8, sample_count=1, keep_best=False, motion_floor=0.0)
    plain = Trainer(wan, Still(), PROMPTS, config, tmp_path / "plain" / "run")
    base, last = (e.evaluation for e in plain if e.evaluation)
    with applied(wan, [LoraUse(read_lora(plain.lora_path), 0.7)]):
        gentle = plain.evaluate()
    ratios = [(speed(seen.frames) / speed(base.frames)).item() for seen in (last, gentle)]
    assert ratios[0] < ratios[1] < 1
    guarded = replace(config, keep_best=True, motion_floor=sum(ratios) / 2)
    trainer = Trainer(wan, Still(), PROMPTS, guarded, tmp_path / "run")
    found = list(trainer)[-1].evaluation.findings
    assert (found["best"], found["strength"], found["unsound"]) == (True, 0.7, ("motion",))
    assert found["gentler"]["reward"] == pytest.approx(gentle.rewards, rel=1e-4)
    assert trainer.result_paths == trainer.kept_paths == [best_path(trainer.lora_path)]
    kept = read_lora(trainer.kept_paths[0])
    assert (kept.metadata["step"], kept.metadata["strength"]) == ("8", "0.7")
    with applied(wan, [LoraUse(kept, 1.0)]):
        torch.testing.assert_close(trainer.evaluate().frames, gentle.frames, rtol=0, atol=1e-4)
    assert torch.equal(read_lora(trainer.lora_path).modules.popitem()[1].down,
                       read_lora(plain.lora_path).modules.popitem()[1].down)  # fmt: skip
    only_measured = Trainer(wan, Still(), PROMPTS, replace(guarded, keep_best=False), tmp_path / "off" / "run")
    assert list(only_measured)[-1].evaluation.findings["gentler"] is None
    assert only_measured.kept_paths == []


class Turning(Bright):
    """Praises the second evaluation and blames the third, clip by clip as it is asked."""

    looks = 0

    def score(self, frames, prompts, *, reference=None):
        said = (0.0, 1.0, -1.0)[min(2, self.looks // len(PROMPTS))]
        self.looks += 1
        return frames.flatten(1)[:, 0] * 0 + said


def test_the_runs_lora_is_swept_over_strengths_and_left_as_it_was(wan, fast, tmp_path):
    """The best step is in the middle: its LoRA is painted, not the last; the LoRAs do not change for it."""
    config = replace(fast, steps=4, patience=0, motion_floor=0.0, sample_every=2)
    made = {}
    for sweep in (False, True):
        heldout = [Turning("turning")]
        trainer = Trainer(
            wan, Bright(), PROMPTS, replace(config, sweep=sweep), tmp_path / f"{sweep}" / "run", heldout=heldout
        )
        list(trainer)
        made[sweep] = [path.read_bytes() for path in (trainer.lora_path, *trainer.kept_paths)]
    assert made[False] == made[True]
    record = json.loads((trainer.folder / "log.jsonl").read_text().splitlines()[-1])["sweep"]
    assert record["step"] == 2
    assert [point["strength"] for point in record["points"]] == [0, 0.25, 0.5, 0.7, 1]
    best = read_lora(trainer.kept_paths[0])
    for point in record["points"]:
        with applied(wan, [LoraUse(best, point["strength"])]):
            seen = trainer.evaluate()
        assert point["rewards"] == pytest.approx(seen.rewards, abs=1e-5)
        assert point["motion"] == pytest.approx(speed(seen.frames).tolist(), rel=1e-3)
    painted = heldout[0].looks
    list(Trainer(wan, Bright(), PROMPTS, replace(config, sweep=True), trainer.folder, heldout=heldout))
    assert heldout[0].looks == painted, "what is in the log is not painted again"


def test_a_new_run_in_the_folder_does_not_inherit_the_best_lora(wan, config, tmp_path):
    trainer = Trainer(wan, Bright(), PROMPTS, replace(config, steps=1, sample_every=0), tmp_path / "run")
    trainer.folder.mkdir()
    best_path(trainer.lora_path).write_bytes(b"of an earlier run")
    assert trainer.kept_paths
    list(trainer)
    assert not trainer.kept_paths


def test_standard_changes_no_step(wan, reward, config, tmp_path):
    for preset in ("off", "standard"):
        list(Trainer(wan, reward, PROMPTS, replace(config, guards=preset), tmp_path / preset / "run"))
    same = [read_lora(tmp_path / preset / "run" / "run.safetensors").modules for preset in ("off", "standard")]
    assert all(torch.equal(same[0][key].up, same[1][key].up) for key in same[0])


def test_a_preset_is_overruled_setting_by_setting(wan):
    careful = TrainConfig(guards="careful", backprop=TrainConfig.from_dict({"backprop": {"num_steps": 2}}).backprop)
    filled = careful.for_model(wan.spec)
    assert (filled.augment, filled.motion_guard, filled.anchor) == (2, 1.0, 0.0)
    filled = replace(careful, augment=0, anchor=0.5).for_model(wan.spec)
    assert (filled.augment, filled.motion_guard, filled.anchor) == (0, 1.0, 0.5)
    with pytest.raises(ValueError, match="guards must be one of careful, standard, off"):
        TrainConfig(guards="none")


@pytest.mark.parametrize("latents", [0, 1])
def test_the_motion_guard_keeps_what_the_reward_would_still(wan, fast, tmp_path, latents):
    """With several judged frames through them, with one through the latents."""
    config = replace(fast, steps=8, sample_every=0, judged_latents=latents, motion_floor=1.0)
    left = {}
    for weight in (1e-9, 30.0):
        c = replace(config, motion_guard=weight)
        events = list(Trainer(wan, Still() if latents == 0 else Bright(), PROMPTS, c, tmp_path / f"{weight}" / "run"))
        assert events[1].motion == pytest.approx(1)  # an untrained LoRA is the base model
        left[weight] = events[-1].motion
    assert left[1e-9] < 0.95 < 0.99 < left[30.0]


@pytest.mark.parametrize("view", [View(0), View(1)])
def test_the_motion_penalty_has_the_gradient_of_its_loss(wan, view):
    latents = torch.randn(2, 4, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    base = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1)) * 2
    walk = Walk(wan, None, 1.0)
    with torch.no_grad():
        guard = MotionGuard(2.0, 3.0, wan.decode(base) if view.several else base)
    found = judge(walk, latents, Bright(), ["", ""], Objective(), view, guard)
    plain = judge(walk, latents, Bright(), ["", ""], Objective(), view)
    inner = latents.clone().requires_grad_()
    penalty = guard(wan.decode(inner) if view.several else inner)
    penalty.backward()
    assert penalty > 0
    torch.testing.assert_close(found.gradient - plain.gradient, inner.grad, rtol=1e-3, atol=1e-6)
    assert found.loss - plain.loss == pytest.approx(penalty.item(), rel=1e-4)
    assert found.motion == pytest.approx(
        float(guard.ratio(wan.decode(latents) if view.several else latents).mean()), rel=1e-3
    )


def test_a_constant_anchor_keeps_the_lora_near_the_base_model(wan, fast, tmp_path):
    config = replace(fast, steps=8, sample_every=8, judged_latents=1)
    ends = {}
    for weight in (1e-9, 100.0):
        events = list(Trainer(wan, Bright(), PROMPTS, replace(config, anchor=weight), tmp_path / f"{weight}" / "run"))
        assert {e.anchor for e in events[1:]} == {weight}
        ends[weight] = (events[-1].drift, events[-1].evaluation.reward - events[0].evaluation.reward)
    assert ends[100.0][0] < 0.3 * ends[1e-9][0]
    assert ends[1e-9][1] > ends[100.0][1], "the price is reward"


def test_an_adaptive_anchor_holds_the_distance(wan, fast, tmp_path):
    config = replace(fast, steps=16, sample_every=0, anchor=1.0, judged_latents=1)
    free = list(Trainer(wan, Bright(), PROMPTS, replace(config, anchor=1e-9), tmp_path / "free" / "run"))
    target = free[-1].drift / 10
    held = list(Trainer(wan, Bright(), PROMPTS, replace(config, anchor_target=target), tmp_path / "held" / "run"))
    assert held[-1].drift < free[-1].drift / 2
    assert held[-1].anchor != held[1].anchor == 1.0
    steered = Guards(0, 0.9, "reward", [])
    for _ in range(3):
        steered.steer_anchor(1.0, 0.1, 0.2)
    assert steered.anchor_weight(1.0, 0.1) == pytest.approx(1.1**3)
    steered.steer_anchor(1.0, 0.1, 0.0)
    assert steered.anchor_weight(1.0, 0.1) == pytest.approx(1.1**2)
    assert steered.anchor_weight(1.0, 0.0) == 1.0


def test_everything_survives_a_resume(wan, fast, tmp_path):
    """Anchor, best step and patience: a run left in the middle ends as the one that was not."""
    config = replace(fast, steps=6, sample_every=3, anchor=1.0, anchor_target=1e-6, motion_guard=1.0, augment=2)
    judges = {"heldout": [Bright("dark", -1.0)]}
    whole = Trainer(wan, Bright(), PROMPTS, config, tmp_path / "whole" / "run", **judges)
    first = list(whole)
    part = Trainer(wan, Bright(), PROMPTS, config, tmp_path / "part" / "run", **judges)
    with closing(iter(part)) as events:
        for event in events:
            if event.step == 4:
                break
    rest = list(Trainer(wan, Bright(), PROMPTS, config, part.folder, **judges))
    assert [e.anchor for e in rest] == [e.anchor for e in first[5:]]
    assert rest[-1].stop == first[-1].stop
    assert whole.lora_path.read_bytes() == part.lora_path.read_bytes()
    assert states(whole) == states(part)


def test_an_evaluation_that_was_cancelled_is_made_up_for(wan, fast, tmp_path):
    config = replace(fast, steps=2, sample_every=1, save_every=1, judged_latents=1)
    whole = Trainer(wan, Bright(), PROMPTS, config, tmp_path / "whole" / "run")
    list(whole)
    part = Trainer(wan, Bright(), PROMPTS, config, tmp_path / "part" / "run")
    evaluate = part.evaluate

    def cancelled():
        if list_checkpoints(part.folder):
            raise KeyboardInterrupt
        return evaluate()

    part.evaluate = cancelled
    with pytest.raises(KeyboardInterrupt):
        list(part)
    list(Trainer(wan, Bright(), PROMPTS, config, part.folder))
    assert states(whole) == states(part)
    logs = [[json.loads(line) for line in (t.folder / "log.jsonl").read_text().splitlines()] for t in (whole, part)]
    assert [r.get("evaluation") for r in logs[0]] == [r.get("evaluation") for r in logs[1]]


def states(trainer):
    from safetensors import safe_open

    with safe_open(list_checkpoints(trainer.folder)[-1], "pt") as file:
        return json.loads(file.metadata()["progress"])["guards"]


def test_views_starve_a_pattern_and_feed_what_is_seen_from_everywhere():
    """A judge of brightness that also falls for one exact pattern of pixels."""
    size = 32
    pattern = torch.randn(3, 1, size, size, generator=torch.Generator().manual_seed(3)).sign()

    def score(clips):
        return 3 * clips.mean((1, 2, 3, 4)) + 3 * (clips * pattern).mean((1, 2, 3, 4))

    def gained(views):
        frames = torch.full((2, 3, 2, size, size), 0.5)
        for step in range(10):
            frames.requires_grad_()
            shown = [augmented(frames, 100 * step + n) for n in range(views)] or [frames]
            (found,) = torch.autograd.grad(sum(map(score, shown)).sum(), frames)
            frames = frames.detach() + 0.1 * found / found.norm()
        change = frames - 0.5
        return change.mean().item(), (change * pattern).mean().item()

    (bright, fooled), (bright_views, fooled_views) = gained(0), gained(4)
    assert fooled_views < 0.4 * fooled
    assert bright_views > bright


@pytest.fixture
def one_kind(monkeypatch):
    """Leaves one kind of change in the views."""

    def leave(kept):
        for name in ("ZOOM", "ROTATION", "JITTER", "NOISE", "DROPOUT"):
            if name != kept:
                monkeypatch.setattr(augment, name, 0.0)

    return leave


def climbed(score, frames, views, rate, steps):
    """Frames after following a judge's gradient, averaged over so many views; without views that of the frames."""
    for step in range(steps):
        frames = frames.detach().requires_grad_()
        shown = [augmented(frames, 100 * step + n) for n in range(views)] or [frames]
        (found,) = torch.autograd.grad(sum(map(score, shown)) / len(shown), frames)
        frames = frames.detach() + rate * found
    return frames


@pytest.mark.parametrize("kind", ["ZOOM", "ROTATION"])
def test_crops_and_turns_starve_an_exact_pattern(kind, one_kind):
    one_kind(kind)
    pattern = torch.randn(3, 1, 32, 32, generator=torch.Generator().manual_seed(3)).sign()
    start = torch.full((1, 3, 1, 32, 32), 0.5)

    def gained(views):
        return ((climbed(lambda c: (c * pattern).mean(), start, views, 1.0, 10) - start) * pattern).mean()

    assert gained(4) < 0.5 * gained(0)


@pytest.mark.parametrize("kind", ["JITTER", "NOISE"])
def test_colours_and_noise_lead_out_of_a_narrow_trap(kind, one_kind):
    """A judge that wants it brighter, but for a needle of praise at one exact shade: of the clip, or of a pixel."""
    one_kind(kind)
    start = torch.full((1, 3, 1, 8, 8), 0.5)

    def score(clips):
        shade = clips.mean((1, 2, 3, 4)) if kind == "JITTER" else clips
        return clips.mean() + 0.05 * (-((shade - 0.5) / 0.01).square()).exp().mean()

    stuck, free = (climbed(score, start, views, 1e-3 * start.numel(), 100).mean() for views in (0, 4))
    assert stuck < 0.51
    assert free > 0.54


def test_missing_patches_keep_one_spot_from_carrying_the_score(one_kind):
    """A judge of the brightest patch alone."""
    one_kind("DROPOUT")
    start = torch.full((1, 3, 1, 16, 16), 0.3)
    start[..., 4:6, 4:6] += 0.1
    start[..., 8:10, 4:6] += 0.05

    def patches(clips):
        return torch.nn.functional.avg_pool2d(clips.mean((1, 2)), 2).flatten()

    def second(views):
        """The score when that spot is hidden."""
        seen = patches(climbed(lambda c: (200 * patches(c)).logsumexp(0) / 200, start, views, 0.2, 20))
        return seen.sort().values[-2]

    assert second(0) == pytest.approx(0.35, abs=1e-3)
    assert second(4) > 0.36


def test_a_view_is_its_seeds_and_the_same_in_every_frame():
    clip = torch.rand(2, 3, 1, 24, 32, generator=torch.Generator().manual_seed(0)).expand(2, 3, 4, 24, 32)
    view = augmented(clip, 5)
    assert torch.equal(view, augmented(clip, 5))
    assert not torch.equal(view, augmented(clip, 6))
    assert view.shape == clip.shape
    assert 0 <= view.min() <= view.max() <= 1
    assert speed(view).max() < 0.5 * speed(torch.rand(2, 3, 4, 24, 32)).min()  # the noise alone moves


def test_the_judge_is_shown_as_many_views_as_were_asked_for(wan):
    calls = []

    class Counting(Bright):
        def score(self, frames, prompts, *, reference=None):
            calls.append(frames.detach().clone())
            return super().score(frames, prompts)

    latents = torch.randn(1, 4, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    verdict = judge(Walk(wan, None, 1.0), latents, Counting(), [""], Objective(), View(1, seed=3, augment=3))
    assert len(calls) == 3
    assert verdict.rewards.item() == pytest.approx(sum(c.mean().item() for c in calls) / 3)
    assert not torch.equal(calls[0], calls[1])
    calls.clear()
    mixed = judge(Walk(wan, None, 1.0), latents, Mixture([Counting()], [2.0]), [""], Objective(),
                  View(1, seed=3, augment=3))  # fmt: skip
    assert mixed.terms["bright"].item() == pytest.approx(verdict.rewards.item())
    assert mixed.terms["bright"].item() != calls[-1].mean().item()


def test_conflicts_of_a_mixture(wan, fast, tmp_path):
    frames = torch.rand(2, 3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    against = Mixture([Bright(), Bright("dark", -1.0)], [1.0, 0.5])
    assert conflicts(against, frames, ["", ""]) == {"bright, dark": pytest.approx(-1)}
    pushed_down = Mixture([Bright(), Bright("dark", -1.0)], [1.0, -0.5])
    assert conflicts(pushed_down, frames, ["", ""]) == {"bright, dark": pytest.approx(1)}
    assert conflicts(Bright(), frames, ["", ""]) == {}
    config = replace(fast, steps=2, accumulation=2)
    trainer = Trainer(wan, against, PROMPTS, config, tmp_path / "run")
    list(trainer)
    records = [json.loads(line) for line in (trainer.folder / "log.jsonl").read_text().splitlines()]
    assert [r.get("conflicts") for r in records] == [None, None, {"bright, dark": pytest.approx(-1)}]
