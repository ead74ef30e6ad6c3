"""The policy server: a saved policy drives cars in CARLA, each over a local socket that the leaderboard's agent opens.

The messages are described in `in_carla/irlvla_agent.py`. Each connection is one route. Whatever goes wrong on one is told to the agent
with its cause, ends the connection and nothing else: the server waits for the next.
"""

from __future__ import annotations

import contextlib
import logging
import math
import socket
import socketserver
import threading
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from pydantic import Field

import irlvla
from irlvla import ConfigError, Observation, Policy, Trajectory
from irlvla_bench2drive.control import Follower
from irlvla_bench2drive.geometry import Projection
from irlvla_bench2drive.in_carla.irlvla_agent import PROTOCOL, Cut, ProtocolError, receive, send
from irlvla_bench2drive.localization import COMMANDS, Odometer, Route
from irlvla_bench2drive.rig import CAMERAS, Rig

FRAMES, INTERVAL = 4, 0.5  #: of the history in an observation, as in every dataset of irlvla [s]
LINGER = 2.0  #: how long a connection that is ended is listened to, so that the agent hears why [s]

log = logging.getLogger("irlvla_bench2drive")


class ServeConfig(irlvla.Config):
    """Settings of `python -m irlvla_bench2drive serve`."""

    policy: str = Field(description="a saved policy: its folder, or its name on the Hub (owner/name)")
    host: str = Field("127.0.0.1", description="address to listen on; any other than this machine's own lets others in, unasked")
    port: int = Field(2710, ge=0, le=65535, description="0 = any that is free")
    device: str = Field("cpu", description="cpu, cuda or cuda:1")
    cameras: list[str] = Field(list(CAMERAS), min_length=1, description="those that the policy was trained with, in that order")
    size: tuple[int, int] | None = Field(None, description="height and width of the images that it was trained with; null = CARLA's own")
    candidates: int = Field(1, ge=1, description="plans at every step (K); the planner's favourite is driven")
    seed: int = Field(0, description="of random numbers; the same seed gives the same plans")
    busy_seconds: float = Field(60.0, gt=0.0, description="how long a route waits while the policy plans for others")
    idle_seconds: float = Field(600.0, gt=0.0, description="how long an agent may be silent, as while CARLA loads a town")


class PolicyServer(socketserver.ThreadingTCPServer):
    """Serves a policy until `shutdown()`; use it as a context."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, policy: Policy, config: ServeConfig) -> None:
        """Raises `ConfigError` if the address cannot be listened on, or a camera is unknown."""
        self.policy, self.config = policy, config
        self.rig = Rig(config.cameras, config.size)
        self._one_at_a_time = threading.Lock()
        try:
            super().__init__((config.host, config.port), _Connection)
        except (OSError, OverflowError) as error:
            raise ConfigError(f"host={config.host} port={config.port}: cannot be listened on ({error})") from error

    def plan(self, observation: Observation, step: int) -> Trajectory:
        """The plan that is driven. Raises `ProtocolError` if other routes have the policy too long, or it plans nonsense."""
        if not self._one_at_a_time.acquire(timeout=self.config.busy_seconds):
            raise ProtocolError(f"the policy was busy with other routes for {self.config.busy_seconds:g} s")
        try:
            generator = torch.Generator(self.config.device).manual_seed(self.config.seed + step)
            with torch.inference_mode():
                plan = self.policy.sample(observation.to(self.config.device), self.config.candidates, generator=generator).best().to("cpu")
        finally:
            self._one_at_a_time.release()
        if not bool(plan.poses.isfinite().all()):
            raise ProtocolError("the policy planned NaN or infinity")
        return plan

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.exception("a connection of %s broke", client_address)


class _Connection(socketserver.BaseRequestHandler):
    """One agent, on one route."""

    server: PolicyServer

    def handle(self) -> None:
        where = f"{self.client_address[0]}:{self.client_address[1]}"
        self.request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # or every answer waits for an acknowledgement
        try:
            self._drive()
            log.info("%s: has left", where)
        except Cut as error:
            log.warning("%s: %s", where, error)
        except ProtocolError as error:
            log.warning("%s: %s", where, error)
            self._leave(str(error))
        except Exception as error:
            log.exception("%s: the policy failed", where)
            self._leave(f"the policy failed: {type(error).__name__}: {error}")

    def _drive(self) -> None:
        fields, _ = self._receive("hello")
        if fields.get("protocol") != PROTOCOL:
            raise ProtocolError(f"the agent speaks protocol {fields.get('protocol')}, this server {PROTOCOL}; take both from one version")
        self._send("welcome", {"protocol": PROTOCOL, "sensors": self.server.rig.sensors})
        fields, arrays = self._receive("route", "bye")
        if fields["kind"] == "bye":
            return
        drive = _Drive(self.server, fields, arrays)
        self._send("ready", {})
        while True:
            fields, arrays = self._receive("step", "bye")
            if fields["kind"] == "bye":
                return
            self._send("control", *drive.step(fields, arrays))

    def _receive(self, *kinds: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        return receive(self.request, kinds, self.server.config.idle_seconds)

    def _send(self, kind: str, fields: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None) -> None:
        send(self.request, kind, fields, arrays, self.server.config.idle_seconds)

    def _leave(self, cause: str) -> None:
        """Say why, and listen on until the agent has heard it: closing before would take the words back."""
        deadline = time.monotonic() + LINGER
        with contextlib.suppress(ProtocolError, OSError):
            send(self.request, "error", {"cause": cause}, seconds=LINGER)
            self.request.shutdown(socket.SHUT_WR)
            while (left := deadline - time.monotonic()) > 0.0:
                self.request.settimeout(left)
                if not self.request.recv(1 << 16):
                    break


class _Drive:
    """One route: what is remembered from step to step."""

    def __init__(self, server: PolicyServer, fields: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        """Raises `ProtocolError` for a route that is none."""
        options = fields.get("options")
        gps, world = (_array(arrays, name, "float64", (None, 2)) for name in ("gps", "world"))
        if not isinstance(options, list) or not len(options) == len(gps) == len(world) > 0:
            raise ProtocolError("a route needs as many options as places, and one at least")
        if unknown := [option for option in options if option not in COMMANDS]:
            raise ProtocolError(f"a route has the option {unknown[0]!r}; known are {', '.join(COMMANDS)}")
        self._server = server
        projection = Projection.fit(gps, world)
        self._route = Route(projection(gps), options)
        self._odometer = Odometer(projection, self._route.heading)
        self._follower = Follower()
        self._steps = 0

    def step(self, fields: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Fields and arrays of the answer to one step. Raises `ProtocolError` for sensors that say nothing."""
        time, speed = (_number(fields, name) for name in ("timestamp", "speed"))
        gps, imu = _array(arrays, "GPS", "float64", (3,)), _array(arrays, "IMU", "float64", (7,), finite=False)
        for camera in self._server.rig.cameras:
            _array(arrays, camera["id"], "uint8", (camera["height"], camera["width"], 4))
        self._odometer.update(time, gps, imu, speed, keep=FRAMES * INTERVAL)
        plan = self._server.plan(self._observation(arrays), self._steps)
        self._steps += 1
        poses = plan.poses[0].double().numpy()
        control = self._follower.step(poses, plan.dt, speed)
        return {"throttle": control.throttle, "steer": control.steer, "brake": control.brake, "dt": plan.dt}, {"plan": poses}

    def _observation(self, arrays: Mapping[str, np.ndarray]) -> Observation:
        rig = self._server.rig
        return Observation(
            token=(f"carla-{self._steps}",),
            ego=torch.tensor(self._odometer.history(FRAMES, INTERVAL), dtype=torch.float32)[None],
            command=torch.tensor([int(self._route.command(self._odometer.place))]),
            images=rig.images(arrays),
            intrinsics=rig.intrinsics,
            camera_to_ego=rig.camera_to_ego,
        )


def _number(fields: Mapping[str, Any], name: str) -> float:
    value = fields.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ProtocolError(f"{name}={value!r:.80} is no finite number")
    return float(value)


def _array(arrays: Mapping[str, np.ndarray], name: str, dtype: str, shape: tuple[int | None, ...], *, finite: bool = True) -> np.ndarray:
    array = arrays.get(name)
    expected = f"{dtype} of shape ({', '.join('N' if length is None else str(length) for length in shape)})"
    if array is None:
        raise ProtocolError(f"the array {name!r} is missing; expected {expected}")
    fits = array.ndim == len(shape) and all(want in (None, length) for want, length in zip(shape, array.shape, strict=True))
    if not fits or array.dtype != dtype:
        raise ProtocolError(f"the array {name!r} is {array.dtype} of shape {array.shape}; expected {expected}")
    if finite and array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ProtocolError(f"the array {name!r} holds NaN or infinity")
    return array


def load_policy(config: ServeConfig) -> Policy:
    """The policy to be served. Raises as `irlvla.from_pretrained`, and `ConfigError` for another saved model."""
    policy = irlvla.from_pretrained(config.policy, device=config.device)
    if not isinstance(policy, Policy):
        raise ConfigError(f"policy={config.policy} holds {policy} alone; it must hold a whole policy")
    return policy
