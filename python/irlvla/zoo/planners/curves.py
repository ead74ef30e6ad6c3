"""Drives as curves: coordinates in which they are smooth and of order 1, and headings that follow from where the car goes."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

FAN = 64  #: arcs that stand in for drives that nobody recorded: they keep the coordinates sensible where there are few
FINEST = 0.05  #: metres: the least deviation that a coordinate is taken to have; below lies what a tracker does not follow
CREEP = 1.0  #: m/s: well below it a car keeps its heading, well above it heads where it goes


def fan(count: int, poses: int, interval: float) -> Float[Tensor, "count T 2"]:
    """Arcs from the origin, evenly spread over what cars do in a city: speeds to 20 m/s, accelerations from -3 to 2 m/s^2 and
    lateral ones to 3 m/s^2. The same count gives the same arcs (Roberts' R3 sequence)."""
    ratio = 1.2207440846057596  # the root of x^4 = x + 1
    index = torch.arange(1, count + 1, dtype=torch.float64)[:, None]
    place = (0.5 + index * ratio ** -torch.arange(1.0, 4.0, dtype=torch.float64)) % 1.0
    times = torch.arange(1, poses + 1, dtype=torch.float64) * interval
    speed, acceleration = 20.0 * place[:, :1], 5.0 * place[:, 1:2] - 3.0
    seconds = torch.where(acceleration < 0.0, torch.minimum(times, speed / -acceleration), times)  # until it stands
    along = speed * seconds + acceleration / 2.0 * seconds**2
    fastest = torch.maximum(speed, speed + acceleration * times[-1])
    bend = (2.0 * place[:, 2:] - 1.0) * (3.0 / fastest**2).clamp(max=0.15)
    turn = along * bend
    x, y = along * torch.sinc(turn / torch.pi), along * torch.sin(turn / 2.0) * torch.sinc(turn / (2.0 * torch.pi))
    return torch.stack([x, y], -1).float()


class Curves(nn.Module):
    """Positions of a drive as coordinates, and as poses.

    The coordinates are the principal components of human drives (as in MotionDiffuser, CVPR 2023), x and y each by themselves and
    left as good as right; as many as there are poses, so that any drive has its own. One is 1 where a drive deviates by twice
    what is usual for it. White noise in them is a drive that is faster, slower or to a side, and hardly rougher:
    on poses it would be an acceleration of sqrt(6) sigma / interval^2.

    Headings are the directions of the spline through the positions, so they always fit the motion.
    """

    mean: Tensor
    modes: Tensor
    inverse: Tensor
    velocities: Tensor

    def __init__(self, poses: int, interval: float) -> None:
        super().__init__()
        self.count, self.interval = poses, interval
        self.register_buffer("mean", torch.zeros(poses, 2))
        self.register_buffer("modes", torch.zeros(2, poses, poses))  # metres per coordinate: axis, pose, coordinate
        self.register_buffer("inverse", torch.zeros(2, poses, poses))
        velocities = torch.stack([_velocities(poses, interval, free_start) for free_start in (True, False)])
        self.register_buffer("velocities", velocities.float(), persistent=False)
        self.fit(torch.zeros(0, poses, 2))

    def fit(self, drives: Float[Tensor, "N T 2"]) -> None:
        """Take the coordinates from human drives."""
        seen = torch.cat([drives.cpu().double(), fan(FAN, self.count, self.interval).double()])
        mean = seen.mean(0) * torch.tensor([1.0, 0.0], dtype=torch.float64)
        moments = torch.einsum("nta,nsa->ats", seen - mean, seen - mean) / len(seen)
        variances, vectors = torch.linalg.eigh(moments)
        vectors = vectors * torch.where(vectors.sum(1, keepdim=True) < 0.0, -1.0, 1.0)  # of the two signs always the same
        scale = 2.0 * variances.clamp(min=FINEST**2).sqrt()[:, None]
        self.mean.copy_(mean)
        self.modes.copy_((vectors * scale).flip(-1))  # the largest first
        self.inverse.copy_((vectors / scale).flip(-1).mT)

    def coordinates(self, positions: Float[Tensor, "*lead T 2"]) -> Float[Tensor, "*lead T 2"]:
        """Positions [m] as coordinates."""
        with torch.autocast(positions.device.type, enabled=False):
            return torch.einsum("...ta,amt->...ma", positions.float() - self.mean, self.inverse)

    def positions(self, coordinates: Float[Tensor, "*lead T 2"]) -> Float[Tensor, "*lead T 2"]:
        """Coordinates as positions [m]."""
        with torch.autocast(coordinates.device.type, enabled=False):
            return self.mean + torch.einsum("...ma,atm->...ta", coordinates.float(), self.modes)

    def poses(self, positions: Float[Tensor, "*lead T 2"]) -> Float[Tensor, "*lead T 3"]:
        """Positions [m] with headings in [-pi, pi]. A car that hardly moves keeps its heading, also while it rolls back."""
        with torch.autocast(positions.device.type, enabled=False):
            velocity = torch.einsum("...ta,ast->...sa", positions, self.velocities)
            ahead = torch.zeros_like(velocity[..., 0, :])
            ahead[..., 0] = 1.0
            headings = []
            for now in velocity.unbind(-2):
                now = torch.where((now * ahead).sum(-1, keepdim=True) < 0.0, -now, now)
                speed = (now.square().sum(-1, keepdim=True) + 1e-12).sqrt()
                ahead = nn.functional.normalize(speed**3 * now + CREEP**4 * ahead, dim=-1)
                headings.append(torch.atan2(ahead[..., 1], ahead[..., 0]))
            return torch.cat([positions, torch.stack(headings, -1)[..., None]], -1)


def _velocities(poses: int, interval: float, free_start: bool) -> Float[Tensor, "T T"]:
    """The linear map from values at the poses to their rates there, by the cubic spline through them and 0 at t = 0.

    It ends, and with `free_start` begins, with a constant second derivative (natural ends would flatten turns);
    otherwise it begins level, as the car's way does across its heading.
    """
    system, right = torch.zeros(2, poses + 1, poses + 1, dtype=torch.float64)
    for i in range(1, poses):
        system[i, i - 1 : i + 2] = torch.tensor([1.0, 4.0, 1.0])
        right[i, i + 1], right[i, i - 1] = 3.0 / interval, -3.0 / interval
    system[0, 0] = system[-1, -1] = system[-1, -2] = 1.0
    right[-1, -1], right[-1, -2] = 2.0 / interval, -2.0 / interval
    if free_start:
        system[0, 1], right[0, 1], right[0, 0] = 1.0, 2.0 / interval, -2.0 / interval
    return torch.linalg.solve(system, right)[1:, 1:]
