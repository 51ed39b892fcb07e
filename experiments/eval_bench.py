"""Time both metrics, and COCO's beside pycocotools if it is installed, in one run.

    python experiments/eval_bench.py [--images 5000] [--classes 80] [--guesses 200]

Images, objects and detections are random; half of the detections lie near an object. CPU seconds;
reading JSON files is in neither side, building its index (loadRes) is in pycocotools'.
"""

import argparse
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

from machine import hardware  # noqa: E402
from metrics import COCO_NAMES, coco_ap, voc_ap  # noqa: E402
from tests.test_eval import by_pycocotools, random_case  # noqa: E402


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--objects", type=int, default=15, help="of an image, at most")
    parser.add_argument("--guesses", type=int, default=200, help="detections an image, at most")
    args = parser.parse_args()
    records, detections = random_case(0, args.images, args.classes, args.objects, args.guesses)
    objects, guesses = (sum(len(x.labels) for x in xs) for xs in (records, detections))
    print(f"{args.images:,} images, {objects:,} objects, {guesses:,} detections; {hardware('cpu')}")

    def timed(function, *more):
        start = time.process_time()
        result = function(records, detections, args.classes, *more)
        return result, time.process_time() - start

    print(f"voc_ap       {timed(voc_ap)[1]:8.2f} s")
    ours, seconds = timed(coco_ap)
    print(f"coco_ap      {seconds:8.2f} s")
    try:
        stats, theirs = by_pycocotools(records, detections, args.classes)
    except ImportError:
        print("pycocotools is not installed: nothing to compare with")
        return
    off = max(abs(ours[name] - value) for name, value in zip(COCO_NAMES, stats, strict=True))
    print(f"pycocotools  {theirs:8.2f} s = {theirs / seconds:.1f} times coco_ap's")
    print(f"largest difference of the 12 numbers {off:.1e}")


if __name__ == "__main__":
    main()
