"""The rungs on the way to the kernels above, one idea each. Only tests and benches build them.

    rungs = load("cuda")             # or load("emulate"): the same files on CPU threads
    rungs["nms_1_pairs"](boxes_xyxy, scores, groups, 0.45)

A rung takes what its op takes (reference.py) and returns the same, bit for bit.
"""

import torch

from .. import NAMES, build

NMS = ("nms_1_pairs", "nms_2_tiles", "nms_3_scan", "nms_4_block")  # the last: 1,024 boxes at most
MATCH = ("match_1_pairs", "match_2_priors")
CPU = ("nms_1_loop", "nms_2_arrays")


def load(device, flags=(), *, final=False, label="ladder"):
    """Build the CUDA rungs for "cuda" or "emulate", or those for "cpu" -> {rung: op}.

    Raises ops.BuildError.

    `final` adds the final kernels (ops.NAMES, and the backward of one), under another name than the
    ops that they override elsewhere: so a test can call them beside the CPU's. Libraries of
    different `flags` have different labels.
    """
    space = f"scratchdet_{label}_{device}"
    names = CPU if device == "cpu" else [*NMS, *MATCH, *(NAMES if final else ())]
    defined = [*names, "mined_cross_entropy_backward"] if final else names
    for name in defined:
        op = name.split("_")[0] if name in (*NMS, *MATCH, *CPU) else name  # nms_1_pairs is an nms
        schema = str(getattr(torch.ops.scratchdet, op).default._schema)
        if not hasattr(getattr(torch.ops, space), name):
            torch.library.define(f"{space}::{name}", schema[schema.index("(") :])
    suffix = ".cpp" if device == "cpu" else ".cu"
    sources = [f"{'' if name in NAMES else 'ladder/'}{name}{suffix}" for name in names]
    flags = [f"-DOP_NAMESPACE={space}", *flags]
    build(f"{label}_{device}", sources, flags, emulate=device == "emulate")
    return {name: getattr(getattr(torch.ops, space), name).default for name in defined}
