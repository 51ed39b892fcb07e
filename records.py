"""Until the merge: the old name of plumbing.files, plumbing.voc and plumbing.coco."""

from plumbing.coco import find_listing, read_coco  # noqa: F401
from plumbing.files import *  # noqa: F403
from plumbing.files import decode_pixels as decode  # noqa: F401
from plumbing.voc import VOC_CLASSES, find_set, list_sets, read_voc  # noqa: F401
