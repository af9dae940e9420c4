"""The layers of a real network that a LoRA may change, adapters looked through."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from torch import nn

ALL_LINEAR = "all-linear"


def base_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer, convolution and norm by its real name; an injected adapter is looked through."""
    from peft.tuners.lora import LoraLayer

    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, LoraLayer))
    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            module = module.get_base_layer()
        elif inside and name.startswith(inside):
            continue
        if getattr(module, "weight", None) is not None and not isinstance(module, nn.Embedding):
            layers[name] = module
    return layers


def _linears(model: nn.Module) -> dict[str, nn.Linear]:
    return {name: layer for name, layer in base_layers(model).items() if isinstance(layer, nn.Linear)}


def linear_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """``(out, in)`` of every linear layer a LoRA may adapt, by name."""
    return {name: (linear.out_features, linear.in_features) for name, linear in _linears(model).items()}


def layer_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The weight's shape of every layer, by name; of a linear one ``(out, in)`` however its weight is stored."""
    shapes = {name: tuple(layer.weight.shape) for name, layer in base_layers(model).items()}
    return shapes | linear_shapes(model)


def layer_names(model: nn.Module, linear_names: Mapping[str, str]) -> dict[str, str]:
    """The publisher's name of every layer whose name is sure, by our name.

    Args:
        model: The network.
        linear_names: The publisher's name of the linear layers, by our name. A layer of another kind keeps its
            own last name, in the place to which all of several linear neighbours were renamed; at the top it keeps
            its name.
    """
    places = defaultdict(list)
    for ours, original in linear_names.items():
        places[ours.rpartition(".")[0]].append(original.rpartition(".")[0])
    names = dict(linear_names)
    taken = set(names.values())
    for ours in base_layers(model):
        place, dot, last = ours.rpartition(".")
        known = places[place] if dot else []
        original = ours if not dot else f"{known[0]}.{last}" if len(known) > 1 == len(set(known)) else None
        if original is not None and ours not in names and original not in taken:
            names[ours] = original
    return names


def select_modules(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """Names of the linear layers that ``targets`` speak of.

    Args:
        model: Any network.
        targets: A target matches a module of that name or whose name ends in ``.<target>``;
            ``all-linear`` matches every linear layer.

    Raises:
        ValueError: A target that matches nothing.
    """
    names = list(_linears(model))
    if ALL_LINEAR in targets:
        return names
    chosen = {name for name in names for t in targets if name == t or name.endswith(f".{t}")}
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            ends = sorted({name.rpartition(".")[2] for name in names})
            raise ValueError(f"no linear layer of this model is called {target!r}; names end in {', '.join(ends)}")
    return [name for name in names if name in chosen]
