"""The worlds that there are, by name."""

from lm_jax.lab.lists import LISTS
from lm_jax.lab.trips import TRIPS

WORLDS = {world.name: world for world in (LISTS, TRIPS)}
