"""The checks of backbones, reasoners and planners."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
from torch import Tensor

import irlvla
from irlvla.components import Backbone, Planner, Reasoner, require_plan
from irlvla.testing.contract import BEHAVIOUR, SETTINGS, TRAINING, keeps_scenes_apart
from irlvla.testing.examples import Example
from irlvla.testing.subject import (
    ROUNDING,
    Kit,
    Outputs,
    Skip,
    Subject,
    difference,
    listed,
    require,
    require_finite,
    require_same,
    require_tensor,
    seeded,
    total,
)
from irlvla.types import Features, Plan

# Shapes of tokens after the batch axis; D = their width.
TOKENS = {"bev": ("D", None, None), "agents": (None, "D"), "map": (None, "D"), "status": ("D",), "language": (None, "D")}
MANY = 32  # proposals, for statistics


# -- backbones and reasoners -------------------------------------------------------------------------------------------


def tokens_of(features: Features) -> dict[str, Tensor]:
    return {name: tokens for name in TOKENS if (tokens := getattr(features, name)) is not None}


def perceive(component: Backbone | Reasoner, given: Example) -> list[Outputs]:
    """The valid tokens of each scene."""
    features = component(given.observation)
    scenes: list[Outputs] = [{} for _ in range(len(given))]
    for name, tokens in tokens_of(features).items():
        valid = getattr(features, f"{name}_valid", None)
        for i, scene in enumerate(scenes):
            scene[name] = tokens[i] if valid is None else tokens[i][valid[i]]
    return scenes


def learn_to_perceive(component: Backbone | Reasoner, given: Example) -> Tensor:
    """Its own losses, and a stand-in for those of the planner that reads its tokens."""
    features = component(given.observation)
    read = sum((tokens * torch.randn_like(tokens)).sum() for tokens in tokens_of(features).values())
    return total(component.loss(features, given.scene), given.device) + read


def makes_tokens(subject: Subject) -> None:
    """Return Features(obs, NAME=tokens) with finite tokens of the width that it was built with; a backbone tells it: self.width = 64."""
    component, given = subject.build(), subject.example()
    width = subject.runtime.get("width", getattr(component, "width", None))
    require(isinstance(width, int), f"its width is {width!r}, expected an int")
    features = component(given.observation)
    require(isinstance(features, Features), f"forward() returns {type(features).__name__}, expected irlvla.Features")
    require(features.observation is given.observation, "Features.observation is not the observation that it was given")
    for name, tokens in tokens_of(features).items():
        require_tensor(tokens, f"Features.{name}", (len(given), *(width if size == "D" else None for size in TOKENS[name])), given.device)
        valid = getattr(features, f"{name}_valid", None)
        fits = valid is None or (valid.dtype == torch.bool and valid.shape == tokens.shape[:2])
        require(fits, f"Features.{name}_valid does not say of each of {tuple(tokens.shape[:2])} tokens whether it exists")
    made = perceive(component, given)
    wanted = ["language"] if subject.entry.kind == "reasoner" else list(TOKENS)
    require(any(name in made[0] for name in wanted), f"it makes no tokens, expected {' or '.join(wanted)}")
    require_finite(made)


# -- planners ----------------------------------------------------------------------------------------------------------


def plan_of(component: Planner, given: Example, k: int | None = None, seed: int = 0) -> Plan:
    """A sample, of as many proposals as the example has."""
    generator = torch.Generator(given.device).manual_seed(seed)
    with torch.no_grad():
        return component.sample(given.features, k or given.plan.poses.shape[1], generator=generator)


def _proposed(plan: Plan) -> dict[str, Tensor]:
    return {"poses": plan.poses} | ({} if plan.score is None else {"score": plan.score})


def explorer(subject: Subject) -> Planner:
    """A planner as it is reinforced: it explores."""
    component: Any = subject.build()
    component.explore = True
    return component


def log_prob_of(component: Planner, given: Example, plan: Plan) -> Tensor:
    if component.log_prob is None:
        raise Skip("it has no log_prob: it imitates but cannot be reinforced")
    return component.log_prob(given.features, plan)


def drive(component: Planner, given: Example) -> list[Outputs]:
    """The plan of each scene, and its log-probability."""
    plan = plan_of(component, given)
    made = _proposed(plan)
    if component.log_prob is not None:
        made["log_prob"] = component.log_prob(given.features, plan)
    return [{name: value[i] for name, value in made.items()} for i in range(len(given))]


def learn_to_drive(component: Planner, given: Example) -> Tensor:
    """Its losses; for one that has none the log-probability, by which it is reinforced."""
    losses = component.loss(given.features, given.human)
    if losses == {} and component.log_prob is not None:
        losses = {"log_prob": -log_prob_of(component, given, plan_of(component, given)).mean()}
    return total(losses, given.device)


def plans_fit(subject: Subject) -> None:
    """Return irlvla.Plan(poses, dt): finite poses "B K T 3" in the ego frame that cover 4 s, at least float32."""
    component, given = subject.build(), subject.example(k=4)
    plan = plan_of(component, given)
    b, k = given.plan.poses.shape[:2]
    require_plan(plan, b, k, component)
    require_tensor(plan.poses, "Plan.poses", (b, k, None, 3), given.device)
    require(plan.poses.element_size() >= 4, f"Plan.poses are of {plan.poses.dtype}, too coarse for metres; expected float32 or float64")
    if plan.score is not None:
        require_tensor(plan.score, "Plan.score", (b, k), given.device)
    if plan.trace is not None:
        fits = plan.trace.ndim >= 3 and plan.trace.shape[:2] == (b, k) and plan.trace.shape[2] > 1
        require(fits, f"Plan.trace has shape {tuple(plan.trace.shape)}, expected ({b}, {k}, D+1, ...): the chain of D steps, noise first")
    require_finite([dict(plan.tensors())])
    irlvla.epdms(given.scene.to("cpu"), plan.to("cpu"))  # raises what else is wrong


def draws_from_its_generator(subject: Subject) -> None:
    """Draw from the generator that sample() is given: torch.randn(..., generator=generator, device=...), and from nothing else."""
    component, given = subject.build(), subject.example()
    plans = []
    for seed in (1, 2):
        with seeded(seed):
            before = _global_state(subject.device)
            plans.append(dict(plan_of(component, given).tensors()))
            untouched = torch.equal(before, _global_state(subject.device))
        require(untouched, "sample() draws from torch's global generator, though it was given one")
    require_same(plans[:1], plans[1:], "the same state of the generator gives another plan")
    with torch.no_grad():
        component.sample(given.features, 1)  # without a generator, from the global one


def _global_state(device: str) -> Tensor:
    """State of torch's global generators."""
    return torch.get_rng_state() if device == "cpu" else torch.cat([torch.get_rng_state(), torch.cuda.get_rng_state(device)])


def keeps_plans_apart(subject: Subject) -> None:
    """Let nothing of one scene depend on which others are in the batch: no mean, sort or padding over the batch axis."""
    component, given = subject.build(), subject.example()
    one, other = ([_proposed(plan_of(component, given, seed=seed))] for seed in (1, 2))
    if not difference(one, other):
        return keeps_scenes_apart(subject)  # a planner without noise
    if component.log_prob is None:
        raise Skip("its plans are random, and without log_prob they cannot be compared")
    plan = plan_of(component, given)
    with torch.no_grad():
        together = [{"log_prob": value} for value in log_prob_of(component, given, plan)]
        alone = [{"log_prob": log_prob_of(component, given[[i]], plan[[i]])[0]} for i in range(len(given))]
    require_same(together, alone, "a plan is otherwise likely alone than in a batch", ROUNDING)
    return None


def does_without_humans(subject: Subject) -> None:
    """Leave scenes out of loss() where human.poses is NaN: none was recorded. Take means over what there is."""
    component, given = subject.build().train(), subject.example()
    for rows in (slice(0, 1), slice(None)):
        given.human.poses[rows] = math.nan
        if (objective := learn_to_drive(component, given)).requires_grad:
            objective.backward()
    bad = [
        name for name, parameter in component.named_parameters() if parameter.grad is not None and not bool(parameter.grad.isfinite().all())
    ]
    require(not bad, f"a scene without human drive makes the gradient of {listed(bad)} NaN or infinite")


def log_prob_fits_the_sample(subject: Subject) -> None:
    """Return "B K D" from log_prob(features, plan), computed from these two alone: before an update the ratio to its old value is 1."""
    component, given = explorer(subject), subject.example()
    plan = plan_of(component, given)
    with torch.no_grad():
        old = log_prob_of(component, given, plan)
    steps = None if plan.trace is None else plan.trace.shape[2] - 1
    require_tensor(old, "log_prob()", (*plan.poses.shape[:2], steps), given.device)
    require_finite([{"log_prob()": old}])
    plan_of(component, given, seed=1)  # of which log_prob must know nothing
    new = log_prob_of(component, given, plan)
    ratio, one = [{"ratio": (new - old).exp().detach()}], [{"ratio": torch.ones_like(old)}]
    require_same(ratio, one, "exp(new - old) is not 1 before an update", ROUNDING)


def log_prob_prefers_own_samples(subject: Subject) -> None:
    """Let log_prob() be the logarithm of the density that sample() draws from: mind its sign, and use the same noise in both."""
    component, given = explorer(subject), subject.example()
    stranger = copy.deepcopy(component)
    with torch.no_grad():
        for parameter in stranger.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        plan = plan_of(component, given, MANY)
        margin = (log_prob_of(component, given, plan) - log_prob_of(stranger, given, plan)).sum(-1).flatten()
    # By Gibbs' inequality the margin is positive on average, for every density; four standard errors are no accident.
    error = margin.std() / len(margin) ** 0.5
    require(bool(margin.mean() >= -4 * error), "its samples are less likely by its own log_prob() than by that of another planner")


def log_prob_can_be_trained(subject: Subject) -> None:
    """Keep log_prob() differentiable: no no_grad(), no detach() of what depends on parameters."""
    component, given = explorer(subject), subject.example()
    plan = plan_of(component, given)
    old = log_prob_of(component, given, plan)
    parameters = [parameter for parameter in component.parameters() if parameter.requires_grad]
    if not parameters:
        raise Skip("it has no parameters to train")
    require(old.requires_grad, "log_prob() has no gradient")
    optimizer = torch.optim.Adam(parameters, 1e-3)
    for _ in range(10):
        optimizer.zero_grad()
        (-log_prob_of(component, given, plan).mean()).backward()
        optimizer.step()
    ratio = (log_prob_of(component, given, plan) - old).mean().exp().item()
    require(ratio > 1.0, f"after training on a plan its ratio exp(new - old) is {ratio:.4g}, expected more than 1")


PERCEPTION = Kit(perceive, learn_to_perceive, makes_tokens, (*SETTINGS, makes_tokens, *BEHAVIOUR, keeps_scenes_apart, *TRAINING))
PLANNING = Kit(
    drive,
    learn_to_drive,
    plans_fit,
    (
        *SETTINGS,
        plans_fit,
        draws_from_its_generator,
        *BEHAVIOUR,
        keeps_plans_apart,
        *TRAINING,
        does_without_humans,
        log_prob_fits_the_sample,
        log_prob_prefers_own_samples,
        log_prob_can_be_trained,
    ),
)
