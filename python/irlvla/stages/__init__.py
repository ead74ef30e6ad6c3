"""The stages: each is one function and the configuration that it takes."""

from irlvla.stages.conversion import ConvertConfig, convert
from irlvla.stages.imitation import ImitateConfig, imitate
from irlvla.stages.scoring import ScoreConfig, score

__all__ = ["ConvertConfig", "ImitateConfig", "ScoreConfig", "convert", "imitate", "score"]
