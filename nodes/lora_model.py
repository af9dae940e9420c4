"""Apply Reward LoRA to MODEL: for workflows with ComfyUI's own loaders and samplers."""

from __future__ import annotations

import comfy.lora
from comfy_api.latest import io
from torch import Tensor, nn

from ..lora.adapter import check_strength
from ..lora.files import LoraFile, MatchedLora, match
from ..lora.network import layer_shapes
from ..video_models.wan_keys import convert_transformer
from .bridge import engine, say
from .lora import chosen, connected_input, file_fingerprint, file_input, strength_input


class ApplyRewardLoraToModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="RewardLoraApplyRewardLoraToModel",
            display_name="Apply Reward LoRA to MODEL",
            category="Reward LoRA/lora",
            description="Uses a LoRA of any format with a model of ComfyUI's own loaders, such as Load Diffusion "
            "Model, and reports what matched. For the two models of Wan2.2 take one of these nodes each.",
            inputs=[
                io.Model.Input("model", tooltip="From Load Diffusion Model, Load Checkpoint or another LoRA."),
                file_input(),
                strength_input(),
                connected_input(),
            ],
            outputs=[
                io.Model.Output("model_with_lora", display_name="model", tooltip="The model with the LoRA."),
                io.String.Output("report", display_name="report", tooltip="What matched and what was left out."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, lora_file: str, **_others) -> str:
        return file_fingerprint(lora_file)

    @classmethod
    def execute(cls, model, lora_file: str, strength: float, lora: LoraFile | None = None) -> io.NodeOutput:
        with engine():
            check_strength(strength)
            file = chosen(lora_file, lora)
            network = model.model.diffusion_model
            matched = match(file, other_names(network), layer_shapes(network))
            patched = model.clone()
            known = comfy.lora.model_lora_keys_unet(patched.model, {})
            taken = patched.add_patches(comfy.lora.load_lora(native_weights(matched), known), strength)
            lost = parameters(matched) - len(taken)
        lines = [*file.notes, f"{matched.report()}, strength {strength:g}"]
        if lost:
            lines.append(f"{lost} weights were not taken by ComfyUI; see its log")
        report = "\n".join(lines)
        say(report, cls.hidden.unique_id)
        return io.NodeOutput(patched if strength else model, report, ui={"text": [report]})


def other_names(network: nn.Module) -> dict[str, str]:
    """The name diffusers gives each layer of a native network, by its native name; where they agree, the same."""
    names = {name: name for name in layer_shapes(network)}
    if "blocks.0.self_attn.q" in names:  # a Wan
        names = {native: other for other, native in convert_transformer(names).items()}
    return names


def native_weights(lora: MatchedLora) -> dict[str, Tensor]:
    """A LoRA in ComfyUI's own spelling."""
    weights: dict[str, Tensor | None] = {}
    for name, module in lora.modules.items():
        key = f"diffusion_model.{name}"
        weights |= {f"{key}.lora_down.weight": module.down, f"{key}.lora_up.weight": module.up}
        weights[f"{key}.alpha"] = module.up.new_tensor(module.alpha).float()
    for name, offset in lora.offsets.items():
        weights |= {f"diffusion_model.{name}.diff": offset.weight, f"diffusion_model.{name}.diff_b": offset.bias}
    return {key: value for key, value in weights.items() if value is not None}


def parameters(lora: MatchedLora) -> int:
    """How many weights and biases of a network a LoRA changes."""
    weights = lora.modules.keys() | {name for name, offset in lora.offsets.items() if offset.weight is not None}
    return len(weights) + sum(offset.bias is not None for offset in lora.offsets.values())
