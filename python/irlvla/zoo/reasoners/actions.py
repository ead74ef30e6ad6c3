"""The commands of semantic reasoning: their names, recorded answers, and which ones a human's drive follows.

IRL-VLA's reasoner gives one of 13 speed commands and one of 9 path commands. Their names are those of the answers that were
recorded for DiffVLA ("Mild_Decel, Right_LaneChange"). What they mean was not published: the rules below are ours, with borders
from Senna and nuPlan where these have one, and every border is configuration.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from irlvla import components
from irlvla.errors import InputError, did_you_mean
from irlvla.types import Scene, StateIndex

# -- names -------------------------------------------------------------------------------------------------------------

SPEEDS = (
    *("Emergency_Decel", "Full_Stop", "Creeping", "Regenerative_Braking", "Controlled_Decel", "Mild_Decel_Linear", "Mild_Decel"),
    *("Mild_Accel", "Mild_Accel_NonLinear", "Mild_Accel_Linear", "Aggressive_Accel", "Constant_Speed_Loose", "Constant_Speed_Strict"),
)
PATHS = (
    *("Swerving", "Sharp_Left_Turn", "Slight_Left_Turn", "Sharp_Right_Turn", "Slight_Right_Turn"),
    *("Straight_Strict", "Left_LaneChange", "Lane_Micro_Adjust", "Right_LaneChange"),
)
UNKNOWN = -1  #: in the place of a command's number: none was given

#: Other names that recorded answers and DiffVLA's code use.
ALIASES = {"Sight_Strict": "Swerving"}

#: Speed commands that DiffVLA encodes as another one: 13 names, 11 slots.
SAME_SLOT = {"Regenerative_Braking": "Controlled_Decel", "Mild_Accel": "Mild_Accel_NonLinear"}


class Commands(NamedTuple):
    """A command of each kind for B scenes, by number: its place in `SPEEDS` or `PATHS`, or `UNKNOWN`."""

    speed: Int[Tensor, " B"]
    path: Int[Tensor, " B"]


def parse(answer: str) -> tuple[int, int]:
    """The numbers of the two commands of an answer "<speed>, <path>". Case does not matter, nor whether words are joined by "_" or a space.

    Raises:
        InputError: it is not two commands.
    """
    words = [word.strip() for word in answer.split(",")] if isinstance(answer, str) else []
    if len(words) != 2:
        raise InputError(f'an answer is "<speed command>, <path command>", as in "{SPEEDS[-1]}, {PATHS[5]}"; got {answer!r:.80}')
    return _number("speed", words[0], SPEEDS), _number("path", words[1], PATHS)


def _number(kind: str, word: str, names: Sequence[str]) -> int:
    known = {name.lower(): names.index(ALIASES.get(name, name)) for name in (*names, *ALIASES) if ALIASES.get(name, name) in names}
    number = known.get(re.sub(r"[\s_]+", "_", word).lower())
    if number is None:
        raise InputError(f"there is no {kind} command {word!r:.40}. {did_you_mean(word, names)}{kind.title()} commands: {', '.join(names)}")
    return number


# -- labels ------------------------------------------------------------------------------------------------------------


class Rules(components.Config):
    """Where one command ends and the next begins. Of each kind the first rule that holds gives the command.

    Speed, with v(t) the speed between two poses, v(0) that at t = 0, and the change d the v(t) - v(0) farthest from zero:
    strong braking; at a stand in the end; slow throughout; d small; else faster or slower, told apart by the strongest rate
    within a second and by whether v(t) is a straight line.

    Path: a change of heading is a turn, whatever lies beside the way. Otherwise the way is compared with an arc that begins
    straight ahead and ends with the same small change of heading, so that a bend of the road is not taken for a lane change: what
    leaves the arc and comes back swerves, what ends far beside it has changed lanes. A lane change that is still under way at
    the end counts by its heading.
    """

    emergency: float = Field(4.05, gt=0, description="Emergency_Decel brakes so hard [m/s^2]: uncomfortable to nuPlan (min_lon_accel)")
    standing: float = Field(0.5, gt=0, description="Full_Stop ends slower than this, also where the car never moved [m/s]")
    creeping: float = Field(2.0, gt=0, description="Creeping is never faster than this: a brisk walk [m/s]")
    strict: float = Field(1.0, gt=0, description="Constant_Speed_Strict stays this near to the speed at t = 0 [m/s]")
    loose: float = Field(3.0, gt=0, description="Constant_Speed_Loose stays this near to it: Senna's KEEP [m/s]")
    aggressive: float = Field(2.4, gt=0, description="Aggressive_Accel gains speed faster than this: uncomfortable to nuPlan [m/s^2]")
    mild: float = Field(2.0, gt=0, description="Mild_Decel brakes less; above are Regenerative_Braking and Controlled_Decel [m/s^2]")
    linear: float = Field(0.1, gt=0, description="a linear change, and Regenerative_Braking, leaves a straight line by this share of d")
    pause: float = Field(0.2, ge=0, description="Mild_Accel_NonLinear never loses more speed than this; Mild_Accel does [m/s]")
    turn: float = Field(5.0, gt=0, description="a turn changes the heading by this: Senna's [degrees]")
    sharp: float = Field(30.0, gt=0, description="a sharp turn by this [degrees]")
    swerving: float = Field(1.0, gt=0, description="Swerving leaves the arc by this, and comes at least half the way back [m]")
    lane_change: float = Field(
        2.0, gt=0, description="a lane change ends this far beside the arc: more than half a lane; Senna asks for 4 m, of the plain offset"
    )
    adjustment: float = Field(0.5, gt=0, description="Lane_Micro_Adjust ends this far beside it [m]")


def label(human: Float[Tensor, "B T 3"], dt: float, speed: Float[Tensor, " B"], rules: Rules | None = None) -> Commands:
    """The commands that drives follow; `UNKNOWN` where one is not recorded (NaN).

    Args:
        human: poses every `dt` seconds from `dt` on, ego frame.
        speed: at t = 0 [m/s].

    Raises:
        InputError: the drives are too short to tell: 1.5 s are needed.
    """
    if human.shape[1] * dt < 1.5 or human.shape[1] < 3:
        raise InputError(f"{human.shape[1]} poses every {dt} s are too short a drive to label: at least 3 poses and 1.5 s are needed")
    rules = rules or Rules.model_validate({})
    poses = torch.cat([torch.zeros_like(human[:, :1]), human], 1).double()
    known = poses.isfinite().flatten(1).all(1) & speed.isfinite()
    speeds, paths = _speeds(poses, dt, speed.double(), rules), _paths(poses, rules)
    return Commands(speeds.where(known, UNKNOWN), paths.where(known, UNKNOWN))


def labels_of(scene: Scene, rules: Rules | None = None) -> Commands:
    """The commands that the humans of B scenes follow. It looks into the future: for supervision only."""
    return label(scene.human, scene.human_dt, scene.ego[:, [StateIndex.VX, StateIndex.VY]].norm(dim=-1), rules)


def counts(commands: Commands) -> dict[str, int]:
    """How often each command occurs, by name; those that do not are left out."""
    pairs = [(SPEEDS, commands.speed), (PATHS, commands.path)]
    return dict(Counter(names[number] for names, numbers in pairs for number in numbers.tolist() if number != UNKNOWN))


def _speeds(poses: Float[Tensor, "B T 3"], dt: float, start: Float[Tensor, " B"], rules: Rules) -> Int[Tensor, " B"]:
    v = poses[..., :2].diff(dim=1).norm(dim=-1) / dt  # between two poses
    second = max(1, min(round(1.0 / dt), v.shape[1] - 1))
    rate = (v[:, second:] - v[:, :-second]) / (second * dt)
    change = (v - start[:, None]).gather(1, (v - start[:, None]).abs().argmax(1, keepdim=True))[:, 0]
    time = torch.linspace(-1.0, 1.0, v.shape[1], dtype=v.dtype, device=v.device)
    line = v.mean(1, keepdim=True) + time * (v @ time / (time @ time))[:, None]
    straight = (v - line).abs().amax(1) <= rules.linear * change.abs()
    braking, faster = -rate.amin(1), change > 0
    return _first(
        SPEEDS,
        {
            "Emergency_Decel": braking >= rules.emergency,
            "Full_Stop": v[:, -1] < rules.standing,
            "Creeping": (v.amax(1) < rules.creeping) & (start < rules.creeping),
            "Constant_Speed_Strict": change.abs() < rules.strict,
            "Constant_Speed_Loose": change.abs() < rules.loose,
            "Aggressive_Accel": faster & (rate.amax(1) > rules.aggressive),
            "Mild_Accel_Linear": faster & straight,
            "Mild_Accel_NonLinear": faster & ((v.cummax(1).values - v).amax(1) <= rules.pause),
            "Mild_Accel": faster,
            "Mild_Decel_Linear": straight & (braking < rules.mild),
            "Mild_Decel": braking < rules.mild,
            "Regenerative_Braking": straight,
            "Controlled_Decel": torch.ones_like(faster),
        },
    )


def _paths(poses: Float[Tensor, "B T 3"], rules: Rules) -> Int[Tensor, " B"]:
    turns = poses[..., 2].diff(dim=1)
    heading = torch.atan2(turns.sin(), turns.cos()).sum(1)  # beyond half a circle, too
    x, y = poses[..., 0], poses[..., 1]
    arc = x * x * (heading / 2).tan()[:, None] / x[:, -1:].abs().clamp(min=1.0)
    beside = y - arc
    offset, farthest = beside[:, -1], beside.abs().amax(1)
    turn, sharp = math.radians(rules.turn), math.radians(rules.sharp)
    return _first(
        PATHS,
        {
            "Sharp_Left_Turn": heading >= sharp,
            "Sharp_Right_Turn": heading <= -sharp,
            "Slight_Left_Turn": heading >= turn,
            "Slight_Right_Turn": heading <= -turn,
            "Swerving": (farthest >= rules.swerving) & (offset.abs() <= farthest / 2),
            "Left_LaneChange": offset >= rules.lane_change,
            "Right_LaneChange": offset <= -rules.lane_change,
            "Lane_Micro_Adjust": offset.abs() >= rules.adjustment,
            "Straight_Strict": torch.ones_like(offset, dtype=torch.bool),
        },
    )


def _first(names: Sequence[str], rules: Mapping[str, Tensor]) -> Int[Tensor, " B"]:
    """The number of the first command whose rule holds; that of the last holds always."""
    holds = torch.stack(list(rules.values()))
    return torch.tensor([names.index(name) for name in rules], device=holds.device)[holds.int().argmax(0)]
