"""Natural cubic splines, as linear maps."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from irlvla.types import HORIZON


def natural_spline(knots: int, times: Float[Tensor, " T"]) -> tuple[Float[Tensor, "T knots"], Float[Tensor, "T knots"]]:
    """The linear maps from knots, evenly spaced over 4 s after the origin at t = 0, to positions and velocities at some times [s].

    A spline is linear in its knots: between two of them it follows from their places and from the second derivatives there, which
    solve a tridiagonal system and, as it is natural, are zero at both ends.
    """
    places = torch.eye(knots + 1, dtype=torch.float64)
    ones = torch.ones(knots - 2, dtype=torch.float64)
    system = 4.0 * torch.eye(knots - 1, dtype=torch.float64) + torch.diag(ones, 1) + torch.diag(ones, -1)
    bends = torch.nn.functional.pad(torch.linalg.solve(system, 6.0 * places.diff(n=2, dim=0)), (0, 0, 1, 1))
    along = times.double() * (knots / HORIZON)
    i = along.long().clamp(max=knots - 1)
    b = (along - i)[:, None]
    a = 1.0 - b
    position = a * places[i] + b * places[i + 1] + (a**3 - a) / 6.0 * bends[i] + (b**3 - b) / 6.0 * bends[i + 1]
    velocity = places[i + 1] - places[i] - (3.0 * a**2 - 1.0) / 6.0 * bends[i] + (3.0 * b**2 - 1.0) / 6.0 * bends[i + 1]
    return position[:, 1:], velocity[:, 1:] * (knots / HORIZON)  # the first knot is the origin
