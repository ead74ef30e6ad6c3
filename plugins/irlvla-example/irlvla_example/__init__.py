"""An example plugin for irlvla: a planner that drives splines, and a metric of smoothness."""

import irlvla


@irlvla.hookimpl
def irlvla_planners() -> dict[str, str]:
    return {"example_spline": "irlvla_example.spline:SplinePlanner"}


@irlvla.hookimpl
def irlvla_metrics() -> dict[str, str]:
    return {"example_smoothness": "irlvla_example.smoothness:SmoothnessMetric"}
