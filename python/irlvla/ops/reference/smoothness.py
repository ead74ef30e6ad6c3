"""Comfort: the Savitzky-Golay filter, the signals it makes of states, their bounds, with history and between two frames."""

from __future__ import annotations

import math
from functools import cache

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from irlvla.ops.reference.motion import interpolate_linearly, resample, through_centre
from irlvla.types import REAR_AXLE_TO_CENTRE, STEP, Scene, StateIndex

# Comfort (navsim pdm_comfort_metrics.py): lon acc, lat acc, jerk, lon jerk, yaw acc, yaw rate
COMFORT_BOUNDS = ((-4.05, 2.40), (-4.89, 4.89), (-8.37, 8.37), (-4.13, 4.13), (-1.93, 1.93), (-0.95, 0.95))
EXTENDED_COMFORT_BOUNDS = (0.7, 0.5, 0.1, 0.1)  # rms of the differences in acceleration, jerk, yaw rate, yaw acceleration


def fit_weights(window: int, order: int, derivative: int, at: float) -> Float[Tensor, " W"]:
    """Weights of `window` samples in a derivative (per sample) at position `at` of their least-squares polynomial."""
    powers = (torch.arange(window, dtype=torch.float64) - at)[:, None] ** torch.arange(order + 1, dtype=torch.float64)
    inverse = torch.linalg.lstsq(powers, torch.eye(window, dtype=torch.float64)).solution
    return inverse[derivative] * math.factorial(derivative)


@cache
def savgol_matrix(samples: int, window: int, order: int, derivative: int = 0, delta: float = 1.0) -> Float[Tensor, "T T"]:
    """The Savitzky-Golay filter as a matrix (scipy.signal.savgol_filter, mode "interp").

    With an even window the devkit's 8 samples reach from i - 3 to i + 4 and the parabola is read at i + 0.5, not at i;
    the first and last window // 2 outputs are read from the fits to the first and last samples, at their own places.
    """
    half = window // 2
    matrix = torch.zeros(samples, samples, dtype=torch.float64)
    for i in range(samples):
        if half <= i < samples - half:
            first, at = i - (window - 1) // 2, (window - 1) / 2.0
        else:
            first = 0 if i < half else samples - window
            at = i - first
        matrix[i, first : first + window] = fit_weights(window, order, derivative, at)
    return matrix / delta**derivative


def smooth(signal: Float[Tensor, "N T"], window: int, order: int = 2, derivative: int = 0) -> Float[Tensor, "N T"]:
    """Filtered or differentiated signal, rounded to 8 decimals (navsim pdm_comfort_metrics.py)."""
    matrix = savgol_matrix(signal.shape[-1], window, order, derivative, STEP)
    return (signal @ matrix.T * 1e8).round() / 1e8


def phase_unwrap(heading: Float[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    """Headings without jumps of full turns (navsim pdm_comfort_metrics.py _phase_unwrap)."""
    turns = torch.zeros_like(heading)
    turns[..., 1:] = (heading.diff(dim=-1) / (2.0 * math.pi)).round().cumsum(-1)
    return heading - 2.0 * math.pi * turns


def acceleration_magnitude(states: Float[Tensor, "N T 11"]) -> Float[Tensor, "N T"]:
    return torch.hypot(states[..., StateIndex.AX], states[..., StateIndex.AY])


def comfort_signals(states: Float[Tensor, "N T 11"]) -> Float[Tensor, "N 6 T"]:
    """Lon and lat acceleration, jerk, lon jerk, yaw acceleration, yaw rate at 0.1 s (navsim pdm_comfort_metrics.py).

    The shift from rear axle to centre puts both the w^2 and the dw/dt term on the x axis (pdm_geometry_utils.py
    get_acceleration_shifted), so lateral acceleration never contains v * w. Yaw windows are 5: the 15 is not passed on.
    """
    states = states.double()
    spin = states[..., StateIndex.ANGULAR_VELOCITY] ** 2
    lon = states[..., StateIndex.AX] + REAR_AXLE_TO_CENTRE * spin + REAR_AXLE_TO_CENTRE * states[..., StateIndex.ANGULAR_ACCELERATION]
    heading = phase_unwrap(states[..., StateIndex.HEADING])
    signals = [
        smooth(lon, 8),
        smooth(states[..., StateIndex.AY], 8),
        smooth(smooth(acceleration_magnitude(states), 8), 15, derivative=1),
        smooth(smooth(lon, 8), 15, derivative=1),
        smooth(heading, 5, order=3, derivative=2),
        smooth(heading, 5, derivative=1),
    ]
    return torch.stack(signals, 1)


def comfort_signals_v1(states: Float[Tensor, "N 41 11"]) -> Float[Tensor, "N 6 41"]:
    """The same of v1: accelerations of the rear axle, smoothed and differentiated with one parabola over all samples.

    Only the acceleration that is differentiated is smoothed over 8 samples.
    """
    states, whole = states.double(), states.shape[1]
    lon, lat = states[..., StateIndex.AX], states[..., StateIndex.AY]
    heading = phase_unwrap(states[..., StateIndex.HEADING])
    signals = [
        smooth(lon, whole),
        smooth(lat, whole),
        smooth(smooth(acceleration_magnitude(states), 8), whole, derivative=1),
        smooth(smooth(lon, 8), whole, derivative=1),
        smooth(heading, 5, order=3, derivative=2),
        smooth(heading, 5, derivative=1),
    ]
    return torch.stack(signals, 1)


def within_bounds(signals: Float[Tensor, "N 6 T"]) -> Bool[Tensor, "N 6"]:
    """Strictly within COMFORT_BOUNDS at every sample (navsim pdm_comfort_metrics.py _within_bound)."""
    low, high = torch.tensor(COMFORT_BOUNDS, dtype=torch.float64).unbind(-1)
    return ((signals > low[:, None]) & (signals < high[:, None])).all(-1)


def comfort(states: Float[Tensor, "N T 11"]) -> Bool[Tensor, "N 6"]:
    """Which comfort signals stay within bounds (navsim pdm_comfort_metrics.py ego_is_comfortable)."""
    return within_bounds(comfort_signals(states))


def comfort_v1(states: Float[Tensor, "N 41 11"]) -> Bool[Tensor, "N 6"]:
    """The same of PDMS v1: `comfort_v1(states).all(-1)` is its comfort."""
    return within_bounds(comfort_signals_v1(states))


def history(time_us: Int[Tensor, " H"], logged: Float[Tensor, "H 8"]) -> Float[Tensor, "n 11"]:
    """Logged ego states (x y heading vx vy ax ay steering) at 0.1 s up to the present (navsim pdm_scorer.py _calculate_history_comfort).

    The devkit drops the last sample, so after exact time stamps a gap of 0.2 s lies before the first simulated state
    and counts as 0.1 s. Rates of steering and yaw are 0.
    """
    query = torch.arange(int(time_us[0]), int(time_us[-1]), 100_000)[None, :-1]
    knots, logged = time_us[None], logged.double()
    poses = through_centre(resample(query, knots, through_centre(logged[None, :, :3])))[0]
    others = interpolate_linearly(query, knots, logged[None, :, 3:])[0]
    return torch.cat([poses, others, torch.zeros(len(poses), 3, dtype=torch.float64)], -1)


def history_comfort(scene: Scene, states: Float[Tensor, "N 41 11"]) -> Bool[Tensor, "N 6"]:
    """HC, signal by signal: comfort of history and simulation in one (navsim pdm_scorer.py _calculate_history_comfort)."""
    past = history(scene.history_time_us[0], scene.history[0])
    return comfort(torch.cat([past.expand(len(states), -1, -1), states], 1))


def extended_comfort_signals(states: Float[Tensor, "N T 11"]) -> Float[Tensor, "N 4 T"]:
    """Acceleration, jerk, yaw rate, yaw acceleration (navsim pdm_comfort_metrics.py extract_features)."""
    acceleration = smooth(acceleration_magnitude(states), 8)
    heading = phase_unwrap(states[..., StateIndex.HEADING])
    signals = [acceleration, smooth(acceleration, 15, derivative=1), smooth(heading, 5, derivative=1), smooth(heading, 5, derivative=2)]
    return torch.stack(signals, 1)


def extended_comfort(
    states: Float[Tensor, "N 41 11"], previous: Float[Tensor, "N 41 11"], shift: int
) -> tuple[Bool[Tensor, " N"], Float[Tensor, "N 4"]]:
    """EC and the rms differences behind it, where the plans of two frames `shift` steps apart overlap.

    navsim scene_aggregator.py _compute_two_frame_comfort, pdm_comfort_metrics.py ego_is_two_frame_extended_comfort.
    """
    now = extended_comfort_signals(states.double()[:, :-shift])
    before = extended_comfort_signals(previous.double()[:, shift:])
    rms = ((now - before) ** 2).mean(-1).sqrt()
    return (rms <= torch.tensor(EXTENDED_COMFORT_BOUNDS, dtype=torch.float64)).all(-1), rms


def frame_shift(scene: Scene) -> int:
    """Steps between the previous frame and this one (navsim scene_aggregator.py _compute_two_frame_comfort)."""
    return round((int(scene.time_us[0]) * 1e-6 - int(scene.previous_time_us[0]) * 1e-6) / STEP)
