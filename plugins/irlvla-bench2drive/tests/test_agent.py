"""The agent in a simulated leaderboard, and the policy server, together and each against a partner that misbehaves."""

from __future__ import annotations

import ast
import contextlib
import json
import math
import re
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from simulated_leaderboard import AutonomousAgent, Leaderboard, RoadOption, installed_agent

import irlvla
from irlvla import Command, ConfigError, Observation, Plan, StateIndex
from irlvla.benchmarks import SummariseConfig, summarise
from irlvla.registry import installed
from irlvla_bench2drive.__main__ import IN_CARLA
from irlvla_bench2drive.in_carla import irlvla_agent
from irlvla_bench2drive.in_carla.irlvla_agent import PREFIX, PROTOCOL, ProtocolError, receive, send
from irlvla_bench2drive.localization import AHEAD
from irlvla_bench2drive.rig import CAMERAS
from irlvla_bench2drive.server import PolicyServer, ServeConfig, load_policy

FRONT = ["CAM_FRONT"]
# North is where y decreases: 25 m to the east, then to the left, and 12 m to the north.
TURN = [
    (0.0, 0.0, RoadOption.LANEFOLLOW),
    (25.0, 0.0, RoadOption.LEFT),
    (33.0, -8.0, RoadOption.LANEFOLLOW),
    (33.0, -20.0, RoadOption.LANEFOLLOW),
]
STRAIGHT = [(0.0, 0.0, RoadOption.LANEFOLLOW), (60.0, 0.0, RoadOption.LANEFOLLOW)]
WAIT = 10.0  # for what happens at once, on a machine that is busy [s]


class Driver(torch.nn.Module):
    """A policy made for these tests: 5 m/s, on the circle that a function of what it sees chooses."""

    def __init__(self, curvature: Callable[[Observation], float] = lambda obs: 0.0) -> None:
        super().__init__()
        self.curvature = curvature
        self.seen: list[Observation] = []

    def sample(self, obs: Observation, k: int = 1, *, generator: torch.Generator | None = None) -> Plan:
        self.seen.append(obs)
        curvature, along = self.curvature(obs), 2.5 * torch.arange(1, 9)
        turn = curvature * along
        x, y = (along, 0.0 * along) if curvature == 0.0 else (turn.sin() / curvature, (1.0 - turn.cos()) / curvature)
        return Plan(torch.stack([x, y, turn], -1)[None, None].expand(1, k, -1, -1), 0.5)


class Corner:
    """How to take a corner to the left by nothing but what a policy sees: on a circle of 8 m, 20 m after it is told to."""

    def __init__(self) -> None:
        self.told = self.turned = 0.0  # [m], [rad]

    def __call__(self, obs: Observation) -> float:
        self.told += 0.05 * float(obs.ego[0, -1, StateIndex.VX]) * (obs.command.item() == Command.LEFT)
        self.turned -= 0.1 * float(obs.ego[0, -2, StateIndex.HEADING])  # half a second ago: ten steps
        return 1 / 8 if self.told > AHEAD and self.turned < math.pi / 2 - 0.25 else 0.0  # the wheel comes back in time


@pytest.fixture(autouse=True)
def small_cameras(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundredth of the pixels."""
    for name, camera in CAMERAS.items():
        monkeypatch.setitem(CAMERAS, name, {**camera, "width": 160, "height": 90})


@contextmanager
def serving(policy: Any, **settings: Any) -> Iterator[PolicyServer]:
    config = ServeConfig(policy="-", port=0, **{"cameras": FRONT, "size": (18, 32), **settings})
    with PolicyServer(policy, config) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join(WAIT)


@pytest.fixture
def agent() -> Iterator[Any]:
    with installed_agent() as module:
        yield module


def address(server: PolicyServer) -> str:
    return "{}:{}".format(*server.server_address)


# -- together ----------------------------------------------------------------------------------------------------------


def test_a_route_with_a_turn_is_driven_to_its_end(agent: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Round the corner by the commands alone: frames, route, control and steering have the right signs, or the car goes astray."""
    monkeypatch.setenv("SAVE_PATH", str(tmp_path / "drives"))
    with serving(Driver(Corner())) as server:
        board = Leaderboard(agent, address(server), TURN)
        car, cause = board.drive(ticks=400)
    assert cause == ""
    assert board.records[0]["status"] == "Completed"
    assert math.remainder(car.yaw + math.pi / 2, math.tau) == pytest.approx(0.0, abs=0.2)  # CARLA's yaw of north is -90 degrees
    drive = json.loads((tmp_path / "drives" / board.records[0]["save_name"] / "metric_info.json").read_text())
    assert len(drive) > 100
    assert drive["0"]["forward_vector"] == [1.0, 0.0, 0.0]
    spec = {"name": "bench2drive", "drives": str(tmp_path / "drives")}
    config = installed().validate(SummariseConfig, {"benchmark": spec, "results": [str(board.results(tmp_path / "r.json"))]})
    rows = {row["metric"].split(" [")[0]: row["value"] for row in summarise(config)["tables"]["Bench2Drive"]}
    assert rows["driving score"] == pytest.approx(100 / 220)
    assert rows["success rate"] == pytest.approx(1 / 220)
    assert 0.0 <= rows["comfort"] <= 1.0


def test_what_the_policy_sees(agent: Any) -> None:
    told: list[tuple[float, int]] = []

    def look(obs: Observation) -> float:
        told.append((AutonomousAgent.hero.x, int(obs.command)))
        return 0.0

    policy = Driver(look)
    with serving(policy, cameras=["CAM_FRONT", "CAM_BACK"]) as server:
        Leaderboard(agent, address(server), TURN).drive(ticks=80)
    first, last = policy.seen[0], policy.seen[-1]
    assert first.images.shape == (1, 2, 3, 18, 32)
    assert first.images[0, :, :, 5, 5].tolist() == [[30, 20, 10]] * 2
    assert first.intrinsics.shape == (1, 2, 3, 3)
    assert first.camera_to_ego.shape == (1, 2, 4, 4)
    assert first.ego.shape == (1, 4, 8)
    assert first.ego[..., :3].count_nonzero() == 0
    speed = last.ego[0, :, StateIndex.VX]
    x = last.ego[0, :, StateIndex.X]
    torch.testing.assert_close(x.diff(), (speed[1:] + speed[:-1]) / 4.0, atol=0.05, rtol=0.0)  # half a second apart
    assert x[-1] == 0.0
    assert 4.0 < speed[-1] < 6.0
    assert told[0][1] == Command.STRAIGHT
    assert told[-1][1] == Command.LEFT
    assert next(x for x, command in told if command == Command.LEFT) == pytest.approx(25.0 - AHEAD, abs=1.5)  # GNSS is noisy


def test_several_routes_one_after_the_other_and_at_once(agent: Any) -> None:
    with serving(Driver()) as server:
        board = Leaderboard(agent, address(server), STRAIGHT)
        assert [board.drive(route, 3)[1] for route in ("1711", "1773")] == ["", ""]
        others = [threading.Thread(target=Leaderboard(agent, address(server), STRAIGHT).drive, args=(r, 3)) for r in ("1790", "1792")]
        for thread in others:
            thread.start()
        for thread in others:
            thread.join(WAIT)
            assert not thread.is_alive()
        assert board.drive("1825", 3)[1] == ""


def test_the_command_serves_a_saved_policy(agent: Any, tmp_path: Path) -> None:
    """A process of its own, a policy from a folder, on this machine's own address."""
    torch.manual_seed(0)
    folder = irlvla.save_pretrained(installed().build_policy("status", "gaussian", None), tmp_path / "policy")
    command = [sys.executable, "-m", "irlvla_bench2drive", "serve", str(folder), "port=0", "cameras=[CAM_FRONT]", "size=[96,256]"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            found = re.search(r" on (127\.0\.0\.1:\d+)$", process.stdout.readline())
            assert found is not None
            assert f"TEAM_CONFIG={found[1]}" in process.stdout.readline()
            assert Leaderboard(agent, found[1], STRAIGHT).drive(ticks=2)[1] == ""
        finally:
            process.terminate()


def test_only_loopback_is_listened_on_by_default() -> None:
    assert ServeConfig(policy="-").host == "127.0.0.1"
    with serving(Driver()) as server:
        assert server.server_address[0] == "127.0.0.1"
        with pytest.raises(ConfigError, match=r"host=127\.0\.0\.1 port=.* cannot be listened on"):
            PolicyServer(Driver(), ServeConfig(policy="-", port=server.server_address[1], cameras=FRONT))
    with pytest.raises(ConfigError, match=r"no 'CAM_FROND'.*mean 'CAM_FRONT'"):
        PolicyServer(Driver(), ServeConfig(policy="-", port=0, cameras=["CAM_FROND"]))


def test_a_model_that_is_no_policy_is_refused(tmp_path: Path) -> None:
    folder = irlvla.save_pretrained(irlvla.build("backbone", "status"), tmp_path / "model")
    with pytest.raises(ConfigError, match="alone; it must hold a whole policy"):
        load_policy(ServeConfig(policy=str(folder)))


# -- a policy that misbehaves ------------------------------------------------------------------------------------------


def test_a_policy_that_crashes_ends_the_route_and_not_the_server(agent: Any) -> None:
    crashing = iter([1, 2, 3])

    def curvature(obs: Observation) -> float:
        if next(crashing, None) == 3:
            raise KeyError("no such head")
        return 0.0

    with serving(Driver(curvature)) as server:
        board = Leaderboard(agent, address(server), STRAIGHT)
        car, cause = board.drive(ticks=10)
        assert cause == "irlvla policy server: no answer to 'step': the policy failed: KeyError: 'no such head'"
        assert board.records[-1]["status"] == "Failed - Agent crashed"
        assert car.applied[-1].brake == 1.0
        assert car.applied[-1].throttle == 0.0
        assert board.drive("1773", 3)[1] == ""


def test_a_policy_that_plans_nan_ends_the_route(agent: Any) -> None:
    with serving(Driver(lambda obs: math.nan)) as server:
        _, cause = Leaderboard(agent, address(server), STRAIGHT).drive(ticks=2)
    assert cause.endswith("the policy planned NaN or infinity")


def test_a_policy_that_answers_late_ends_the_route_and_then_serves_the_next(agent: Any) -> None:
    awake, finished = threading.Event(), threading.Event()

    def curvature(obs: Observation) -> float:
        assert awake.wait(WAIT)
        finished.set()
        return 0.0

    with serving(Driver(curvature), busy_seconds=0.2) as server:
        _, cause = Leaderboard(agent, f"{address(server)}:0.5", STRAIGHT).drive(ticks=2)
        assert cause == "irlvla policy server: no answer to 'step': no whole message came within 0.5 s"
        _, cause = Leaderboard(agent, address(server), STRAIGHT).drive(ticks=2)
        assert cause.endswith("the policy was busy with other routes for 0.2 s")
        awake.set()
        assert finished.wait(WAIT)
        for _ in range(50):  # until the first has let go
            _, cause = Leaderboard(agent, address(server), STRAIGHT).drive(ticks=2)
            if not cause:
                break
        assert cause == ""


# -- a server that misbehaves ------------------------------------------------------------------------------------------


@contextmanager
def partner(behave: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server that does what a test wants with one connection. Its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(WAIT)

        def run() -> None:
            connection, _ = listener.accept()
            connection.settimeout(WAIT)
            with connection:
                behave(connection)

        thread = threading.Thread(target=run)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        thread.join(WAIT)
        assert not thread.is_alive()


def welcome(connection: socket.socket, protocol: int = PROTOCOL) -> None:
    receive(connection, ("hello",), WAIT)
    send(connection, "welcome", {"protocol": protocol, "sensors": [{"type": "sensor.speedometer", "id": "SPEED"}]}, seconds=WAIT)


def ready(connection: socket.socket) -> None:
    welcome(connection)
    receive(connection, ("route",), WAIT)
    send(connection, "ready", seconds=WAIT)


def answered_by(raw: bytes) -> Callable[[socket.socket], None]:
    def behave(connection: socket.socket) -> None:
        ready(connection)
        receive(connection, ("step",), WAIT)
        connection.sendall(raw)
        connection.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            connection.recv(1)  # until the agent has left

    return behave


def message(fields: Any, payload: bytes = b"") -> bytes:
    header = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    return PREFIX.pack(b"IRLV", len(header), len(payload)) + header + payload


WRONG = {
    "garbage": (b"HTTP/1.1 400 Bad Request\r\n\r\n", "is no message of irlvla: it begins with b'HTTP'"),
    "cut in the prefix": (b"IRLV\0\0", "the other side closed the connection"),
    "cut in the header": (message({"kind": "control"})[:-3], "the other side closed the connection"),
    "oversized header": (PREFIX.pack(b"IRLV", 1 << 31, 0), "2147483648 and 0 bytes is too large"),
    "oversized payload": (PREFIX.pack(b"IRLV", 2, 1 << 62), "2 and 4611686018427387904 bytes is too large"),
    "no JSON": (message(b"{nope"), "the header of a message is no JSON"),
    "no text": (message(b"\xff\xfe"), "the header of a message is no JSON"),
    "deep JSON": (message(b"[" * 100_000), "the header of a message is no JSON"),
    "no object": (message([1]), "the header of a message is no object"),
    "another kind": (message({"kind": "welcome"}), "a message 'welcome' came where control was expected"),
    "unknown type": (
        message({"kind": "control", "arrays": [{"name": "a", "type": "object", "shape": [1]}]}),
        "not described as they must be",
    ),
    "negative shape": (
        message({"kind": "control", "arrays": [{"name": "a", "type": "uint8", "shape": [-1]}]}),
        "not described as they must be",
    ),
    "huge shape": (
        message({"kind": "control", "arrays": [{"name": "a", "type": "uint8", "shape": [1 << 40] * 3}]}),
        "not as large as its payload",
    ),
    "arrays that are none": (message({"kind": "control", "arrays": 3}), "not described as they must be"),
    "missing payload": (message({"kind": "control"}, b"123"), "not as large as its payload of 3 bytes"),
    "no pedals": (message({"kind": "control"}), r"throttle, steer and brake [None, None, None] are no numbers"),
    "wild pedals": (
        message({"kind": "control", "throttle": 9.0, "steer": math.nan, "brake": 0.0}),
        "[9.0, nan, 0.0] are no numbers between",
    ),
    "an error": (message({"kind": "error", "cause": "out of memory"}), "no answer to 'step': out of memory"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_answer_ends_the_route_with_its_cause(agent: Any, name: str) -> None:
    raw, expected = WRONG[name]
    with partner(answered_by(raw)) as where:
        board = Leaderboard(agent, where, STRAIGHT)
        board.sense = lambda *_: {"SPEED": (0, {"speed": 0.0})}  # type: ignore[method-assign]
        car, cause = board.drive()
    assert cause.startswith("irlvla policy server: ")
    assert expected in cause
    assert board.records[0]["status"] == "Failed - Agent crashed"
    assert car.applied[-1].brake == 1.0


def test_another_version_is_refused_by_the_agent(agent: Any) -> None:
    with partner(lambda connection: welcome(connection, PROTOCOL + 1)) as where:
        board = Leaderboard(agent, where, STRAIGHT)
        _, cause = board.drive()
    assert f"the server speaks protocol {PROTOCOL + 1}, this agent {PROTOCOL}" in cause
    assert board.records[0]["status"] == "Failed - Agent couldn't be set up"


def test_a_server_that_trickles_is_late(agent: Any) -> None:
    """A byte now and then does not put the deadline off."""

    def trickle(connection: socket.socket) -> None:
        receive(connection, ("hello",), WAIT)
        with contextlib.suppress(ConnectionError):  # until the agent leaves
            for byte in message({"kind": "welcome", "filler": "-" * 5000}):
                connection.sendall(bytes([byte]))
                time.sleep(0.02)

    with partner(trickle) as where:
        _, cause = Leaderboard(agent, f"{where}:0.3", STRAIGHT).drive()
    assert cause == "irlvla policy server: no answer to 'hello': no whole message came within 0.3 s"


def test_no_server_is_there(agent: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        where = f"127.0.0.1:{listener.getsockname()[1]}"
    _, cause = Leaderboard(agent, where, STRAIGHT).drive()
    assert f"no policy server at {where}" in cause
    assert "python -m irlvla_bench2drive serve" in cause


@pytest.mark.parametrize("text", ["", "2710", "localhost:port", "a:1:2:3"])
def test_an_address_that_is_none(agent: Any, text: str) -> None:
    _, cause = Leaderboard(agent, text, STRAIGHT).drive()
    assert cause == f"TEAM_CONFIG is {text!r}; it must be HOST:PORT or HOST:PORT:SECONDS, as in 127.0.0.1:2710"


# -- an agent that misbehaves ------------------------------------------------------------------------------------------


@contextmanager
def connected(server: PolicyServer) -> Iterator[socket.socket]:
    with socket.create_connection(server.server_address[:2], WAIT) as connection:
        yield connection


def begin(connection: socket.socket) -> None:
    send(connection, "hello", {"protocol": PROTOCOL})
    receive(connection, ("welcome",), WAIT)
    route = {"gps": np.array([[35.0, 110.0], [35.001, 110.0]]), "world": np.array([[0.0, 0.0], [0.0, -111.0]])}
    send(connection, "route", {"options": ["LANEFOLLOW", "LEFT"]}, route)
    receive(connection, ("ready",), WAIT)


def sensors(**changes: Any) -> dict[str, Any]:
    arrays = {"CAM_FRONT": np.zeros((90, 160, 4), np.uint8), "GPS": np.array([35.0, 110.0, 0.0]), "IMU": np.zeros(7), **changes}
    return {name: array for name, array in arrays.items() if array is not None}


def cause_of(connection: socket.socket) -> str:
    with pytest.raises(ProtocolError) as caught:
        receive(connection, (), WAIT)
    return str(caught.value)


def require_alive(server: PolicyServer) -> None:
    """The next agent is served."""
    with connected(server) as connection:
        begin(connection)
        send(connection, "step", {"timestamp": 0.0, "speed": 1.0}, sensors())
        fields, arrays = receive(connection, ("control",), WAIT)
        assert 0.0 < fields["throttle"] <= 0.75
        assert arrays["plan"].shape == (8, 3)
        send(connection, "bye")


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n", "it begins with b'GET '"),
        (PREFIX.pack(b"IRLV", 10, 1 << 40) + b"x" * 100_000, "too large"),
        (message({"kind": "step"}), "a message 'step' came where hello was expected"),
        (message({"kind": "hello", "protocol": 99}), f"the agent speaks protocol 99, this server {PROTOCOL}"),
        (message({"kind": "hello"}), "the agent speaks protocol None"),
    ],
)
def test_the_server_says_what_is_wrong_and_lives_on(raw: bytes, expected: str) -> None:
    with serving(Driver()) as server:
        with connected(server) as connection:
            connection.sendall(raw)
            assert expected in cause_of(connection)
            assert connection.recv(1) == b""  # and has closed
        require_alive(server)


@pytest.mark.parametrize(
    ("fields", "arrays", "expected"),
    [
        ({}, {"CAM_FRONT": None}, "the array 'CAM_FRONT' is missing; expected uint8 of shape (90, 160, 4)"),
        ({}, {"CAM_FRONT": np.zeros((9, 16, 4), np.uint8)}, "the array 'CAM_FRONT' is uint8 of shape (9, 16, 4)"),
        ({}, {"GPS": np.zeros(2)}, "the array 'GPS' is float64 of shape (2,)"),
        ({}, {"GPS": np.full(3, np.nan)}, "the array 'GPS' holds NaN"),
        ({}, {"IMU": np.zeros(7, np.float32)}, "the array 'IMU' is float32"),
        ({"speed": math.inf}, {}, "speed=inf is no finite number"),
        ({"timestamp": "now"}, {}, "timestamp='now' is no finite number"),
    ],
)
def test_sensors_that_say_nothing_are_refused(fields: dict[str, Any], arrays: dict[str, Any], expected: str) -> None:
    with serving(Driver()) as server:
        with connected(server) as connection:
            begin(connection)
            send(connection, "step", {"timestamp": 0.0, "speed": 1.0, **fields}, sensors(**arrays))
            assert expected in cause_of(connection)
        require_alive(server)


@pytest.mark.parametrize(
    ("options", "places", "expected"),
    [
        (["LANEFOLLOW"], 2, "as many options as places"),
        ([], 0, "one at least"),
        (["SIDEWAYS"], 1, "the option 'SIDEWAYS'; known are LEFT"),
        (None, 1, "as many options as places"),
    ],
)
def test_routes_that_are_none_are_refused(options: Any, places: int, expected: str) -> None:
    with serving(Driver()) as server, connected(server) as connection:
        send(connection, "hello", {"protocol": PROTOCOL})
        receive(connection, ("welcome",), WAIT)
        send(connection, "route", {"options": options}, {"gps": np.ones((places, 2)), "world": np.ones((places, 2))})
        assert expected in cause_of(connection)


def test_an_agent_that_leaves_in_the_middle_of_a_message(agent: Any) -> None:
    with serving(Driver()) as server:
        for length in (3, 20, 60):
            with connected(server) as connection:
                begin(connection)
                connection.sendall(message({"kind": "step", "arrays": []}, b"0" * 100)[:length])
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # reset it
        require_alive(server)


def test_an_agent_that_is_silent_is_left() -> None:
    with serving(Driver(), idle_seconds=0.3) as server, connected(server) as connection:
        assert cause_of(connection) == "no whole message came within 0.3 s"


def test_an_agent_sends_arrays_of_known_types_alone() -> None:
    left, right = socket.socketpair()
    with left, right:
        with pytest.raises(ProtocolError, match="of type complex128; uint8, float32, float64, int64 can be sent"):
            send(left, "step", arrays={"a": np.zeros(1, complex)})
        with pytest.raises(ProtocolError, match="is too large"):
            send(left, "step", {"text": "-" * (1 << 20)})
        sent = {"a": np.arange(6, dtype=np.int64).reshape(2, 3)[:, ::-1], "b": np.zeros((0, 2), np.float32), "c": np.array(2.5)}
        send(left, "step", {"x": 1}, sent)
        fields, arrays = receive(right, ("step",))
        assert fields["x"] == 1
        assert arrays.keys() == sent.keys()
        assert all(np.array_equal(arrays[name], sent[name]) and arrays[name].dtype == sent[name].dtype for name in sent)


# -- where it runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(IN_CARLA.glob("*.py")), ids=lambda path: path.name)
def test_what_runs_in_carla_is_python_3_7_and_needs_next_to_nothing(path: Path) -> None:
    tree = ast.parse(path.read_text(), feature_version=(3, 7))
    allowed = {*sys.stdlib_module_names, "numpy", "carla", "leaderboard", "agents"}
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None) or ""]
        if isinstance(node, ast.Import | ast.ImportFrom):
            assert {name.partition(".")[0] for name in names} <= allowed
    assert "pickle" not in path.read_text()


def test_the_agent_has_no_memory_of_the_server_side() -> None:
    assert irlvla_agent.carla is None
    assert irlvla_agent.get_entry_point() == "IrlvlaAgent"
