"""What a run trains on: read from every form it may have, refused in a sentence, and given to model and reward."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from reward_lora.cli import main
from reward_lora.selfcheck.exactness import ToyReward
from reward_lora.tests.families import Case
from reward_lora.training.config import TrainConfig
from reward_lora.training.examples import Example, Picture, Store, as_examples, clip, read_examples, still, together
from reward_lora.training.inputs import Inputs
from reward_lora.training.media import read_video, write_video
from reward_lora.training.prompts import PromptFileError
from reward_lora.training.schedule import BackpropSchedule
from reward_lora.training.trainer import Trainer
from reward_lora.video_models import load_video_model

IMAGE_TO_VIDEO = (
    Case("wan", "2.1 original inp"),
    Case("wan", "2.2 original ti2v"),
    Case("cogvideox", "fun 2b inp"),
    Case("easyanimate", "original v5.1 inp"),
)


class Comparing(ToyReward):
    """Higher the nearer the mean colour is to the reference's."""

    name, needs = "comparing", frozenset({"reference"})

    def __init__(self):
        self.seen = []

    def score(self, frames, prompts, *, reference=None):
        self.seen.append(reference)
        return -(frames.flatten(2).mean(2) - reference.flatten(2).mean(2)).square().sum(1)


def paint(path, colour=(200, 100, 50), size=(24, 16)):
    """A plain picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def film(path, levels):
    """A clip whose frames are gray, of these levels."""
    frames = torch.tensor(levels).view(1, -1, 1, 1).expand(3, -1, 32, 48)
    return write_video(path, frames.float(), 8)


@pytest.fixture
def dataset(tmp_path):
    """A folder as ROLL's: two clips and their table, which begins with a byte order mark."""
    film(tmp_path / "data" / "clips" / "a.mp4", [0.1, 0.3, 0.5, 0.7, 0.9])
    film(tmp_path / "data" / "clips" / "b.mp4", [0.8, 0.2])
    rows = '\ufeffvideo,prompt\nclips/a.mp4,"a woman, smiling"\nclips/b.mp4,a man\n'
    (tmp_path / "data" / "metadata.csv").write_text(rows, encoding="utf-8")
    return tmp_path / "data"


def test_a_table_of_clips_gives_start_image_and_reference(dataset):
    first, second = read_examples(dataset)
    assert [first.prompt, second.prompt] == ["a woman, smiling", "a man"]
    assert first.start_image is first.reference
    assert first.reference == Picture(dataset / "clips/a.mp4")
    assert read_examples(dataset / "metadata.csv") == [first, second]


def test_a_table_may_name_pictures_one_by_one(tmp_path):
    for name in ("a.png", "b.png", "c.jpg"):
        paint(tmp_path / name)
    (tmp_path / "metadata.csv").write_text("image,prompt,end_image,reference\na.png,one,b.png,c.jpg\nb.png,two,,\n")
    one, two = read_examples(tmp_path)
    assert one == Example("one", tmp_path / "a.png", tmp_path / "b.png", tmp_path / "c.jpg")
    assert two == Example("two", tmp_path / "b.png", None, tmp_path / "b.png")


def test_pictures_with_captions_and_lines_of_objects(tmp_path):
    paint(tmp_path / "set" / "b.png"), paint(tmp_path / "set" / "a.JPG")
    (tmp_path / "set" / "a.txt").write_text("a red\ncircle\n")
    (tmp_path / "set" / "b.txt").write_text("a blue square")
    (tmp_path / "set" / ".hidden.png").write_bytes(b"")
    files = [tmp_path / "set" / "a.JPG", tmp_path / "set" / "b.png"]
    examples = read_examples(tmp_path / "set")
    assert examples == [
        Example("a red circle", files[0], None, files[0]),
        Example("a blue square", files[1], None, files[1]),
    ]
    lines = [{"prompt": "x", "start_image": "set/b.png"}, {"prompt": "y", "reference": "set/a.JPG", "else": 1}]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert read_examples(tmp_path / "p.jsonl") == [Example("x", files[1]), Example("y", reference=files[0])]
    (tmp_path / "p.txt").write_text("one\n\ntwo\n")
    assert read_examples(tmp_path / "p.txt") == as_examples(["one", Example("two")])


BAD = {
    "unknown column": ("a.png,x", "picture,prompt", r"unknown column 'picture'; write video,prompt or image,prompt"),
    "no prompt column": ("a.png", "image", r"has the columns image; write"),
    "no pictures": ("x", "prompt", r"has the columns prompt; write"),
    "missing": ("b.png,x", "image,prompt", r"metadata.csv, line 2: .*b.png: there is no such"),
    "unreadable": ("broken.png,x", "image,prompt", r"line 2: broken.png cannot be read as a video or picture"),
    "outside": ("../secret.png,x", "image,prompt", r"line 2: ../secret.png lies outside of"),
    "absolute": ("/etc/hostname,x", "image,prompt", r"line 2: /etc/hostname lies outside of"),
    "empty prompt": ("a.png, ", "image,prompt", r"line 2: the prompt is empty"),
    "too many": (
        "a.png,x,y",
        "image,prompt",
        r'line 2: 3 values where there are 2 columns; put a prompt with commas in "quotes"',
    ),
    "too few": ("a.png", "image,prompt", r"line 2: 1 values where there are 2 columns"),
    "not a table": ("a.png," + "x" * 200_000, "image,prompt", r"line 2: no comma-separated values"),
    "empty": ("", "", r"has the columns none"),
    "no rows": ("", "image,prompt", r"holds no rows"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_table_gets_a_sentence(tmp_path, name):
    row, header, words = BAD[name]
    folder = tmp_path / "data"
    paint(folder / "a.png"), paint(tmp_path / "secret.png")
    (folder / "broken.png").write_bytes(b"\x89PNG nothing")
    (folder / "metadata.csv").write_text(f"{header}\n{row}\n")
    with pytest.raises(PromptFileError, match=words) as error:
        read_examples(folder)
    assert "\n" not in str(error.value)


def test_pictures_without_prompts_get_a_sentence(tmp_path):
    with pytest.raises(PromptFileError, match="holds neither a metadata.csv nor pictures with prompts"):
        read_examples(tmp_path)
    paint(tmp_path / "a.png")
    with pytest.raises(PromptFileError, match=r"a.png has no prompt; write it into a.txt beside it"):
        read_examples(tmp_path)
    with pytest.raises(PromptFileError, match="there is no such prompt file"):
        read_examples(tmp_path / "none")


def test_a_start_image_fills_the_size_and_a_reference_is_whole(tmp_path):
    picture = np.zeros((40, 80, 3), np.uint8)
    picture[:, 20:60] = 255
    Image.fromarray(picture).save(tmp_path / "wide.png")
    filled = still(Picture(tmp_path / "wide.png"), 20, 20)
    assert filled.shape == (1, 3, 20, 20)
    assert float(filled.mean()) > 0.95
    whole = clip(Picture(tmp_path / "wide.png"), 20, 20, 5)
    assert (whole.shape, whole.dtype) == ((3, 1, 20, 20), torch.uint8)
    assert int(whole[:, 0, :5].max()) == int(whole[:, 0, 15:].max()) == 0
    assert float(whole[:, 0, 6:14].float().mean()) == pytest.approx(255 / 2, abs=8)
    same = still(Picture(torch.from_numpy(picture).permute(2, 0, 1)[:, None].float() / 255), 20, 20)
    assert torch.equal(same, filled)


def test_a_picture_stands_upright(tmp_path):
    picture = Image.new("RGB", (40, 20), (255, 0, 0))
    notes = picture.getexif()
    notes[0x0112] = 6  # the camera was turned
    picture.save(tmp_path / "a.jpg", exif=notes)
    assert read_video(tmp_path / "a.jpg").shape == (3, 1, 40, 20)


def test_a_clips_first_frame_starts_the_video_and_is_no_reference(dataset):
    first, second = read_examples(dataset)
    assert float(still(first.start_image, 48, 32).mean()) == pytest.approx(0.1, abs=0.03)
    levels = clip(first.reference, 48, 32, 5).float().mean((0, 2, 3)) / 255
    assert levels.tolist() == pytest.approx([0.3, 0.5, 0.7, 0.9], abs=0.03)
    assert clip(first.reference, 48, 32, 3).shape[1] == 2
    longer = clip(first.reference, 48, 32, 9).float().mean((0, 2, 3)) / 255
    assert longer.tolist() == pytest.approx([0.3, 0.3, 0.5, 0.5, 0.7, 0.7, 0.9, 0.9], abs=0.03)
    batch = together([clip(e.reference, 48, 32, 5) for e in (first, second)])
    assert batch.shape == (2, 3, 4, 32, 48)
    assert float(batch[1].mean()) == pytest.approx(0.2, abs=0.03)


def test_identity_is_that_of_the_content(tmp_path):
    a, b, c = (
        paint(tmp_path / name, colour)
        for name, colour in (("a.png", (9, 9, 9)), ("b.png", (9, 9, 9)), ("c.png", (8, 9, 9)))
    )
    assert Example("x", a).identity == Example("x", b).identity
    frames = read_video(a)
    others = [Example("x"), Example("y", a), Example("x", c), Example("x", end_image=a), Example("x", reference=a)]
    others += [Example("x", frames), Example("x", frames / 2)]
    assert len({example.identity for example in [Example("x", a), *others]}) == 8
    assert Example("x", frames).identity == Example("x", frames.clone()).identity


def test_the_store_forgets_what_was_not_used_for_longest():
    made = []

    def make(name):
        made.append(name)
        return [{"x": torch.zeros(10, dtype=torch.uint8)}]

    store = Store(25)
    for name in ("a", "b", "a", "c", "a", "b"):
        store.get(name, partial(make, name))
    assert made == ["a", "b", "c", "b"]
    Store(5).get("large", partial(make, "large"))


@pytest.mark.parametrize("case", IMAGE_TO_VIDEO, ids=str)
def test_a_batch_is_conditioned_as_its_examples_and_each_is_encoded_once(case, tmp_path, monkeypatch):
    case.write(tmp_path / "model")
    model = load_video_model(tmp_path / "model", dtype="float32")
    width, height, frames = case.size
    c = TrainConfig(width=width, height=height, frames=frames).for_model(model.spec)
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, 1, height, width, generator=generator) for _ in range(2)]
    ends = [None, None] if "ti2v" in case.layout else images[::-1]
    prompts = ("a red", "a blue circle")
    examples = [Example(*three) for three in zip(prompts, images, ends, strict=True)]
    inputs = Inputs(model, c, lambda phase: None, None)
    inputs.prepare(examples)
    ours = inputs.conditioning(examples)
    pixels = (torch.stack(images)[:, :, 0] * 255).round() / 255
    texts, negative = model.encode_text([e.prompt for e in examples]), model.encode_text([""]) * 2
    shape = model.spec.latent_shape(width, height, frames)
    for place in range(2):  # alone, for some families draw noise for a whole batch
        alone = {"start_image": pixels[[place]]}
        if "ti2v" not in case.layout:
            alone["end_image"] = pixels[[1 - place]]
        whole = model.conditioning([texts[place]], negative[:1], shape, **alone)
        for mine, wanted in ((ours.positive, whole.positive), (ours.negative, whole.negative)):
            assert mine.keys() == wanted.keys()
            for key in mine:
                torch.testing.assert_close(mine[key][place], wanted[key][0], rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(model, "conditioning", None)
    again = inputs.conditioning(examples[::-1])
    assert all(torch.equal(again.positive[key], ours.positive[key].flip(0)) for key in ours.positive)


@pytest.fixture
def inp(tmp_path):
    """A tiny image-to-video Wan."""
    case = IMAGE_TO_VIDEO[0]
    case.write(tmp_path / "model")
    return load_video_model(tmp_path / "model", dtype="float32")


SETTINGS = TrainConfig(
    steps=2, batch_size=2, rank=2, learning_rate=1e-2, width=32, height=32, frames=5, sampler_steps=2,
    guidance_scale=2.0, backprop=BackpropSchedule("tail", 2), judged_latents=0, save_every=1, sample_every=2,
    sample_count=2, guards="off", save_dtype="float32",
)  # fmt: skip


def test_a_run_on_clips_is_given_their_frames_and_resumes(inp, dataset, tmp_path):
    reward = Comparing()
    whole = Trainer(inp, reward, read_examples(dataset), SETTINGS, tmp_path / "whole" / "run")
    events = list(whole)
    assert [event.skipped for event in events] == ["", "", ""]
    assert all(event.grad_norm > 0 for event in events[1:])
    assert len(reward.seen) == 4  # two steps and two evaluations
    for reference in reward.seen:
        assert (reference.shape, reference.dtype) == ((2, 3, 4, 32, 32), torch.float32)
        levels = sorted(reference[:, :, :, 16, 16].mean((1, 2)).tolist())
        assert levels == pytest.approx([0.2, 0.6], abs=0.03)
    part = Trainer(inp, Comparing(), read_examples(dataset), SETTINGS, tmp_path / "part" / "run")
    with closing(iter(part)) as running:
        assert [next(running).step, next(running).step] == [0, 1]
    assert [event.step for event in Trainer(inp, Comparing(), read_examples(dataset), SETTINGS, part.folder)] == [2]
    assert part.lora_path.read_bytes() == whole.lora_path.read_bytes()
    film(dataset / "clips" / "b.mp4", [0.8, 0.3])
    with pytest.raises(ValueError, match=r"another run|other settings .prompts"):
        list(Trainer(inp, Comparing(), read_examples(dataset), SETTINGS, part.folder))


def test_the_start_image_decides_what_is_painted(inp, tmp_path):
    images = [Example("a circle", paint(tmp_path / f"{n}.png", (n, n, n))) for n in (10, 240)]
    trainer = Trainer(inp, ToyReward(), images, SETTINGS, tmp_path / "run")
    dark, bright = trainer.evaluate().frames
    again = Trainer(inp, ToyReward(), images[::-1], SETTINGS, tmp_path / "run").evaluate().frames
    assert not torch.equal(dark, again[0])
    assert float((dark - again[0]).abs().mean()) > 1e-3


def test_what_does_not_fit_is_refused_before_anything_is_made(wan, reward, inp, tmp_path):
    picture = paint(tmp_path / "a.png")
    plain, starting, ending = Example("x"), Example("x", picture), Example("x", picture, picture)
    compared = Example("x", picture, reference=picture)
    start = partial(Trainer, config=SETTINGS, folder=tmp_path / "run")
    small = partial(Trainer, config=replace(SETTINGS, width=0, height=0, frames=0), folder=tmp_path / "run")
    cases = [
        (small, wan, reward, [starting], [], "text-to-video model, and 1 of 1 training prompts have a start image"),
        (start, inp, reward, [starting, "y"], [], "1 of 2 training prompts have a start image; give one to all"),
        (start, inp, reward, [starting, ending], [], "1 of 2 training prompts have an end image; give one to all"),
        (
            start,
            inp,
            Comparing(),
            [compared, starting],
            [compared],
            "comparing needs a reference, which 1 of 2 training",
        ),
        (start, inp, Comparing(), [compared], ["y"], "comparing needs a reference, which 1 of 1 sample prompts lack"),
    ]
    for make, model, judge, examples, samples, words in cases:
        with pytest.raises(ValueError, match=words):
            make(model, judge, examples, sample_prompts=samples)
    with pytest.raises(ValueError, match="comparing needs a reference, which 1 of 1 sample prompts lack"):
        start(inp, reward, [plain], heldout=[Comparing()])
    assert not (tmp_path / "run").exists()


def test_a_held_out_reward_compares_too(inp, dataset, tmp_path):
    judge = Comparing()
    trainer = Trainer(inp, ToyReward(), read_examples(dataset), SETTINGS, tmp_path / "run", heldout=[judge])
    evaluation = trainer.evaluate()
    assert len(evaluation.heldout["comparing"]) == 2
    assert [reference.shape for reference in judge.seen] == [(1, 3, 4, 32, 32)] * 1 + [(1, 3, 1, 32, 32)]


def test_a_batch_that_shows_nothing_contributes_nothing(wan, config, tmp_path):
    """Of three batches a step one is blind: the step counts; where all are, it is skipped with a word."""

    class Blinking(ToyReward):
        def __init__(self, *open_at):
            self.calls, self.open_at = 0, open_at

        def score(self, frames, prompts, *, reference=None):
            self.calls += 1
            return super().score(frames, prompts) * float(self.calls % 3 in self.open_at)

    c = replace(config, steps=2, accumulation=3, sample_every=0, max_skipped=2, max_grad_norm=1e9, guards="off")
    norms = []
    for number, open_at in enumerate(((0, 1, 2), (1, 2))):
        events = list(Trainer(wan, Blinking(*open_at), ["x"], c, tmp_path / f"run{number}"))[1:]
        assert [event.skipped for event in events] == ["", ""]
        norms.append(events[0].grad_norm)
    assert norms[0] != norms[1]
    with pytest.raises(Exception, match="2 steps in a row were skipped.*found nothing to judge, such as no face"):
        list(Trainer(wan, Blinking(), ["x"], c, tmp_path / "blind"))


def test_the_command_line_trains_on_a_folder(dataset, tmp_path, capsys):
    IMAGE_TO_VIDEO[0].write(tmp_path / "model")
    size = (
        "--width 32 --height 32 --frames 5 --steps 1 --sampler-steps 2 --backprop.num-steps 1 --rank 2 --sample-count 1"
    )
    where = ["--output-dir", str(tmp_path / "out"), "--prompts", str(dataset), "--model", str(tmp_path / "model")]
    command = ["train", "--reward", "tiny_clip", "--dtype", "float32", "--name", "run", *where, *size.split()]
    assert main(command) == 0, capsys.readouterr().err
    records = [json.loads(line) for line in (tmp_path / "out" / "run" / "log.jsonl").read_text().splitlines()]
    assert [(record["step"], record["skipped"]) for record in records] == [(0, ""), (1, "")]
    (tmp_path / "mine.py").write_text(f"from {Comparing.__module__} import Comparing\nmine = Comparing()\n")
    (tmp_path / "p.txt").write_text("a circle\n")
    capsys.readouterr()
    assert (
        main([*command, "--reward", f"{tmp_path / 'mine.py'}:mine", "--sample-prompts", str(tmp_path / "p.txt")]) == 2
    )
    assert "comparing needs a reference, which 1 of 1 sample prompts lack" in capsys.readouterr().err
