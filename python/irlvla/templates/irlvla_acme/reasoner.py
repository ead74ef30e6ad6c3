"""A reasoner: the driving command as one word."""

from typing import Any

import irlvla
from torch import nn


class AcmeCommand(irlvla.Reasoner):
    """One language token: a learned vector for each driving command."""

    def __init__(self, config: Any, *, width: int) -> None:
        super().__init__(config)
        self.words = nn.Embedding(len(irlvla.Command), width)

    def forward(self, obs: irlvla.Observation) -> irlvla.Features:
        return irlvla.Features(obs, language=self.words(obs.command)[:, None])
