"""Golden scenes for tests; the loader is the package's own."""

from irlvla.golden import OFFICIAL, GoldenScene, load

__all__ = ["OFFICIAL", "GoldenScene", "load"]
