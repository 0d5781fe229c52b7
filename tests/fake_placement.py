"""Models spread over two GPUs that need not exist."""

from __future__ import annotations

from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn


class Placed(AlignDevicesHook):
    """Hook of `device_map`, for a module whose weights are on their device; the original compares data pointers."""

    def init_hook(self, module: nn.Module) -> nn.Module:
        return module


def spread(model: nn.Module) -> nn.Module:
    """Put the second half of the layers on a second GPU, as `device_map` does."""
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    stacks = [name for name in lists if not any(name.startswith(f"{outer}.") for outer in lists)]
    inside = {
        f"{name}.{index}": f"cuda:{index * 2 // len(model.get_submodule(name))}"
        for name in stacks
        for index in range(len(model.get_submodule(name)))
    }
    device_map: dict[str, str] = {}

    def place(name: str, module: nn.Module) -> None:
        if name in inside:
            device_map[name] = inside[name]
        elif not any(each.startswith(f"{name}." if name else "") for each in inside):
            device_map[name] = "cuda:0"
        else:
            for child, each in module.named_children():
                place(f"{name}.{child}".strip("."), each)

    place("", model)
    for name, device in device_map.items():
        add_hook_to_module(model.get_submodule(name).to(device), Placed(execution_device=device))
    return add_hook_to_module(model, Placed(execution_device="cuda:0", io_same_device=True))
