"""Image backbones: encoders, lift, augmentation, `bev` and `vit`."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import irlvla
from irlvla import Observation, Scene, ops
from irlvla.errors import ConfigError, FileError, InputError
from irlvla.synthetic import FRONT_RIG, NAVSIM_RIG, make_world, to_observation, to_scene
from irlvla.testing import backbone_checks
from irlvla.testing.examples import example_observation, example_scene
from irlvla.types import Command
from irlvla.zoo.backbones.augmentation import Augmentation
from irlvla.zoo.backbones.encoders import TimmEncoder
from irlvla.zoo.backbones.lift import Lift, rays_of
from irlvla.zoo.backbones.vit import VitEncoder
from irlvla.zoo.libraries import library

timm, transformers = library("timm"), library("transformers")

LIFT = {
    "x": (-16.0, 32.0, 4.0),
    "y": (-16.0, 16.0, 4.0),
    "depth": (1.0, 33.0, 2.0),
    "channels": 8,
    "widths": (16, 24),
    "blocks": 1,
    "joined": 16,
}
CONVOLUTIONS = {"model": "mobilenetv3_small_050", "strides": (16, 32), "channels": 16}
PATCHES = {
    "model_type": "dinov2",
    "patch_size": 14,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 56,
}
QUERIES = {"queries": 6, "layers": 1, "heads": 2}
HEADS = {"detection": QUERIES, "map": QUERIES, "segmentation": {"hidden": 8}}
BEV = {"width": 32, "encoder": CONVOLUTIONS, "lift": LIFT, **HEADS}
VIT = {"width": 32, "encoder": {"architecture": PATCHES, "channels": 16}, "lift": LIFT, **HEADS}
PLAIN = {**BEV, "detection": None, "map": None, "segmentation": None, "augmentation": None}

test_bev = backbone_checks("bev", **BEV)
test_bev_without_heads = backbone_checks("bev", **PLAIN)
test_bev_that_forgets = backbone_checks("bev", **BEV, command_dropout=0.5, status_dropout=0.5)
test_vit = backbone_checks("vit", **VIT)


def backbone(seed: int = 0, **settings):
    torch.manual_seed(seed)
    return irlvla.build("backbone", {"name": "bev", **PLAIN, **settings})


def encoder(**settings) -> TimmEncoder:
    torch.manual_seed(0)
    return TimmEncoder(TimmEncoder.Config(**{**CONVOLUTIONS, **settings}))


def vit_encoder(**settings) -> VitEncoder:
    torch.manual_seed(0)
    return VitEncoder(VitEncoder.Config(**{"architecture": PATCHES, "channels": 16, **settings}))


def images(*size: int, seed: int = 0) -> Tensor:
    return torch.randint(256, (2, 3, *size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def channels_last(grid: Tensor) -> bool:
    return grid.is_contiguous(memory_format=torch.channels_last)


# -- encoders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [encoder, vit_encoder])
def test_encoders_make_one_map(make):
    """Of any size of image, channels last, and of bytes as of floats."""
    sees = make().eval()
    for height, width in ((64, 96), (32, 160)):
        seen = sees(images(height, width))
        assert seen.shape == (2, sees.width, height // 16, width // 16)
        assert (sees.width, sees.stride) == (16, 16)
        assert channels_last(seen)
    given = images(64, 96)
    torch.testing.assert_close(sees(given), sees(given.float() / 255.0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sees(given)[:1], sees(given[:1]), rtol=1e-4, atol=1e-5)


def test_colours_are_normalised_as_the_network_was_trained():
    pixels = encoder().pixels
    mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    given = images(4, 6)
    expected = (given / 255.0 - mean[:, None, None]) / deviation[:, None, None]
    torch.testing.assert_close(pixels(given), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("strides", [(8,), (16,), (4, 16), (8, 16, 32)])
def test_encoder_joins_the_levels_that_it_is_told(strides):
    sees = encoder(strides=strides)
    assert sees.stride == strides[0]
    assert sees(images(64, 96)).shape == (2, 16, 64 // strides[0], 96 // strides[0])


def test_encoder_leaves_out_what_lies_behind_its_levels():
    def count(sees: TimmEncoder) -> int:
        return sum(parameter.numel() for parameter in sees.net.parameters())

    assert count(encoder(strides=(8,))) < count(encoder(strides=(16,))) < count(encoder(strides=(32,)))


def test_norms_mix_scenes_only_where_they_are_told_to():
    given = images(64, 96)
    for norm, mixes in (("group", False), ("frozen", False), ("batch", True), (None, False)):
        sees = encoder(norm=norm).train()
        apart = torch.cat([sees(given[:1]), sees(given[1:])])
        assert torch.allclose(sees(given), apart, rtol=1e-3, atol=1e-4) != mixes, norm
    norms = {type(module).__name__ for module in encoder(model="resnet10t", norm="frozen").net.modules()}
    assert "FrozenBatchNormAct2d" in norms or "FrozenBatchNorm2d" in norms
    assert not any("BatchNorm" in type(module).__name__ for module in encoder(norm="group").modules())


def test_checkpointing_changes_no_gradient():
    given = images(64, 96)
    gradients = []
    for checkpointing in (False, True):
        sees = encoder(checkpointing=checkpointing)
        sees(given).square().mean().backward()
        gradients.append([parameter.grad for parameter in sees.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_encoder_of_another_layout():
    """Swin's maps have their channels last, and it is built for one size of image."""
    sees = encoder(model="test_vit", strides=(16,), size=(64, 96))
    assert sees(images(64, 96)).shape == (2, 16, 4, 6)
    sees = encoder(model="swin_tiny_patch4_window7_224", strides=(16,), size=(64, 96))
    assert sees(images(64, 96)).shape == (2, 16, 4, 6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "resnet10"}, r"timm .* has no network 'resnet10'. Did you mean 'resnet10t'"),
        ({"strides": (16, 64)}, r"has feature maps of the strides \[2, 4, 8, 16, 32\]; got \[16, 64\]"),
        ({"strides": (32, 16)}, "finest first"),
        ({"model": "hf-hub:timm/resnet10t.c3_in1k"}, "has no network"),
    ],
)
def test_encoder_rejects(settings, message):
    with pytest.raises(ConfigError, match=message):
        encoder(**settings)


def test_encoder_is_as_fine_as_it_says():
    """timm says that dla34 has a map of stride 16; it is of stride 8."""
    sees = encoder(model="dla34", strides=(16,))
    with pytest.raises(ConfigError, match=r"makes \(8, 12\) cells of \(64, 96\) pixels, where \(4, 6\) are needed"):
        sees(images(64, 96))


# -- pretrained weights ------------------------------------------------------------------------------------------------


@pytest.fixture
def weights(tmp_path):
    """A file as timm's are: names of the whole network with its classifier, statistics that are not those of a new one."""
    torch.manual_seed(7)
    network = timm.create_model("resnet10t")
    for name, buffer in network.named_buffers():
        if name.endswith("running_mean"):
            buffer.uniform_(-0.1, 0.1)
    safetensors.torch.save_file(network.state_dict(), tmp_path / "resnet10t.safetensors")
    return network, tmp_path / "resnet10t.safetensors"


def test_pretrained_weights_from_a_file(weights):
    network, file = weights
    sees = encoder(model="resnet10t", pretrained=file).train()
    assert not any(isinstance(module, nn.GroupNorm) for module in sees.net.modules())
    given = sees.pixels(images(64, 96))
    *_, expected, _ = network.eval().forward_intermediates(given, intermediates_only=True)
    torch.testing.assert_close(sees.net(given)[0], expected, rtol=1e-4, atol=1e-5)
    grouped = encoder(model="resnet10t", pretrained=file, norm="group")
    assert torch.equal(grouped.net.model.conv1[0].weight, network.conv1[0].weight)


def test_pretrained_weights_must_fit(weights, tmp_path):
    _, file = weights
    with pytest.raises(FileError, match=r"resnet10t.safetensors does not fit timm's 'resnet14t' .*Missing key"):
        encoder(model="resnet14t", pretrained=file)
    with pytest.raises(FileError, match="is no safetensors file of pretrained weights"):
        encoder(model="resnet10t", pretrained=tmp_path / "nothing.safetensors")
    (tmp_path / "text").write_text("no weights")
    with pytest.raises(FileError, match="is no safetensors file of pretrained weights"):
        encoder(model="resnet10t", pretrained=tmp_path / "text")
    with pytest.raises(FileError, match="no pretrained weights were found for timm's 'ese_vovnet99b'"):
        encoder(model="ese_vovnet99b", pretrained=True)


def test_a_download_that_fails_says_what_to_do(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_hf", offline)
    with pytest.raises(FileError, match=r"no pretrained weights were found for timm's 'resnet10t' \(no network\); give the path of"):
        encoder(model="resnet10t", pretrained=True)


def test_saved_model_does_not_need_its_pretrained_weights(weights, tmp_path):
    _, file = weights
    before = irlvla.build("backbone", {"name": "bev", **PLAIN, "encoder": {**CONVOLUTIONS, "model": "resnet10t", "pretrained": str(file)}})
    folder = irlvla.save_pretrained(before, tmp_path / "model")
    file.unlink()
    after = irlvla.from_pretrained(folder)
    assert after.config.encoder.norm == "frozen"
    obs = example_observation(1)
    torch.testing.assert_close(after(obs).bev, before.eval()(obs).bev, rtol=0, atol=0)


@pytest.mark.parametrize("colours", [True, False])
def test_vit_from_a_folder(tmp_path, colours):
    import json

    folder = tmp_path / "dino"
    trained = vit_encoder().net
    with torch.no_grad():
        trained.embeddings.cls_token.add_(1.0)
    trained.save_pretrained(folder)
    if not colours:
        with pytest.raises(ConfigError, match=r"does not say how its images were normalised .*; set mean and deviation"):
            vit_encoder(pretrained=str(folder))
        sees = vit_encoder(pretrained=str(folder), mean=(0.5, 0.5, 0.5), deviation=(0.5, 0.5, 0.5))
    else:
        (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
        sees = vit_encoder(pretrained=str(folder))
    assert torch.equal(sees.net.embeddings.cls_token, trained.embeddings.cls_token)
    torch.testing.assert_close(sees.pixels(torch.full((1, 3, 2, 2), 0.75)), torch.full((1, 3, 2, 2), 0.5))
    assert sees.config.pretrained is None
    again = VitEncoder(VitEncoder.Config(**sees.config.model_dump(mode="json")))
    again.load_state_dict(sees.state_dict())
    assert torch.equal(again.eval()(images(64, 96)), sees.eval()(images(64, 96)))


def test_vit_of_both_towers_takes_the_one_that_sees(tmp_path):
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.SiglipConfig(text_config={**small, "vocab_size": 20}, vision_config={**small, "image_size": 32, "patch_size": 16})
    whole = transformers.SiglipModel(config)
    whole.save_pretrained(tmp_path / "siglip")
    half = (0.5, 0.5, 0.5)
    sees = vit_encoder(pretrained=str(tmp_path / "siglip"), mean=half, deviation=half)
    assert torch.equal(sees.net.embeddings.patch_embedding.weight, whole.vision_model.embeddings.patch_embedding.weight)
    assert sees(images(64, 96)).shape == (2, 16, 4, 6)
    frozen = {name for name, parameter in sees.named_parameters() if not parameter.requires_grad}
    assert frozen
    assert all(name.startswith("net.head.") for name in frozen)  # the pooler, on which no patch depends


def test_vit_must_be_there(tmp_path):
    with pytest.raises(FileError, match=r"gives no pretrained vision model: .*name a folder"):
        vit_encoder(pretrained=str(tmp_path))
    for architecture in ({"model_type": "dino"}, {"model_type": "bert"}, {}):
        with pytest.raises(ConfigError, match=r"makes no vision model of|does not turn an image into tokens"):
            vit_encoder(architecture=architecture)


def test_vit_patches_cover_the_image():
    """Patches of 14 see an image of 64 x 96 as 4 x 6 patches of 16: what changes in one of them changes its token most."""
    sees = vit_encoder(architecture={**PATCHES, "num_hidden_layers": 1}).eval()
    given = torch.full((1, 3, 64, 96), 0.5)
    before = sees(given)
    changed = given.clone()
    changed[:, :, 32:48, 64:80] = 1.0
    moved = (sees(changed) - before).norm(dim=1)[0]
    assert moved.argmax().item() == 2 * 6 + 4


def test_frozen_vit_stays_as_it_is():
    sees = vit_encoder(architecture={**PATCHES, "hidden_dropout_prob": 0.5}, freeze=True).train()
    assert torch.equal(sees(images(64, 96)), sees(images(64, 96)))
    sees(images(64, 96)).sum().backward()
    learns = {name for name, parameter in sees.named_parameters() if parameter.grad is not None}
    assert learns
    assert all(name.startswith("neck.") for name in learns)


# -- geometry ----------------------------------------------------------------------------------------------------------


def seen_from(rig, point) -> tuple[int, tuple[float, float], float] | None:
    """The camera, the pixel and the depth at which a rig sees a point of the ego frame."""
    pixels, depths = rig.project(np.asarray(point))
    for camera, ((u, v), depth) in enumerate(zip(pixels, depths, strict=True)):
        if depth > 1.0 and 8 <= u < rig.width - 8 and 8 <= v < rig.height - 8:
            return camera, (u, v), depth
    return None


def lifted(rig, camera: int, pixel: tuple[float, float], depth: float, stride: int = 8) -> tuple[Tensor, Lift]:
    """What lands in the grid of a feature that stands at one pixel with a depth that is sure."""
    lift = Lift(Lift.Config(x=(-40.0, 40.0, 1.0), y=(-40.0, 40.0, 1.0), depth=(0.0, 60.0, 0.5)), 4, 4)
    size = rig.height, rig.width
    intrinsics, mounts = (torch.as_tensor(array)[None].float() for array in (rig.intrinsics, rig.camera_to_ego))
    plan = lift.plan(intrinsics, mounts, size, stride)
    shape = 1, len(rig), -1, size[0] // stride, size[1] // stride
    features = torch.zeros(*shape[:2], 1, *shape[3:])
    row, column = (math.floor((value + 0.5) / stride) for value in pixel[::-1])
    features[0, camera, 0, row, column] = 1.0
    logits = torch.full((*shape[:2], 120, *shape[3:]), -1e4)
    logits[0, camera, int(depth / 0.5)] = 0.0
    logits[0, :, 0] = torch.where(logits[0].amax(1) < 0.0, 0.0, logits[0, :, 0])
    return ops.voxel_pool(features, logits, plan, softmax=True)[0, 0], lift


@pytest.mark.parametrize("rig", [FRONT_RIG, NAVSIM_RIG], ids=["front", "navsim"])
def test_what_is_seen_lands_where_it_stands(rig):
    """A point of the world, seen in a pixel at its depth, lights the cell that it stands in."""
    rig, found = rig.resized(256, 704), 0
    for x, y in ((10.3, 0.4), (20.4, -6.6), (8.6, 7.7), (31.5, 3.5), (-12.4, 2.5), (3.5, -14.5)):
        seen = seen_from(rig, (x, y, 0.8))
        if seen is None:
            continue
        grid, lift = lifted(rig, *seen)
        cell = divmod(grid.argmax().item(), grid.shape[1])
        assert grid.sum() == pytest.approx(1.0)
        low_x, _, low_y, _ = lift.grid.range
        assert abs(low_x + cell[0] + 0.5 - x) <= 1.0
        assert abs(low_y + cell[1] + 0.5 - y) <= 1.0
        found += 1
    assert found >= (4 if len(rig) == 3 else 6)


def test_painted_object_lands_where_it_stands():
    """What differs between the images of a world with and without a car, lifted at the depths at which that car stands, is its box."""
    world = make_world(3)
    rig = FRONT_RIG.resized(128, 352)
    agent = dataclasses.replace(world.actors[0], name="new")
    state = agent.state.copy()
    state[..., :] = 0.0
    ego = world.ego[20]
    ahead, left = 14.0, 2.0
    cos, sin = math.cos(ego[2]), math.sin(ego[2])
    state[..., 0] = ego[0] + cos * ahead - sin * left
    state[..., 1] = ego[1] + sin * ahead + cos * left
    state[..., 2] = ego[2]
    agent = dataclasses.replace(agent, state=state, valid=np.ones_like(agent.valid), size=np.array([4.0, 2.0, 1.6]))
    without = dataclasses.replace(world, actors=())
    with_it = dataclasses.replace(world, actors=(agent,))
    seen = [to_observation(one, FRONT_RIG, (128, 352)).images.float() for one in (without, with_it)]
    changed = (seen[0] - seen[1]).abs().amax(2) > 30.0  # "1 N H W"
    covered = nn.functional.avg_pool2d(changed.float(), 8)
    assert covered.sum() > 3.0
    lift = Lift(Lift.Config(x=(-40.0, 40.0, 1.0), y=(-40.0, 40.0, 1.0), depth=(0.0, 60.0, 1.0)), 4, 4)
    intrinsics, mounts = (torch.as_tensor(array)[None].float() for array in (rig.intrinsics, rig.camera_to_ego))
    plan = lift.plan(intrinsics, mounts, (128, 352), 8)
    back = ahead - 2.0 - mounts[0, 1, 0, 3]  # of the front camera, to the rear of the car
    logits = torch.full((1, 3, 60, 16, 44), -1e4)
    logits[:, :, int(back)] = 0.0
    grid = ops.voxel_pool(covered[:, :, None], logits, plan, softmax=True)[0, 0]
    x, y = (grid.sum(1 - axis) / grid.sum() @ (torch.arange(80.0) - 39.5) for axis in (0, 1))
    assert abs(x - (ahead - 2.0)) < 1.0
    assert abs(y - left) < 1.0


def test_rays_lead_to_what_is_seen():
    """A point at some depth along the ray of a pixel projects onto the middle of its patch."""
    rig = NAVSIM_RIG.resized(128, 352)
    intrinsics, mounts = (torch.as_tensor(array)[None].float() for array in (rig.intrinsics, rig.camera_to_ego))
    rays = rays_of(intrinsics, mounts, (128, 352), 16)
    assert rays.shape == (1, 8, 8, 8, 22)
    points = rays[0, :, 3:6] + 7.0 * rays[0, :, :3]
    for camera, view in enumerate(rig.views()):
        where = points[camera].permute(1, 2, 0).double().numpy()
        pixels, depths = view.pixels(view.to_camera(where))
        np.testing.assert_allclose(depths, 7.0, atol=1e-4)
        np.testing.assert_allclose(pixels[3, 5], (5 * 16 + 7.5, 3 * 16 + 7.5), atol=1e-2)


def test_augmented_images_show_the_world_where_their_calibration_says():
    """A white patch painted where a camera sees a point is found again where the new calibration sees it."""
    rig = FRONT_RIG.resized(128, 352)
    intrinsics, mounts = (torch.as_tensor(array)[None].float() for array in (rig.intrinsics, rig.camera_to_ego))
    point = np.array([12.0, 1.0, 1.0])
    camera, (u, v), _ = seen_from(rig, point)
    given = torch.zeros(1, 3, 3, 128, 352)
    rows, columns = torch.meshgrid(torch.arange(128.0), torch.arange(352.0), indexing="ij")
    given[0, camera] = (-((columns - u) ** 2 + (rows - v) ** 2) / 8.0).exp()
    change = Augmentation(Augmentation.Config(resize=(0.8, 1.2), rotation=8.0, brightness=0.0, contrast=0.0, saturation=0.0))
    turned = set()
    for seed in range(20):
        torch.manual_seed(seed)
        moved, calibration = change(given, intrinsics)
        assert moved.shape == given.shape
        homogeneous = (
            calibration[0, camera].double() @ torch.linalg.inv(mounts[0, camera].double())[:3] @ torch.tensor([*point, 1.0]).double()
        )
        expected = homogeneous[:2] / homogeneous[2]
        seen = moved[0, camera, 0].double()
        if not (8 < expected[0] < 343 and 8 < expected[1] < 119):
            continue
        found = torch.stack([(seen * columns).sum(), (seen * rows).sum()]) / seen.sum()
        torch.testing.assert_close(found, expected, rtol=0, atol=0.05)
        turned.add(round(expected[0].item(), 2))
    assert len(turned) > 10


def test_augmentation_that_changes_nothing():
    change = Augmentation(Augmentation.Config(resize=(1.0, 1.0), rotation=0.0, brightness=0.0, contrast=0.0, saturation=0.0))
    given = example_observation(2)
    moved, calibration = change(given.images, given.intrinsics)
    torch.testing.assert_close(moved, given.images / 255.0, rtol=0, atol=1e-4)
    torch.testing.assert_close(calibration, given.intrinsics)


def test_augmentation_tints_within_its_limits():
    change = Augmentation(Augmentation.Config(resize=(1.0, 1.0), rotation=0.0, brightness=0.5, contrast=0.0, saturation=0.0))
    torch.manual_seed(0)
    moved, _ = change(torch.full((4, 8, 3, 4, 4), 0.5), torch.eye(3).repeat(4, 8, 1, 1))
    levels = moved.mean((2, 3, 4))
    assert levels.min() >= 0.25
    assert levels.max() <= 0.75
    assert levels.std() > 0.05
    assert torch.allclose(moved, levels[:, :, None, None, None])


def test_augmentation_is_for_training_alone():
    sees = backbone(augmentation={"resize": (0.8, 1.2)})
    obs = example_observation(2)
    for training in (True, False):
        sees.train(training)
        torch.manual_seed(1)
        first = sees(obs).bev
        assert torch.equal(first, sees(obs).bev) != training
        torch.manual_seed(1)
        assert torch.equal(first, sees(obs).bev)


# -- backbones ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bev", "vit"])
@pytest.mark.parametrize("cameras", [1, 3, 8])
def test_shapes(name, cameras):
    torch.manual_seed(0)
    sees = irlvla.build("backbone", {"name": name, **(BEV if name == "bev" else VIT)})
    features = sees(example_observation(2, cameras))
    assert features.bev.shape == (2, 32, 12, 8)
    assert features.bev_range.tolist() == [[-16.0, 32.0, -16.0, 16.0]] * 2
    assert channels_last(features.bev)
    assert features.status.shape == (2, 32)
    assert features.agents.shape == features.map.shape == (2, 6, 32)


def test_heads_can_be_switched_off():
    features = backbone()(example_observation(1))
    assert features.agents is None
    assert features.map is None
    assert features.predictions == {}
    assert backbone().loss(features, example_scene(1)) == {}
    sees = backbone(segmentation={"hidden": 8})
    losses = sees.loss(sees(example_observation(2)), example_scene(2))
    assert losses
    assert all(name.startswith("areas") for name in losses)


def test_eight_cameras_see_what_each_sees():
    """The lifted grid of a rig is the sum of those of its cameras."""
    sees = backbone().eval()
    obs = example_observation(1, 8)
    pooled = []
    sees.lift.encoder = nn.Identity()
    for cameras in [list(range(8)), *([camera] for camera in range(8))]:
        part = {name: getattr(obs, name)[:, cameras] for name in ("images", "intrinsics", "camera_to_ego")}
        pooled.append(sees(dataclasses.replace(obs, **part)).bev)
    torch.testing.assert_close(pooled[0], sum(pooled[1:]), rtol=1e-4, atol=1e-5)


def test_each_scene_has_its_own_rig():
    """Scenes with other cameras in a batch come out as each alone, in training too."""
    sees = backbone().train()
    obs = example_observation(4, 3, (64, 96))
    lenses = obs.intrinsics * torch.linspace(0.7, 1.4, 4)[:, None, None, None]
    lenses[..., 2, 2] = 1.0
    mounts = obs.camera_to_ego.clone()
    mounts[..., 0, 3] += torch.linspace(0.0, 1.0, 4)[:, None]
    obs = dataclasses.replace(obs, intrinsics=lenses, camera_to_ego=mounts)
    together = sees(obs)
    for i in range(4):
        alone = sees(obs[[i]])
        torch.testing.assert_close(together.bev[i : i + 1], alone.bev, rtol=1e-3, atol=1e-4)
    same = dataclasses.replace(obs, intrinsics=lenses[:1].expand_as(lenses))
    assert not torch.allclose(sees(same).bev[1], together.bev[1], atol=1e-3)


def test_gradients_of_a_batch_are_those_of_its_scenes():
    obs, scene = example_observation(4), example_scene(4)
    settings = {**HEADS}
    whole, parts = backbone(**settings).train(), backbone(**settings).train()
    sum(whole.loss(whole(obs), scene).values()).backward()
    for i in range(4):
        (sum(parts.loss(parts(obs[[i]]), scene[[i]]).values()) / 4).backward()
    for (name, one), other in zip(whole.named_parameters(), parts.parameters(), strict=True):
        if one.grad is not None:
            scale = one.grad.abs().max().item() + 1e-6
            torch.testing.assert_close(other.grad / scale, one.grad / scale, rtol=0, atol=5e-3, msg=name)


def test_dropout_of_command_and_status():
    obs = example_observation(8)
    sees = backbone(command_dropout=1.0)
    unknown = dataclasses.replace(obs, command=torch.full_like(obs.command, Command.UNKNOWN))
    assert torch.equal(sees.train()(obs).status, sees.eval()(unknown).status)
    assert not torch.equal(sees.eval()(obs).status, sees(unknown).status)
    sees = backbone(status_dropout=1.0)
    assert not sees.train()(obs).status.any()  # the learnt token is zero at first
    assert sees.eval()(obs).status.std(0).max() > 0.0
    sees = backbone(status_dropout=0.5).train()
    torch.manual_seed(0)
    dropped = (sees(obs).status == 0.0).all(1)
    assert 0 < dropped.sum() < 8


def test_half_precision():
    """Autocast to bfloat16 keeps geometry exact, and the grid close to that of float32."""
    sees = backbone(**HEADS).train()
    obs, scene = example_observation(2), example_scene(2)
    exact = sees(obs).bev
    with torch.autocast("cpu", torch.bfloat16):
        _, rays, _ = sees.prepare(obs)
        features = sees(obs)
        losses = sees.loss(features, scene)
    assert rays.dtype == torch.float32
    assert torch.equal(rays, sees.prepare(obs)[1])
    assert (features.bev.float() - exact).abs().mean() < 0.05 * exact.abs().mean()
    sum(losses.values()).backward()
    assert all(parameter.grad is None or bool(parameter.grad.isfinite().all()) for parameter in sees.parameters())


@pytest.mark.parametrize("name", ["bev", "vit"])
def test_compiled_in_one_graph(name):
    torch.manual_seed(0)
    small = {"model": "test_resnet", "channels": 16} if name == "bev" else VIT["encoder"]
    sees = irlvla.build("backbone", {"name": name, **PLAIN, "encoder": small})
    given = sees.prepare(example_observation(2))
    expected = sees.see(*given)
    compiled = torch.compile(sees.see, fullgraph=True, backend="aot_eager" if name == "bev" else "eager")
    found = compiled(*given)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    found.square().mean().backward()
    assert all(parameter.grad is not None for parameter in sees.lift.parameters())


def test_flops_are_counted():
    from torch.utils.flop_counter import FlopCounterMode

    sees = backbone()
    given = sees.prepare(example_observation(1))
    with FlopCounterMode(display=False) as counter:
        sees.see(*given)
    by_module = counter.get_flop_counts()
    assert by_module["Lift.head"]
    pooled = {str(op): count for op, count in by_module["Lift"].items() if "voxel_pool" in str(op)}
    assert list(pooled.values()) == [2 * 8 * 2 * 16 * 4 * 6]  # a product and a sum for each of 8 channels, 2 cameras, 16 bins, 4 x 6 pixels


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": None}, r"backbone 'bev' \(irlvla .* looks at images, and the observation has no images; give the dataset a `size`"),
        ({"images": None, "intrinsics": None, "camera_to_ego": None}, "has no images, intrinsics, camera_to_ego"),
        ({"images": torch.zeros(2, 3, 64, 96)}, r"images must have shape \(B, C, 3, H, W\)"),
        ({"images": torch.zeros(2, 0, 3, 64, 96)}, "one camera at least"),
        ({"images": torch.zeros(2, 2, 3, 60, 96)}, r"multiples of 16, got \(60, 96\); \(64, 96\) would do"),
        ({"intrinsics": torch.eye(3).repeat(2, 1, 1, 1)}, r"intrinsics of images \(2, 2, 3, 64, 96\) must have shape \(2, 2, 3, 3\)"),
    ],
)
def test_observations_that_do_not_fit(change, message):
    with pytest.raises(InputError, match=message):
        backbone()(dataclasses.replace(example_observation(2), **change))


def test_settings_that_do_not_fit():
    with pytest.raises(ConfigError, match=r"backbone.encoder.modell"):
        irlvla.build("backbone", {"name": "bev", "encoder": {"modell": "resnet10t"}})
    with pytest.raises(InputError, match="whole number of steps"):
        backbone(lift={**LIFT, "x": (-16.0, 16.0, 3.0)})
    with pytest.raises(InputError, match="whole number of steps"):
        backbone(lift={**LIFT, "depth": (1.0, 33.0, 3.0)})


def test_default_is_the_scale_of_the_paper():
    with torch.device("meta"):
        config = irlvla.zoo.backbones.bev.BevBackbone.Config()
    lift = Lift(config.lift, 256, config.width)
    assert lift.grid.shape == (128, 128)
    assert len(lift.depths) == 118
    assert config.encoder.model == "ese_vovnet99b"
    assert config.detection.queries == 30


def test_it_learns_what_it_sees():
    """Sixty steps on four scenes: it finds the areas of each in its images, and not in those of another."""
    worlds = [make_world(seed) for seed in range(4)]
    obs = Observation.cat([to_observation(world, FRONT_RIG, (64, 176)) for world in worlds])
    scene = Scene.cat([to_scene(world, reference=False) for world in worlds])
    sees = backbone(segmentation={"hidden": 16}).train()
    optimizer = torch.optim.AdamW(sees.parameters(), 5e-3)

    def loss(images: Tensor) -> Tensor:
        return sum(sees.loss(sees(dataclasses.replace(obs, images=images)), scene).values())

    first = loss(obs.images).item()
    for _ in range(60):
        optimizer.zero_grad()
        loss(obs.images).backward()
        optimizer.step()
    with torch.no_grad():
        last, mistaken = loss(obs.images).item(), loss(obs.images.roll(1, 0)).item()
    assert last < 0.6 * first
    assert mistaken > 1.1 * last
