"""The built-in plugin: what `pip install irlvla` provides, through the hooks that every other plugin uses."""

from irlvla.hooks import hookimpl


@hookimpl
def irlvla_backbones() -> dict[str, str]:
    return {
        "bev": "irlvla.zoo.backbones.bev:BevBackbone",
        "status": "irlvla.zoo.backbones.status:StatusBackbone",
        "vector": "irlvla.zoo.backbones.vector:VectorBackbone",
        "vit": "irlvla.zoo.backbones.vit:VitBackbone",
    }


@hookimpl
def irlvla_reasoners() -> dict[str, str]:
    return {
        "commands": "irlvla.zoo.reasoners.commands:CommandReasoner",
        "driver": "irlvla.zoo.reasoners.driver:DriverReasoner",
        "vlm": "irlvla.zoo.reasoners.vlm:VlmReasoner",
    }


@hookimpl
def irlvla_planners() -> dict[str, str]:
    return {
        "constant_velocity": "irlvla.zoo.planners.constant_velocity:ConstantVelocityPlanner",
        "diffusion": "irlvla.zoo.planners.diffusion:DiffusionPlanner",
        "flow": "irlvla.zoo.planners.flow:FlowPlanner",
        "gaussian": "irlvla.zoo.planners.gaussian:GaussianPlanner",
        "human": "irlvla.zoo.planners.human:HumanPlanner",
        "pdm_closed": "irlvla.zoo.planners.pdm_closed:PdmClosedPlanner",
        "vocabulary": "irlvla.zoo.planners.vocabulary:VocabularyPlanner",
    }


@hookimpl
def irlvla_reward_models() -> dict[str, str]:
    return {
        "ensemble": "irlvla.zoo.rewards.ensemble:EnsembleReward",
        "exact": "irlvla.zoo.rewards.exact:ExactReward",
        "mix": "irlvla.zoo.rewards.mix:MixedReward",
        "world_model": "irlvla.zoo.rewards.world_model:WorldModel",
    }


@hookimpl
def irlvla_rl_algorithms() -> dict[str, str]:
    return {
        "grpo": "irlvla.zoo.algorithms.grpo:Grpo",
        "ppo": "irlvla.zoo.algorithms.ppo:Ppo",
        "reinforce": "irlvla.zoo.algorithms.reinforce:Reinforce",
    }


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
