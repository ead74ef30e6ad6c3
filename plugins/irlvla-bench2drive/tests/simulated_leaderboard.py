"""CARLA and its leaderboard as far as an agent sees them: the classes that it imports, the order of its calls, the formats of its
sensors, and what becomes of its errors. The car is a bicycle on a plane.
"""

from __future__ import annotations

import importlib
import json
import math
import sys
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from irlvla_bench2drive.__main__ import IN_CARLA

TICK = 0.05
LATITUDE, LONGITUDE = 35.0, 110.0  # reference of the map
EARTH_RADIUS = 6378137.0
GNSS_NOISE = 0.000005  # the leaderboard's [degrees]


class RoadOption(Enum):
    VOID = -1
    LEFT = 1
    RIGHT = 2
    STRAIGHT = 3
    LANEFOLLOW = 4
    CHANGELANELEFT = 5
    CHANGELANERIGHT = 6


@dataclass
class VehicleControl:
    throttle: float = 0.0
    steer: float = 0.0
    brake: float = 0.0
    hand_brake: bool = False
    manual_gear_shift: bool = False


@dataclass
class Car:
    """A car in CARLA's world: y to the south, yaw clockwise, its place that of the rear axle."""

    x: float = 0.0
    y: float = 0.0
    yaw: float = 0.0
    speed: float = 0.0
    acceleration: float = 0.0
    yaw_rate: float = 0.0
    applied: list[VehicleControl] = field(default_factory=list)

    def apply_control(self, control: VehicleControl) -> None:
        self.applied.append(control)

    def move(self, control: VehicleControl) -> None:
        self.acceleration = 4.0 * control.throttle - (8.0 if control.brake > 0.5 else 0.3) * (self.speed > 0.0)
        self.speed = max(0.0, self.speed + self.acceleration * TICK)
        self.yaw_rate = self.speed / 2.85 * math.tan(math.radians(60.0) * control.steer)
        self.yaw += self.yaw_rate * TICK
        self.x += self.speed * TICK * math.cos(self.yaw)
        self.y += self.speed * TICK * math.sin(self.yaw)


def to_gps(x: float, y: float) -> tuple[float, float]:
    """Latitude and longitude as CARLA gives them."""
    scale = math.cos(math.radians(LATITUDE))
    east = scale * math.radians(LONGITUDE) * EARTH_RADIUS + x
    north = scale * EARTH_RADIUS * math.log(math.tan(math.radians(90.0 + LATITUDE) / 2.0)) - y
    return 360.0 * math.atan(math.exp(north / (EARTH_RADIUS * scale))) / math.pi - 90.0, math.degrees(east / (EARTH_RADIUS * scale))


class AutonomousAgent:
    """The base class, as Bench2Drive has it."""

    hero: Car

    def __init__(self, host: str, port: int, debug: bool = False) -> None:
        self.track = Track.SENSORS
        self._global_plan = self._global_plan_world_coord = None
        self.hero_actor = AutonomousAgent.hero

    def set_global_plan(self, gps: Any, world: Any) -> None:
        self._global_plan, self._global_plan_world_coord = gps, world

    def get_metric_info(self) -> dict[str, list[float]]:
        car = self.hero_actor
        forward = [math.cos(car.yaw), math.sin(car.yaw), 0.0]
        return {
            "acceleration": [car.acceleration * axis for axis in forward],
            "angular_velocity": [0.0, 0.0, car.yaw_rate],
            "forward_vector": forward,
            "right_vector": [-forward[1], forward[0], 0.0],
            "location": [car.x, car.y, 0.0],
            "rotation": [0.0, 0.0, math.degrees(car.yaw)],
        }


class Track(Enum):
    SENSORS = "SENSORS"


@contextmanager
def installed_agent() -> Iterator[Any]:
    """The module of the agent, loaded by its path as the leaderboard does, where `carla` and `leaderboard` are there to be imported."""
    fakes = {name: types.ModuleType(name) for name in ("carla", "leaderboard", "leaderboard.autoagents")}
    fakes["leaderboard.autoagents.autonomous_agent"] = agents = types.ModuleType("leaderboard.autoagents.autonomous_agent")
    fakes["carla"].VehicleControl = VehicleControl  # type: ignore[attr-defined]
    agents.AutonomousAgent, agents.Track = AutonomousAgent, Track  # type: ignore[attr-defined]
    sys.modules.update(fakes)
    sys.path.insert(0, str(IN_CARLA))
    try:
        yield importlib.import_module("irlvla_agent")
    finally:
        sys.path.remove(str(IN_CARLA))
        for name in (*fakes, "irlvla_agent"):
            sys.modules.pop(name, None)


class Leaderboard:
    """Drives one route after the other, and keeps what the leaderboard would write of each."""

    def __init__(self, module: Any, address: str, nodes: Sequence[tuple[float, float, RoadOption]]) -> None:
        self.module, self.config, self.nodes = module, address, nodes
        self.records: list[dict[str, Any]] = []
        self.random = np.random.default_rng(0)

    def drive(self, route: str = "1711", ticks: int = 20) -> tuple[Car, str]:
        """The car after a route, and why the route ended: "" if the time was over or the end was reached."""
        car = AutonomousAgent.hero = Car(self.nodes[0][0], self.nodes[0][1])
        name = f"RouteScenario_{route}_rep0"
        save_name = f"{name}_Town12_ParkingCutIn_1_0_11_21_22_00_00"
        gps = [({"lat": to_gps(x, y)[0], "lon": to_gps(x, y)[1], "z": 0.0}, option) for x, y, option in self.nodes]
        world = [(SimpleNamespace(location=SimpleNamespace(x=x, y=y, z=0.0)), option) for x, y, option in self.nodes]
        agent = getattr(self.module, self.module.get_entry_point())("localhost", 2000, False)
        agent.set_global_plan(gps, world)
        self.config += f"+{save_name}"  # it grows from route to route
        cause, status = "", "Failed"
        try:
            agent.setup(self.config)
        except Exception as error:
            cause, status = str(error), "Failed - Agent couldn't be set up"
        else:
            try:
                for tick in range(ticks):
                    car.move(agent.run_step(self.sense(car, agent.sensors(), tick), tick * TICK))
                    if math.hypot(car.x - self.nodes[-1][0], car.y - self.nodes[-1][1]) < 5.0:
                        status = "Completed"
                        break
            except Exception as error:
                cause, status = str(error), "Failed - Agent crashed"
        agent.destroy()
        self._record(name, save_name, status)
        return car, cause

    def sense(self, car: Car, sensors: Sequence[dict[str, Any]], tick: int) -> dict[str, tuple[int, Any]]:
        """What the sensors say: by id, the frame and the data."""
        data: dict[str, Any] = {}
        for sensor in sensors:
            if sensor["type"] == "sensor.camera.rgb":
                data[sensor["id"]] = np.full((sensor["height"], sensor["width"], 4), (10, 20, 30, 255), dtype=np.uint8)  # BGRA
            elif sensor["type"] == "sensor.other.gnss":
                data[sensor["id"]] = np.array([*to_gps(car.x, car.y), 0.0]) + GNSS_NOISE * self.random.normal(size=3)
            elif sensor["type"] == "sensor.other.imu":
                compass = math.nan if tick < 2 else (car.yaw + math.pi / 2.0) % math.tau
                lateral = car.speed * car.yaw_rate
                data[sensor["id"]] = np.array([car.acceleration, lateral, 9.81, 0.0, 0.0, car.yaw_rate, compass])
            else:
                data[sensor["id"]] = {"speed": car.speed}
        return {name: (tick, value) for name, value in data.items()}

    def _record(self, name: str, save_name: str, status: str) -> None:
        completion = 100.0 if status == "Completed" else 0.0
        kinds = ("collisions_vehicle", "red_light", "stop_infraction", "min_speed_infractions", "route_timeout")
        self.records.append(
            {
                "route_id": name,
                "status": status,
                "save_name": save_name,
                "infractions": {kind: [] for kind in kinds},
                "scores": {"score_route": completion, "score_penalty": 1.0, "score_composed": completion},
            }
        )

    def results(self, path: Path) -> Path:
        """Write the result file."""
        path.write_text(json.dumps({"_checkpoint": {"records": self.records}}))
        return path
