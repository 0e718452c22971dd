"""Muon: momentum, then the nearest orthogonal matrix instead of the gradient; for the matrices inside blocks.

Adapted from Keller Jordan's reference (https://kellerjordan.github.io/posts/muon/). It differs from
`torch.optim.Muon` in two ways that matter on a CPU: float32 where bfloat16 is slow, and matrices of one shape are
orthogonalised together.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch


def orthogonalize(matrices: torch.Tensor, num_steps: int = 5, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Push all singular values of each matrix towards 1 (Newton-Schulz iteration, quintic).

    Args:
        matrices: `(num_matrices, rows, columns)`, float32.
        num_steps: iterations; 5 bring the singular values to about 0.7-1.2.
        dtype: in which to iterate.

    Returns:
        The same shape.
    """
    tall = matrices.shape[-2] > matrices.shape[-1]
    result = matrices.mT if tall else matrices
    result = (result / (result.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(dtype)
    for _ in range(num_steps):
        gram = result @ result.mT
        result = 3.4445 * result + (-4.7750 * gram + 2.0315 * gram @ gram) @ result
    return (result.mT if tall else result).float()


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum for 2-D parameters.

    Args:
        params: matrices only.
        lr: step size per unit of spectral norm, scaled by sqrt(rows / columns) of tall matrices.
        momentum: of the gradients' running mean.
        weight_decay: decoupled, times `lr`.
        dtype: in which updates are orthogonalised.
    """

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.nn.Parameter]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for shape, parameters in by_shape.items():
                momenta = torch.stack([self._momentum(parameter, group) for parameter in parameters])
                updates = orthogonalize(momenta, dtype=self.dtype)
                scale = max(1.0, shape[0] / shape[1]) ** 0.5
                for parameter, update in zip(parameters, updates, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update, alpha=-group["lr"] * scale)

    def _momentum(self, parameter: torch.nn.Parameter, group: dict) -> torch.Tensor:
        state = self.state[parameter]
        buffer = state.setdefault("momentum", torch.zeros_like(parameter))
        buffer.lerp_(parameter.grad, 1 - group["momentum"])
        return parameter.grad.lerp(buffer, group["momentum"])
