"""RL algorithms: the conformance kit, advantages against slow twins, the objective, the anchors, what is learnt, and what is saved."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Generator, Tensor, nn

from irlvla.checkpoint import from_pretrained, save_pretrained
from irlvla.components import Algorithm, Policy
from irlvla.errors import ConfigError, InputError
from irlvla.registry import build, installed
from irlvla.testing import example_observation, rl_algorithm_checks
from irlvla.types import METRICS, Plan, Rollout, Trajectory
from irlvla.zoo.algorithms import advantages
from irlvla.zoo.algorithms.objective import chains_of, choice_loss, clipped, divergence
from irlvla.zoo.algorithms.ppo import Critic

test_ppo = rl_algorithm_checks("ppo")
test_ppo_anchored = rl_algorithm_checks("ppo", kl=0.1, value_clip=0.2, minibatch=2, metrics={"ep": 1.0, "nc": 2.0})
test_grpo = rl_algorithm_checks("grpo")
test_reinforce = rl_algorithm_checks("reinforce", target_kl=0.5)

ALGORITHMS = ["ppo", "grpo", "reinforce"]
WIDTH = 32
SMALL = {"anchors": 6, "heads": 2, "layers": 1, "bev_tokens": 0, "tokens": ["status"]}
PLANNERS: dict[str, dict[str, Any]] = {
    "diffusion": {"name": "diffusion", **SMALL},
    "flow": {"name": "flow", **SMALL, "steps": 2},
    "gaussian": {"name": "gaussian", **SMALL},
    "vocabulary": {"name": "vocabulary", **SMALL, "anchors": 12},
}


def make_policy(planner: str = "diffusion", **settings: Any) -> Policy:
    torch.manual_seed(0)
    return installed().build_policy({"name": "status", "width": WIDTH}, {**PLANNERS.get(planner, {"name": planner}), **settings}).eval()


def make(name: str = "ppo", **settings: Any) -> Algorithm:
    torch.manual_seed(1)
    return build("rl_algorithm", {"name": name, **settings}, width=WIDTH)  # type: ignore[no-any-return]


def optimizer_of(policy: Policy, algorithm: Algorithm, lr: float = 3e-3) -> torch.optim.Adam:
    return torch.optim.Adam([p for p in (*policy.parameters(), *algorithm.parameters()) if p.requires_grad], lr)


def make_rollout(policy: Policy, k: int = 12, seed: int = 0, scenes: int = 4) -> Rollout:
    """Plans are rewarded for ending near a place, which is another in each scene."""
    obs = dataclasses.replace(example_observation(scenes, cameras=0), scene=None)
    goal = torch.tensor([20.0, 25.0, 30.0, 35.0])[:scenes, None]
    with torch.no_grad():
        features = policy(obs)
        policy.planner.explore = True
        plan = policy.planner.sample(features, k, generator=Generator().manual_seed(seed))
        policy.planner.explore = False
        log_prob = policy.planner.log_prob(features, plan)  # type: ignore[misc]
    reward = (-(plan.poses[..., -1, 0] - goal).abs() / 10.0 - plan.poses[..., -1, 1].abs() / 10.0).exp()
    values = reward[..., None].repeat(1, 1, len(METRICS))
    values[..., METRICS.index("ec")] = math.nan
    human = torch.zeros(scenes, 8, 3)
    human[..., 0] = torch.arange(1, 9) / 8 * goal
    return Rollout(obs, Trajectory(human), plan, log_prob, reward, values)


def driven(policy: Policy, rollout: Rollout) -> float:
    """The mean reward of what is driven."""
    goal = rollout.human.poses[:, -1, 0]
    end = policy.sample(rollout.observation, 1, generator=Generator().manual_seed(9)).poses[:, 0, -1]
    return (-(end[:, 0] - goal).abs() / 10.0 - end[:, 1].abs() / 10.0).exp().mean().item()


# -- advantages --------------------------------------------------------------------------------------------------------


def test_advantages_within_groups() -> None:
    generator = Generator().manual_seed(0)
    values = torch.rand(3, 7, 2, generator=generator)
    values[0, 2, 1] = math.nan
    group = torch.randint(3, (3, 7), generator=generator)
    found = advantages.within_groups(values, group)
    for b in range(3):
        for k in range(7):
            for m in range(2):
                own = values[b, k, m].item()
                others = [values[b, j, m].item() for j in range(7) if group[b, j] == group[b, k]]
                others = [value for value in others if not math.isnan(value)]
                mean = sum(others) / len(others)
                spread = math.sqrt(sum((value - mean) ** 2 for value in others) / len(others))
                expected = (own - mean) / (spread + advantages.TINY)
                assert found[b, k, m].item() == pytest.approx(expected, abs=2e-3, nan_ok=True)


def test_advantages_leave_one_out() -> None:
    values = torch.rand(2, 5, 2, generator=Generator().manual_seed(0))
    values[1, 3, 0] = math.nan
    found = advantages.leave_one_out(values)
    for b in range(2):
        for k in range(5):
            for m in range(2):
                others = [values[b, j, m].item() for j in range(5) if j != k and not values[b, j, m].isnan()]
                assert found[b, k, m].item() == pytest.approx(values[b, k, m].item() - sum(others) / len(others), abs=1e-6, nan_ok=True)


def test_advantages_have_one_scale() -> None:
    values = 5.0 + 3.0 * torch.randn(4, 6, 2, generator=Generator().manual_seed(0))
    values[0, 0, 1] = math.nan
    found = advantages.standardised(values)
    for column in found.unbind(-1):
        known = column[~column.isnan()]
        assert known.mean().item() == pytest.approx(0.0, abs=1e-5)
        assert known.std(correction=0).item() == pytest.approx(1.0, abs=1e-3)
    assert bool((advantages.standardised(torch.full((2, 3, 1), 0.7)) == 0.0).all())


def test_advantage_of_each_metric() -> None:
    """A metric that is not measured counts as neither good nor bad, and one of a larger scale for no more than its weight."""
    rollout = make_rollout(make_policy())
    values = rollout.values.clone()
    values[..., METRICS.index("ep")] *= 100.0
    rollout = dataclasses.replace(rollout, values=values)
    one, two = (make("grpo", metrics=metrics) for metrics in ({"ep": 1.0, "ec": 5.0}, {"nc": 1.0}))
    planner: Any = make_policy().planner
    features: Any = None
    found, expected = (algorithm.goals(planner, features, rollout)["advantage"] for algorithm in (one, two))  # type: ignore[operator]
    torch.testing.assert_close(found, expected, atol=1e-2, rtol=1e-2)


def test_wrong_metric() -> None:
    with pytest.raises(ConfigError, match=r"no sub-metric 'epp'. Did you mean 'ep'\?"):
        make("grpo", metrics={"epp": 1.0})


def test_explained_variance() -> None:
    measured = torch.tensor([0.0, 1.0, 2.0, math.nan])
    assert advantages.explained_variance(measured, measured) == pytest.approx(1.0)
    assert advantages.explained_variance(torch.ones(4), measured) == pytest.approx(0.0)
    assert advantages.explained_variance(-measured, measured) == pytest.approx(-3.0)
    assert advantages.explained_variance(measured, torch.ones(4)) == 0.0


def test_groups_of_grpo() -> None:
    """Within an anchor a plan is compared with those from the same anchor alone; truncated, only what is better counts, or unsafe."""
    policy = make_policy()
    rollout = make_rollout(policy, k=24)
    anchor = policy.planner.anchor_of(rollout.plan)  # type: ignore[operator]
    assert bool((anchor.sort(1).values[:, ::4] == torch.arange(6)).all())  # 4 plans of each
    goals = {group: make("grpo", group=group).goals(policy.planner, None, rollout)["advantage"] for group in ("scene", "anchor", "both")}  # type: ignore[operator]
    for own in range(6):
        assert goals["anchor"][0][anchor[0] == own].mean().item() == pytest.approx(0.0, abs=1e-3)
    assert goals["scene"].mean(1).abs().max() < 1e-3
    torch.testing.assert_close(goals["both"], (goals["scene"] + goals["anchor"]) / 2)
    values = torch.ones_like(rollout.values)
    values[0, 3, METRICS.index("nc")] = 0.5
    cut = make("grpo", truncate=True).goals(policy.planner, None, dataclasses.replace(rollout, values=values))["advantage"]  # type: ignore[operator]
    assert cut[0, 3] == -1.0
    assert cut.flatten().sort().values[1] >= 0.0


# -- the objective -----------------------------------------------------------------------------------------------------


def test_clipped_objective() -> None:
    """Against a slow twin, step by step."""
    generator = Generator().manual_seed(0)
    new, old = (torch.randn(2, 3, 4, generator=generator, dtype=torch.float64) * 0.3 for _ in range(2))
    advantage = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    loss, values = clipped(new, old, advantage, 0.2, 0.5)
    total, outside = 0.0, 0
    for b in range(2):
        for k in range(3):
            for d in range(4):
                ratio = math.exp(new[b, k, d] - old[b, k, d])
                credit = advantage[b, k].item() * 0.5 ** (3 - d)
                total -= min(credit * ratio, credit * min(max(ratio, 0.8), 1.2)) / 24
                outside += abs(ratio - 1) > 0.2
    assert loss.item() == pytest.approx(total, abs=1e-6)
    assert values["clipfrac"].item() == pytest.approx(outside / 24)
    assert values["approx_kl"] >= 0.0


def test_divergence_is_an_estimate_of_kl() -> None:
    """Of two Gaussians whose divergence is known; 0 of a policy from itself."""
    draws = torch.randn(1, 200_000, 1, generator=Generator().manual_seed(0))
    one, other = torch.distributions.Normal(0.0, 1.0), torch.distributions.Normal(0.5, 1.2)
    found = divergence(other.log_prob(draws), one.log_prob(draws))
    assert found.item() == pytest.approx(torch.distributions.kl_divergence(one, other).item(), abs=2e-3)
    assert divergence(one.log_prob(draws), one.log_prob(draws)) == 0.0


@pytest.mark.parametrize("kind", ["reward", "policy", "cross_entropy", "ranking"])
def test_scores_learn_to_choose(kind: Any) -> None:
    """The best plan of each scene comes to have the highest score, and an unlucky one that is usually good is not the loser."""
    reward = torch.tensor([[0.2, 0.9, 0.0, 0.5], [0.0, 0.1, 0.6, 0.3]])
    score = nn.Parameter(torch.tensor([[3.0, 0.0, 1.0, 2.0], [2.0, 1.0, 0.0, 2.0]]))
    optimizer = torch.optim.Adam([score], 0.1)
    for _ in range(150):
        optimizer.zero_grad()
        choice_loss(kind, score, reward).backward()
        optimizer.step()
    assert score.argmax(1).tolist() == [1, 2]


# -- updates -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("planner", PLANNERS)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_improves(name: str, planner: str) -> None:
    """What is driven is rewarded better after some updates; the scores, too, by which it is chosen."""
    policy, algorithm = make_policy(planner), make(name, imitation=0.0, epochs=2)
    optimizer = optimizer_of(policy, algorithm)
    before = driven(policy, make_rollout(policy))
    drawn = [make_rollout(policy).reward.mean().item()]
    for step in range(20):
        values = algorithm.update(policy, optimizer, make_rollout(policy, seed=step))
        assert all(math.isfinite(value) for value in values.values())
    drawn.append(make_rollout(policy).reward.mean().item())
    assert drawn[1] > drawn[0] + 0.02
    assert driven(policy, make_rollout(policy)) > before + 0.04


@pytest.mark.parametrize("planner", PLANNERS)
def test_ratio_is_1_before_the_first_step(planner: str) -> None:
    policy, algorithm = make_policy(planner), make("ppo", epochs=1, kl=1.0)
    values = algorithm.update(policy, optimizer_of(policy, algorithm), make_rollout(policy))
    assert values["losses/approx_kl"] == pytest.approx(0.0, abs=1e-9)
    assert values["losses/old_approx_kl"] == pytest.approx(0.0, abs=1e-6)
    assert values["losses/clipfrac"] == 0.0
    assert values["losses/kl"] == pytest.approx(0.0, abs=1e-9)


def test_names_are_those_of_cleanrl() -> None:
    policy, algorithm = make_policy(), make("ppo", kl=1.0)
    values = algorithm.update(policy, optimizer_of(policy, algorithm), make_rollout(policy))
    names = {
        "policy_loss",
        "value_loss",
        "entropy",
        "approx_kl",
        "old_approx_kl",
        "clipfrac",
        "explained_variance",
        "imitation",
        "kl",
        "score",
    }
    assert {f"losses/{name}" for name in names} <= values.keys()


def test_target_kl_ends_an_update() -> None:
    """After the first epoch in which the policy has gone too far."""
    counts = []
    for target in (None, 1e-4):
        policy, algorithm = make_policy(), make("ppo", epochs=10, target_kl=target)
        optimizer, steps = optimizer_of(policy, algorithm), []
        optimizer.register_step_post_hook(lambda *_, steps=steps: steps.append(1))
        algorithm.update(policy, optimizer, make_rollout(policy))
        counts.append(len(steps))
    assert counts[0] == 10
    assert 2 <= counts[1] < 10


def test_anchors_hold() -> None:
    """Against random rewards the policy stays nearer to where it was with an anchor; on the human's drive it stays nearer to that."""
    far = {}
    for anchor in ("none", "imitation", "kl"):
        policy = make_policy()
        algorithm = make("grpo", score="none", imitation=float(anchor == "imitation"), kl=3.0 * (anchor == "kl"))
        optimizer = optimizer_of(policy, algorithm)
        first = copy.deepcopy(policy)
        for step in range(12):
            rollout = make_rollout(policy, seed=step)
            algorithm.update(policy, optimizer, dataclasses.replace(rollout, reward=rollout.plan.poses[..., -1, 1].sigmoid()))
        rollout = make_rollout(first)
        with torch.no_grad():
            moved = divergence(policy.planner.log_prob(policy(rollout.observation), rollout.plan), rollout.log_prob)  # type: ignore[misc]
            loss = policy.planner.loss(policy(rollout.observation), rollout.human)["distance"]
        far[anchor] = moved.item(), loss.item()
    assert far["kl"][0] < 0.5 * far["none"][0]
    assert far["imitation"][1] < far["none"][1]


def test_imitation_leaves_out_who_left_no_drive() -> None:
    """Half of the scenes with a drive: half of the loss of these."""
    policy = make_policy("gaussian")
    rollout = make_rollout(policy)
    poses = rollout.human.poses.clone()
    poses[2:] = math.nan
    half = dataclasses.replace(rollout, human=Trajectory(poses))
    found = []
    for given in (rollout[:2], half, dataclasses.replace(rollout, human=Trajectory(torch.full_like(poses, math.nan)))):
        learner, algorithm = copy.deepcopy(policy), make("grpo", epochs=1, imitation=1.0)
        found.append(algorithm.update(learner, optimizer_of(learner, algorithm), given)["losses/imitation"])
    assert found[1] == pytest.approx(found[0] / 2, rel=1e-5)
    assert found[2] == 0.0


def test_minibatches_see_every_scene_once(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, algorithm = make_policy(), make("ppo", minibatch=3, epochs=2)
    policy.backbone.requires_grad_(False)
    seen: list[int] = []
    step = type(algorithm)._step  # type: ignore[attr-defined]

    def watch(self: Any, planner: Any, optimizer: Any, features: Any, rollout: Rollout, goals: Any) -> Any:
        assert features.observation.token == rollout.observation.token
        seen.extend(int(token.rpartition("-")[2]) for token in rollout.observation.token)
        return step(self, planner, optimizer, features, rollout, goals)

    monkeypatch.setattr(type(algorithm), "_step", watch)
    algorithm.update(policy, optimizer_of(policy, algorithm), make_rollout(policy))
    assert sorted(seen[:4]) == sorted(seen[4:]) == [0, 1, 2, 3]


def test_seeing_is_done_once_where_it_does_not_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    for frozen, times in ((True, 1), (False, 5)):
        policy, algorithm = make_policy(), make("ppo", epochs=4)
        policy.backbone.requires_grad_(not frozen)
        calls: list[int] = []
        policy.backbone.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        rollout = make_rollout(policy)
        calls.clear()
        algorithm.update(policy, optimizer_of(policy, algorithm), rollout)
        assert len(calls) == times


def test_critic_reads_where_a_chain_begins() -> None:
    """If that is given; a planner that draws it gets the same baseline for all plans of a scene."""
    for name, same in (("diffusion", False), ("gaussian", True)):
        policy = make_policy(name)
        rollout = make_rollout(policy)
        torch.manual_seed(0)
        features = policy(rollout.observation)
        values = Critic(WIDTH, 1)(features, chains_of(policy.planner, features, rollout.plan))[..., 0]
        assert values.shape == rollout.reward.shape
        assert bool((values - values[:, :1]).abs().max() < 1e-6) == same


def test_focus_is_on_what_is_driven() -> None:
    """By the scores with which plans were drawn; on average plans count as much as without."""
    policy, algorithm = make_policy(), make("ppo", focus=2.0)
    plan = make_rollout(policy).plan
    found = algorithm._emphasis(policy.planner, plan)  # type: ignore[operator]
    torch.testing.assert_close(found.mean(1), torch.ones(4))
    assert torch.equal(found.argmax(1), plan.score.argmax(1))  # type: ignore[union-attr]
    assert make("ppo", focus=0.0)._emphasis(policy.planner, plan) == 1.0  # type: ignore[operator]
    assert algorithm._emphasis(make_policy("gaussian").planner, plan) == 1.0  # type: ignore[operator]


def test_value_clip_bounds_the_critic() -> None:
    """Where it has moved further than that in an update, and would go on, it is not pulled any more."""
    policy = make_policy()
    rollout = make_rollout(policy)
    features = policy(rollout.observation)
    chains = chains_of(policy.planner, features, rollout.plan)
    for clip, pulled in ((None, True), (2.0, True), (0.5, False)):
        algorithm: Any = make("ppo", value_clip=clip)
        values = algorithm.critic(features, chains).detach()
        loss = algorithm.losses(features, chains, {"values": values - 1.0, "measured": values + 1.0})["value_loss"]
        (gradient,) = torch.autograd.grad(loss, algorithm.critic.read.weight)
        assert bool(gradient.abs().sum() > 1e-6) == pulled


def test_same_seed_same_weights() -> None:
    found = []
    for _ in range(2):
        policy, algorithm = make_policy(), make("ppo", minibatch=3)
        torch.manual_seed(5)
        algorithm.update(policy, optimizer_of(policy, algorithm), make_rollout(policy))
        found.append(policy.state_dict() | algorithm.state_dict())
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_state_is_saved_and_restored() -> None:
    """The policy that the divergence is from, too: one that goes on is held to where it began."""
    policy, algorithm = make_policy(), make("ppo", kl=0.1)
    optimizer = optimizer_of(policy, algorithm)
    algorithm.update(policy, optimizer, make_rollout(policy))
    again, after = make("ppo", kl=0.1), copy.deepcopy(policy)
    again.load_state_dict(algorithm.state_dict())
    rollout = make_rollout(policy, seed=3)
    resumed = torch.optim.Adam([*after.parameters(), *again.parameters()], 3e-3)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    results = []
    for one, model, steps in ((algorithm, policy, optimizer), (again, after, resumed)):
        torch.manual_seed(7)  # of the noise of imitation
        results.append(one.update(model, steps, rollout))
    assert results[0] == results[1]
    assert results[0]["losses/kl"] > 0.0


def test_what_it_remembers_is_saved_as_a_model(tmp_path: Path) -> None:
    policy, algorithm = make_policy(), make("ppo", kl=0.1)
    algorithm.update(policy, optimizer_of(policy, algorithm), make_rollout(policy))
    again = from_pretrained(save_pretrained(algorithm, tmp_path / "ppo"))
    assert len(algorithm.reference) > 0
    assert torch.equal(cast(Any, again).reference, algorithm.reference)


# -- what cannot be reinforced -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALGORITHMS)
def test_planner_without_log_prob(name: str) -> None:
    policy, other = make_policy("constant_velocity"), make_policy()
    with pytest.raises(InputError, match=r"constant_velocity.* has no log_prob, so it imitates but cannot be reinforced"):
        make(name).update(policy, optimizer_of(other, make()), make_rollout(other))


@pytest.mark.parametrize("name", ["grpo", "reinforce"])
def test_one_plan_cannot_be_compared(name: str) -> None:
    policy, algorithm = make_policy(), make(name)
    with pytest.raises(InputError, match="candidates must be at least 2"):
        algorithm.update(policy, optimizer_of(policy, algorithm), make_rollout(policy, k=1))


def test_groups_need_anchors() -> None:
    policy, algorithm = make_policy(), make("grpo", group="anchor")

    class Free:
        log_prob = policy.planner.log_prob

        def __str__(self) -> str:
            return "planner 'free'"

    rollout = make_rollout(policy)
    with pytest.raises(InputError, match="needs a planner with anchors, but planner 'free' has none; set group=scene"):
        algorithm.goals(Free(), None, rollout)  # type: ignore[operator]


def test_retrace_is_what_sample_did() -> None:
    """Log-probability, scores and anchors of the chains that were drawn."""
    for name in ("diffusion", "flow"):
        policy = make_policy(name)
        rollout = make_rollout(policy)
        found = policy.planner.retrace(policy(rollout.observation), rollout.plan)  # type: ignore[operator]
        torch.testing.assert_close(found.log_prob, rollout.log_prob)
        torch.testing.assert_close(found.score, rollout.plan.score)
        anchors: Tensor = policy.planner.anchors  # type: ignore[assignment]
        expected = anchors[policy.planner.anchor_of(rollout.plan)][..., :2]  # type: ignore[operator]
        torch.testing.assert_close(found.start, expected, atol=1e-4, rtol=1e-4)


def test_plan_of_the_rollout_is_a_batch() -> None:
    """Rows of a rollout are those of all that is in it."""
    rollout = make_rollout(make_policy())
    part = rollout[torch.tensor([2, 0])]
    assert part.observation.token == ("example-0-2", "example-0-0")
    assert isinstance(part.plan, Plan)
    assert torch.equal(part.plan.poses, rollout.plan.poses[[2, 0]])
