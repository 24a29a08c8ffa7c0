"""Muon (Jordan et al., 2024): momentum whose steps are made orthogonal, for the matrices inside the blocks."""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import nn


def orthogonalise(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Bring every singular value of `[batch, rows, columns]` close to one, by Newton-Schulz steps in bf16."""
    x = matrices.bfloat16()
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if wide else x.mT


class Muon(torch.optim.Optimizer):
    """Muon with decoupled weight decay; matrices of one shape take their step together.

    Steps are scaled to the size that AdamW's have, so that learning rates and decays of AdamW's order fit.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        """Take matrices only."""
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # noqa: ARG002
        """Take one step."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                shapes[parameter.shape].append(parameter)
            for shape, parameters in shapes.items():
                self._step_together(parameters, 0.2 * max(shape) ** 0.5, group)

    def _step_together(self, parameters: list[nn.Parameter], scale: float, group: dict[str, float]) -> None:
        gradients = [parameter.grad for parameter in parameters]
        state = self.state[parameters[0]]
        if "momentum" not in state:
            state["momentum"] = [torch.zeros_like(gradient) for gradient in gradients]
        torch._foreach_lerp_(state["momentum"], gradients, 1 - group["momentum"])
        nesterov = torch._foreach_lerp(gradients, state["momentum"], group["momentum"])  # noqa: SLF001
        updates = orthogonalise(torch.stack(nesterov)).to(parameters[0].dtype)
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, list(updates.unbind()), alpha=-group["lr"] * scale)
