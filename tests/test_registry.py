"""Plugins are found and isolated, components are found and built, and each mistake gets a message that helps."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import irlvla
from irlvla import registry
from irlvla.errors import ConfigError, ContractError, IrlvlaError, Mistakes, PluginError
from irlvla.registry import Plugin, Registry
from plugins_for_tests import HEAD, PLANNER, Site, empty_site, planners

HOOK = "import irlvla\n\n@irlvla.hookimpl\n"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    with empty_site(tmp_path, monkeypatch) as made:
        yield made


def plugin(found: Registry, name: str) -> Plugin:
    return next(plugin for plugin in found.plugins if plugin.name == name)


def usable(found: Registry, *names: str) -> bool:
    """Whether planners of these names can be built."""
    return all(isinstance(found.build("planner", name, width=8), irlvla.Planner) for name in names)


# -- what works ----------------------------------------------------------------------------------------------------------


def test_an_installed_plugin_is_found_and_built(site: Site) -> None:
    site.add("irlvla-acme", requires=("irlvla>=0.1", "numpy>=1"))
    found = site.scan()
    assert plugin(found, "irlvla-acme") == Plugin("irlvla-acme", "0.3.1", "irlvla_acme")
    assert "acme_spline" in found.names("planner")
    built = found.build("planner", {"name": "acme_spline", "knots": "7"}, width=8)
    assert (built.config.knots, built.config.spread, built.width) == (7, 0.5, 8)
    assert str(built) == "planner 'acme_spline' (irlvla-acme 0.3.1)"
    assert found.entry_of(built) is found.find("planner", "acme_spline")
    assert irlvla.build("planner", "acme_spline", width=3).width == 3


def test_a_target_is_imported_only_when_it_is_used(site: Site) -> None:
    site.add("irlvla-acme")
    found = site.scan()
    assert "irlvla_acme" in sys.modules
    assert "irlvla_acme.spline" not in sys.modules
    found.find("planner", "acme_spline").load()
    assert "irlvla_acme.spline" in sys.modules


def test_entries_are_listed_by_kind_and_name(site: Site) -> None:
    site.add("irlvla-acme")
    entries = list(site.scan())
    assert [entry.kind for entry in entries if entry.kind in ("planner", "metric")][-1] == "metric"
    names = [entry.name for entry in entries if entry.kind == "planner"]
    assert names == sorted(names)
    assert "acme_spline" in names


def test_a_component_with_two_names(site: Site) -> None:
    site.add("irlvla-acme", planners(acme_a="irlvla_acme.spline:Planner", acme_b="irlvla_acme.spline:Planner"))
    found = site.scan()
    for name in ("acme_a", "acme_b"):
        assert found.entry_of(found.build("planner", name, width=8)).name == name


def test_two_entry_points_of_one_distribution(site: Site) -> None:
    modules = {"a": planners(acme_a="irlvla_acme.spline:Planner"), "b": planners(acme_b="irlvla_acme.spline:Planner")}
    site.add("irlvla-acme", points={"a": "irlvla_acme.a", "b": "irlvla_acme.b"}, modules=modules)
    assert usable(site.scan(), "acme_a", "acme_b")


def test_a_broken_part_leaves_the_other_part_of_its_distribution(site: Site) -> None:
    modules = {"a": "import nowhere", "b": planners(acme_b="irlvla_acme.spline:Planner")}
    site.add("irlvla-acme", points={"a": "irlvla_acme.a", "b": "irlvla_acme.b"}, modules=modules)
    found = site.scan()
    assert usable(found, "acme_b")
    with pytest.raises(PluginError, match=r"Not usable: irlvla-acme 0\.3\.1 \(irlvla_acme\.a\): ModuleNotFoundError"):
        found.find("planner", "acme_a")


def test_the_first_of_two_distributions_of_one_name_counts(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for Python's own imports: an older copy further down `sys.path` is shadowed."""
    old = Site(tmp_path / "old")
    old.folder.mkdir()
    monkeypatch.setattr(sys, "path", [*sys.path, str(old.folder)])
    old.add("irlvla-acme", "raise RuntimeError", version="0.1.0")
    site.add("irlvla-acme")
    found = site.scan()
    assert [(plugin.version, plugin.problem) for plugin in found.plugins if plugin.name == "irlvla-acme"] == [("0.3.1", "")]
    assert usable(found, "acme_spline")


# -- plugins that are set aside --------------------------------------------------------------------------------------------

TRY = "Try: pip install --upgrade irlvla-bad, or tell its author"
BOTH = "Try: pip install --upgrade irlvla irlvla-bad"

BROKEN: dict[str, tuple[dict[str, Any], str, str]] = {
    "missing third-party module": ({"source": "import scipy_is_not_here"}, "No module named 'scipy_is_not_here'", "pip install scipy_is_"),
    "missing module of its own": ({"source": "import irlvla_bad.nowhere"}, "No module named 'irlvla_bad.nowhere'", TRY),
    "missing module, in a hook": (
        {"source": f"{HOOK}def irlvla_planners():\n    import scipy_is_not_here\n"},
        "ModuleNotFoundError: No module named 'scipy_is_not_here' (in irlvla_planners).",
        "Try: pip install scipy_is_not_here",
    ),
    "import error": ({"source": "from irlvla_bad.spline import Nothing"}, "ImportError: cannot import name 'Nothing'", TRY),
    "syntax error": ({"source": "\n\ndef planners(:\n"}, "SyntaxError: invalid syntax (__init__.py, line 3).", TRY),
    "exit": ({"source": "raise SystemExit(3)"}, "SystemExit: 3.", TRY),
    "exception": ({"source": "raise RuntimeError"}, "RuntimeError.", TRY),
    "missing attribute": ({"points": {"bad": "irlvla_bad:nothing"}}, "module 'irlvla_bad' has no attribute 'nothing'.", TRY),
    "no hook": ({"source": ""}, "irlvla_bad implements no hook; mark its hooks with @irlvla.hookimpl.", TRY),
    "nothing": ({"source": "plugin = None", "points": {"bad": "irlvla_bad:plugin"}}, "irlvla_bad:plugin implements no hook", TRY),
    "unknown hook": (
        {"source": f"{HOOK}def irlvla_drivers():\n    return {{}}\n"},
        "there is no hook irlvla_drivers. ",
        TRY,
    ),
    "misspelt hook": (
        {"source": f"{HOOK}def irlvla_planers():\n    return {{}}\n"},
        "there is no hook irlvla_planers. Did you mean 'irlvla_planners'? Hooks: irlvla_backbones,",
        TRY,
    ),
    "misspelt hook without its mark": (
        {"source": "def irlvla_planers():\n    return {}\n"},
        "there is no hook irlvla_planers. Did you mean 'irlvla_planners'? Hooks:",
        TRY,
    ),
    "hook without its mark": (
        {"source": "def irlvla_planners():\n    return {}\n"},
        "irlvla_planners lacks its mark: write @irlvla.hookimpl above it.",
        TRY,
    ),
    "wrong argument": (
        {"source": f"{HOOK}def irlvla_log(run, stepp, values):\n    pass\n"},
        "irlvla_log gets no argument 'stepp'. Did you mean 'step'? Arguments: run, step, values.",
        TRY,
    ),
    "argument for a hook without any": (
        {"source": f"{HOOK}def irlvla_planners(config):\n    return {{}}\n"},
        "irlvla_planners gets no argument 'config'. It gets none.",
        TRY,
    ),
    "wrapper that wraps nothing": (
        {"source": "import irlvla\n\n@irlvla.hookimpl(wrapper=True)\ndef irlvla_log(run):\n    pass\n"},
        "is not a generator function.",
        TRY,
    ),
    "hook that raises": (
        {"source": f"{HOOK}def irlvla_planners():\n    raise ValueError('no licence:\\n  expired')\n"},
        "ValueError: no licence:; expired (in irlvla_planners).",
        TRY,
    ),
    "hook that returns a list": (
        {"source": f"{HOOK}def irlvla_planners():\n    return ['spline']\n"},
        "irlvla_planners returns ['spline']; it must return a mapping of names to classes.",
        TRY,
    ),
    "hook that returns a name with a dot": (
        {"source": planners(**{"acme.spline": "a:B"})},
        "irlvla_planners returns the name 'acme.spline'; a name is of letters, digits, _ and -, and begins with a letter.",
        TRY,
    ),
    "hook that returns a path": (
        {"source": planners(spline="irlvla_bad.spline.Planner")},
        "irlvla_planners returns 'irlvla_bad.spline.Planner' for 'spline'; it must be a class or 'module:Class'.",
        TRY,
    ),
    "hook that returns an object": (
        {"source": f"{HOOK}def irlvla_planners():\n    return {{'spline': 5}}\n"},
        "irlvla_planners returns 5 for 'spline'; it must be a class or 'module:Class'.",
        TRY,
    ),
    "name of irlvla itself": (
        {"source": planners(bad_spline="irlvla_bad.spline:Planner", constant_velocity="irlvla_bad.spline:Planner")},
        "it provides the planner 'constant_velocity', a name of irlvla itself; use another name.",
        TRY,
    ),
    "Config of another class": (
        {"source": "import irlvla\n\nclass Bad(irlvla.Planner):\n    class Config:\n        pass\n"},
        "Bad.Config must derive from irlvla.Config: class Config(irlvla.Config): ...",
        TRY,
    ),
    "for a newer irlvla": ({"requires": ("irlvla>=99,<100",)}, f"it needs irlvla<100,>=99, and this is irlvla {irlvla.__version__}.", BOTH),
    "for an older irlvla": ({"requires": ("irlvla<0.0.9",)}, f"it needs irlvla<0.0.9, and this is irlvla {irlvla.__version__}.", BOTH),
    "requirement that cannot be read": ({"requires": ("irlvla ~~ 3",)}, "InvalidRequirement: ", TRY),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_plugin_is_set_aside(site: Site, case: str) -> None:
    what, cause, remedy = BROKEN[case]
    site.add("irlvla-bad", **what)
    site.add("irlvla-zeta")
    found = site.scan()
    problem = plugin(found, "irlvla-bad").problem
    assert cause in problem
    assert problem.endswith(remedy) or remedy in problem
    assert "\n" not in problem
    # Nothing else stops working, and none of it is left behind.
    assert usable(found, "zeta_spline", "constant_velocity")
    assert not [entry for entry in found if entry.plugin.name == "irlvla-bad"]
    assert not [name for name, _ in found.manager.list_name_plugin() if "bad" in name]
    # Who asks for what it should have provided hears of it.
    with pytest.raises(PluginError) as caught:
        found.build("planner", "bad_spline", width=8)
    assert str(caught.value).startswith("no planner named 'bad_spline'. ")
    assert f"Not usable: irlvla-bad 0.3.1 ({plugin(found, 'irlvla-bad').module}): {problem}" in str(caught.value)


def test_requirements_that_do_not_apply_are_passed_over(site: Site) -> None:
    site.add("irlvla-acme", requires=('irlvla<0.0.9; extra == "old"', 'irlvla>99; python_version < "3"', "irlvla-other>99", "torch>99"))
    assert usable(site.scan(), "acme_spline")


def test_a_distribution_that_cannot_be_read(site: Site) -> None:
    site.add("irlvla-bad")
    site.add("irlvla-zeta")
    (site.folder / "irlvla_bad-0.3.1.dist-info" / "entry_points.txt").write_text("[irlvla]\nthis is no entry point\n")
    (site.folder / "remains-1.0.dist-info").mkdir()
    (site.folder / "remains-1.0.dist-info" / "entry_points.txt").write_text("[irlvla]\nremains = remains\n")
    found = site.scan()
    assert plugin(found, "irlvla-bad").problem == "its entry points cannot be read. Try: pip install --force-reinstall irlvla-bad"
    assert usable(found, "zeta_spline", "constant_velocity")


def test_one_module_in_two_distributions(site: Site) -> None:
    site.add("irlvla-acme")
    site.add("irlvla-fork", points={"fork": "irlvla_acme"})
    found = site.scan()
    assert plugin(found, "irlvla-fork").problem.startswith("irlvla_acme is a plugin already. Try: ")
    assert usable(found, "acme_spline")


def test_irlvla_that_is_not_installed(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(site.folder)])
    with pytest.raises(PluginError, match=r"not installed.*make develop"):
        site.scan()


def test_a_process_survives_broken_plugins(site: Site) -> None:
    site.add("irlvla-bad", "raise SystemExit('not today')")
    site.add("irlvla-zeta")
    script = "import irlvla; print(irlvla.build('planner', 'zeta_spline', width=8))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site.folder), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert (done.stdout, done.stderr) == ("planner 'zeta_spline' (irlvla-zeta 0.3.1)\n", "")


# -- names that collide ----------------------------------------------------------------------------------------------------


def test_a_name_of_two_plugins_is_refused_and_the_others_work(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("irlvla-acme", "irlvla-zeta"):
        package = name.replace("-", "_")
        site.add(name, planners(spline=f"{package}.spline:Planner", **{f"{package[7:]}_own": f"{package}.spline:Planner"}))
    found = site.scan()
    with pytest.raises(PluginError) as caught:
        found.build("planner", "spline", width=8)
    assert str(caught.value) == (
        "planner 'spline' is provided by both irlvla-acme 0.3.1 and irlvla-zeta 0.3.1. "
        "Block one, for example IRLVLA_BLOCK=irlvla-zeta, or uninstall it"
    )
    assert usable(found, "acme_own", "zeta_own", "constant_velocity")
    assert [str(entry.plugin) for entry in found if entry.name == "spline"] == ["irlvla-acme 0.3.1", "irlvla-zeta 0.3.1"]
    monkeypatch.setenv("IRLVLA_BLOCK", "irlvla-zeta")
    assert str(site.scan().build("planner", "spline", width=8)) == "planner 'spline' (irlvla-acme 0.3.1)"


def test_a_name_twice_in_one_distribution(site: Site) -> None:
    modules = {part: planners(spline="irlvla_acme.spline:Planner") for part in "ab"}
    site.add("irlvla-acme", points={"a": "irlvla_acme.a", "b": "irlvla_acme.b"}, modules=modules)
    with pytest.raises(PluginError, match=r"planner 'spline' \(irlvla-acme 0\.3\.1\) is provided twice; its author must rename one"):
        site.scan().find("planner", "spline")


# -- variables -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def three(site: Site) -> Site:
    """Three plugins: acme and zeta, and "other", whose name has no prefix, as convention is no mechanism."""
    for name in ("irlvla-acme", "irlvla-zeta", "other"):
        site.add(name)
    return site


@pytest.mark.parametrize(
    ("variable", "value", "left"),
    [
        ("IRLVLA_PLUGINS", "irlvla-acme,other", ["acme_spline", "other_spline"]),
        ("IRLVLA_PLUGINS", "acme", ["acme_spline"]),
        ("IRLVLA_PLUGINS", "irlvla", []),
        ("IRLVLA_PLUGINS", "", []),
        ("IRLVLA_PLUGINS", " , ", []),
        ("IRLVLA_BLOCK", "Irlvla_Acme, zeta", ["other_spline"]),
        ("IRLVLA_BLOCK", "other", ["acme_spline", "zeta_spline"]),
        ("IRLVLA_BLOCK", "", ["acme_spline", "other_spline", "zeta_spline"]),
    ],
)
def test_variables_choose_plugins(three: Site, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, left: list[str]) -> None:
    monkeypatch.setenv(variable, value)
    found = three.scan()
    assert [name for name in found.names("planner") if name.endswith("_spline")] == left
    assert usable(found, "constant_velocity", *left)
    for name in {"acme_spline", "other_spline", "zeta_spline"} - set(left):
        with pytest.raises(PluginError, match=rf"Not usable: .*{name[:4]}.*: it is (blocked by|not among) {variable}"):
            found.find("planner", name)


def test_variables_together(three: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IRLVLA_PLUGINS", "acme,zeta")
    monkeypatch.setenv("IRLVLA_BLOCK", "zeta")
    assert [name for name in three.scan().names("planner") if name.endswith("_spline")] == ["acme_spline"]


def test_a_blocked_plugin_is_not_imported(three: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IRLVLA_BLOCK", "acme")
    three.scan()
    assert "irlvla_zeta" in sys.modules
    assert "irlvla_acme" not in sys.modules


@pytest.mark.parametrize("variable", ["IRLVLA_PLUGINS", "IRLVLA_BLOCK"])
def test_a_variable_that_names_what_is_not_there(three: Site, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "irlvla-acne")
    with pytest.raises(PluginError) as caught:
        three.scan()
    start = f"{variable} names 'irlvla-acne', which is not installed. Did you mean 'irlvla-acme'? Accepted: acme, irlvla, "
    assert str(caught.value).startswith(start)


def test_irlvla_cannot_be_blocked(three: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IRLVLA_BLOCK", "irlvla")
    with pytest.raises(PluginError, match="cannot be blocked"):
        three.scan()


# -- single files ----------------------------------------------------------------------------------------------------------

MINE = f"{HEAD}{PLANNER}\n@irlvla.hookimpl\ndef irlvla_planners():\n    return {{'mine': Planner}}\n"


@pytest.fixture
def file(site: Site, tmp_path: Path) -> Path:
    path = tmp_path / "my_planner.py"
    path.write_text(MINE)
    return path


def test_a_file_is_a_plugin(site: Site, file: Path) -> None:
    found = site.scan()
    added = found.add_file(file)
    assert added == Plugin("my_planner.py", "", str(file))
    assert added in found.plugins
    assert str(found.build("planner", {"name": "mine", "knots": 9}, width=8)) == "planner 'mine' (my_planner.py)"


def test_a_file_twice_is_one_plugin(site: Site, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = site.scan()
    monkeypatch.chdir(file.parent)
    assert found.add_file(file) is found.add_file("my_planner.py")
    assert usable(found, "mine")


def test_a_file_may_import_its_neighbours(site: Site, file: Path) -> None:
    (file.parent / "my_helpers.py").write_text("NAME = 'neighbourly'")
    file.write_text(MINE.replace("'mine'", "NAME") + "\nfrom my_helpers import NAME\n")
    found = site.scan()
    found.add_file(file)
    assert usable(found, "neighbourly")


def test_classes_of_a_file_pickle_for_any_worker(site: Site, tmp_path: Path) -> None:
    path = tmp_path / "my-thing.py"
    path.write_text(
        f"def double(x):\n    return 2 * x\n\nclass Thing: pass\n\n{HOOK}def irlvla_planners():\n    return {{'mine': 'a:B'}}\n"
    )
    site.scan().add_file(path)
    module = sys.modules["my-thing"]
    assert pickle.loads(pickle.dumps(module.Thing)) is module.Thing
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # a worker that inherits nothing but `sys.path`
        assert pool.apply(module.double, (3,)) == 6


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("broken.py", "def f(:", "the plugin broken.py cannot be used: SyntaxError: invalid syntax (broken.py, line 1). Mend {}"),
        ("empty.py", "", "the plugin empty.py cannot be used: {} implements no hook; mark its hooks with @irlvla.hookimpl. Mend {}"),
        (
            "needy.py",
            "import scipy_is_not_here",
            "cannot be used: ModuleNotFoundError: No module named 'scipy_is_not_here'. Try: pip install",
        ),
        (
            "colliding.py",
            MINE.replace("mine", "pdm_closed"),
            "the planner 'pdm_closed', a name of irlvla itself; use another name. Mend {}",
        ),
        ("json.py", MINE, "'json' is the name of another module ({json}). Rename the file"),
        ("a.b.py", MINE, "'a.b' is no name for a Python module. Rename the file"),
        ("my_planner.txt", MINE, "a plugin must be a Python file (.py), and {} is none. Did you mean 'my_planner.py'?"),
        ("my_planer.py", None, "a plugin must be a Python file (.py), and {} is none. Did you mean 'my_planner.py'?"),
        ("nowhere/else.py", None, "a plugin must be a Python file (.py), and {} is none."),
    ],
)
def test_a_file_that_is_no_plugin(site: Site, file: Path, name: str, source: str | None, message: str) -> None:
    path = file.parent / name
    if source is not None:
        path.write_text(source)
    found = site.scan()
    before = list(found.plugins)
    with pytest.raises(PluginError) as caught:
        found.add_file(path)
    assert message.format(path, path, json=sys.modules["json"].__file__) in str(caught.value)
    assert found.plugins == before
    assert usable(found, "constant_velocity")


def test_a_file_that_was_mended(site: Site, file: Path) -> None:
    found = site.scan()
    file.write_text("raise ValueError('not yet')")
    with pytest.raises(PluginError, match="not yet"):
        found.add_file(file)
    file.write_text(MINE)
    os.utime(file, (0, 0))  # so that the compiled code of the first try does not count as its own
    found.add_file(file)
    assert usable(found, "mine")


def test_two_files_of_one_name(site: Site, file: Path) -> None:
    (file.parent / "other").mkdir()
    second = file.parent / "other" / file.name
    second.write_text(MINE.replace("mine", "mine_too"))
    found = site.scan()
    found.add_file(file)
    with pytest.raises(PluginError, match=rf"'my_planner' is the name of another module \({file}\). Rename the file"):
        found.add_file(second)
    assert usable(found, "mine")


def test_two_files_with_one_component(site: Site, file: Path) -> None:
    second = file.with_name("second.py")
    second.write_text(MINE)
    found = site.scan()
    found.add_file(file)
    found.add_file(second)
    with pytest.raises(PluginError, match=r"planner 'mine' is provided by both my_planner\.py and second\.py. Rename it in second\.py"):
        found.find("planner", "mine")


# -- names -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "start"),
    [
        ("acme_splin", "no planner named 'acme_splin'. Did you mean 'acme_spline'? Installed: acme_spline, constant_velocity, "),
        ("ACME_SPLINE", "no planner named 'ACME_SPLINE'. Did you mean 'acme_spline'? Installed: "),
        ("exact", "no planner named 'exact'. There is reward_model 'exact' (irlvla "),
        ("q", "no planner named 'q'. Installed: acme_spline, "),
    ],
)
def test_a_name_that_is_missing(site: Site, name: str, start: str) -> None:
    site.add("irlvla-acme")
    with pytest.raises(PluginError) as caught:
        site.scan().find("planner", name)
    assert str(caught.value).startswith(start)


def test_a_kind_that_is_missing() -> None:
    for call in (lambda: Registry().names("planer"), lambda: irlvla.build("planer", "spline")):
        with pytest.raises(PluginError, match=r"no kind 'planer'\. Did you mean 'planner'\? Kinds: backbone, "):
            call()
    with pytest.raises(PluginError, match=r"no planner named 'spline'\. Installed: none\."):
        Registry().find("planner", "spline")


def test_a_component_that_was_not_built_by_its_name(site: Site) -> None:
    site.add("irlvla-acme")
    found = site.scan()
    target: Any = found.find("planner", "acme_spline").load()
    with pytest.raises(PluginError, match=r"Planner was not built by its name.*irlvla_planners.*irlvla\.build\('planner', NAME\)"):
        found.entry_of(target(target.Config(), width=8))


# -- components that break their contract ----------------------------------------------------------------------------------

BAD_TARGETS: dict[str, tuple[str, str, type[IrlvlaError], str]] = {
    "missing module": (
        "irlvla_acme.nowhere:X",
        "",
        PluginError,
        "No module named 'irlvla_acme.nowhere'. Try: pip install --upgrade irlvla-a",
    ),
    "missing third-party module": ("irlvla_acme.thing:X", "import scipy_is_not_here", PluginError, "Try: pip install scipy_is_not_here"),
    "missing class": ("irlvla_acme.thing:Nothing", "", PluginError, "has no attribute 'Nothing'. Try: pip install --upgrade irlvla-acme"),
    "exit": ("irlvla_acme.thing:X", "raise SystemExit", PluginError, "cannot be imported from irlvla_acme.thing:X: SystemExit. Try: "),
    "Config of another class": (
        "irlvla_acme.thing:Bad",
        "class Bad(irlvla.Planner):\n    class Config: pass",
        PluginError,
        "Bad.Config must derive from irlvla.Config: class Config(irlvla.Config): ... Try: pip install --upgrade irlvla-acme",
    ),
    "function": (
        "irlvla_acme.thing:make",
        "def make(config): ...",
        ContractError,
        "which does not derive from irlvla.Planner. Try: pip install",
    ),
    "another kind": (
        "irlvla_acme.thing:Bad",
        "class Bad(irlvla.Metric):\n    def __call__(self, scene, plan): return {}",
        ContractError,
        "is <class 'irlvla_acme.thing.Bad'>, which does not derive from irlvla.Planner. Try: pip install --upgrade irlvla-acme",
    ),
    "abstract": (
        "irlvla_acme.thing:Bad",
        "class Bad(irlvla.Planner):\n    def loss(self, features, human): return {}",
        ContractError,
        "lacks the method sample(), see irlvla.Planner. Try: pip install --upgrade irlvla-acme, or tell its author",
    ),
    "field 'name'": (
        "irlvla_acme.thing:Bad",
        f"{PLANNER}\nclass Bad(Planner):\n    class Config(irlvla.Config):\n        name: str = ''",
        ContractError,
        "its Config must not have a field 'name', which names the component. Try: ",
    ),
    "field that is a runtime argument": (
        "irlvla_acme.thing:Bad",
        f"{PLANNER}\nclass Bad(Planner):\n    class Config(irlvla.Config):\n        width: int = 3",
        ContractError,
        "its Config must not have a field 'width', which it is given when it is built. Try: ",
    ),
    "no runtime argument": (
        "irlvla_acme.thing:Bad",
        f"{PLANNER}\nclass Bad(Planner):\n    def __init__(self, config): super().__init__(config)",
        ContractError,
        "cannot be built as Bad(config, width=8): got an unexpected keyword argument 'width'. For how a planner is built: help(",
    ),
    "forgotten super().__init__": (
        "irlvla_acme.thing:Bad",
        f"{PLANNER}\nclass Bad(Planner):\n    def __init__(self, config, *, width): self.width = width",
        ContractError,
        "does not keep its config: its __init__ must begin with super().__init__(config). Try: ",
    ),
    "forgotten super().__init__ before a layer": (
        "irlvla_acme.thing:Bad",
        f"import torch\n{PLANNER}\nclass Bad(Planner):\n    def __init__(self, config, *, width): self.layer = torch.nn.Linear(2, 2)",
        ContractError,
        "does not keep its config: its __init__ must begin with super().__init__(config). Try: ",
    ),
}


@pytest.mark.parametrize("case", BAD_TARGETS)
def test_a_component_that_is_not_what_its_kind_demands(site: Site, case: str) -> None:
    target, source, kind, message = BAD_TARGETS[case]
    modules = {"thing": f"{HEAD}{source}\n"}
    site.add("irlvla-acme", planners(acme_bad=target, acme_spline="irlvla_acme.spline:Planner"), modules=modules)
    found = site.scan()
    with pytest.raises(kind) as caught:
        found.build("planner", "acme_bad", width=8)
    assert str(caught.value).startswith("planner 'acme_bad' (irlvla-acme 0.3.1)")
    assert message in str(caught.value)
    assert usable(found, "acme_spline", "constant_velocity")


def test_a_mistake_inside_a_component_keeps_its_traceback(site: Site) -> None:
    broken = PLANNER.replace("super().__init__(config)", "super().__init__(config); {}['nothing']")
    site.add("irlvla-acme", modules={"spline": HEAD + broken})
    with pytest.raises(KeyError) as caught:
        site.scan().build("planner", "acme_spline", width=8)
    assert caught.value.__notes__ == ["while building planner 'acme_spline' (irlvla-acme 0.3.1)"]


def test_a_runtime_argument_that_is_not_given(site: Site) -> None:
    site.add("irlvla-acme")
    with pytest.raises(ContractError, match=r"built as Planner\(config\): missing a required argument: 'width'\. For how a planner is"):
        site.scan().build("planner", "acme_spline")


def test_a_backbone_without_a_width(site: Site) -> None:
    source = "class Blind(irlvla.Backbone):\n    def forward(self, obs): ...\n"
    hook = f"{HOOK}def irlvla_backbones():\n    return {{'acme_blind': 'irlvla_acme.thing:Blind'}}\n"
    site.add("irlvla-acme", hook, modules={"thing": HEAD + source})
    with pytest.raises(ContractError, match=r"^backbone 'acme_blind' \(irlvla-acme 0\.3\.1\) has no width: .* self\.width"):
        site.scan().build_policy("acme_blind", "constant_velocity")


def test_a_policy_is_built_from_its_parts(site: Site) -> None:
    site.add("irlvla-acme")
    policy = site.scan().build_policy("status", {"name": "acme_spline", "knots": 3})
    assert policy.planner.width == policy.backbone.width
    assert policy.reasoner is None


# -- settings --------------------------------------------------------------------------------------------------------------


def test_settings_are_checked_and_filled_in(site: Site) -> None:
    site.add("irlvla-acme")
    found = site.scan()
    assert found.configure("planner", "acme_spline") == {"name": "acme_spline", "knots": 4, "spread": 0.5}
    filled = found.configure("planner", {"name": "acme_spline", "spread": 1})
    assert filled == {"name": "acme_spline", "knots": 4, "spread": 1.0}
    assert found.configure("planner", filled) == filled


@pytest.mark.parametrize("spec", [None, 5, {}, {"knots": 3}, {"name": 5}, ["acme_spline"]])
def test_a_spec_that_names_nothing(site: Site, spec: Any) -> None:
    site.add("irlvla-acme")
    with pytest.raises(ConfigError, match=r"^planner: must name one of acme_spline, .*, got .*; write planner=NAME, or name: NAME beside"):
        site.scan().build("planner", spec, width=8)


def test_wrong_settings(site: Site) -> None:
    site.add("irlvla-acme")
    found = site.scan()
    with pytest.raises(ConfigError) as caught:
        found.configure("planner", {"name": "acme_spline", "knotz": 3})
    assert str(caught.value) == (
        "planner.knotz: planner 'acme_spline' (irlvla-acme 0.3.1) has no such field. Did you mean 'knots'? Fields: knots, spread"
    )
    with pytest.raises(Mistakes) as several:
        found.build("planner", {"name": "acme_spline", "knots": 1, "spread": "wide", "steps": 5}, width=8)
    assert str(several.value) == (
        "3 mistakes in the configuration:\n"
        "  planner.knots: must be greater than or equal to 2, got 1 for planner 'acme_spline' (irlvla-acme 0.3.1): "
        "control points per trajectory\n"
        "  planner.spread: must be a valid number, got 'wide' for planner 'acme_spline' (irlvla-acme 0.3.1): "
        "standard deviation of a knot [m]\n"
        "  planner.steps: planner 'acme_spline' (irlvla-acme 0.3.1) has no such field. Fields: knots, spread. "
        "planner=NAME starts from the defaults of NAME"
    )


def test_the_registry_of_the_process_is_one() -> None:
    assert registry.installed() is registry.installed()
