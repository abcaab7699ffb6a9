"""What a model looks like from outside, and the same model offloaded."""

from __future__ import annotations

import torch
from accelerate import cpu_offload, disk_offload, dispatch_model


def offloaded(model, where, folder):
    """The model with weights in a CPU map, on disk, or of one whole block and half of another on disk."""
    if where == "cpu":
        return cpu_offload(model, execution_device=torch.device("cpu"))
    if where == "disk":
        disk_offload(model, str(folder), execution_device=torch.device("cpu"))
        return model
    stack = next(n for n, m in model.named_modules() if isinstance(m, torch.nn.ModuleList))
    half = next(n for n, _ in model.get_submodule(f"{stack}.2").named_children() if n in ("mlp", "fc1"))
    disk = {f"{stack}.1", f"{stack}.2.{half}"}
    rest = [n for n, m in model.named_modules() if m._parameters and not any(n.startswith(d) for d in disk)]
    device_map = dict.fromkeys(rest, "cpu") | dict.fromkeys(disk, "disk")
    return dispatch_model(model, device_map, main_device="cpu", offload_dir=str(folder), force_hooks=True)


def surroundings(model):
    flags = {n: (p.requires_grad, p.grad is None) for n, p in model.named_parameters()}
    modules = {n: (m.training, m.__dict__.get("forward")) for n, m in model.named_modules()}
    return flags, modules
