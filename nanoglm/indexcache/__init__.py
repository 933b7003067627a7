"""The pattern lab: which layers can do without an indexer.

>>> from nanoglm.indexcache import Evaluator, GLMStack, Search, of_tasks
>>> stack = GLMStack(nanoglm.load("nanoglm/assets/indexcache").module)
>>> search = Search(Evaluator(stack, of_tasks(("recall", "3hop"), length=512, sequences=32)))
>>> search.greedy(3)[-1].pattern, search.exhaustive(3).pattern

``distil`` and ``report``, which need training and plots, lie in modules of these names.
"""

from nanoglm.indexcache.apply import apply, launch_lines
from nanoglm.indexcache.calibration import Calibration, of_tasks, of_text
from nanoglm.indexcache.evaluate import Evaluator, Score
from nanoglm.indexcache.gates import Gate, gates
from nanoglm.indexcache.overlap import Band, merged, overlap, similarity
from nanoglm.indexcache.pattern import count_of, flipped, sources, subsets, uniform
from nanoglm.indexcache.search import Row, Search, best_groups
from nanoglm.indexcache.stack import GLMStack, Stack

__all__ = [
    "Band", "Calibration", "Evaluator", "GLMStack", "Gate", "Row", "Score", "Search", "Stack", "apply", "best_groups",
    "count_of", "flipped", "gates", "launch_lines", "merged", "of_tasks", "of_text", "overlap", "similarity", "sources",
    "subsets", "uniform",
]  # fmt: skip
