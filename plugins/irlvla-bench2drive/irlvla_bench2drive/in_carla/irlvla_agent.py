"""An agent for the CARLA leaderboard that asks a policy in another process: `python -m irlvla_bench2drive serve`.

    export TEAM_AGENT=.../irlvla_agent.py TEAM_CONFIG=127.0.0.1:2710

TEAM_CONFIG is HOST:PORT of the policy server, or HOST:PORT:SECONDS, where SECONDS is how long one answer may take (60).
It sends what the sensors say as CARLA says it; the server knows about frames, routes and control. Whatever goes wrong stops the
car and raises an error with its cause, at which the leaderboard ends the route ("Agent crashed") and goes on with the next.

With SAVE_PATH set it writes SAVE_PATH/ROUTE/metric_info.json, of which Bench2Drive computes comfort.

This file runs in CARLA's Python (3.7) and needs nothing but numpy there. The server reads it too, for the messages.

A message is a prefix of 16 bytes (`!4sIQ`: b"IRLV", length of the header, length of the payload), a header in JSON, and a payload: the
raw bytes of arrays one after the other, of which the header says name, type and shape ("arrays"). The agent asks, the server
answers, one by one:

    hello   protocol                          -> welcome  protocol, sensors (as `sensors()` returns them)
    route   gps, world, options               -> ready
    step    timestamp, speed, one array for each sensor     -> control  throttle, steer, brake
    bye                                       -> nothing

The server may answer any of them by: error  cause.
"""

# ruff: noqa: UP041 (in Python 3.7 a socket's timeout is no TimeoutError)
from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np

try:
    import carla
    from leaderboard.autoagents.autonomous_agent import AutonomousAgent, Track
except ImportError:  # in the server, which has no leaderboard and needs the messages alone
    carla, AutonomousAgent, Track = None, object, None

PROTOCOL = 1  # to be raised with every change of the messages
PREFIX = struct.Struct("!4sIQ")
MAGIC = b"IRLV"
HEADER_LIMIT = 1 << 20  # bytes
PAYLOAD_LIMIT = 1 << 28  # bytes: eight cameras of 1600 x 900 are 46 MB
TYPES: dict[str, np.dtype] = {"uint8": np.dtype("<u1"), "float32": np.dtype("<f4"), "float64": np.dtype("<f8"), "int64": np.dtype("<i8")}
ANSWER_SECONDS = 60.0


def get_entry_point() -> str:
    """The name of the agent's class, for the leaderboard."""
    return "IrlvlaAgent"


# -- messages ----------------------------------------------------------------------------------------------------------


class ProtocolError(Exception):
    """What came is no message, or none that is allowed here; or nothing came."""


class Cut(ProtocolError):
    """The other side has gone."""


def send(
    connection: socket.socket,
    kind: str,
    fields: Mapping[str, Any] | None = None,
    arrays: Mapping[str, np.ndarray] | None = None,
    seconds: float = ANSWER_SECONDS,
) -> None:
    """Send one message. Raises `ProtocolError` if it is not taken within some seconds, or is too large."""
    described, parts = [], []
    for name, array in (arrays or {}).items():
        type_name = array.dtype.name
        if type_name not in TYPES:
            raise ProtocolError("the array {!r} is of type {}; {} can be sent".format(name, type_name, ", ".join(TYPES)))
        described.append({"name": name, "type": type_name, "shape": list(array.shape)})
        parts.append(array.astype(TYPES[type_name], copy=False).tobytes())
    header = json.dumps(dict(fields or {}, kind=kind, arrays=described)).encode()
    size = sum(len(part) for part in parts)
    _require_size(len(header), size)
    deadline = time.monotonic() + seconds
    try:
        for part in [PREFIX.pack(MAGIC, len(header), size) + header, *parts]:
            connection.settimeout(_left(deadline))
            connection.sendall(part)
    except socket.timeout as error:
        raise ProtocolError(f"the other side took no whole message within {seconds:g} s") from error
    except OSError as error:
        raise Cut(f"the connection was cut: {error}") from error


def receive(
    connection: socket.socket, kinds: Sequence[str], seconds: float = ANSWER_SECONDS
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """One message of a kind that is allowed now, as its fields and its arrays.

    Raises `ProtocolError` for anything else: no whole message within some seconds, a cut connection, what is no message, too large,
    or of another kind; and with the cause that an "error" of the other side gives.
    """
    deadline = time.monotonic() + seconds
    magic, header_size, payload_size = PREFIX.unpack(bytes(_read(connection, PREFIX.size, deadline, seconds)))
    if magic != MAGIC:
        raise ProtocolError(f"what came is no message of irlvla: it begins with {magic!r}")
    _require_size(header_size, payload_size)
    fields = _fields(_read(connection, header_size, deadline, seconds))
    if fields.get("kind") == "error":
        raise ProtocolError(str(fields.get("cause")))
    if fields.get("kind") not in kinds:
        raise ProtocolError("a message {!r} came where {} was expected".format(fields.get("kind"), " or ".join(kinds)))
    layout = _layout(fields, payload_size)  # before anything of its size is read
    payload = _read(connection, payload_size, deadline, seconds)
    arrays, start = {}, 0
    for name, dtype, shape, size in layout:
        arrays[name] = np.frombuffer(payload, dtype, size // dtype.itemsize, start).reshape(shape)
        start += size
    return fields, arrays


def _require_size(header: int, payload: int) -> None:
    if header > HEADER_LIMIT or payload > PAYLOAD_LIMIT:
        limits = f"at most {HEADER_LIMIT} and {PAYLOAD_LIMIT} are allowed"
        raise ProtocolError(f"a message of {header} and {payload} bytes is too large; {limits}")


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise socket.timeout()
    return left


def _read(connection: socket.socket, size: int, deadline: float, seconds: float) -> bytearray:
    """Exactly so many bytes, by a deadline for all of them: a side that trickles is late too."""
    buffer = bytearray(size)
    view, done = memoryview(buffer), 0
    try:
        while done < size:
            connection.settimeout(_left(deadline))
            count = connection.recv_into(view[done:])
            if count == 0:
                raise Cut("the other side closed the connection")
            done += count
    except socket.timeout as error:
        raise ProtocolError(f"no whole message came within {seconds:g} s") from error
    except OSError as error:
        raise Cut(f"the connection was cut: {error}") from error
    return buffer


def _fields(header: bytearray) -> dict[str, Any]:
    try:
        fields = json.loads(bytes(header).decode())
    except (ValueError, RecursionError) as error:
        raise ProtocolError(f"the header of a message is no JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ProtocolError("the header of a message is no object")
    return fields


def _layout(fields: Mapping[str, Any], payload_size: int) -> list[tuple[str, np.dtype, tuple[int, ...], int]]:
    """Name, type, shape and size of each array, which together are as large as the payload."""
    layout: list[tuple[str, np.dtype, tuple[int, ...], int]] = []
    names = set()
    try:
        for described in fields.get("arrays", []):
            name, dtype, shape = described["name"], TYPES[described["type"]], described["shape"]
            size = dtype.itemsize
            for length in shape:
                if type(length) is not int or length < 0:
                    raise ValueError(f"a length of {length!r}")
                size *= length
            if not isinstance(name, str) or name in names or len(shape) > 4:
                raise ValueError("a name or a shape that is not allowed")
            names.add(name)
            layout.append((name, dtype, tuple(shape), size))
    except (KeyError, TypeError, ValueError) as error:
        raise ProtocolError(f"the arrays of a message are not described as they must be: {error!r}") from error
    if sum(size for _, _, _, size in layout) != payload_size:
        raise ProtocolError(f"the arrays of a message are not as large as its payload of {payload_size} bytes")
    return layout


# -- the agent ---------------------------------------------------------------------------------------------------------


class IrlvlaAgent(AutonomousAgent):  # type: ignore[misc]
    """Lets a policy server drive."""

    def setup(self, path_to_conf_file: str) -> None:
        """Connect to the server and learn which sensors its policy needs. Raises an error with its cause: the route is not driven."""
        self.track = Track.SENSORS
        self.connection: socket.socket | None = None
        self.sent_route = False
        self.metric_info: dict[int, Any] = {}
        parts = path_to_conf_file.split("+")  # the leaderboard appends "+" and the name of the route
        self.save_name = parts[-1] if len(parts) > 1 else ""
        host, port, self.seconds = _address(parts[0])
        try:
            self.connection = socket.create_connection((host, port), self.seconds)
            self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError as error:
            raise RuntimeError(f"no policy server at {host}:{port} ({error}); start it: python -m irlvla_bench2drive serve") from error
        answer = self._ask("hello", "welcome", {"protocol": PROTOCOL})
        if answer.get("protocol") != PROTOCOL:
            self._fail("the server speaks protocol {}, this agent {}; take both from one version".format(answer.get("protocol"), PROTOCOL))
        self.suite: list[dict[str, Any]] = answer["sensors"]

    def sensors(self) -> list[dict[str, Any]]:
        """What the server asked for."""
        return self.suite

    def run_step(self, input_data: Mapping[str, Any], timestamp: float) -> Any:
        """The control for one step. Raises an error with its cause after it has stopped the car."""
        if not self.sent_route:
            self._ask("route", "ready", {"options": [option.name for _, option in self._global_plan]}, self._route())
            self.sent_route = True
        speed = float(input_data["SPEED"][1]["speed"])
        arrays = {name: data for name, (_, data) in input_data.items() if isinstance(data, np.ndarray)}
        answer = self._ask("step", "control", {"timestamp": float(timestamp), "speed": speed}, arrays)
        control = carla.VehicleControl()
        control.throttle, control.steer, control.brake = self._pedals(answer)
        control.hand_brake = False
        if hasattr(self, "get_metric_info") and os.environ.get("SAVE_PATH"):
            self.metric_info[len(self.metric_info)] = self.get_metric_info()
        return control

    def destroy(self) -> None:
        """Leave the server, and write what comfort is computed of."""
        connection = getattr(self, "connection", None)
        if connection is not None:
            with contextlib.suppress(ProtocolError):  # it may have gone before
                send(connection, "bye", seconds=1.0)
            self._close()
        if getattr(self, "metric_info", None):
            folder = os.path.join(os.environ["SAVE_PATH"], self.save_name)
            if not os.path.isdir(folder):
                os.makedirs(folder)
            with open(os.path.join(folder, "metric_info.json"), "w") as stream:
                json.dump(self.metric_info, stream)
            self.metric_info = {}

    def _pedals(self, answer: Mapping[str, Any]) -> list[float]:
        """Throttle, steer and brake of an answer."""
        pedals: list[Any] = [answer.get(name) for name in ("throttle", "steer", "brake")]
        if not all(isinstance(value, float) and -1.0 <= value <= 1.0 for value in pedals):
            self._fail(f"throttle, steer and brake {pedals} are no numbers between -1 and 1")
        return pedals

    def _route(self) -> dict[str, np.ndarray]:
        """The nodes of the plan: latitude and longitude, and x and y in CARLA's world."""
        gps = [[place["lat"], place["lon"]] for place, _ in self._global_plan]
        world = [[place.location.x, place.location.y] for place, _ in self._global_plan_world_coord]
        return {"gps": np.array(gps, dtype=np.float64), "world": np.array(world, dtype=np.float64)}

    def _ask(
        self, kind: str, expected: str, fields: Mapping[str, Any] | None = None, arrays: Mapping[str, np.ndarray] | None = None
    ) -> dict[str, Any]:
        """The fields of the answer to a message."""
        if self.connection is None:
            self._fail("the connection was closed before")
        try:
            with contextlib.suppress(Cut):  # the server may have said why before it left
                send(self.connection, kind, fields, arrays, self.seconds)
            return receive(self.connection, (expected,), self.seconds)[0]
        except ProtocolError as error:
            self._fail(f"no answer to {kind!r}: {error}")

    def _fail(self, cause: str) -> NoReturn:
        """Stop the car, leave the server, and raise the cause."""
        self._close()
        hero = getattr(self, "hero_actor", None)
        if hero is not None:
            control = carla.VehicleControl()
            control.throttle, control.steer, control.brake, control.hand_brake = 0.0, 0.0, 1.0, True
            hero.apply_control(control)
        raise RuntimeError(f"irlvla policy server: {cause}")

    def _close(self) -> None:
        if self.connection is not None:
            self.connection.close()
            self.connection = None


def _address(text: str) -> tuple[str, int, float]:
    """HOST:PORT or HOST:PORT:SECONDS."""
    parts = text.split(":")
    try:
        if len(parts) not in (2, 3):
            raise ValueError()
        return parts[0], int(parts[1]), float(parts[2]) if len(parts) == 3 else ANSWER_SECONDS
    except ValueError as error:
        raise ValueError(f"TEAM_CONFIG is {text!r}; it must be HOST:PORT or HOST:PORT:SECONDS, as in 127.0.0.1:2710") from error
