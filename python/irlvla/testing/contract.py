"""The checks that every kind passes, or every kind that learns."""

from __future__ import annotations

import copy
import json
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from irlvla.checkpoint import from_pretrained, save_pretrained
from irlvla.errors import ConfigError
from irlvla.testing.subject import (
    ROUNDING,
    Broken,
    Check,
    Skip,
    Subject,
    difference,
    listed,
    require,
    require_same,
    seeded,
)


def imports(subject: Subject) -> None:
    """Name a class that can be imported and derives from the class of its kind."""
    subject.schema()


def config_is_strict(subject: Subject) -> None:
    """Derive Config from irlvla.Config, and leave its model_config alone."""
    schema = subject.schema()
    require(bool(schema.model_config.get("frozen")), "its Config can be changed after it was checked; expected frozen=True")
    try:
        subject.registry.validate(schema, {**subject.settings, "no_such_field": 1}, subject.entry.kind)
    except ConfigError as error:
        if "no_such_field" in str(error):
            return
        raise
    raise Broken("its Config accepts the unknown field 'no_such_field', so a misspelt setting would go unnoticed; expected an error")


def config_is_data(subject: Subject) -> None:
    """Give Config only fields that JSON can hold: numbers, strings, paths, lists, other Configs. It is saved with every checkpoint."""
    config = subject.config()
    try:
        plain = json.loads(json.dumps(config.model_dump(mode="json"), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise Broken(f"its Config cannot be written as JSON: {error}") from error
    again = subject.registry.validate(subject.schema(), plain, subject.entry.kind, str(subject.entry))
    require(again == config, f"its Config comes back from JSON as {again!r}, expected {config!r}")


def config_leaves_runtime_names(subject: Subject) -> None:
    """Rename the field: settings are data that can be saved, runtime arguments are live objects, and they never share a name."""
    shared = sorted(subject.schema().model_fields.keys() & subject.runtime.keys())
    require(not shared, f"its Config has a field {', '.join(map(repr, shared))}, which every {subject.entry.kind} is given at run time")


def builds(subject: Subject) -> None:
    """Build from the settings alone, as Class(config, **runtime arguments), and call super().__init__(config)."""
    subject.build()


def repeats(subject: Subject) -> None:
    """In eval mode, let equal input (and an equal state of the generator) give equal output: switch off dropout and draw no other noise."""
    component, given = subject.build(), subject.example()
    require_same(subject.outputs(component, given), subject.outputs(component, given), "the same input gives other output the second time")


def leaves_input_alone(subject: Subject) -> None:
    """Change no tensor in place that was passed in: copy it first (clone()), or use operations without a trailing underscore."""
    component, given = subject.build(), subject.example()
    before = copy.deepcopy(given)
    subject.outputs(component, given)
    if subject.kit.learn is not None:
        with suppress(Broken):  # of which another check tells
            subject.learn(component, given)
    changed = [name for (name, a), (_, b) in zip(given.tensors(), before.tensors(), strict=True) if difference([{"": a}], [{"": b}], 0.0)]
    require(not changed, f"it changes its input: {listed(changed)}")


def keeps_scenes_apart(subject: Subject) -> None:
    """In eval mode, let nothing of one scene depend on which others are in the batch: no mean, sort or padding over the batch axis."""
    component, given = subject.build(), subject.example()
    together = subject.outputs(component, given)
    alone = [subject.outputs(component, given[[i]])[0] for i in range(len(given))]
    require_same(together, alone, "a scene comes out otherwise alone than in a batch", ROUNDING)


def takes_one_scene(subject: Subject) -> None:
    """Work for a batch of one scene with one proposal: no squeeze() without an axis, no statistics over the batch."""
    component, given = subject.build(), subject.example(batch=1, k=1)
    subject.outputs(component, given)


def copies(subject: Subject) -> None:
    """Keep nothing that copy.deepcopy cannot copy (open files, locks, generators), and no state outside of the component."""
    component, given = subject.build(), subject.example()
    require_same(subject.outputs(copy.deepcopy(component), given), subject.outputs(component, given), "its copy gives other output")


def losses_are_finite(subject: Subject) -> None:
    """Return a dict of finite scalars by name from loss(), {} for none: take means only over what there is."""
    subject.learn(subject.build().train(), subject.example())


def gradients_arrive(subject: Subject) -> None:
    """Let the losses depend on every parameter, and freeze those that shall not learn: parameter.requires_grad_(False)."""
    component = subject.build().train()
    wanting = {name: parameter for name, parameter in component.named_parameters() if parameter.requires_grad}
    if not wanting:
        raise Skip("it has no parameters to train")
    try:
        objective = subject.learn(component, subject.example())
    except Broken:
        raise Skip("its losses are wrong") from None
    require(objective.requires_grad, "its losses are cut off from its parameters (detach(), no_grad(), item()), or it has none to learn by")
    objective.backward()
    missing = [name for name, parameter in wanting.items() if parameter.grad is None]
    require(not missing, f"no gradient reaches {listed(missing)}")
    wrong = [name for name, parameter in wanting.items() if not bool(parameter.grad.isfinite().all())]
    require(not wrong, f"the gradient of {listed(wrong)} is NaN or infinite")


def saves_and_loads(subject: Subject) -> None:
    """Keep what is learnt in parameters and buffers (nn.Parameter, register_buffer): they alone are saved, beside the config."""
    component, given = subject.build(), subject.example()
    with torch.no_grad():
        for parameter in filter(Tensor.is_floating_point, component.parameters()):
            parameter.add_(0.01 * torch.randn_like(parameter))  # away from what its constructor makes
    with tempfile.TemporaryDirectory() as folder:
        saved = save_pretrained(component, Path(folder) / "model")
        with seeded(1):
            loaded: Any = from_pretrained(saved, device=subject.device)
    require(type(loaded) is type(component), f"it is loaded as {type(loaded).__qualname__}")
    require_same(subject.outputs(loaded, given), subject.outputs(component, given), "it gives other output after saving and loading")


SETTINGS: tuple[Check, ...] = (imports, config_is_strict, config_is_data, config_leaves_runtime_names, builds)
BEHAVIOUR: tuple[Check, ...] = (repeats, leaves_input_alone, takes_one_scene, copies)
TRAINING: tuple[Check, ...] = (losses_are_finite, gradients_arrive, saves_and_loads)
