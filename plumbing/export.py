"""Network and decoding as a file that runs without this code: `python detect.py --export FILE`."""

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from ops.reference import decode, normalise


class Exported(nn.Module):
    """pixels (N,3,S,S) RGB 0..255 -> boxes (N,P,4) xyxy in image units, probabilities (N,P,C)."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        config = self.model.config
        loc, logits = self.model(normalise(pixels, config.mean, config.std, config.channels))
        return decode(loc, self.model.priors_cxcywh), logits.softmax(dim=-1)


def export(model: nn.Module, path: str | Path) -> None:
    """Network and decoding as a torch.export file, for any batch size.

    `torch.export.load(path, extra_files=extra)` reads it without this code; extra["classes.json"]
    holds the class names, background first. NMS is left to the caller.
    """
    config, size = model.config, model.config.size
    pixels = torch.zeros(2, 3, size, size, device=model.priors_cxcywh.device)
    normalise(pixels, config.mean, config.std, config.channels)  # makes its constants, untraced
    shapes = {"pixels": {0: torch.export.Dim("batch", min=1)}}
    program = torch.export.export(Exported(model).eval(), (pixels,), dynamic_shapes=shapes)
    classes = json.dumps(["background", *model.config.classes])
    torch.export.save(program, path, extra_files={"classes.json": classes})
