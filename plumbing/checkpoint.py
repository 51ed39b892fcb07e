"""Reading a checkpoint without trusting it."""

import contextlib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import NoneType

import torch
from torch import nn


def read_checkpoint(path: str | Path, device: str | torch.device = "cpu") -> dict:
    """Reads a checkpoint of train.py or experiments.convert, with its tensors on `device`.

    Only tensors and plain data are read, so a checkpoint cannot run code. The checksums of the file
    are verified, which torch.load does not do. ValueError says what is wrong and what to try.
    """
    if not str(path):
        raise ValueError("checkpoint '': no name; expected a file such as runs/NAME/last.pt")
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise ValueError("a folder or a device")
        with zipfile.ZipFile(path) as file:
            # torch does not compress. Compressed entries could be a zip bomb; entries with other
            # attributes come from a flipped bit, which can turn a file into a folder.
            odd = [e.filename for e in file.infolist() if e.compress_type or e.external_attr]
            bad = odd[0] if odd else file.testzip()
            if bad:
                raise zipfile.BadZipFile(f"{bad} is not what was written")
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        missing = {"config", "model"} - set(checkpoint)
        if missing or not isinstance(checkpoint["config"], dict):
            raise ValueError("it has no 'config' and 'model'")
        check_values(checkpoint)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such checkpoint; `python train.py` writes one") from None
    except Exception as e:  # torch raises many kinds of errors on damaged files
        why = " ".join(str(e).split())[:150] or type(e).__name__
        if "Weights only" in why:
            why = "it holds more than tensors and plain data, and might run code"
        raise ValueError(
            f"{path}: not a checkpoint of train.py, or damaged ({why}). Expected a file such as "
            "runs/NAME/last.pt; runs/NAME/previous.pt is the one before it"
        ) from None
    return checkpoint


def check_values(checkpoint: dict) -> None:
    """ValueError where what the programs read beside the network is of another type than it was
    written, or where a weight is not finite: such a network detects nothing."""
    for name in ("args", "results"):
        if not isinstance(checkpoint.get(name), (dict, NoneType)):
            kind = type(checkpoint[name]).__name__
            raise ValueError(f"its {name!r} are of type {kind}, expected a dict or None")
    threshold = (checkpoint.get("results") or {}).get("threshold", 0)
    if not isinstance(threshold, (int, float, NoneType)) or not 0 <= (threshold or 0) <= 1:
        raise ValueError(f"its threshold is {threshold!r:.60}, expected 0 to 1")
    for part in (checkpoint["model"], checkpoint.get("ema")):
        tensors = part if isinstance(part, dict) else {}
        for name, x in tensors.items():
            # one that was expanded is larger than its storage, perhaps than any memory
            if not isinstance(x, torch.Tensor) or x.nbytes > x.untyped_storage().nbytes():
                continue
            if not x.isfinite().all():
                raise ValueError(f"its weights {name} are not finite")


@contextlib.contextmanager
def of_this_code(path: str | Path, checkpoint: dict) -> Iterator[None]:
    """Whatever fails inside becomes a ValueError: the checkpoint is of another network."""
    try:
        yield
    except Exception as e:  # plain data from anywhere can make Python and torch fail in any way
        why = " ".join(str(e).split())[:250] or type(e).__name__
        raise ValueError(
            f"{path}: of another network than this code's ({why}). It was written by commit "
            f"{checkpoint.get('commit')}: use that code, or train again"
        ) from None


def take_weights(model: nn.Module, start: dict, name: str | Path) -> str:
    """Copies all weights that fit from the checkpoint `start` into the model -> one line about it.

    Weights fit if name and shape agree; for other classes the layers of the class scores do not
    fit. All others stay random. `name` is the checkpoint's file, for messages.
    """
    own, saved = model.state_dict(), start.get("ema") or start["model"]
    detects = tuple(start["config"].get("classes", model.config.classes))
    same = detects == model.config.classes
    fits = {key: value for key, value in saved.items()
            if key in own and value.shape == own[key].shape
            and (same or not key.startswith("head.conf"))}  # fmt: skip
    if not fits:
        raise ValueError(f"--init {name}: no weight of it fits a {model.config.backbone}")
    model.load_state_dict(own | fits)
    why = "" if same else f"; it detects {', '.join(detects)}"
    return f"--init {name}: {len(fits)} of {len(own)} tensors, the others random{why}"
