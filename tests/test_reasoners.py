"""Reasoners: the commands and their rules, commands from files, from a small network, and from vision-language models."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
import math
import pickle
import shutil
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import irlvla
from irlvla import build
from irlvla.errors import ConfigError, FileError, InputError
from irlvla.testing import example_observation, example_scene, reasoner_checks
from irlvla.types import Observation, Scene
from irlvla.zoo.libraries import library
from irlvla.zoo.reasoners.actions import ALIASES, PATHS, SAME_SLOT, SPEEDS, UNKNOWN, Rules, counts, label, labels_of, parse
from irlvla.zoo.reasoners.commands import read_answers
from irlvla.zoo.reasoners.driver import balanced, directions
from irlvla.zoo.reasoners.likelihoods import VisionLanguageModel, _encode, _shared, _tokens
from irlvla.zoo.reasoners.vlm import PROMPT, VIEWS

WIDTH = 16


@pytest.fixture(scope="session")
def timm() -> ModuleType:
    return library("timm")


@pytest.fixture(scope="session")
def transformers() -> ModuleType:
    return library("transformers")


# -- rules -------------------------------------------------------------------------------------------------------------

TIME = torch.linspace(0.0, 4.0, 4001, dtype=torch.float64)


def drive(v: Callable | float = 10.0, heading: Callable | None = None, side: Callable | None = None, dt: float = 0.5) -> torch.Tensor:
    """Poses "1 T 3" of a drive with the speed v(t) and the heading h(t); or, with y(t) to the side of x, as far as v(t) goes."""
    speed = torch.zeros_like(TIME) + (v(TIME) if callable(v) else v)
    step = TIME[1] - TIME[0]
    if side is None:
        angle = torch.zeros_like(TIME) if heading is None else heading(TIME)
        x, y = torch.cumulative_trapezoid(torch.stack([speed * angle.cos(), speed * angle.sin()]), dx=step.item())
    else:
        x = torch.cumulative_trapezoid(speed, dx=step.item())
        y, angle = side(TIME)[1:], torch.atan2(torch.gradient(side(TIME))[0] / step, speed)
    poses = torch.stack([x, y, torch.atan2(angle.sin(), angle.cos())[1:]], -1)
    every = round(dt / step.item())
    return poses[every - 1 :: every][None]


def across(metres: float) -> Callable:
    """To the side within the 4 s, smoothly."""
    return lambda t: metres * (t / 4) ** 2 * (3 - 2 * t / 4)


SPEED_CASES = [
    ("Emergency_Decel", lambda t: (15 - 5 * t).clamp(min=0)),
    ("Emergency_Decel", lambda t: 15 - 5 * t.clamp(max=1.5)),
    ("Full_Stop", lambda t: (6 - 2 * t).clamp(min=0)),
    ("Full_Stop", 0.0),
    ("Creeping", 1.2),
    ("Creeping", lambda t: 0.4 * t),
    ("Regenerative_Braking", lambda t: 15 - 2.8 * t),
    ("Controlled_Decel", lambda t: 15 - 3 * t.clamp(max=2)),
    ("Mild_Decel_Linear", lambda t: 15 - 1.2 * t),
    ("Mild_Decel", lambda t: 15 - 0.25 * t**2),
    ("Mild_Accel", lambda t: 5 + t + 0.8 * (2 * t).sin()),
    ("Mild_Accel_NonLinear", lambda t: 5 + 0.28 * t**2),
    ("Mild_Accel_NonLinear", lambda t: 5 + 2.2 * t.clamp(max=1.8)),
    ("Mild_Accel_Linear", lambda t: 5 + 1.5 * t),
    ("Aggressive_Accel", lambda t: 3 * t),
    ("Constant_Speed_Loose", lambda t: 10 + 0.6 * t),
    ("Constant_Speed_Loose", lambda t: 10 - 2 * (t * math.pi / 4).sin()),
    ("Constant_Speed_Strict", 10.0),
    ("Constant_Speed_Strict", lambda t: 10 + 0.5 * t.sin()),
]
PATH_CASES = [
    ("Swerving", {"side": lambda t: 1.5 * (t * math.pi / 4).sin() ** 2}),
    ("Swerving", {"side": lambda t: -2.5 * (t * math.pi / 4).sin() ** 2}),
    ("Sharp_Left_Turn", {"heading": lambda t: 0.2 * t}),
    ("Sharp_Left_Turn", {"heading": lambda t: 0.9 * t}),  # more than half a circle
    ("Slight_Left_Turn", {"heading": lambda t: 0.05 * t}),
    ("Sharp_Right_Turn", {"heading": lambda t: -0.2 * t}),
    ("Slight_Right_Turn", {"heading": lambda t: -0.05 * t}),
    ("Straight_Strict", {}),
    ("Straight_Strict", {"v": 20.0, "heading": lambda t: 0.02 * t}),  # a bend of 1 km: 3.2 m to the side, and no lane change
    ("Left_LaneChange", {"side": across(3.5)}),
    ("Left_LaneChange", {"v": 20.0, "side": lambda t: across(3.5)(t) + 0.1 * t**2}),  # in a bend
    ("Lane_Micro_Adjust", {"side": across(0.9)}),
    ("Lane_Micro_Adjust", {"side": across(-0.9)}),
    ("Right_LaneChange", {"side": across(-3.5)}),
    ("Straight_Strict", {"v": 0.0}),
]


def starts(drives: torch.Tensor, v: Callable | float) -> torch.Tensor:
    return torch.tensor([float(v(TIME[:1])) if callable(v) else v], dtype=torch.float64)


@pytest.mark.parametrize("dt", [0.5, 0.1])
@pytest.mark.parametrize(("name", "v"), SPEED_CASES)
def test_speed_rules(name: str, v: Callable | float, dt: float) -> None:
    poses = drive(v, dt=dt)
    speed, path = label(poses, dt, starts(poses, v))
    assert SPEEDS[speed] == name
    assert PATHS[path] == "Straight_Strict"


@pytest.mark.parametrize("dt", [0.5, 0.1])
@pytest.mark.parametrize(("name", "way"), PATH_CASES)
def test_path_rules(name: str, way: dict, dt: float) -> None:
    poses = drive(**way, dt=dt)
    _, path = label(poses, dt, starts(poses, way.get("v", 10.0)))
    assert PATHS[path] == name


def test_every_command_is_reached() -> None:
    assert {name for name, _ in SPEED_CASES} == set(SPEEDS)
    assert {name for name, _ in PATH_CASES} == set(PATHS)
    assert (len(SPEEDS), len(PATHS)) == (13, 9)


def test_many_drives_are_labelled_as_one_by_one() -> None:
    drives = [drive(v) for _, v in SPEED_CASES] + [drive(**way) for _, way in PATH_CASES]
    speeds = [starts(drives[0], v) for _, v in SPEED_CASES] + [starts(drives[0], way.get("v", 10.0)) for _, way in PATH_CASES]
    lost = torch.full((1, 8, 3), math.nan, dtype=torch.float64)
    together = label(torch.cat([*drives, lost]), 0.5, torch.cat([*speeds, torch.ones(1)]))
    alone = [label(poses, 0.5, speed) for poses, speed in zip(drives, speeds, strict=True)]
    assert together.speed.tolist() == [int(one.speed) for one in alone] + [UNKNOWN]
    assert together.path.tolist() == [int(one.path) for one in alone] + [UNKNOWN]
    assert [SPEEDS[i] for i in together.speed[: len(SPEED_CASES)]] == [name for name, _ in SPEED_CASES]
    assert sum(counts(together).values()) == 2 * len(drives)
    assert counts(together)["Swerving"] == 2


def test_rules_are_configuration() -> None:
    poses = drive(side=across(3.5))
    senna = Rules(lane_change=4.0)
    assert PATHS[label(poses, 0.5, torch.tensor([10.0]), senna).path] == "Lane_Micro_Adjust"
    with pytest.raises(InputError, match=r"2 poses every 0.5 s are too short"):
        label(poses[:, :2], 0.5, torch.tensor([10.0]))


def test_labels_of_scenes() -> None:
    scene = example_scene(4)  # gentle changes of speed, straight on
    assert {PATHS[i] for i in labels_of(scene).path} == {"Straight_Strict"}
    assert {SPEEDS[i] for i in labels_of(scene).speed} <= {"Constant_Speed_Strict", "Constant_Speed_Loose"}
    without = dataclasses.replace(scene, human=torch.full_like(scene.human, math.nan))
    assert labels_of(without).speed.tolist() == labels_of(without).path.tolist() == [UNKNOWN] * 4


# -- answers -----------------------------------------------------------------------------------------------------------


def test_answers_are_parsed() -> None:
    assert parse("Mild_Decel, Right_LaneChange\n") == (SPEEDS.index("Mild_Decel"), PATHS.index("Right_LaneChange"))
    assert parse("mild decel linear,lane micro adjust") == (SPEEDS.index("Mild_Decel_Linear"), PATHS.index("Lane_Micro_Adjust"))
    assert parse("Full_Stop, Sight_Strict") == (SPEEDS.index("Full_Stop"), PATHS.index("Swerving"))
    assert set(ALIASES.values()) <= {*SPEEDS, *PATHS}
    assert len(SPEEDS) - len(SAME_SLOT) == 11


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("Mild_Brake, Swerving", r"no speed command 'Mild_Brake'. Did you mean 'Mild_"),
        ("Mild_Decel, Straight", r"no path command 'Straight'. Did you mean 'Straight_Strict'\? Path commands: Swerving, "),
        ("Swerving, Mild_Decel", r"no speed command 'Swerving'"),
        ("Mild_Decel", r'an answer is "<speed command>, <path command>"'),
        ("Mild_Decel, Swerving, Creeping", r"got 'Mild_Decel, Swerving, Creeping'"),
        ("", r"got ''"),
    ],
)
def test_answers_that_are_none(answer: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse(answer)


def test_recorded_answers(shared_real: Path) -> None:
    answers = read_answers(shared_real / "diffvla" / "vlm_cmd.zip")
    assert len(answers) == 109_200
    speeds, paths = (
        Counter(names[i] for i in column) for names, column in zip((SPEEDS, PATHS), zip(*answers.values(), strict=True), strict=True)
    )
    assert len(speeds) == 13
    assert speeds["Constant_Speed_Strict"] == 67_897
    assert paths["Straight_Strict"] == 63_190
    assert paths["Swerving"] == 13_703
    assert answers["7aa3305e92fb5f1b"] == parse("Mild_Decel, Right_LaneChange")


# -- commands ----------------------------------------------------------------------------------------------------------

ANSWERS = {"example-0-0": "Full_Stop, Swerving", "example-0-1": "Creeping, Straight_Strict\n"}


@pytest.fixture
def answers(tmp_path: Path) -> Path:
    path = tmp_path / "answers.json"
    path.write_text(json.dumps([{"image": "a/b.jpg", "token": token, "answer": answer} for token, answer in ANSWERS.items()]))
    return path


def commands(path: Path, **settings) -> irlvla.Reasoner:
    torch.manual_seed(0)
    return build("reasoner", {"name": "commands", "path": str(path), **settings}, width=WIDTH).eval()


def tokens_of(reasoner: irlvla.Reasoner, speed: str, path: str) -> torch.Tensor:
    """The language tokens of two commands."""
    table = reasoner.tokens
    return torch.stack([table.speed.weight[table.slots[SPEEDS.index(speed)]], table.path.weight[PATHS.index(path)]])


def unknown_of(reasoner: irlvla.Reasoner) -> torch.Tensor:
    return torch.stack([reasoner.tokens.speed.weight[-1], reasoner.tokens.path.weight[-1]])


def test_commands_under_the_kit(answers: Path, kit: Callable) -> None:
    kit("commands", path=str(answers))


@pytest.fixture
def kit() -> Callable:
    """The conformance kit, for settings that only a test knows."""

    def check(name: str, **settings) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results = irlvla.testing.check("reasoner", name, settings)
        assert [(result.check, result.problem or result.skipped) for result in results if result.problem or result.skipped] == []
        assert len(results) > 10

    return check


def test_commands_by_token(answers: Path) -> None:
    reasoner, obs = commands(answers), example_observation(3, cameras=0)
    with pytest.warns(UserWarning, match=r"answers.json has no commands for the scene 'example-0-2'.*Set missing=error to stop"):
        language = reasoner(obs).language
    assert language.shape == (3, 2, WIDTH)
    assert torch.equal(language[0], tokens_of(reasoner, "Full_Stop", "Swerving"))
    assert torch.equal(language[1], tokens_of(reasoner, "Creeping", "Straight_Strict"))
    assert torch.equal(language[2], unknown_of(reasoner))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it warned once
        reasoner(obs)
    assert reasoner.unanswered.count == 2


@pytest.mark.parametrize("token", ["example-0", "example-0-00", "xexample-0-0", "EXAMPLE-0-0", "a/b.jpg", ""])
def test_no_other_token_will_do(answers: Path, token: str) -> None:
    obs = dataclasses.replace(example_observation(1, cameras=0), token=(token,))
    with pytest.raises(InputError, match=r"has no commands for the scene '.*Set missing=unknown to go on"):
        commands(answers, missing="error")(obs)


def test_commands_are_dropped_in_training_alone(answers: Path) -> None:
    reasoner = commands(answers, dropout=0.3)
    obs = example_observation(1, cameras=0)[[0] * 2000]
    assert torch.equal(reasoner(obs).language, tokens_of(reasoner, "Full_Stop", "Swerving").expand(2000, -1, -1))
    torch.manual_seed(1)
    language = reasoner.train()(obs).language
    dropped = (language == unknown_of(reasoner)).flatten(1).all(1)
    kept = (language == tokens_of(reasoner, "Full_Stop", "Swerving")).flatten(1).all(1)
    assert (dropped | kept).all()  # both commands, or none
    assert 0.25 < dropped.float().mean() < 0.35
    torch.manual_seed(1)
    assert torch.equal(reasoner(obs).language, language)


def test_slots(tmp_path: Path) -> None:
    path = tmp_path / "two.json"
    path.write_text(json.dumps({"example-0-0": "Regenerative_Braking, Swerving", "example-0-1": "Controlled_Decel, Swerving"}))
    obs = example_observation(2, cameras=0)
    merged, apart = commands(path), commands(path, merged=False)
    assert merged.tokens.speed.weight.shape[0] == 12  # 11 and unknown
    assert apart.tokens.speed.weight.shape[0] == 14
    assert torch.equal(*merged(obs).language)
    assert not torch.equal(*apart(obs).language)


def test_forms_of_files(tmp_path: Path, answers: Path) -> None:
    (tmp_path / "mapping.json").write_text(json.dumps({**ANSWERS, "nothing": None}))
    with zipfile.ZipFile(tmp_path / "answers.zip", "w") as archive:
        archive.write(answers, "folder/answers.json")
    expected = {token: parse(answer) for token, answer in ANSWERS.items()}
    for name in ("answers.json", "mapping.json", "answers.zip"):
        assert read_answers(tmp_path / name) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"neither JSON nor a zip of it"),
        ("3", r"must hold a list of answers, or answers by token; it holds 3"),
        ('[{"token": "a"}, "b"]', r"entry 1 must hold a token and an answer, both as text; it is 'b'"),
        ('[{"token": 3, "answer": "Creeping, Swerving"}]', r"entry 0 must hold a token"),
        ('{"a": "Creeping, Swervin"}', r"entry 0, of the scene 'a': there is no path command 'Swervin'. Did you mean 'Swerving'"),
        ('{"a": "Creeping, Swerving", "a": "Full_Stop, Swerving"}', r"a name occurs twice"),
        (
            '[{"token": "a", "answer": "Creeping, Swerving"}, {"token": "a", "answer": "Full_Stop, Swerving"}]',
            r"two answers for the scene 'a'",
        ),
    ],
)
def test_files_of_something_else(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(FileError, match=message):
        commands(tmp_path / "bad.json")


def test_files_that_are_not_there(tmp_path: Path, answers: Path) -> None:
    with pytest.raises(FileError, match=r"answer.json does not exist. Did you mean 'answers.json'\?"):
        commands(tmp_path / "answer.json")
    with pytest.raises(FileError, match=r"neither JSON nor a zip"):
        commands(tmp_path)
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
        pass
    with pytest.raises(FileError, match=r"must hold one .json file; it holds none"):
        commands(tmp_path / "empty.zip")
    with pytest.raises(ConfigError, match=r"path: needs a value"):
        build("reasoner", "commands", width=WIDTH)


# -- driver ------------------------------------------------------------------------------------------------------------

SMALL = {"hidden": 32, "encoder": {"model": "lcnet_050", "strides": [32], "channels": 32}}

test_driver_blind = reasoner_checks("driver", cameras="none")
test_driver_front = pytest.mark.usefixtures("timm")(reasoner_checks("driver", **SMALL))
test_driver_all = pytest.mark.usefixtures("timm")(reasoner_checks("driver", cameras="all", detach=False, states=False, **SMALL))


def driver(**settings) -> irlvla.Reasoner:
    torch.manual_seed(0)
    return build("reasoner", {"name": "driver", "dropout": 0.0, **settings}, width=WIDTH)


@pytest.fixture(scope="module")
def drives() -> tuple[Observation, Scene]:
    """16 scenes of the embedded world, as its front camera sees them."""
    dataset = build("dataset", {"name": "synthetic", "count": 16, "size": [64, 96], "cameras": ["CAM_F0"]})
    items = [dataset[row] for row in range(16)]
    return Observation.cat(item[0] for item in items), Scene.cat(item[1] for item in items)


def test_driver_learns_the_commands_of_16_scenes(timm: None, drives: tuple[Observation, Scene]) -> None:
    (obs, scene), reasoner = drives, driver(**SMALL)
    assert len(set(labels_of(scene).speed.tolist())) > 2
    optimizer = torch.optim.AdamW(reasoner.parameters(), 3e-3)
    for _ in range(50):
        losses = reasoner.loss(reasoner(obs), scene)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    assert losses.keys() == {"speed", "path"}
    with torch.no_grad():
        features = reasoner.eval()(obs)
    accuracy = reasoner.accuracy(features, scene)
    assert accuracy["speed"].mean() == accuracy["path"].mean() == 1.0
    blank = dataclasses.replace(obs, images=torch.zeros_like(obs.images))
    assert not torch.allclose(reasoner(blank).predictions["speed_logits"], features.predictions["speed_logits"], atol=1e-2)


def test_driver_tokens_are_expected_embeddings(drives: tuple[Observation, Scene]) -> None:
    (obs, _), reasoner = drives, driver(cameras="none", merged=False).eval()
    features = reasoner(obs)
    speed = features.predictions["speed_logits"].softmax(-1)
    expected = sum(speed[:, i, None] * reasoner.tokens.speed.weight[i] for i in range(len(SPEEDS)))
    torch.testing.assert_close(features.language[:, 0], expected)
    assert features.language.shape == (16, 4, WIDTH)
    assert driver(cameras="none", states=False)(obs).language.shape == (16, 2, WIDTH)


@pytest.mark.parametrize("detach", [True, False])
def test_driver_gradients_from_the_planner(drives: tuple[Observation, Scene], detach: bool) -> None:
    reasoner = driver(cameras="none", detach=detach)
    reasoner(drives[0]).language.square().sum().backward()
    assert (reasoner.speed.weight.grad is None) == detach
    assert reasoner.tokens.speed.weight.grad.abs().sum() > 0


def test_driver_losses_are_means_over_scenes(drives: tuple[Observation, Scene]) -> None:
    (obs, scene), reasoner = drives, driver(cameras="none", counts={"Full_Stop": 3, "Constant_Speed_Strict": 90, "Swerving": 1})
    human = scene.human.clone()
    human[:5] = math.nan
    scene = dataclasses.replace(scene, human=human)

    def loss(rows: slice) -> torch.Tensor:
        return sum(reasoner.loss(reasoner(obs[rows]), scene[rows]).values())

    torch.testing.assert_close(loss(slice(None)), (loss(slice(0, 4)) + loss(slice(4, 8)) + loss(slice(8, 12)) + loss(slice(12, 16))) / 4)
    assert loss(slice(0, 4)) == 0.0  # nobody drove
    accuracy = reasoner.accuracy(reasoner(obs), scene)
    assert accuracy["speed"].isnan().tolist() == [True] * 5 + [False] * 11


def test_rare_commands_weigh_more() -> None:
    weights = balanced({"Full_Stop": 10, "Constant_Speed_Strict": 5000}, SPEEDS)
    rare, common = weights[SPEEDS.index("Full_Stop")], weights[SPEEDS.index("Constant_Speed_Strict")]
    assert rare > 10 * common
    assert (10 * rare + 5000 * common).item() == pytest.approx(5010, rel=1e-5)
    assert torch.equal(balanced({"Full_Stop": 10}, PATHS), torch.ones(9))
    with pytest.raises(ConfigError, match=r"no command 'Full_Stopp'. Did you mean 'Full_Stop'"):
        balanced({"Full_Stopp": 10}, SPEEDS)
    with pytest.raises(ConfigError, match=r"at least 0"):
        balanced({"Full_Stop": -1}, SPEEDS)


def test_directions_of_patches() -> None:
    """A camera that looks to the left: the middle of its image is y, the left half looks further back to ahead as x grows."""
    camera = torch.tensor([[50.0, 0.0, 47.5], [0.0, 50.0, 31.5], [0.0, 0.0, 1.0]])[None, None]
    mount = torch.eye(4)[None, None].clone()
    mount[0, 0, :3, :3] = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, -1.0, 0.0]])  # x right = ego x, z forward = ego y
    rays = directions(camera, mount, (1, 3), (64, 96))[0, 0]
    torch.testing.assert_close(rays[1], torch.tensor([0.0, 1.0, 0.0]))
    torch.testing.assert_close(rays[2], torch.nn.functional.normalize(torch.tensor([32.0, 50.0, 0.0]), dim=0))
    torch.testing.assert_close(rays[0] * torch.tensor([-1.0, 1.0, 1.0]), rays[2])


def test_driver_in_half_precision(timm: None, drives: tuple[Observation, Scene]) -> None:
    obs, scene = drives
    with torch.autocast("cpu", torch.bfloat16):
        features = (reasoner := driver(**SMALL))(obs)
        losses = reasoner.loss(features, scene)
    assert {value.dtype for value in losses.values()} == {torch.float32}
    assert features.language.isfinite().all()


def test_driver_needs_what_it_reads(timm: None) -> None:
    obs = example_observation(2, cameras=0)
    with pytest.raises(InputError, match=r"needs images with their calibration.*set cameras=none"):
        driver(**SMALL)(obs)
    with pytest.raises(InputError, match=r"reads 4 frames of history, the observation has 2"):
        driver(cameras="none")(dataclasses.replace(obs, ego=obs.ego[:, -2:]))


# -- vision-language models --------------------------------------------------------------------------------------------

CHAT = (
    "{% for message in messages %}USER: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %} ASSISTANT: {% endif %}"
)
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def tokenizer_of(t: ModuleType, special: list[str], **named: str):
    """A tokenizer that has learnt the words of the prompt."""
    tokenizers = importlib.import_module("tokenizers")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=500, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    model.train_from_iterator([PROMPT, *VIEWS, *(name.replace("_", " ") for name in SPEEDS + PATHS)], trainer)
    return t.PreTrainedTokenizerFast(tokenizer_object=model, pad_token=special[0], eos_token=special[1], extra_special_tokens=named)


def llava(t: ModuleType):
    words = tokenizer_of(t, ["<pad>", "</s>", "<image>"], image_token="<image>")
    vision = t.CLIPVisionConfig(**VISION, image_size=28, patch_size=14, projection_dim=32)
    text, image = t.LlamaConfig(vocab_size=len(words), **TEXT), words.convert_tokens_to_ids("<image>")
    config = t.LlavaConfig(vision_config=vision, text_config=text, image_token_index=image)
    images = t.CLIPImageProcessor(size={"height": 28, "width": 28}, crop_size={"height": 28, "width": 28})
    chat = CHAT.replace("IMAGE", "<image>")
    settings = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return t.LlavaForConditionalGeneration(config), t.LlavaProcessor(images, words, **settings, chat_template=chat)


def qwen(t: ModuleType):
    """Its positions have three axes, and after the images they go on from another place than the count of tokens."""
    marks = {"vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>", "image": "<|image_pad|>", "video": "<|video_pad|>"}
    words = tokenizer_of(t, ["<|endoftext|>", "<|im_end|>", *marks.values()])
    text = {**TEXT, "vocab_size": len(words), "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 32, "fullatt_block_indexes": [1]}
    ids = {f"{name}_token_id": words.convert_tokens_to_ids(mark) for name, mark in marks.items()}
    config = t.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
    images = t.Qwen2VLImageProcessor(size={"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 8})
    chat = CHAT.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    processor = t.Qwen2_5_VLProcessor(images, words, t.Qwen2VLVideoProcessor(), chat_template=chat)
    return t.Qwen2_5_VLForConditionalGeneration(config), processor


def idefics(t: ModuleType):
    words = tokenizer_of(t, ["<pad>", "<end_of_utterance>", "<fake_token_around_image>", "<image>", "<global-img>"])
    text = t.LlamaConfig(vocab_size=len(words), pad_token_id=0, **TEXT)
    image = words.convert_tokens_to_ids("<image>")
    vision = {**VISION, "image_size": 28, "patch_size": 7}
    config = t.Idefics3Config(text_config=text, vision_config=vision, scale_factor=2, image_token_id=image, pad_token_id=0)
    images = t.Idefics3ImageProcessor(size={"longest_edge": 28}, max_image_size={"longest_edge": 28}, do_image_splitting=False)
    chat = CHAT.replace("IMAGE", "<image>")
    return t.Idefics3ForConditionalGeneration(config), t.Idefics3Processor(images, words, image_seq_len=4, chat_template=chat)


def internvl(t: ModuleType):
    named = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"}
    words = tokenizer_of(t, ["<|endoftext|>", "<|im_end|>", *named.values()], **named)
    text, image = t.Qwen2Config(vocab_size=len(words), **TEXT), words.convert_tokens_to_ids("<IMG_CONTEXT>")
    vision = {**VISION, "image_size": [28, 28], "patch_size": [7, 7]}
    config = t.InternVLConfig(text_config=text, vision_config=vision, image_token_id=image, image_seq_length=4)
    images = t.GotOcr2ImageProcessor(size={"height": 28, "width": 28}, crop_to_patches=False)
    chat = CHAT.replace("IMAGE", "<IMG_CONTEXT>")
    processor = t.InternVLProcessor(images, words, t.InternVLVideoProcessor(), image_seq_length=4, chat_template=chat)
    return t.InternVLForConditionalGeneration(config), processor


def save(make: Callable, t: ModuleType, folder: Path, seed: int = 0) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for part in make(t):
            part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", params=[llava, qwen, idefics, internvl], ids=lambda make: make.__name__)
def family(request: pytest.FixtureRequest, transformers: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random model of each family, and its processor."""
    return save(request.param, transformers, tmp_path_factory.mktemp("model"))


@pytest.fixture
def model(transformers: ModuleType, tmp_path: Path) -> Path:
    """A small random model."""
    return save(llava, transformers, tmp_path / "model")


def vlm(model: Path | str, **settings) -> irlvla.Reasoner:
    torch.manual_seed(0)
    return build("reasoner", {"name": "vlm", "model": str(model), "hidden_width": 32, **settings}, width=WIDTH).eval()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[SimpleNamespace]:
    """What models were asked, and what they said."""
    found, judge = [], VisionLanguageModel.judge

    def watched(self, parts, groups, layout, device):
        judged, hidden = judge(self, parts, groups, layout, device)
        found.append(SimpleNamespace(vlm=self, parts=parts, groups=groups, layout=layout, judged=judged, hidden=hidden))
        return judged, hidden

    monkeypatch.setattr(VisionLanguageModel, "judge", watched)
    return found


def slowly(vlm: VisionLanguageModel, parts: list, answer: str, layout: str) -> tuple[torch.Tensor, list[int]]:
    """Log-likelihoods of the tokens of one answer, in one pass over the prompt and the answer."""
    (network, processor), answer = vlm.load("cpu"), answer
    prompt = _encode(processor, parts, layout)
    ids = processor.tokenizer(answer, add_special_tokens=False)["input_ids"]
    more, start = torch.tensor([ids]), prompt["input_ids"].shape[1]
    whole = {**prompt, "input_ids": torch.cat([prompt["input_ids"], more], 1)}
    for name, value in (("attention_mask", 1), ("mm_token_type_ids", 0)):
        if name in prompt:
            whole[name] = torch.cat([prompt[name], torch.full_like(more, value)], 1)
    with torch.no_grad():
        log = network(**whole).logits[0].log_softmax(-1)
    return torch.stack([log[start + place - 1, token] for place, token in enumerate(ids)]), ids


@pytest.mark.parametrize("settings", [{}, {"batch": 5, "format": "plain", "speed_lead": "", "path_lead": ""}], ids=["chat", "plain"])
def test_likelihoods_are_those_of_one_pass_per_command(family: Path, settings: dict, asked: list) -> None:
    vlm(family, **settings)(example_observation(1, cameras=3))
    (question,) = asked
    assert [len(group) for group in question.groups] == [13, 9]
    for answers, judged in zip(question.groups, question.judged, strict=True):
        passes = [slowly(question.vlm, question.parts, answer, question.layout) for answer in answers]
        lead = next(i for i, column in enumerate(zip(*(ids for _, ids in passes), strict=False)) if len(set(column)) > 1)
        assert (lead == 0) == ("speed_lead" in settings)
        torch.testing.assert_close(judged.log, torch.stack([log[lead:].sum() for log, _ in passes]), atol=1e-4, rtol=1e-5)
        assert judged.tokens.tolist() == [len(ids) - lead for _, ids in passes]


def test_families_look_at_the_images(family: Path, asked: list) -> None:
    obs = example_observation(1, cameras=1)
    for images in (obs.images, 255 - obs.images):
        vlm(family)(dataclasses.replace(obs, images=images))
    assert not torch.equal(asked[0].judged[0].log, asked[1].judged[0].log)


def test_vlm_tokens(model: Path, asked: list) -> None:
    obs, reasoner = example_observation(2, cameras=2), vlm(model, merged=False)
    language = reasoner(obs).language
    assert language.shape == (2, 3, WIDTH)
    speed, path = asked[1].judged
    table = reasoner.tokens
    torch.testing.assert_close(language[1, 0], (speed.log.exp() / speed.log.exp().sum()) @ table.speed.weight[:13])
    torch.testing.assert_close(language[1, 1], (path.log.exp() / path.log.exp().sum()) @ table.path.weight[:9])
    torch.testing.assert_close(language[1, 2], table.project(asked[1].hidden))
    likeliest = vlm(model, merged=False, expected=False)(obs).language
    assert torch.equal(likeliest[1, 0], table.speed.weight[speed.log.argmax()])
    mean = vlm(model, merged=False, expected=False, normalised=True)(obs).language
    assert torch.equal(mean[1, 1], table.path.weight[(path.log / path.tokens).argmax()])
    assert vlm(model, hidden_width=0)(obs).language.shape == (2, 2, WIDTH)


def test_vlm_prompt(model: Path, asked: list) -> None:
    obs = example_observation(2, cameras=3)  # ahead, and 120 degrees to either side
    vlm(model)(obs)
    vlm(model, views=["BACK RIGHT", "FRONT"], words={"Full_Stop": "halt"}, prompt="{command}, {speed:.0f}, {paths}. {prompt}")(obs)
    texts = ["|".join(part if isinstance(part, str) else str(part.size) for part in question.parts) for question in asked]
    speed = obs.ego[0, -1, 3:5].norm()
    assert texts[0].startswith(
        "<FRONT VIEW>:\n|(96, 64)|\n|<BACK LEFT VIEW>:\n|(96, 64)|\n|<BACK RIGHT VIEW>:\n|(96, 64)|\n|Your current speed"
    )
    assert f"speed is {speed:.1f} m/s, the navigation command is 'turn left'." in texts[0]
    assert "SPEED is one of Emergency Decel, Full Stop, " in texts[0]
    assert texts[0].endswith("PATH is one of " + ", ".join(name.replace("_", " ") for name in PATHS) + ". Drive on, left.")
    assert texts[3].startswith("<BACK RIGHT VIEW>:\n|(96, 64)|\n|<FRONT VIEW>:\n|(96, 64)|\n|go straight, ")
    assert texts[3].endswith("Drive on, straight.")
    assert asked[2].groups[0][:2] == ["SPEED plan: Emergency Decel.", "SPEED plan: halt."]
    seen = torch.from_numpy(importlib.import_module("numpy").array(asked[2].parts[4])).permute(2, 0, 1)
    assert torch.equal(seen, obs.images[0, 0])
    floats = dataclasses.replace(obs, images=obs.images.float() / 255)
    vlm(model)(floats)
    assert torch.equal(asked[4].judged[0].log, asked[0].judged[0].log)


def test_vlm_under_the_kit(model: Path, tmp_path: Path, kit: Callable) -> None:
    kit("vlm", model=str(model), hidden_width=32, cache=str(tmp_path / "cache"))
    kit("vlm", model=str(model))


def test_the_model_is_no_part_of_the_policy(model: Path, asked: list) -> None:
    reasoner = vlm(model)
    before = dict(reasoner.named_parameters())
    state = torch.get_rng_state()
    reasoner(example_observation(1, cameras=1))
    assert torch.equal(state, torch.get_rng_state())
    with torch.autocast("cpu", torch.bfloat16):
        reasoner(example_observation(1, cameras=1))
    assert torch.equal(asked[0].judged[0].log, asked[1].judged[0].log)
    assert dict(reasoner.named_parameters()).keys() == before.keys() == reasoner.state_dict().keys()
    assert sum(p.numel() for p in reasoner.parameters()) < 2000
    network, _ = reasoner.vlm.load("cpu")
    assert copy.deepcopy(reasoner).vlm.load("cpu")[0] is network
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert pickle.loads(pickle.dumps(reasoner)).vlm._loaded is None


def files(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*.safetensors"))


def test_cached_answers(model: Path, tmp_path: Path, asked: list) -> None:
    obs, cache = example_observation(3, cameras=2), tmp_path / "cache"
    first = vlm(model, cache=str(cache))(obs).language
    assert len(asked) == len(files(cache)) == 3
    for settings in ({}, {"expected": False}, {"normalised": True}, {"hidden_width": 0}, {"batch": 3}):
        again = vlm(model, cache=str(cache), **settings)(obs[[2, 0, 1]]).language
        assert torch.equal(again[[1, 2, 0]], first) == (settings in ({}, {"batch": 3}))
    assert len(asked) == 3
    shutil.rmtree(model)
    assert torch.equal(vlm(model, cache=str(cache))(obs).language, first)  # without the model, too
    with pytest.raises(FileError, match=r"the model .*model is neither a folder here nor a name on the Hub"):
        vlm(model, cache=str(cache))(example_observation(1, cameras=2, seed=1))


def test_what_answers_depend_on(model: Path, tmp_path: Path, asked: list) -> None:
    obs, cache = example_observation(1, cameras=2), str(tmp_path / "cache")
    vlm(model, cache=cache)(obs)
    others = [
        dataclasses.replace(obs, token=("other",)),
        dataclasses.replace(obs, images=torch.zeros_like(obs.images)),
        dataclasses.replace(obs, command=obs.command + 1),
        dataclasses.replace(obs, ego=obs.ego * 1.1),
        dataclasses.replace(obs, prompt=("Mind the dog.",)),
        dataclasses.replace(obs, camera_to_ego=obs.camera_to_ego.flip(1)),
    ]
    for count, other in enumerate(others, 2):
        vlm(model, cache=cache)(other)
        assert len(asked) == count
    for settings in ({"end": "!"}, {"views": ["FRONT"]}, {"dtype": "bfloat16"}, {"format": "plain"}, {"path_lead": "PATH: "}):
        vlm(model, cache=cache, **settings)(obs)
    assert len(asked) == len(files(Path(cache))) == 7 + 5
    vlm(model, cache=cache, dropout=0.5, merged=False, device="cpu")(obs)
    assert len(asked) == 12


@pytest.mark.parametrize("damage", [lambda content: content[:100], lambda content: content[:-8] + bytes(8), lambda content: b""])
def test_damaged_answers_are_asked_again(model: Path, tmp_path: Path, asked: list, damage: Callable) -> None:
    obs, cache = example_observation(1, cameras=1), tmp_path / "cache"
    first = vlm(model, cache=str(cache))(obs).language
    (file,) = files(cache)
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    with pytest.warns(UserWarning, match=r"safetensors .*The model is asked again"):
        assert torch.equal(vlm(model, cache=str(cache))(obs).language, first)
    assert len(asked) == 2
    assert file.read_bytes() == whole


def test_answers_of_another_model(model: Path, transformers: ModuleType, tmp_path: Path) -> None:
    obs, cache = example_observation(1, cameras=1), tmp_path / "cache"
    vlm(model, cache=str(cache))(obs)
    save(llava, transformers, model, seed=1)
    with pytest.raises(FileError, match=r"are of another .*model than there is now. Remove them, or name another cache"):
        vlm(model, cache=str(cache))(obs)
    (manifest,) = cache.rglob("model.json")
    manifest.write_text("{")
    with pytest.raises(FileError, match=r"model.json cannot be read"):
        vlm(model, cache=str(cache))(obs)


def test_scenes_that_may_not_be_asked(model: Path, tmp_path: Path, asked: list) -> None:
    obs, cache = example_observation(2, cameras=1), str(tmp_path / "cache")
    known = vlm(model, cache=cache)(obs[[0]]).language
    reasoner = vlm(model, cache=cache, uncached="unknown")
    with pytest.warns(UserWarning, match=r"cache has no commands for the scene 'example-0-1'.*Set uncached=ask"):
        language = reasoner(obs).language
    torch.testing.assert_close(language[:1], known)
    assert torch.equal(language[1], torch.cat([unknown_of(reasoner), reasoner.tokens.unknown[None]]))
    with pytest.raises(InputError, match=r"no commands for the scene 'example-0-1'"):
        vlm(model, cache=cache, uncached="error")(obs)
    assert len(asked) == 1
    with pytest.raises(ConfigError, match=r"uncached=error needs a cache"):
        vlm(model, uncached="error")


def test_vlm_commands_are_dropped_in_training(model: Path, tmp_path: Path) -> None:
    reasoner = vlm(model, cache=str(tmp_path / "cache"), dropout=0.5).train()
    language = reasoner(example_observation(1, cameras=1)[[0] * 60]).language
    dropped = (language == torch.cat([unknown_of(reasoner), reasoner.tokens.unknown[None]])).flatten(1).all(1)
    assert 15 < dropped.sum() < 45
    assert torch.equal(*language[~dropped][:2])


def test_a_policy_with_a_vlm(model: Path, tmp_path: Path, asked: list) -> None:
    """It is saved without the model, and comes back where the model is not."""
    spec = {"name": "vlm", "model": str(model), "hidden_width": 32, "cache": str(tmp_path / "cache")}
    obs = example_observation(2, cameras=2)
    policy = irlvla.Policy(
        build("backbone", "status"), build("planner", "constant_velocity", width=64), build("reasoner", spec, width=64)
    ).eval()
    expected = policy(obs).language
    saved = irlvla.save_pretrained(policy, tmp_path / "policy")
    assert (saved / "model.safetensors").stat().st_size < 200_000
    shutil.rmtree(model)
    assert torch.equal(irlvla.from_pretrained(saved)(obs).language, expected)
    assert len(asked) == 2


def test_models_on_the_hub(model: Path, tmp_path: Path, asked: list, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def download(name: str, *, revision: str | None, local_files_only: bool, **_) -> str:
        calls.append((name, revision, local_files_only))
        if revision == "gone":
            raise RuntimeError("no such\nrevision")
        return str(model)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    obs, cache = example_observation(1, cameras=1), str(tmp_path / "cache")
    vlm("acme/sees", revision="v1", cache=cache)(obs)
    assert calls[0] == ("acme/sees", "v1", False)
    assert len(asked) == 1
    with pytest.raises(FileError, match=r"acme/sees is no folder here, and cannot be downloaded from the Hub: no such revision"):
        vlm("acme/sees", revision="gone")(obs)


def test_models_that_cannot_be_used(model: Path, tmp_path: Path, transformers: ModuleType) -> None:
    obs = example_observation(1, cameras=1)
    with pytest.raises(FileError, match=r"nothing is neither a folder here nor a name on the Hub"):
        vlm(tmp_path / "nothing")(obs)
    with pytest.raises(InputError, match=r"revision='v1' is for a model on the Hub"):
        vlm(model, revision="v1")(obs)
    (model / "config.json").write_text("{}")
    with pytest.raises(FileError, match=r"is no image-text-to-text model that transformers can load"):
        vlm(model)(obs)
    transformers.CLIPVisionConfig().save_pretrained(model)
    with pytest.raises(FileError, match=r"is no image-text-to-text model that transformers can load"):
        vlm(model)(obs)


def test_code_of_a_model_is_not_run(model: Path, tmp_path: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    code = dict.fromkeys(("AutoConfig", "AutoModelForImageTextToText"), "evil.Evil")
    (model / "config.json").write_text(json.dumps({**config, "model_type": "evil", "auto_map": code}))
    (model / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(FileError, match=r"is no image-text-to-text model"):
        vlm(model)(example_observation(1, cameras=1))
    assert not (tmp_path / "ran").exists()


def test_vlm_mistakes(model: Path) -> None:
    obs = example_observation(1, cameras=1)
    with pytest.raises(InputError, match=r"needs images and camera_to_ego.*give the dataset a size"):
        vlm(model)(example_observation(1, cameras=0))
    with pytest.raises(InputError, match=r"has no view 'BACK'; there are FRONT"):
        vlm(model, views=["BACK"])(obs)
    with pytest.raises(InputError, match=r"hidden state is 32 wide; write hidden_width=32"):
        vlm(model, hidden_width=64)(obs)
    with pytest.raises(InputError, match=r"'SPEED plan: Mild Accel.' and 'SPEED plan: Mild Accel.' do not exclude each other"):
        vlm(model, words={"Mild_Accel_Linear": "Mild Accel"})(obs)
    with pytest.raises(ConfigError, match=r"no field \{sped\}. Did you mean 'speed'"):
        vlm(model, prompt="{sped}")
    with pytest.raises(ConfigError, match=r"'gpu' is no device; write cuda"):
        vlm(model, device="gpu")
    with pytest.raises(ConfigError, match=r"no command 'Mild_Acel'. Did you mean 'Mild_Accel'"):
        vlm(model, words={"Mild_Acel": "faster"})
    (model / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match=r"LlavaProcessor has no chat template; set format=plain"):
        vlm(model)(obs)


def test_an_end_mark_tells_commands_apart(model: Path, asked: list) -> None:
    """Mild Decel is how Mild Decel Linear begins: as texts alone, the shorter one can never be less likely."""
    _, processor = VisionLanguageModel(str(model)).load("cpu")
    with pytest.raises(InputError, match=r"do not exclude each other.*end them with a mark"):
        _tokens(processor.tokenizer, ["Mild Decel", "Mild Decel Linear"])
    assert len(_tokens(processor.tokenizer, ["Mild Decel.", "Mild Decel Linear."])) == 2
    assert _shared([[1, 2, 3], [1, 2, 4, 5]]) == 2
