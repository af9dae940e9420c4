"""LoRA files on the command line: inspected, converted, merged, resized, and fetched from the catalogue."""

from __future__ import annotations

import http.server
import threading

import pytest
import torch
from reward_lora import cli
from reward_lora.cli.lora_names import resolve
from reward_lora.cli.shared import parse_lora
from reward_lora.lora.catalog import CATALOG
from reward_lora.lora.files import LoraModule, read_lora, write_lora
from reward_lora.lora.merge import merge, resize
from safetensors.torch import load_file, save_file

from .conftest import FIXTURES

PUBLISHED = FIXTURES / "wan_t2v" / "lora_videox_fun.safetensors"


def run(capsys, *arguments):
    status = cli.main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def deltas(path):
    """What a LoRA adds to each weight, by the publisher's name."""
    (matched,), names = resolve([read_lora(path)])
    assert matched.unmatched == ()
    return {names[ours]: module.delta() for ours, module in matched.modules.items()}


def test_inspect_tells_format_base_and_sizes(capsys):
    status, out, _ = run(capsys, "inspect", PUBLISHED)
    assert status == 0
    for text in ("format: VideoX-Fun", "base model: Wan", "modules named as in Wan", "modules: 26", "ranks: 4",
                 "alphas: 2", "alpha / rank: 0.5", "stored as: float32"):  # fmt: skip
        assert text in out
    status, out, _ = run(capsys, "inspect", "assets/tiny_reward_lora.safetensors", "--model", "builtin")
    assert "modules matched" in out
    assert "reward: tiny_clip" in out


@pytest.fixture(autouse=True)
def at_home(monkeypatch):
    monkeypatch.chdir(FIXTURES.parent.parent)


def test_convert_there_and_back_loses_nothing(capsys, tmp_path):
    before, file = deltas(PUBLISHED), PUBLISHED
    for turn, layout in enumerate(("diffusers", "dotted", "videox-fun", "diffusers", "videox-fun")):
        target = tmp_path / f"{turn}.safetensors"
        status, out, err = run(capsys, "convert", file, target, "--to", layout)
        assert status == 0, err
        assert "26 modules" in out
        assert "without any rounding" in out
        file = target
        after = deltas(file)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert load_file(file).keys() == load_file(PUBLISHED).keys()


def test_convert_says_what_rounding_costs(capsys, tmp_path):
    tensors = {k: v + 1 if k.endswith("alpha") else v for k, v in load_file(PUBLISHED).items()}  # 3 / 4
    save_file(tensors, tmp_path / "a.safetensors")
    _, out, _ = run(capsys, "convert", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--dtype", "bfloat16")
    assert "rounded by at most" in out
    before, after = deltas(tmp_path / "a.safetensors"), deltas(tmp_path / "b.safetensors")
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=0.02 * float(before[name].abs().max()))


PAIRS = {  # the publisher's names of one module each kind, and diffusers'
    "cogvideox": ("lora_unet__transformer_blocks_3_attn1_to_out_0", "transformer_blocks.3.attn1.to_out.0"),
    "cogvideox 1.5": ("lora_unet__patch_embed_proj", "patch_embed.proj"),
    "easyanimate": ("lora_unet__transformer_blocks_1_attn2_to_out_0", "transformer_blocks.1.attn1.to_add_out"),
}


@pytest.mark.parametrize("kind", PAIRS)
def test_convert_names_other_families(capsys, tmp_path, kind):
    spelled, ours = PAIRS[kind]
    names = [spelled, "lora_unet__transformer_blocks_1_attn1_to_q"]
    tensors = {f"{n}.{part}.weight": torch.ones(4, 4) for n in names for part in ("lora_down", "lora_up")}
    save_file(tensors, tmp_path / "a.safetensors")
    status, out, err = run(
        capsys, "convert", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--to", "diffusers"
    )
    assert status == 0, err
    assert f"transformer.{ours}.lora_A.weight" in sorted(load_file(tmp_path / "b.safetensors"))
    assert "2 modules" in out


def test_convert_of_an_unknown_kind_asks_for_the_model(capsys, tmp_path):
    save_file({f"x.y.lora_{p}.weight": torch.ones(4, 4) for p in "AB"}, tmp_path / "a.safetensors")
    status, _, err = run(capsys, "convert", tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert status == 2
    assert "give --model its folder" in err


def test_convert_of_vaders_pickle_needs_no_table(capsys, tmp_path):
    prefix, module = "base_model.model.model.diffusion_model.", "input_blocks.1.2.transformer_blocks.0.attn1.to_q"
    torch.save({f"{prefix}{module}.lora_{p}.weight": torch.ones(4, 4) for p in "AB"}, tmp_path / "a.pt")
    status, out, err = run(capsys, "convert", tmp_path / "a.pt", tmp_path / "b.safetensors")
    assert status == 0, err
    tensors = load_file(tmp_path / "b.safetensors")
    assert float(tensors[f"diffusion_model.{module}.lora_A.weight"].max()) == 2.0  # alpha 8 at rank 4, folded


def test_convert_names_layers_of_other_kinds(capsys, tmp_path):
    blocks = "diffusion_model.blocks.0"
    tensors = {f"{blocks}.self_attn.q.diff_b": torch.ones(24), f"{blocks}.norm3.diff": torch.ones(24)}
    save_file(tensors, tmp_path / "a.safetensors")
    status, _, err = run(capsys, "convert", tmp_path / "a.safetensors", tmp_path / "b.safetensors", "--to", "diffusers")
    assert status == 0, err
    written = set(load_file(tmp_path / "b.safetensors"))
    assert written == {"transformer.blocks.0.attn1.to_q.diff_b", "transformer.blocks.0.norm2.diff"}


def random_lora(seed, rank, alpha, sizes=((6, 5), (4, 4))):
    g = torch.Generator().manual_seed(seed)
    return {
        f"m{i}": LoraModule(torch.randn(rank, n, generator=g), torch.randn(m, rank, generator=g), alpha)
        for i, (m, n) in enumerate(sizes)
    }


def test_merging_adds_the_changes():
    first, second = random_lora(0, 2, 1.0), random_lora(1, 3, 3.0, sizes=((6, 5),))
    merged = merge([(first, 0.7), (second, -0.5)])
    assert merged["m0"].rank == 5
    expected = 0.7 * first["m0"].delta() - 0.5 * second["m0"].delta()
    torch.testing.assert_close(merged["m0"].delta(), expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(merged["m1"].delta(), 0.7 * first["m1"].delta(), rtol=0, atol=2e-6)


def test_resizing_keeps_the_largest_part_and_says_how_much():
    lora = random_lora(0, 4, 2.0)
    same, kept = resize(lora, 4)
    assert kept == pytest.approx(1)
    smaller, kept = resize(lora, 2)
    values = {name: torch.linalg.svdvals(module.delta().double()).square() for name, module in lora.items()}
    expected = sum(float(v[:2].sum()) for v in values.values()) / sum(float(v.sum()) for v in values.values())
    assert kept == pytest.approx(expected, rel=1e-5)
    for name, module in lora.items():
        assert smaller[name].rank == 2
        torch.testing.assert_close(same[name].delta(), module.delta())
        lost = (smaller[name].delta() - module.delta()).double().square().sum()
        assert float(lost) == pytest.approx(float(values[name][2:].sum()), rel=1e-4)
    redundant, kept = resize(merge([(lora, 1.0), (lora, 1.0)]), 4)
    assert kept == pytest.approx(1)
    torch.testing.assert_close(redundant["m0"].delta(), 2 * lora["m0"].delta(), rtol=0, atol=1e-5)


def test_merge_command(capsys, tmp_path):
    first = write_lora(tmp_path / "a.safetensors", {"blocks.0.attn1.to_q": random_lora(0, 2, 2.0)["m1"]},
                       {"blocks.0.attn1.to_q": "blocks.0.self_attn.q"}, {"base_model": "B"})  # fmt: skip
    second = write_lora(tmp_path / "b.safetensors", {"blocks.0.attn1.to_q": random_lora(1, 2, 2.0)["m1"]},
                        {"blocks.0.attn1.to_q": "blocks.0.self_attn.q"}, {"base_model": "B"},
                        layout="videox-fun")  # fmt: skip
    out = tmp_path / "out.safetensors"
    status, text, err = run(capsys, "merge", f"{first}:0.5", f"{second}:-1", "--output", out)
    assert status == 0, err
    merged = read_lora(out)
    assert merged.ranks == [4]
    assert merged.metadata["base_model"] == "B"
    assert "a.safetensors at 0.5, b.safetensors at -1" in merged.metadata["merged_from"]
    expected = 0.5 * deltas(first)["blocks.0.self_attn.q"] - deltas(second)["blocks.0.self_attn.q"]
    torch.testing.assert_close(deltas(out)["blocks.0.self_attn.q"], expected, rtol=0, atol=1e-6)
    status, text, _ = run(capsys, "merge", f"{first}", f"{second}", "--output", out, "--rank", "3")
    assert status == 0
    assert "rank 3 keeps 9" in text
    assert read_lora(out).ranks == [3]


@pytest.mark.parametrize(
    ("second", "sizes", "metadata", "message"),
    [
        (
            "b_low_noise",
            ((4, 4),),
            {},
            "a_high_noise.safetensors is for the expert high and b_low_noise.safetensors for",
        ),
        ("b", ((6, 6),), {}, "blocks.0.attn1.to_q is 4x4 in a_high_noise.safetensors and 6x6 in b.safetensors"),
        ("b", ((4, 4),), {"expert": "low"}, "merge the LoRAs of each expert by themselves"),
    ],
)
def test_what_cannot_be_merged_is_said(capsys, tmp_path, second, sizes, metadata, message):
    query = {"blocks.0.attn1.to_q": "blocks.0.self_attn.q"}
    paths = []
    for name, shapes, told in (("a_high_noise", ((4, 4),), {}), (second, sizes, metadata)):
        paths.append(tmp_path / f"{name}.safetensors")
        write_lora(paths[-1], {"blocks.0.attn1.to_q": random_lora(0, 2, 2.0, sizes=shapes)["m0"]}, query, told)
    status, _, err = run(capsys, "merge", *paths, "--output", tmp_path / "out.safetensors")
    assert (status, message in err) == (2, True), err
    assert not (tmp_path / "out.safetensors").exists()


def test_merging_takes_one_kind_of_model_and_needs_a_weight(capsys, tmp_path):
    write_lora(tmp_path / "cog.safetensors", random_lora(0, 2, 2.0, sizes=((4, 4),)),
               {"m0": "transformer_blocks.0.attn1.to_q"}, {})  # fmt: skip
    for uses, message in (
        ((PUBLISHED, tmp_path / "cog.safetensors"), "is for Wan and cog.safetensors for CogVideoX"),
        ((f"{PUBLISHED}:0",), "nothing is left to merge"),
        ((f"{PUBLISHED}:1@low_noise",), "say where with @ when it is used"),
    ):
        status, _, err = run(capsys, "merge", *uses, "--output", tmp_path / "out.safetensors")
        assert (status, message in err) == (2, True), err


def test_a_lora_on_the_command_line_may_say_where_it_acts(tmp_path):
    path = tmp_path / "a.safetensors"
    write_lora(path, random_lora(0, 2, 2.0), {"m0": "m0", "m1": "m1"}, {})
    use = parse_lora(f"{path}:0.7@low_noise,0.5-1")
    assert (use.strength, use.expert, use.start, use.end) == (0.7, "low_noise", 0.5, 1.0)
    assert parse_lora(f"{path}@0-0.25").end == 0.25
    assert parse_lora(str(path)).strength == 1.0
    for text, message in (
        (f"{path}@0.5-0.2", "0 <= start < end <= 1"),
        ("none.safetensors:0.5", "none.safetensors is missing"),
        (f"{path}:strong", "takes PATH or PATH:STRENGTH"),
        ("", "got nothing"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_lora(text)


# The catalogue


def test_the_catalogue_is_the_published_table():
    assert len(CATALOG) == 14
    wan = CATALOG["Wan2.1-Fun-1.3B-InP-HPS2.1"]
    assert (wan.rank, wan.alpha, wan.batch_size, wan.steps, wan.strength) == (128, 64, 8, 5000, 0.5)
    assert wan.address == "hf:alibaba-pai/Wan2.1-Fun-Reward-LoRAs/Wan2.1-Fun-1.3B-InP-HPS2.1.safetensors"
    assert CATALOG["CogVideoX-Fun-V1.1-2b-InP-MPS"].steps == 16_000
    vader = CATALOG["vader_videocrafter_hps_aesthetic"]
    assert vader.address == "hf:zheyangqin/VADER_VideoCrafter_HPS_Aesthetic/vader_videocrafter_hps_aesthetic.pt"
    assert {entry.licence for entry in CATALOG.values()} == {"Apache-2.0", "MIT"}


def test_catalog_lists_and_knows_the_nearest_name(capsys):
    _, out, _ = run(capsys, "catalog")
    assert all(name in out for name in CATALOG)
    assert "shown at strength 0.7" in out
    status, _, err = run(capsys, "catalog", "fetch", "wan-1.3b-hps")
    assert status == 2
    assert "the nearest are" in err
    assert "Wan2.1-Fun-1.3B-InP-HPS2.1" in err


@pytest.fixture
def hub(monkeypatch):
    """A hub that has one file."""
    content, asked = PUBLISHED.read_bytes(), []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    yield asked
    server.shutdown()
    server.server_close()


def test_catalog_fetches_into_a_folder(capsys, tmp_path, hub):
    name = "Wan2.1-Fun-14B-InP-MPS"
    status, out, err = run(capsys, "catalog", "fetch", name, "--folder", tmp_path)
    assert status == 0, err
    assert hub == [f"/alibaba-pai/Wan2.1-Fun-Reward-LoRAs/resolve/main/{name}.safetensors"]
    assert (tmp_path / f"{name}.safetensors").read_bytes() == PUBLISHED.read_bytes()
    assert "MPS for alibaba-pai/Wan2.1-Fun-14B-InP" in out
    run(capsys, "catalog", "fetch", f"{name}.safetensors", "--folder", tmp_path)
    assert len(hub) == 1, "it was there already"


def test_sweep_command(capsys, tmp_path):
    arguments = ("assets/tiny_reward_lora.safetensors", "--output-dir", tmp_path, "--strengths", "0.5", "1")
    settings = ("--max-prompts", "3", "--steps", "2", "--batch-size", "3", "--shown", "2")
    status, out, err = run(capsys, "sweep", *arguments, *settings)
    assert status == 0, err
    lines = (tmp_path / "sweep.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["strength", "0", "0.5", "1"]
    assert (tmp_path / "sweep.png").stat().st_size > 1000
    assert (tmp_path / "videos.png").stat().st_size > 1000
    assert "modules matched" in out
    assert "Use strength" in out or "Use no LoRA" in out
    status, _, err = run(capsys, "sweep", *arguments, "--prompt", "one")
    assert status == 2
    assert "at least two videos" in err
