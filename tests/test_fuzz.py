"""Hostile candidates by the thousand (a million under `make sanitize`): no crash, no value out of range. And voxel pooling of odd sizes."""

from __future__ import annotations

import os
from pathlib import Path

import torch

import irlvla
from golden_scenes import load
from irlvla import ops
from irlvla.ops import Grid, VoxelPoolPlan
from irlvla.types import Scene

CANDIDATES = int(os.environ.get("IRLVLA_FUZZ", "20000"))
CHUNK = 20_000


def hostile_plans(n: int, generator: torch.Generator) -> torch.Tensor:
    """Smooth drives, standing, reversing, teleports, spins, far away, and exact repeats."""

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    scale = 10.0 ** (torch.rand(n, 1, 1, generator=generator, dtype=torch.float64) * 8 - 3)
    smooth = noise(n, 1, 3) * torch.linspace(0.5, 4, 8, dtype=torch.float64)[None, :, None] * torch.tensor([8.0, 1.0, 0.1])
    wild = noise(n, 8, 3) * scale.clamp(max=1e5)
    kind = torch.randint(0, 5, (n, 1, 1), generator=generator)
    plans = torch.where(kind == 0, wild, smooth)
    plans = torch.where(kind == 1, torch.zeros_like(plans), plans)
    plans = torch.where(kind == 2, (plans * 2).round() / 2, plans)
    return torch.where(kind == 3, plans + noise(n, 8, 3) * 0.3, plans)


def test_hostile_candidates() -> None:
    generator = torch.Generator().manual_seed(2026)
    golden = load(Path(__file__).parent / "golden")
    scenes = Scene.cat([g.scene for g in golden])
    accepted = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    seen = torch.zeros(9, dtype=torch.bool)
    for _ in range(0, CANDIDATES, CHUNK):
        n = min(CHUNK, CANDIDATES)
        index = torch.randint(0, len(golden), (n,), generator=generator).sort().values
        result = irlvla.epdms(scenes, hostile_plans(n, generator), scene_index=index, details=True, pdms=True, human_filter="none")
        values = result.values[:, :8]
        assert ((values >= 0) & (values <= 1)).all()
        assert torch.isin(values[:, [0, 1, 2, 3, 5, 6, 7]], accepted).all()
        assert ((result.score() >= 0) & (result.score() <= 1)).all()
        assert ((result.pdms.score() >= 0) & (result.pdms.score() <= 1)).all()  # type: ignore[union-attr]
        assert (result.details.progress >= 0).all()  # type: ignore[union-attr]
        seen[:8] |= (values == 0).any(0) & (values == 1).any(0)
    assert seen[:8].all(), "the candidates must fail and pass every metric"


def test_odd_pooling() -> None:
    """Sizes that fill no vector, layouts with gaps, all types: what goes in comes out, and no byte beside it is touched."""
    generator = torch.Generator().manual_seed(2026)

    def integer(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=generator))

    def tensor(*shape: int) -> torch.Tensor:
        order, gap = torch.randperm(len(shape), generator=generator).tolist(), integer(0, 3) == 0
        dtype = (torch.float32, torch.float16, torch.bfloat16)[integer(0, 2)]
        values = torch.rand(*(shape[i] for i in order), 1 + gap, generator=generator).to(dtype)[..., 0]
        return values.permute([order.index(i) for i in range(len(shape))]).requires_grad_()

    for _ in range(max(30, CANDIDATES // 1000)):
        batch, cameras, channels, bins, height, width = (integer(1, most) for most in (2, 3, 300, 40, 40, 20))
        rigs = (cameras,) if integer(0, 1) else (batch, cameras)
        intrinsics = torch.tensor([[0.8 * width, 0, width / 2], [0, 0.8 * height, height / 2], [0, 0, 1]]).expand(*rigs, 3, 3)
        poses = torch.eye(4, dtype=torch.float64).repeat(*rigs, 1, 1)
        poses[..., :3, :3] = torch.linalg.qr(torch.randn(*rigs, 3, 3, generator=generator, dtype=torch.float64)).Q
        plan = VoxelPoolPlan.build(
            intrinsics, poses, (height, width), torch.arange(1.0, bins + 1), Grid((-40, 40, 5), (-40, 40, 8), (-9, 9))
        )
        features, depth = tensor(batch, cameras, channels, height, width), tensor(batch, cameras, bins, height, width)
        bev = ops.voxel_pool(features, depth, plan, softmax=integer(0, 1) == 1, dtype=torch.float32)
        bev.sum().backward()
        assert features.grad.isfinite().all()
        assert depth.grad.isfinite().all()
        linear = (features.grad.double() * features.double()).sum()  # as sums are in features
        torch.testing.assert_close(linear, bev.double().sum(), rtol=1e-2, atol=1e-2)
