"""The embedded world: scenes with roads, traffic, a human driver and cameras, made from a seed. No download."""

from irlvla.synthetic.cameras import FRONT_RIG as FRONT_RIG
from irlvla.synthetic.cameras import NAVSIM_RIG as NAVSIM_RIG
from irlvla.synthetic.cameras import Rig as Rig
from irlvla.synthetic.cameras import render as render
from irlvla.synthetic.scenarios import CASES as CASES
from irlvla.synthetic.scenarios import FAMILIES as FAMILIES
from irlvla.synthetic.scenarios import SPLITS as SPLITS
from irlvla.synthetic.scenarios import UNSEEN as UNSEEN
from irlvla.synthetic.scenarios import Split as Split
from irlvla.synthetic.scenarios import make_world as make_world
from irlvla.synthetic.scenarios import make_worlds as make_worlds
from irlvla.synthetic.scenarios import split as split
from irlvla.synthetic.scenes import synthetic_scenes as synthetic_scenes
from irlvla.synthetic.scenes import to_observation as to_observation
from irlvla.synthetic.scenes import to_scene as to_scene
from irlvla.synthetic.scenes import to_scenes as to_scenes
from irlvla.synthetic.world import World as World
