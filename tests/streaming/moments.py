"""The moments of a layer's inputs, by hooks of torch alone."""

from __future__ import annotations

import torch
from torch.overrides import TorchFunctionMode

from hf_sparsity.model.inference import experts_implementation


class Oracle(TorchFunctionMode):
    """Second moments of the inputs of every product with a 2-D or 3-D parameter, in one plain forward.

    Written apart from the tap: it recomputes products in [tokens, in] form to learn which side is the input.
    """

    def __init__(self, model):
        super().__init__()
        self.parameters = {p.untyped_storage().data_ptr(): (n, p) for n, p in model.named_parameters() if p.ndim >= 2}
        self.moments: dict[tuple[str, int | None], torch.Tensor] = {}
        self.tokens: dict[tuple[str, int | None], int] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in ("linear", "matmul", "__matmul__", "mm", "bmm", "addmm", "baddbmm"):
            if "batch1" in (kwargs or {}):
                args = (*args, kwargs["batch1"], kwargs["batch2"])
            a, b = args[1:3] if "add" in name else args[:2]
            if name == "linear":
                b = b.mT
            for x, w, contracted in ((a, b, -2), (b.mT if b.ndim > 1 else b, a.mT if a.ndim > 1 else a, -2)):
                hit = self.parameters.get(w.untyped_storage().data_ptr()) if w.ndim >= 2 else None
                if hit is None:
                    continue
                key, parameter = hit
                if w.ndim == 3 and parameter.ndim == 3:
                    for e in range(w.shape[0]):
                        self._add((key, e), x[e])
                else:
                    expert = (w.storage_offset() // parameter.stride(0)) if parameter.ndim == 3 else None
                    self._add((key, expert), x)
                assert w.shape[contracted] == x.shape[-1]
                break
        return out

    def _add(self, key, x):
        x = x.detach().reshape(-1, x.shape[-1]).double()
        self.moments[key] = self.moments.get(key, 0) + x.T @ x
        self.tokens[key] = self.tokens.get(key, 0) + x.shape[0]


def plain_moments(model, batches):
    experts = experts_implementation(model)
    model.set_experts_implementation("eager")
    oracle = Oracle(model)
    with torch.no_grad():
        for batch in batches:
            with oracle:
                model(**batch, **({"use_cache": False} if "vit" not in model.config.model_type else {}))
    model.set_experts_implementation(experts)
    return oracle
