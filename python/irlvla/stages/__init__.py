"""The stages: each is one function and the configuration that it takes."""

from irlvla.stages.conversion import ConvertConfig, convert
from irlvla.stages.evaluation import EvaluateConfig, evaluate
from irlvla.stages.imitation import ImitateConfig, imitate
from irlvla.stages.probing import ProbeConfig, probe
from irlvla.stages.reinforcement import ReinforceConfig, reinforce
from irlvla.stages.reward_learning import RewardConfig, reward
from irlvla.stages.scoring import ScoreConfig, score

__all__ = [
    "ConvertConfig",
    "EvaluateConfig",
    "ImitateConfig",
    "ProbeConfig",
    "ReinforceConfig",
    "RewardConfig",
    "ScoreConfig",
    "convert",
    "evaluate",
    "imitate",
    "probe",
    "reinforce",
    "reward",
    "score",
]
