"""Until the merge: the old name of plumbing.shapes."""

from plumbing.shapes import SHAPE_CLASSES, draw_shapes  # noqa: F401
