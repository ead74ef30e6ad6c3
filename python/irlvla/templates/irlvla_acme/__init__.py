"""What irlvla-acme provides. Components are imported only when they are used."""

import irlvla


@irlvla.hookimpl
def irlvla_planners() -> dict[str, str]:
    return {"acme_gaussian": "irlvla_acme.planner:AcmeGaussian"}
