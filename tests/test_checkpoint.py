"""Saving and loading: what comes back, what is refused, and what a kill leaves."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import pickle
import random
import re
import signal
import time
import warnings
from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import errors as hub_errors
from pydantic import Field
from torch import nn

import irlvla
from irlvla import components
from irlvla.checkpoint import from_pretrained, last_checkpoint, manifest, push_to_hub, save_checkpoint, save_pretrained, step_of
from irlvla.components import Policy, Spec, pluggable
from irlvla.errors import ContractError, FileError, InputError, PluginError
from irlvla.registry import Entry, Plugin, Registry, installed
from irlvla.registry.discovery import manager
from test_files import killed_at_each_step

# -- a plugin ----------------------------------------------------------------------------------------------------------


class Eyes(components.Backbone):
    class Config(components.Config):
        width: int = 4
        path: Path = Path("a/b")

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.width = config.width
        self.layer = nn.Linear(2, self.width)
        self.norm = nn.BatchNorm1d(self.width)

    def forward(self, obs: Any) -> Any: ...


class Hands(components.Planner):
    class Config(components.Config):
        knots: int = Field(3, ge=1)
        temperature: float = 0.1
        note: str = "${oc.env:HOME} {0} é"

    def __init__(self, config: Any, *, width: int) -> None:
        super().__init__(config)
        self.layer = nn.Linear(width, config.knots, bias=False)

    def loss(self, features: Any, human: Any) -> Any: ...

    def sample(self, features: Any, k: int, *, generator: Any = None) -> Any: ...


class Words(components.Reasoner):
    """Its two layers share their weights, as language models do."""

    def __init__(self, config: Any, *, width: int) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(5, width)
        self.head = nn.Linear(width, 5, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, obs: Any) -> Any: ...


class Judge(components.RewardModel):
    class Config(components.Config):
        members: list[Spec] = pluggable("reward_model", [])
        held: str = ""  # what it holds that cannot be saved
        data: Any = None

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.weight = nn.Parameter(torch.zeros(2, 2))
        if config.held == "lazy":
            self.layer = nn.LazyLinear(2)
        elif config.held == "sparse":
            self.register_buffer("sparse", torch.eye(2).to_sparse())
        elif config.held == "slices":
            whole = torch.zeros(4)
            self.register_buffer("left", whole[:2])
            self.register_buffer("right", whole[1:3])
        elif config.held in ("extra", "raises"):
            self.state = Extra(config.held)

    def forward(self, obs: Any, scene: Any, plan: Any) -> Any: ...


class Extra(nn.Module):
    def __init__(self, held: str) -> None:
        super().__init__()
        self.held = held

    def get_extra_state(self) -> Any:
        if self.held == "raises":
            raise NotImplementedError("not me")
        return {"an": "object"}


class Ruler(components.Metric):
    def __call__(self, scene: Any, plan: Any) -> Any: ...


TOY, OTHER = Plugin("irlvla-toy", "1.2", "toy"), Plugin("irlvla-other", "0.5.1", "other")
ENTRIES = [
    Entry("backbone", "eyes", Eyes, TOY),
    Entry("planner", "hands", Hands, TOY),
    Entry("reasoner", "words", Words, TOY),
    Entry("reward_model", "judge", Judge, TOY),
    Entry("reward_model", "other", Judge, OTHER),
    Entry("metric", "ruler", Ruler, TOY),
]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill loses nothing that was written: only a power cut needs fsync, which takes most of the time."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> Registry:
    """The registry of this process, with two plugins besides the built-in one, and their components alone."""
    registry = installed()
    monkeypatch.setattr(registry, "plugins", [Plugin("irlvla", irlvla.__version__, "irlvla.zoo"), TOY, OTHER])
    monkeypatch.setattr(registry, "entries", {kind: {} for kind in components.KINDS})
    for entry in ENTRIES:
        registry.entries[entry.kind][entry.name] = [entry]
    return registry


def make_policy(known: Registry, reasoner: str | None = None, **settings: Any) -> Policy:
    torch.manual_seed(0)
    return known.build_policy({"name": "eyes", "width": 6}, {"name": "hands", **settings}, reasoner)


def rewrite(folder: Path, **changes: Any) -> None:
    """Change config.json as a stranger could: with the checksum that fits."""
    content = {**json.loads((folder / "config.json").read_text()), **changes}
    content.pop("sha256")
    (folder / "config.json").write_text(json.dumps({**content, "sha256": manifest._checksum(content)}))


def assert_same(a: nn.Module, b: nn.Module) -> None:
    assert type(a) is type(b)
    torch.testing.assert_close(dict(a.state_dict()), dict(b.state_dict()), rtol=0, atol=0)


@pytest.fixture
def saved(known: Registry, tmp_path: Path) -> Path:
    return save_pretrained(make_policy(known), tmp_path / "saved")


# -- there and back ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reasoner", [None, "words"])
def test_a_policy_comes_back(known: Registry, tmp_path: Path, reasoner: str | None):
    policy = make_policy(known, reasoner, knots=5)
    policy.backbone.norm.running_mean.fill_(7)
    folder = save_pretrained(policy, str(tmp_path / "new" / "folder"))
    assert folder == tmp_path / "new" / "folder"
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    loaded = from_pretrained(str(folder))
    assert_same(loaded, policy)
    for part in ("backbone", "planner", "reasoner"):
        if getattr(policy, part) is not None:
            assert_same(getattr(loaded, part), getattr(policy, part))
            assert getattr(loaded, part).config == getattr(policy, part).config
    assert not any(module.training for module in loaded.modules())
    assert loaded.planner.config.note == "${oc.env:HOME} {0} é"  # text, not an interpolation
    assert save_pretrained(loaded, tmp_path / "again").joinpath("config.json").read_bytes() == (folder / "config.json").read_bytes()


def test_a_component_comes_back_with_what_it_was_built_with(known: Registry, tmp_path: Path):
    for kind, spec, runtime in [("planner", "hands", {"width": 9}), ("backbone", "eyes", {}), ("reasoner", "words", {"width": 3})]:
        component = known.build(kind, spec, **runtime)
        assert_same(from_pretrained(save_pretrained(component, tmp_path / kind)), component)
        assert json.loads((tmp_path / kind / "config.json").read_text())["runtime"] == runtime


def test_shared_weights_stay_shared(known: Registry, tmp_path: Path):
    folder = save_pretrained(known.build("reasoner", "words", width=3), tmp_path / "saved")
    assert (folder / "model.safetensors").stat().st_size < 2 * 5 * 3 * 4 + 100  # written once
    loaded = from_pretrained(folder)
    assert loaded.head.weight is loaded.embed.weight


def test_config_json(known: Registry, saved: Path):
    content = json.loads((saved / "config.json").read_text())
    assert content.pop("sha256") == manifest._checksum(content)
    weights = (saved / "model.safetensors").read_bytes()
    assert content == {
        "format": 1,
        "irlvla": irlvla.__version__,
        "kind": "policy",
        "spec": {
            "backbone": {"name": "eyes", "width": 6, "path": "a/b"},
            "planner": {"name": "hands", "knots": 3, "temperature": 0.1, "note": "${oc.env:HOME} {0} é"},
        },
        "runtime": {},
        "requires": {"irlvla": irlvla.__version__, "irlvla-toy": "1.2"},
        "weights": {"file": "model.safetensors", "bytes": len(weights), "sha256": hashlib.sha256(weights).hexdigest()},
    }


def test_plugins_of_components_that_settings_choose_are_required(known: Registry, tmp_path: Path):
    inner = {"name": "judge", "members": [{"name": "other"}]}
    folder = save_pretrained(known.build("reward_model", {"name": "judge", "members": [inner]}), tmp_path / "saved")
    requires = json.loads((folder / "config.json").read_text())["requires"]
    assert requires == {"irlvla": irlvla.__version__, "irlvla-other": "0.5.1", "irlvla-toy": "1.2"}
    assert from_pretrained(folder).config.members[0]["members"][0]["name"] == "other"


def test_a_saved_model_is_replaced_and_nothing_else(known: Registry, saved: Path, tmp_path: Path):
    save_pretrained(make_policy(known, knots=9), saved)
    assert from_pretrained(saved).planner.config.knots == 9
    (saved / "thesis.tex").write_text("years of work")
    with pytest.raises(FileError, match=r"saved holds other things \(thesis.tex\).*Name a new folder"):
        save_pretrained(make_policy(known), saved)
    assert (saved / "thesis.tex").read_text() == "years of work"
    with pytest.raises(FileError, match="it is a file"):
        save_pretrained(make_policy(known), saved / "thesis.tex")


def test_devices(saved: Path, device: str):
    assert next(from_pretrained(saved, device=device).parameters()).device.type == device
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="device='cuda:0': no CUDA device was found"):
            from_pretrained(saved, device="cuda:0")


# -- what cannot be saved ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ("extra", "its state._extra_state is a dict, which only pickle could save"),
        ("raises", "its state_dict() raises NotImplementedError: not me"),
        ("lazy", "its layer.weight is not initialized"),
        ("sparse", "its sparse is torch.sparse_coo on the device cpu"),
        ("slices", "Refusing to save/load the model"),
    ],
)
def test_a_component_that_cannot_be_saved_is_named(known: Registry, tmp_path: Path, held: str, message: str):
    judge = known.build("reward_model", {"name": "judge", "held": held})
    with pytest.raises(ContractError, match=rf"^reward_model 'judge' \(irlvla-toy 1.2\) cannot be saved: .*{re.escape(message)}"):
        save_pretrained(judge, tmp_path / "saved")
    assert os.listdir(tmp_path) == []


def test_settings_that_are_no_data(known: Registry, tmp_path: Path):
    judge = known.build("reward_model", {"name": "judge", "data": object()})
    with pytest.raises(ContractError, match=r"'judge' \(irlvla-toy 1.2\) cannot be saved: its settings are no plain data"):
        save_pretrained(judge, tmp_path / "saved")


def test_what_has_no_weights(known: Registry, tmp_path: Path):
    with pytest.raises(InputError, match=r"metric 'ruler' .* has no weights to save"):
        save_pretrained(known.build("metric", "ruler"), tmp_path / "saved")
    with pytest.raises(InputError, match="a policy or a component is saved, not Linear"):
        save_pretrained(nn.Linear(1, 1), tmp_path / "saved")  # type: ignore[arg-type]
    with pytest.raises(PluginError, match="Judge "):
        save_pretrained(Judge(Judge.Config()), tmp_path / "saved")


# -- damaged files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_cut_off_anywhere(saved: Path, name: str):
    whole = (saved / name).read_bytes()
    for end in range(len(whole)):
        (saved / name).write_bytes(whole[:end])
        with pytest.raises(FileError, match=f"{name} is (truncated|not whole)"):
            from_pretrained(saved)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_flipped_bit_anywhere(saved: Path, name: str):
    whole = (saved / name).read_bytes()
    for i in range(len(whole)):
        (saved / name).write_bytes(whole[:i] + bytes([whole[i] ^ 1 << i % 7]) + whole[i + 1 :])
        with contextlib.suppress(FileError):
            from_pretrained(saved)
            content = json.loads((saved / "config.json").read_text())
            assert name == "config.json"
            assert content == json.loads(whole)  # it was a space


def test_a_missing_file(saved: Path):
    for name in ("model.safetensors", "config.json"):
        os.remove(saved / name)
        with pytest.raises(FileError, match=rf"{re.escape(name)}( does not exist|$)"):
            from_pretrained(saved)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1, 2]", "was not written by irlvla: it holds a list"),
        ("{}", "was not written by irlvla: it has no format"),
        ('{"model_type": "llama", "torch_dtype": "bfloat16"}', "was not written by irlvla"),
        ('{"format": "1", "irlvla": "0.1.0"}', "was not written by irlvla"),
        ("[" * 100_000, "truncated or corrupt"),
        ("\x00", "truncated or corrupt"),
    ],
)
def test_what_is_no_saved_model(tmp_path: Path, content: str, message: str):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(FileError, match=message):
        from_pretrained(tmp_path)


def test_where_there_is_no_saved_model(saved: Path, tmp_path: Path):
    with pytest.raises(FileError, match="gone does not exist"):
        from_pretrained(tmp_path / "gone")
    with pytest.raises(FileError, match=r"is a file; a saved model is a folder with config.json and model.safetensors"):
        from_pretrained(saved / "model.safetensors")
    (tmp_path / "run" / "checkpoints" / "last").mkdir(parents=True)
    with pytest.raises(FileError, match=r"run is no saved model: it has no config.json$"):
        from_pretrained(tmp_path / "run")
    saved.rename(tmp_path / "run" / "checkpoints" / "last" / "model")
    for path, inside in [("run", "run/checkpoints/last/model"), ("run/checkpoints", "run/checkpoints/last/model")]:
        with pytest.raises(FileError, match=rf"is no saved model: it has no config.json. Did you mean {tmp_path / inside}\?"):
            from_pretrained(tmp_path / path)


def test_a_model_of_a_later_version(saved: Path):
    rewrite(saved, format=2, irlvla="9.1", surprise=[])
    with pytest.raises(FileError, match=r"was written by irlvla 9.1 in format 2, this is .*\. Try: pip install --upgrade irlvla"):
        from_pretrained(saved)


# -- hostile files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"weights": {"file": "../../secret", "bytes": 1, "sha256": ""}},
        {"weights": {"file": "/etc/passwd", "bytes": 1, "sha256": ""}},
        {"requires": {"x; rm -rf ~": "1"}},
        {"requires": {"irlvla-toy": "1.2 --index-url=http://evil"}},
        {"requires": {"-r": "1"}},
        {"runtime": {"kind": "backbone"}},
        {"runtime": {"width": "4"}},
        {"kind": "dataset"},
        {"kind": "policy", "spec": {"backbone": {"name": "eyes"}}},
        {"kind": "policy", "spec": {"backbone": {"name": "eyes"}, "planner": {"name": "hands"}, "self": 1}},
        {"kind": "policy", "spec": {"backbone": {"name": "eyes"}, "planner": {"name": "hands", "_target_": "os.system"}}},
        {"kind": "policy", "spec": {"backbone": {"name": "eyes"}, "planner": {"name": "hands", "knots": "${oc.env:HOME}"}}},
        {"kind": "policy", "spec": {"backbone": {"name": "eyes"}, "planner": {"name": "os:system"}}},
        {"kind": "policy", "spec": {"backbone": [1], "planner": None}},
        {"kind": "planner", "spec": {"name": "hands", "width": 3}},
        {"kind": "planner", "spec": {}},
        {"extra": 1},
    ],
    ids=str,
)
def test_a_made_up_config(saved: Path, changes: dict[str, Any]):
    rewrite(saved, **changes)
    with pytest.raises((FileError, PluginError)):
        from_pretrained(saved)


def test_nothing_is_unpickled(saved: Path, tmp_path: Path):
    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "exploded"),)

    weights = pickle.dumps(Bomb())
    (saved / "model.safetensors").write_bytes(weights)
    rewrite(saved, weights={"file": "model.safetensors", "bytes": len(weights), "sha256": hashlib.sha256(weights).hexdigest()})
    with pytest.raises(FileError, match=r"model\.safetensors holds no weights"):
        from_pretrained(saved)
    assert not (tmp_path / "exploded").exists()


# -- plugins -----------------------------------------------------------------------------------------------------------


def test_a_missing_plugin(known: Registry, saved: Path):
    known.plugins.remove(TOY)
    with pytest.raises(PluginError, match=r"needs irlvla-toy 1.2, which is not installed. Try: pip install irlvla-toy==1.2$"):
        from_pretrained(saved)


def test_a_plugin_that_is_set_aside(known: Registry, saved: Path):
    known.plugins[known.plugins.index(TOY)] = Plugin("irlvla-toy", "1.3", "toy", "it is blocked by IRLVLA_BLOCK")
    with pytest.raises(PluginError, match=r"needs irlvla-toy 1.3, which is set aside: it is blocked by IRLVLA_BLOCK"):
        from_pretrained(saved)


@pytest.mark.parametrize(("version", "warned"), [("1.1.9", True), ("1.2", False), ("1.10", False), ("unknown", False)])
def test_an_older_plugin(known: Registry, saved: Path, version: str, warned: bool):
    known.plugins[known.plugins.index(TOY)] = Plugin("irlvla-toy", version, "toy")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        from_pretrained(saved)
    message = f"{saved} was saved with irlvla-toy 1.2, and 1.1.9 is installed. If it misbehaves: pip install --upgrade irlvla-toy"
    assert [str(warning.message) for warning in caught] == [message] * warned


def test_a_plugin_that_lost_a_component(known: Registry, saved: Path):
    known.plugins[known.plugins.index(TOY)] = Plugin("irlvla-toy", "2.0", "toy")
    known.entries["planner"] = {"handles": known.entries["planner"]["hands"]}
    with pytest.raises(
        PluginError, match=r"saved does not fit what is installed: no planner named 'hands'(.|\n)*pip install irlvla-toy==1.2"
    ):
        from_pretrained(saved)


def test_a_plugin_that_lost_a_setting(known: Registry, saved: Path, monkeypatch: pytest.MonkeyPatch):
    class Config(components.Config):
        knots: int = 3

    monkeypatch.setattr(Hands, "Config", Config)
    with pytest.raises(FileError, match=r"saved does not fit what is installed: (.|\n)*planner.temperature"):
        from_pretrained(saved)


PLUGIN = """
import irlvla
from torch import nn

class Solo(irlvla.RewardModel):
    def __init__(self, config):
        super().__init__(config)
        self.layer = nn.Linear(1, 1)
    def forward(self, obs, scene, plan): ...

@irlvla.hookimpl
def irlvla_reward_models():
    return {"solo": Solo}
"""


def test_a_one_file_plugin(known: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(known, "manager", manager())
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "solo_for_test_checkpoint.py"
    file.write_text(PLUGIN)
    plugin = known.add_file(file)
    folder = save_pretrained(known.build("reward_model", "solo"), tmp_path / "saved")
    digest = hashlib.sha256(PLUGIN.encode()).hexdigest()
    assert json.loads((folder / "config.json").read_text())["requires"][file.name] == f"sha256:{digest}"
    assert isinstance(from_pretrained(folder), components.RewardModel)
    os.remove(file)
    save_pretrained(known.build("reward_model", "solo"), tmp_path / "again")  # while it runs, the file is not needed
    file.write_text(PLUGIN + "# changed")
    manifest.checksum_of.cache_clear()  # as in another process
    with pytest.warns(UserWarning, match=f"{folder} was saved with another {file.name} than {file}"):
        from_pretrained(folder)
    known.plugins.remove(plugin)
    with pytest.raises(PluginError, match=rf"needs the one-file plugin {file.name}, which is not loaded.* --plugin {file.name}"):
        from_pretrained(folder)


# -- weights that do not fit -------------------------------------------------------------------------------------------


def test_weights_that_do_not_fit(known: Registry, saved: Path, monkeypatch: pytest.MonkeyPatch):
    class Changed(Hands):
        def __init__(self, config: Any, *, width: int) -> None:
            super().__init__(config, width=width)
            self.extra = nn.Linear(1, 1)
            del self.layer

    known.entries["planner"]["hands"] = [Entry("planner", "hands", Changed, TOY)]
    lines = ["planner.extra.bias is missing", "planner.extra.weight is missing", "planner.layer.weight is not expected"]
    with pytest.raises(FileError, match=r"do not fit the model:\n  " + r"\n  ".join(map(re.escape, lines)) + "$"):
        from_pretrained(saved)
    rewrite(saved, spec={"backbone": {"name": "eyes", "width": 7}, "planner": {"name": "hands"}})
    with pytest.raises(
        FileError, match=r"backbone.layer.weight has the shape \(6, 2\), not \(7, 2\)(.|\n)*planner.layer.weight is not expected$"
    ):
        from_pretrained(saved)
    known.plugins[known.plugins.index(TOY)] = Plugin("irlvla-toy", "2.0", "toy")
    with pytest.raises(FileError, match=r"It was saved with others: pip install irlvla-toy==1\.2$"):
        from_pretrained(saved)


# -- the Hub -----------------------------------------------------------------------------------------------------------


def hub_error(kind: type[Exception], text: str = "so it says") -> Exception:
    error = kind.__new__(kind)
    Exception.__init__(error, text)
    return error


def test_a_model_from_the_hub(saved: Path, monkeypatch: pytest.MonkeyPatch):
    calls: list[tuple[Any, Any]] = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: calls.append((a, k)) or str(saved))
    assert isinstance(from_pretrained("acme/driver", revision="v1"), Policy)
    (((repo,), named),) = calls
    assert repo == "acme/driver"
    assert named["revision"] == "v1"
    assert named["allow_patterns"] == ["config.json", "model.safetensors"]
    for source in (saved, str(saved)):
        with pytest.raises(InputError, match="revision='v1' is for a model on the Hub"):
            from_pretrained(source, revision="v1")


@pytest.mark.parametrize("source", ["gone", "a/b/c", "./a", "../a", "/a/b", "a b/c", ""])
def test_what_is_no_name_on_the_hub_is_a_folder(source: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked the Hub"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileError, match=r"does not exist|has no config\.json"):
        from_pretrained(source)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (hub_error(hub_errors.RepositoryNotFoundError), "acme/driver is neither a folder here nor a model on the Hub.*hf auth login"),
        (hub_error(hub_errors.GatedRepoError), "acme/driver is gated: ask for access at https://huggingface.co/acme/driver"),
        (hub_error(hub_errors.RevisionNotFoundError), "acme/driver on the Hub has no revision 'v1'"),
        (hub_error(hub_errors.HFValidationError), "nor a name for a model on the Hub: so it says"),
        (hub_error(hub_errors.LocalEntryNotFoundError), "no folder here, and cannot be downloaded from the Hub: so it says"),
        (hub_error(hub_errors.OfflineModeIsEnabled), "cannot be downloaded from the Hub: so it says"),
        (ConnectionError("no route\nto host"), "cannot be downloaded from the Hub: no route to host"),
        (TimeoutError(), "cannot be downloaded from the Hub: TimeoutError"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_errors_of_the_hub(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(FileError, match=message):
        from_pretrained("acme/driver", revision="v1")


class FakeHub:
    """What huggingface_hub.HfApi does for us, without a network."""

    cards: ClassVar[set[str]]
    commits: ClassVar[list[tuple[str, dict[str, bytes], str]]]
    made: ClassVar[list[dict[str, Any]]]

    def __init__(self, token: str | None, **_: Any) -> None:
        self.token = token

    def create_repo(self, repo_id: str, **named: Any) -> Any:
        if repo_id.startswith("forbidden/"):
            raise hub_error(hub_errors.HfHubHTTPError, "403 Forbidden")
        self.made.append({"repo_id": repo_id, "token": self.token, **named})
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def file_exists(self, repo_id: str, name: str) -> bool:
        return name == "README.md" and repo_id in self.cards

    def create_commit(self, repo_id: str, operations: Any, *, commit_message: str) -> None:
        files = {}
        for operation in operations:
            with operation.as_file() as stream:
                files[operation.path_in_repo] = stream.read()
        self.commits.append((repo_id, files, commit_message))


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> type[FakeHub]:
    for name, empty in (("cards", set()), ("commits", []), ("made", [])):
        monkeypatch.setattr(FakeHub, name, empty, raising=False)
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeHub)
    return FakeHub


def test_push_to_hub(known: Registry, saved: Path, tmp_path: Path, fake_hub: type[FakeHub]):
    assert push_to_hub(saved, "acme/driver", private=True, message="first", token="secret") == "https://huggingface.co/acme/driver"
    assert fake_hub.made == [{"repo_id": "acme/driver", "token": "secret", "private": True, "exist_ok": True}]
    ((repo, files, message),) = fake_hub.commits
    assert (repo, message) == ("acme/driver", "first")
    assert sorted(files) == ["README.md", "config.json", "model.safetensors"]
    assert sorted(os.listdir(saved)) == ["config.json", "model.safetensors"]
    card = files.pop("README.md").decode()
    front = yaml.safe_load(card.split("---")[1])
    assert front == {"library_name": "irlvla", "tags": ["autonomous-driving", "irlvla", "policy"]}
    for text in (
        "# driver",
        f"pip install irlvla=={irlvla.__version__} irlvla-toy==1.2",
        'policy = irlvla.from_pretrained("acme/driver")',
        "| backbone | eyes | width=6, path='a/b' |",
        "| planner | hands | knots=3,",
    ):
        assert text in card
    (tmp_path / "got").mkdir()
    for name, content in files.items():
        (tmp_path / "got" / name).write_bytes(content)
    assert_same(from_pretrained(tmp_path / "got"), make_policy(known))


def test_push_a_model_that_is_not_saved_yet(known: Registry, fake_hub: type[FakeHub]):
    fake_hub.cards.add("acme/judge")
    push_to_hub(known.build("reward_model", "judge"), "acme/judge")
    ((_, files, message),) = fake_hub.commits
    assert sorted(files) == ["config.json", "model.safetensors"]  # the card that is there stays
    assert message == "Upload with irlvla"


def test_errors_of_push(saved: Path, fake_hub: type[FakeHub]):
    with pytest.raises(FileError, match=r"forbidden/x cannot be written on the Hub: 403 Forbidden\. To log in: hf auth login"):
        push_to_hub(saved, "forbidden/x")
    (saved / "model.safetensors").write_bytes(b"")
    with pytest.raises(FileError, match="not whole"):
        push_to_hub(saved, "acme/driver")
    assert fake_hub.commits == []


# -- checkpoints -------------------------------------------------------------------------------------------------------


def write_state(folder: Path) -> None:
    (folder / "optimizer").write_text("momentum")


def names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory))


def test_checkpoints(known: Registry, tmp_path: Path):
    directory, policy = tmp_path / "run" / "checkpoints", make_policy(known)
    assert last_checkpoint(directory) is None
    assert save_checkpoint(directory, 9, policy) == directory / "step-9"
    assert names(directory / "step-9") == ["model"]
    save_checkpoint(directory, 10, policy, write_state)
    assert names(directory) == ["last", "step-10", "step-9"]
    assert names(directory / "last") == ["model", "state"]
    assert (directory / "last" / "state" / "optimizer").read_text() == "momentum"
    assert os.readlink(directory / "last") == "step-10"  # relative: the folder can be moved
    assert last_checkpoint(str(directory)) == directory / "step-10"
    assert step_of(directory / "step-10") == 10
    assert_same(from_pretrained(directory / "last" / "model"), policy)
    directory.rename(tmp_path / "moved")
    assert last_checkpoint(tmp_path / "moved") == tmp_path / "moved" / "step-10"


def test_the_newest_checkpoints_stay(known: Registry, tmp_path: Path):
    policy = make_policy(known)
    (tmp_path / "step-notes").mkdir()
    for step in (8, 9, 10, 11):
        save_checkpoint(tmp_path, step, policy, keep=2)
    assert names(tmp_path) == ["last", "step-10", "step-11", "step-notes"]
    save_checkpoint(tmp_path, 5, policy, keep=1)  # whoever went back: what was just written always stays
    assert names(tmp_path) == ["last", "step-5", "step-notes"]
    assert last_checkpoint(tmp_path) == tmp_path / "step-5"
    with pytest.raises(InputError, match="keep=0"):
        save_checkpoint(tmp_path, 6, policy, keep=0)
    with pytest.raises(InputError, match="step=-1"):
        save_checkpoint(tmp_path, -1, policy)


def test_the_last_checkpoint_is_where_the_link_points(known: Registry, tmp_path: Path):
    for step in (1, 2, 10):
        save_checkpoint(tmp_path, step, make_policy(known))
    os.remove(tmp_path / "last")
    assert last_checkpoint(tmp_path) == tmp_path / "step-10"  # copied without links
    (tmp_path / "last").symlink_to("step-2")
    assert last_checkpoint(tmp_path) == tmp_path / "step-2"  # set back by hand
    os.remove(tmp_path / "last")
    (tmp_path / "last").symlink_to("step-77")
    assert last_checkpoint(tmp_path) == tmp_path / "step-10"


def test_a_failed_checkpoint_leaves_nothing(known: Registry, tmp_path: Path):
    save_checkpoint(tmp_path, 1, make_policy(known))

    def fail(_: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(FileError, match="step-2 cannot be written: No space left on device"):
        save_checkpoint(tmp_path, 2, make_policy(known), fail)
    assert names(tmp_path) == ["last", "step-1"]


def require_whole(directory: Path, policy: Policy) -> Path:
    """`last`, and every checkpoint that has a name, must be whole."""
    assert (directory / "last").is_dir()
    checkpoint = last_checkpoint(directory)
    assert checkpoint is not None
    for folder in directory.glob("step-*"):
        assert_same(from_pretrained(folder / "model"), policy)
        assert (folder / "state" / "optimizer").read_text() == "momentum"
    return checkpoint


@pytest.mark.parametrize("step", [2, 1], ids=["the next step", "the same step again"])
def test_a_kill_at_each_step_of_saving(known: Registry, tmp_path: Path, step: int):
    policy = make_policy(known)
    save_checkpoint(tmp_path, 1, policy, write_state)
    seen = []
    for _ in killed_at_each_step(lambda: save_checkpoint(tmp_path, step, policy, write_state, keep=1)):
        seen.append(step_of(require_whole(tmp_path, policy)))
    assert seen == sorted(seen)
    assert set(seen) == {1, step}
    assert names(tmp_path) == ["last", f"step-{step}"]  # nothing is left of those that were killed


def test_kills_at_random_moments(known: Registry, tmp_path: Path):
    policy = make_policy(known)
    save_checkpoint(tmp_path, 0, policy, write_state)
    for moment in (random.Random(0).uniform(0.001, 0.05) for _ in range(8)):
        child = os.fork()
        if child == 0:
            for step in itertools.count(1):
                save_checkpoint(tmp_path, step, policy, write_state, keep=2)
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        require_whole(tmp_path, policy)


def test_an_authors_card_stays(known: Registry, saved: Path):
    """What somebody wrote about a model is kept when the model is saved again."""
    (saved / "README.md").write_text("precious")
    save_pretrained(make_policy(known), saved)
    assert (saved / "README.md").read_text() == "precious"
