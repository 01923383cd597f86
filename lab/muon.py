"""Muon, for the toy's base model: momentum whose every step is made orthogonal, so that all directions
of a matrix learn equally fast (Jordan et al., 2024).

torch.optim.Muon does the same in bf16, which most CPUs only emulate.
"""

import torch


class Muon(torch.optim.Optimizer):
    """For matrices. Those of one shape are made orthogonal together, which is faster."""

    def __init__(self, matrices, lr, momentum=0.95):
        by_shape = {}
        for matrix in matrices:
            by_shape.setdefault(matrix.shape, []).append(matrix)
        super().__init__([{"params": group} for group in by_shape.values()],
                         {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            matrices, momentum = group["params"], group["momentum"]
            gradient = torch.stack([matrix.grad for matrix in matrices])    # (K, rows, columns)
            if "average" not in group:
                group["average"] = torch.zeros_like(gradient)
            group["average"].lerp_(gradient, 1 - momentum)
            update = orthogonal(gradient.lerp(group["average"], momentum))  # Nesterov's look ahead
            rows, columns = matrices[0].shape
            size = group["lr"] * max(1, rows / columns) ** 0.5
            for matrix, change in zip(matrices, update):
                matrix.sub_(size * change)


def orthogonal(x, iterations=4):
    """K matrices (K, rows, columns) with their singular values brought near 1, by Newton-Schulz."""
    if x.shape[1] > x.shape[2]:
        return orthogonal(x.mT, iterations).mT      # the products below are smaller this way round
    x = x / x.norm(dim=(1, 2), keepdim=True)
    for _ in range(iterations):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x
