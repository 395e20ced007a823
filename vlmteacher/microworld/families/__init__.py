"""The registry of the microworld's task families: to add one, write its file and list it here."""

from vlmteacher.microworld.families.base import FLAWS, PACKAGED_FLAWS, Family
from vlmteacher.microworld.families.connect import Connect
from vlmteacher.microworld.families.count import Count
from vlmteacher.microworld.families.deliver import Deliver
from vlmteacher.microworld.families.maze import Maze
from vlmteacher.microworld.families.move import Move
from vlmteacher.microworld.families.odd import Odd
from vlmteacher.microworld.families.recolor import Recolor
from vlmteacher.microworld.families.resize import Resize
from vlmteacher.microworld.families.rotate import Rotate
from vlmteacher.microworld.families.sort import Sort

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Move(),
        Maze(),
        Deliver(),
        Recolor(),
        Resize(),
        Rotate(),
        Sort(),
        Connect(),
        Odd(),
        Count(),
    )
}

__all__ = ["FAMILIES", "FLAWS", "PACKAGED_FLAWS", "Family"]
