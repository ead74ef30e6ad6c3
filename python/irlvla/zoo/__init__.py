"""The built-in plugin: what `pip install irlvla` provides, through the hooks that every other plugin uses."""

from irlvla.hooks import hookimpl


@hookimpl
def irlvla_backbones() -> dict[str, str]:
    return {"status": "irlvla.zoo.backbones.status:StatusBackbone"}


@hookimpl
def irlvla_planners() -> dict[str, str]:
    return {
        "constant_velocity": "irlvla.zoo.planners.constant_velocity:ConstantVelocityPlanner",
        "pdm_closed": "irlvla.zoo.planners.pdm_closed:PdmClosedPlanner",
    }


@hookimpl
def irlvla_reward_models() -> dict[str, str]:
    return {"exact": "irlvla.zoo.rewards.exact:ExactReward"}


@hookimpl
def irlvla_datasets() -> dict[str, str]:
    return {
        "cached": "irlvla.zoo.datasets.cached:CachedDataset",
        "scenes": "irlvla.zoo.datasets.scenes:SceneFiles",
        "synthetic": "irlvla.zoo.datasets.synthetic:SyntheticDataset",
    }


@hookimpl
def irlvla_metrics() -> dict[str, str]:
    return {
        "epdms": "irlvla.zoo.metrics.epdms:EpdmsMetric",
        "displacement": "irlvla.zoo.metrics.displacement:DisplacementMetric",
    }
