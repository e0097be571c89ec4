"""The worlds that there are, by name."""

from lab.worlds.lists import LISTS
from lab.worlds.trips import TRIPS

WORLDS = {world.name: world for world in (LISTS, TRIPS)}
