"""Face identity on random networks exported here in the graph layouts of insightface's packs."""

from __future__ import annotations

import functools
import http.server
import logging
import sys
import threading
import warnings
import zipfile

import numpy as np
import pytest
import torch
from reward_lora.files import WeightFileError
from reward_lora.hub import RemoteFile
from reward_lora.reward_models import load_reward
from reward_lora.reward_models.face import LICENCE, FaceCounts, FaceIdentity, Pack
from reward_lora.reward_models.face_detection import ARCFACE_TEMPLATE, FaceDetector, crop_face, similarity, suppress
from reward_lora.reward_models.iresnet import FaceNetwork, open_session
from reward_lora.reward_models.protocol import Reward
from torch import nn
from torch.nn import functional as F

for module in ("onnx", "onnxruntime"):
    pytest.importorskip(module, reason="the face reward is NOT tested: install the extra [face]")


class Block(nn.Module):
    """IResNet's block: the exporter fuses the second and third norm into the convolutions."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(inputs),
            nn.Conv2d(inputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.PReLU(outputs),
            nn.Conv2d(outputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Identity()
        if stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        return self.body(x) + self.shortcut(x)


class IResNet(nn.Module):
    def __init__(self, *, normalizes=False):
        super().__init__()
        self.normalizes = normalizes
        stem = [nn.Conv2d(3, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4), nn.PReLU(4)]
        blocks = [Block(4, 4, 2), Block(4, 4, 1), Block(4, 6, 2), Block(6, 8, 2), Block(8, 10, 2), Block(10, 10, 1)]
        self.body = nn.Sequential(*stem, *blocks, nn.BatchNorm2d(10))
        self.head = nn.Sequential(nn.Linear(490, 16), nn.BatchNorm1d(16))
        for layer in self.modules():
            if isinstance(layer, (nn.BatchNorm2d, nn.BatchNorm1d)):
                nn.init.uniform_(layer.running_mean, -0.3, 0.3)
                nn.init.uniform_(layer.running_var, 0.5, 1.5)
                nn.init.uniform_(layer.bias, -0.3, 0.3)
            if isinstance(layer, nn.PReLU):
                nn.init.uniform_(layer.weight, 0.1, 0.5)
        scale = 255 if normalizes else 2  # statistics under which embeddings of different pictures differ
        textures = F.interpolate(torch.rand(32, 3, 5, 5), (112, 112)) * scale - (0 if normalizes else 1)
        with torch.no_grad():
            embedded = self.head[0](torch.flatten(self.eval().body(self.scaled(textures)), 1))
            self.head[1].running_mean.copy_(embedded.mean(0)), self.head[1].running_var.copy_(embedded.var(0))

    def scaled(self, x):
        return (x - 127.5) * 0.0078125 if self.normalizes else x

    def forward(self, x):
        return self.head(torch.flatten(self.body(self.scaled(x)), 1))


class Scrfd(nn.Module):
    """The nine outputs of SCRFD. What is bright is a face: 4 cells wide, landmarks about where they belong."""

    def __init__(self):
        super().__init__()
        self.stems = nn.ModuleList(nn.Conv2d(3, 2, stride, stride, bias=False) for stride in (8, 16, 32))
        for stem, stride in zip(self.stems, (8, 16, 32), strict=True):
            nn.init.constant_(stem.weight[0], 1 / (3 * stride**2))
        self.scores, self.boxes, self.points = (
            nn.ModuleList(nn.Conv2d(2, 2 * n, 1) for _ in self.stems) for n in (1, 4, 10)
        )
        template = (torch.tensor(ARCFACE_TEMPLATE) / 112 - 0.5).flatten() * 4
        with torch.no_grad():
            for score, box, point in zip(self.scores, self.boxes, self.points, strict=True):
                score.weight.copy_(torch.tensor([[6.0, 0.3], [5.0, -0.3]])[:, :, None, None])
                box.bias.copy_(torch.tensor([2.0] * 4 + [1.8] * 4))
                point.bias.copy_(template.repeat(2))
                box.weight.mul_(0.3), point.weight.mul_(0.3)

    def forward(self, x):
        features = [stem(x) for stem in self.stems]

        def flat(heads, count):
            return [h(f).permute(0, 2, 3, 1).reshape(-1, count) for h, f in zip(heads, features, strict=True)]

        return (*(score.sigmoid() for score in flat(self.scores, 1)), *flat(self.boxes, 4), *flat(self.points, 10))


def export(module, path, size, axes):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module.eval(),
            torch.rand(1, 3, size, size),
            str(path),
            dynamo=False,
            opset_version=11,
            input_names=["input.1"],
            dynamic_axes={"input.1": axes},
        )


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    """An ``antelopev2`` with tiny random networks, nested as its zip unpacks."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("packs") / "antelopev2" / "antelopev2"
    folder.mkdir(parents=True)
    export(IResNet(), folder / "glintr100.onnx", 112, {0: "None"})
    export(Scrfd(), folder / "scrfd_10g_bnkps.onnx", 640, {2: "?", 3: "?"})
    return folder


@pytest.fixture
def face(pack):
    return FaceIdentity.load(pack)


def portraits(count, *, seed=0, height=96, width=128):
    """``[1, 3, count, H, W]``: a bright textured square, somewhere else in every frame, on black."""
    generator = torch.Generator().manual_seed(seed)
    frames = torch.zeros(1, 3, count, height, width)
    for index in range(count):
        texture = torch.rand(1, 3, 6, 6, generator=generator) * 0.4 + 0.6
        top, left = torch.randint(0, 40, (2,), generator=generator).tolist()
        frames[0, :, index, top : top + 48, left : left + 48] = F.interpolate(texture, (48, 48), mode="bilinear")[0]
    return frames


@pytest.mark.parametrize("normalizes", [False, True])
def test_recognition_equals_onnxruntime_and_its_gradient_the_exported_module(tmp_path, normalizes):
    torch.manual_seed(1)
    module = IResNet(normalizes=normalizes)
    export(module, tmp_path / "net.onnx", 112, {0: "None"})
    network = FaceNetwork.load(tmp_path / "net.onnx")
    faces = torch.rand(3, 3, 112, 112, requires_grad=True)
    pixels = faces * 255 if normalizes else (faces * 255 - 127.5) / 127.5
    ours = network(faces)
    session = open_session(tmp_path / "net.onnx", "cpu")
    theirs = torch.from_numpy(session.run(None, {"input.1": pixels.detach().numpy()})[0])
    assert float((F.normalize(ours) - F.normalize(theirs)).abs().max()) <= 1e-5
    torch.testing.assert_close(ours.detach(), theirs, rtol=1e-5, atol=1e-4)
    weights = torch.randn_like(ours)
    (gradient,) = torch.autograd.grad((ours * weights).sum(), faces)
    (reference,) = torch.autograd.grad((module(pixels) * weights).sum(), faces)
    assert float((gradient - reference).norm() / reference.norm()) < 1e-4


class FixedLandmarks:
    """Finite differences would move the landmarks, whose gradient is left out on purpose."""

    def landmarks(self, picture):
        return torch.tensor(ARCFACE_TEMPLATE) / 4 + 2


def test_gradient_check(pack):
    face = FaceIdentity(FixedLandmarks(), FaceNetwork.load(pack / "glintr100.onnx").double())
    generator = torch.Generator().manual_seed(0)
    frames, reference = torch.rand(2, 2, 3, 2, 32, 36, dtype=torch.float64, generator=generator)
    scores = functools.partial(face.score, prompts=["", ""], reference=reference)
    assert torch.autograd.gradcheck(scores, frames.requires_grad_(), fast_mode=True, eps=1e-7)


def test_similarity_is_umeyamas():
    points = torch.tensor(ARCFACE_TEMPLATE) + torch.randn(5, 2, generator=torch.Generator().manual_seed(0)) * 9
    source, target = points.double().numpy(), np.array(ARCFACE_TEMPLATE)
    a, b = source - source.mean(0), target - target.mean(0)
    u, s, vt = np.linalg.svd(b.T @ a / 5)
    signs = np.array([1, np.sign(np.linalg.det(u @ vt))])
    linear = u @ np.diag(signs) @ vt * (s * signs).sum() / a.var(0).sum()
    shift = target.mean(0) - linear @ source.mean(0)
    matrix = similarity(points, torch.tensor(ARCFACE_TEMPLATE)).numpy()
    np.testing.assert_allclose(matrix, np.column_stack([linear, shift]), atol=1e-5)


@pytest.mark.parametrize("shift", [(0.0, 0.0), (-245.0, 160.0)])
def test_crop_equals_opencv(shift):
    cv2 = pytest.importorskip("cv2", reason="the face crop is NOT compared with OpenCV: install opencv-python-headless")
    generator = torch.Generator().manual_seed(0)
    picture = F.interpolate(torch.rand(1, 3, 60, 80, generator=generator), (480, 640), mode="bicubic")[0]
    picture = (picture.clamp(0, 1) * 255).round()
    points = torch.tensor([[250.0, 200.0], [330, 190], [300, 240], [262, 290], [330, 285]]) + torch.tensor(shift)
    matrix = similarity(points, torch.tensor(ARCFACE_TEMPLATE)).numpy()
    theirs = cv2.warpAffine(picture.permute(1, 2, 0).byte().numpy(), matrix, (112, 112), borderValue=0)
    ours = crop_face(picture, points).permute(1, 2, 0).numpy()
    assert theirs.std() > 20
    assert np.abs(ours - theirs).mean() <= 0.3


def test_suppression_equals_torchvision():
    nms = pytest.importorskip("torchvision", reason="suppression is NOT compared with torchvision").ops.nms
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(200, 2, generator=generator) * 80
    boxes = torch.cat([corners, corners + 5 + torch.rand(200, 2, generator=generator) * 40], 1)
    scores = torch.rand(200, generator=generator)
    assert suppress(boxes, scores, 0.4).tolist() == nms(boxes, scores, 0.4).tolist()
    assert suppress(boxes[:0], scores[:0], 0.4).tolist() == []


def intersection_over_union(a, b):
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    common = max(width, 0) * max(height, 0)
    return common / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common)


def test_detection_decodes_cell_by_cell(pack):
    """Against a slow reading of SCRFD's outputs: two anchors a cell, distances and landmarks in strides."""
    detector = FaceDetector(pack / "scrfd_10g_bnkps.onnx")
    picture = torch.zeros(3, 640, 640)
    picture[:, 160:288, 96:224], picture[:, 416:448, 448:480] = 0.95, 1.0  # a large face and a small one
    session = open_session(pack / "scrfd_10g_bnkps.onnx", "cpu")
    outputs = session.run(None, {"input.1": ((picture[None] * 255 - 127.5) / 128).numpy()})
    faces = []
    for level, stride in enumerate((8, 16, 32)):
        scores, boxes, points = outputs[level], outputs[level + 3], outputs[level + 6]
        for index in range(len(scores)):
            row, column = divmod(index // 2, 640 // stride)
            x, y = column * stride, row * stride
            left, top, right, bottom = boxes[index] * stride
            if scores[index, 0] >= 0.5:
                box = (x - left, y - top, x + right, y + bottom)
                faces.append((scores[index, 0], box, points[index].reshape(5, 2) * stride + (x, y)))
    kept = []
    for score, box, points in sorted(faces, key=lambda face: -face[0]):
        if all(intersection_over_union(box, other) <= 0.4 for _, other, _ in kept):
            kept.append((score, box, points))
    _, _, landmarks = max(kept, key=lambda face: (face[1][2] - face[1][0]) * (face[1][3] - face[1][1]))
    assert len(faces) > len(kept) > 1
    np.testing.assert_allclose(detector.landmarks(picture).numpy(), landmarks, atol=1e-3)
    assert detector.landmarks(torch.zeros(3, 64, 64)) is None


def test_landmarks_are_in_the_pixels_of_the_picture(pack):
    detector = FaceDetector(pack / "scrfd_10g_bnkps.onnx")
    picture = portraits(1)[0, :, 0]
    small, large = detector.landmarks(picture), detector.landmarks(F.interpolate(picture[None], scale_factor=4)[0])
    assert float((large / 4 - small).abs().max()) < 1.0
    bright = (picture.mean(0) > 0.3).nonzero().flip(1)
    assert (bright.amin(0) <= small.mean(0)).all()
    assert (small.mean(0) <= bright.amax(0)).all()


def test_whole_score_equals_insightfaces_way(pack, face):
    """OpenCV's crop, RGB, 127.5, onnxruntime, mean cosine of a pool."""
    cv2 = pytest.importorskip(
        "cv2", reason="the face score is NOT compared with OpenCV: install opencv-python-headless"
    )
    session = open_session(pack / "glintr100.onnx", "cpu")
    frames, reference = ((portraits(3, seed=seed) * 255).round() / 255 for seed in (0, 1))

    def embed(clip):
        rows = []
        for frame in clip[0].unbind(1):
            matrix = similarity(face.detector.landmarks(frame), torch.tensor(ARCFACE_TEMPLATE)).numpy()
            crop = cv2.warpAffine((frame * 255).round().byte().permute(1, 2, 0).numpy(), matrix, (112, 112))
            row = session.run(None, {"input.1": ((crop.astype(np.float32) - 127.5) / 127.5).transpose(2, 0, 1)[None]})
            rows.append(row[0][0] / np.linalg.norm(row[0][0]))
        return np.stack(rows)

    expected = (embed(frames) @ embed(reference).T).mean()
    assert float(face.score(frames, [""], reference=reference)[0]) == pytest.approx(expected, abs=2e-3)
    assert float(face.score(frames.flip(1), [""], reference=reference)[0]) != pytest.approx(expected, abs=2e-3)


def test_gradient_ascent_on_pixels_raises_the_score(face):
    frames, reference = portraits(2), portraits(1, seed=5)
    before = None
    for _ in range(8):
        frames = frames.detach().requires_grad_()
        score = face.score(frames, [""], reference=reference)
        before = score.item() if before is None else before
        (gradient,) = torch.autograd.grad(score.sum(), frames)
        assert (gradient.flatten(3).abs().sum((0, 1, 3)) > 0).all()  # every frame
        frames = (frames + 0.01 * gradient.sign()).clamp(0, 1)
    assert face.score(frames, [""], reference=reference).item() > before + 0.01
    assert isinstance(face, Reward)


def test_a_score_depends_on_its_own_clip_and_reference_alone(face):
    frames = torch.cat([portraits(3, seed=seed) for seed in range(3)])
    reference = torch.cat([portraits(2, seed=seed) for seed in range(7, 10)])
    together = face.score(frames, [""] * 3, reference=reference)
    alone = [face.score(frames[i : i + 1], [""], reference=reference[i : i + 1]) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-5)
    other = FaceIdentity(face.detector, face.network, chunk=2)
    torch.testing.assert_close(other.score(frames, [""] * 3, reference=reference), together, rtol=0, atol=1e-5)
    as_bytes = (frames * 255).round().byte()
    torch.testing.assert_close(
        face.score(as_bytes, [""] * 3, reference=reference),
        face.score(as_bytes.float() / 255, [""] * 3, reference=reference),
    )
    assert together.dtype == torch.float32
    one = face.score(frames, [""] * 3, reference=reference[:1])
    torch.testing.assert_close(one[0], together[0])
    assert len({round(float(score), 4) for score in together}) == 3


def test_frames_without_a_face_are_masked_and_counted(face):
    frames, reference = portraits(3), portraits(2, seed=1)
    alone = face.score(frames[:, :, :2], [""], reference=reference)
    frames[:, :, 2], more = 0, torch.cat([reference, torch.zeros_like(reference)], 2)
    torch.testing.assert_close(face.score(frames, [""], reference=more), alone, rtol=0, atol=1e-6)
    assert face.counts == (FaceCounts(frames=3, faces=2, reference_frames=4, reference_faces=2),)


def test_a_clip_without_any_face_scores_zero_and_says_so(face, caplog):
    frames = torch.cat([torch.zeros(1, 3, 2, 96, 128), portraits(2)]).requires_grad_()
    with caplog.at_level(logging.WARNING):
        scores = face.score(frames, [""] * 2, reference=portraits(1, seed=1))
    assert "sample 0: no face was found in the clip, so it scores 0 without a gradient" in caplog.text
    (gradient,) = torch.autograd.grad(scores.sum(), frames)
    assert scores[0] == 0
    assert not gradient[0].any()
    assert gradient[1].any()
    assert [count.faces for count in face.counts] == [0, 2]
    with caplog.at_level(logging.WARNING):
        assert face.score(frames, [""] * 2, reference=torch.zeros(1, 3, 1, 32, 32)).tolist() == [0, 0]
    assert "no face was found in its reference" in caplog.text


def test_a_reference_is_embedded_once_and_under_inference_mode_serves_training_later(face, monkeypatch):
    looked, landmarks = [], face.detector.landmarks
    monkeypatch.setattr(face.detector, "landmarks", lambda picture: looked.append(1) or landmarks(picture))
    frames, reference = portraits(1), portraits(3, seed=1)
    with torch.inference_mode():
        face.score(frames.clone(), [""], reference=reference.clone())
    frames.requires_grad_()
    face.score(frames, [""], reference=reference).sum().backward()
    assert frames.grad.any()
    assert len(looked) == 3 + 1 + 1


def test_a_reference_is_needed_and_must_fit(face):
    with pytest.raises(ValueError, match="needs a reference"):
        face.score(portraits(1), [""])
    with pytest.raises(ValueError, match=r"reference of 1 videos must be \[1 or 1, 3, T, H, W\], got \[2, 3"):
        face.score(portraits(1), [""], reference=torch.zeros(2, 3, 1, 32, 32))


@pytest.mark.parametrize("names", [("antelopev2",), ("antelopev2", "antelopev2"), ("buffalo_l",)])
def test_packs_of_insightface_are_found(pack, tmp_path, names):
    folder = tmp_path.joinpath(*names)
    folder.mkdir(parents=True)
    files = (
        ("det_10g.onnx", "w600k_r50.onnx") if names == ("buffalo_l",) else ("scrfd_10g_bnkps.onnx", "glintr100.onnx")
    )
    for source, target in zip(("scrfd_10g_bnkps.onnx", "glintr100.onnx"), files, strict=True):
        (folder / target).symlink_to(pack / source)
    for path in (tmp_path / names[0], tmp_path):
        assert load_reward("face", path).needs == {"reference"}


def test_the_published_zip_is_fetched_and_unpacked(pack, tmp_path):
    with zipfile.ZipFile(tmp_path / "antelopev2.zip", "w") as archive:
        for file in pack.iterdir():
            archive.write(file, f"antelopev2/{file.name}")
        archive.writestr("antelopev2/1k3d68.onnx", b"not needed")
        archive.writestr("../escape.onnx", b"bad")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        part = Pack("antelopev2", RemoteFile(f"http://127.0.0.1:{server.server_port}/antelopev2.zip"))
        folder = part.fetch(tmp_path / "models" / "antelopev2", None)
        server.shutdown()
    assert part.at(folder)
    assert sorted(file.name for file in folder.iterdir()) == ["glintr100.onnx", "scrfd_10g_bnkps.onnx"]


def test_missing_files_name_the_zip_and_its_licence(tmp_path):
    with pytest.raises(WeightFileError, match="antelopev2.zip.*non-commercial") as error:
        load_reward("face", tmp_path)
    assert LICENCE in str(error.value)


def test_wrong_files_get_a_sentence(pack, tmp_path):
    weights = (pack / "glintr100.onnx").read_bytes()
    (tmp_path / "cut.onnx").write_bytes(weights[: len(weights) // 2])
    (tmp_path / "text.onnx").write_text("<html>404</html>")
    with pytest.raises(WeightFileError, match="missing; download it again"):
        FaceNetwork.load(tmp_path / "none.onnx")
    for name in ("cut.onnx", "text.onnx"):
        with pytest.raises(WeightFileError, match="damaged or not an ONNX file|cannot be opened|lacks the data"):
            FaceNetwork.load(tmp_path / name)
        with pytest.raises(WeightFileError, match="cannot be opened by onnxruntime"):
            FaceDetector(tmp_path / name)
    with pytest.raises(WeightFileError, match="no face recognition network"):
        FaceNetwork.load(pack / "scrfd_10g_bnkps.onnx")
    with pytest.raises(WeightFileError, match="no SCRFD with landmarks: it has 1 outputs"):
        FaceDetector(pack / "glintr100.onnx")
    export(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softplus(), nn.Flatten()), tmp_path / "other.onnx", 112, {0: "None"})
    with pytest.raises(WeightFileError, match="operator Softplus, which no IResNet uses"):
        FaceNetwork.load(tmp_path / "other.onnx")
    export(nn.Sequential(nn.Conv2d(3, 4, 3), nn.PReLU(4)), tmp_path / "map.onnx", 112, {0: "None"})
    with pytest.raises(WeightFileError, match="gives other numbers"):
        FaceNetwork.load(tmp_path / "map.onnx")


def test_a_missing_extra_says_what_to_install(pack, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match=r"needs the Python package onnxruntime, .*pip install .*\[face\]"):
        load_reward("face", pack)
