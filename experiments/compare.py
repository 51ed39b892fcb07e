"""How sure is a difference of mAP? A paired bootstrap over the test images.

    python experiments/compare.py RUN/last.pt                       mAP and its 95 % interval
    python experiments/compare.py RUN/last.pt OTHER/last.pt         and those of the difference

The images are drawn again, with replacement, 1,000 times, and all detectors measured on each draw.
The interval holds the middle 95 % of what comes out. It says what other images would change. It
does not say what another seed of training would: for that, train several. A draw counts some images
several times, so its curves have higher peaks: the draws may lie a little above the value itself.

Data as for eval.py: what the first checkpoint was evaluated on, or --voc-root DIR --eval-sets SET.
The metric is VOC's, 11-point for VOC2007 and the area elsewhere, of all objects and by their size.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from numpy import ndarray as Array

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

import eval as evaluation  # noqa: E402
from metrics import SIZES, VocMatches, mean, voc_average, voc_match, voc_outcome  # noqa: E402
from plumbing import program  # noqa: E402
from scratchdet import load_detector  # noqa: E402

PARTS = {"all": (0.0, np.inf), **SIZES}  # objects by their side, as in metrics.voc_ap


def bootstrap(detectors: list[VocMatches], images: int, draws: int, metric: str) -> Array:
    """mAP of M detectors on resampled images -> (1 + draws, M, 4).

    Row 0 is of the images as they are; the columns are `PARTS`. metric "voc07": 11-point.
    """
    rng, progress = np.random.default_rng(0), evaluation.Progress(draws, "resampling", "draws")
    values = np.empty((1 + draws, len(detectors), len(PARTS)))
    outcomes = [[voc_outcome(one, *sides) for sides in PARTS.values()] for one in detectors]
    times = np.ones(images, int)  # (N,) how often each image was drawn
    for draw in range(1 + draws):
        for m, one in enumerate(detectors):
            both = [voc_average(one, outcome, times)[:2] for outcome in outcomes[m]]
            values[draw, m] = [mean(ap11 if metric == "voc07" else area) for ap11, area in both]
        if draw:
            progress(draw)
        times = np.bincount(rng.integers(images, size=images), minlength=images)
    return values


def row(name: str, values: Array) -> str:
    """A line of the table: (1 + draws, 4) -> of each part the value and its interval."""
    cells = []
    for column in values.T:
        if np.isnan(column[0]):
            cells.append("-")
            continue
        low, high = np.nanpercentile(column[1:], (2.5, 97.5))
        cells.append(f"{column[0]:.4f} [{low:.4f}, {high:.4f}]")
    return f"{name:5}" + "".join(f"{cell:>25}" for cell in cells)


def main(argv: list[str] | None = None) -> Array:
    """Measure, resample, print the table; -> the mAPs, as of `bootstrap`."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="files of train.py")
    parser.add_argument("--draws", type=int, default=1000, help="how often images are resampled")
    evaluation.add_shared_flags(parser)
    args = parser.parse_args(argv)
    evaluation.check_shared(args)
    program.check_range(args, "draws", 1)

    detectors = []
    for path in args.checkpoints:
        model, checkpoint = load_detector(path, args.device)
        classes = model.config.classes
        records = evaluation.open_test_set(args, checkpoint, classes)
        found = evaluation.run_detector(
            model, records, batch_size=args.batch_size, workers=args.workers
        )
        detectors.append(voc_match(records, found, len(classes)))
    sets = args.eval_sets
    metric = evaluation.metric_of(args.data, sets)
    values = bootstrap(detectors, len(records), args.draws, metric)

    print(f"{len(records)} images of {' '.join(sets)}, {args.draws} draws, "
          f"{'11-point' if metric == 'voc07' else 'area'} mAP [95 % of the draws]")  # fmt: skip
    letters = [chr(ord("A") + m) for m in range(len(detectors))]
    for letter, path in zip(letters, args.checkpoints, strict=True):
        print(f"{letter} = {path}")
    print(f"{'':5}" + "".join(f"{part:>25}" for part in PARTS))
    for m, letter in enumerate(letters):
        print(row(letter, values[:, m]))
    for m, letter in enumerate(letters[1:], start=1):
        difference = values[:, 0] - values[:, m]
        print(row(f"A - {letter}", difference))
        print(f"A is better than {letter} in {(difference[1:, 0] > 0).mean():.1%} of the draws")
    return values


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
