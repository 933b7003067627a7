"""``nanoglm launch``: the line that starts another engine on a checkpoint, and what must be known beside it."""

from nanoglm.launch.engines import ENGINES, launch
from nanoglm.launch.line import Launch
from nanoglm.launch.pattern import starting
from nanoglm.launch.published import Published, published
from nanoglm.launch.target import Target, Wish, target

__all__ = ["ENGINES", "Launch", "Published", "Target", "Wish", "launch", "published", "starting", "target"]
