"""One-line bugs, planted one at a time: each must turn the tests red.

    python tests/harness/mutants.py             all of them, as a table; minutes
    python tests/harness/mutants.py priors      those whose description has the word

A bug is planted in a temporary copy of the repository, never here. Most are bugs that published
detectors had (ssd.pytorch: forced matches overwritten, priors clipped, a crop constraint that never
holds, the largest logit of all in the log-sum-exp; lufficc/SSD: a division by zero positives; and
so on). Before that the same tests must be green on an untouched copy, or red would say nothing.
"""

import contextlib
import multiprocessing
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch  # noqa: F401  the forks find it imported

ROOT = Path(__file__).resolve().parents[2]
OURS = (ROOT, ROOT / "tests", ROOT / "tests/harness")  # a copy must not import from them
CPU_SECONDS, SECONDS = 120, 900  # that one run of the tests may take


class Mutant(NamedTuple):
    what: str
    file: str
    old: str  # must be there exactly once
    new: str
    tests: str  # of which file
    where: str  # pytest's -k: the tests that should see it
    compiled: bool = False  # whether those tests need the kernels


# fmt: off
MUTANTS = [
    # The network
    Mutant("priors run down the columns", "scratchdet.py",
           "cell.reshape(-1, 4)", "cell.transpose(0, 1).reshape(-1, 4)",
           "test_priors.py", "along_rows or neighbourhood or belongs"),
    Mutant("tall before wide priors", "scratchdet.py",
           "sides += [(small * root, small / root), (small / root, small * root)]",
           "sides += [(small / root, small * root), (small * root, small / root)]",
           "test_priors.py", "first_cell"),
    Mutant("priors clipped, in centre form", "scratchdet.py",
           "torch.cat([unit, side_unit])).float()",
           "torch.cat([unit, side_unit])).clamp(0, 1).float()",
           "test_priors.py", "first_cell or not_clipped"),
    Mutant("priors in the corner of their cell", "scratchdet.py",
           "(torch.arange(w, dtype=torch.float64) + 0.5)", "(torch.arange(w, dtype=torch.float64))",
           "test_priors.py", "first_cell"),
    Mutant("the large square twice as large in area", "scratchdet.py",
           "(math.sqrt(small * large),) * 2", "(float(large),) * 2",
           "test_priors.py", "first_cell"),
    Mutant("priors of maps 5 and 6 at steps 100 and 300 in any image", "scratchdet.py",
           "(step or image_w / w)", "(step or config.size / w)",
           "test_priors.py", "another_image_size"),
    Mutant("head permutes rows and columns", "scratchdet.py",
           "x.permute(0, 2, 3, 1)", "x.permute(0, 3, 2, 1)",
           "test_priors.py", "neighbourhood or belongs"),
    Mutant("head does not permute", "scratchdet.py",
           "x.permute(0, 2, 3, 1).reshape", "x.reshape",
           "test_priors.py", "neighbourhood or belongs"),
    Mutant("no ReLU behind the residual sum", "scratchdet.py",
           "return F.relu(y + self.shortcut(x), inplace=True)", "return y + self.shortcut(x)",
           "test_model.py", "parity and resnet18"),
    Mutant("fc6 without dilation", "scratchdet.py",
           "padding=6, dilation=6", "padding=1, dilation=1",
           "test_model.py", "parity and vgg16"),
    Mutant("pool3 rounds down", "scratchdet.py",
           "ceil_mode=True", "ceil_mode=False",
           "test_model.py", "six_maps and vgg16"),
    Mutant("last shortcut from the corner pixel", "scratchdet.py",
           "x[:, :, 1:-1, 1:-1]", "x[:, :, :-2, :-2]",
           "test_model.py", "3x3_to_1x1"),
    Mutant("BN of the head where the backbone's is asked for", "scratchdet.py",
           'how = {"bn": config.head_bn', 'how = {"bn": config.body_bn',
           "test_model.py", "bn_modes"),
    Mutant("xavier of twice the variance", "scratchdet.py",
           "bound = math.sqrt(3 /", "bound = math.sqrt(6 /",
           "test_model.py", "xavier"),
    Mutant("priors of the same fraction keep their pixels", "scratchdet.py",
           "if same_fraction else 100 * unit", "if False else 100 * unit",
           "test_priors.py", "same_fraction"),
    Mutant("the eps of the head's BN is not used", "scratchdet.py",
           '"eps": config.head_bn_eps, ', "",
           "test_model.py", "eps_of_the_heads"),
    Mutant("L2 norm over the pixels, not the channels", "scratchdet.py",
           "F.normalize(x, dim=1, eps=1e-10)", "F.normalize(x, dim=2, eps=1e-10)",
           "test_model.py", "l2_norm"),
    Mutant("options without effect are accepted", "plumbing/network.py",
           "return [n for n in sorted(options) if ", "return [n for n in () if ",
           "test_model.py", "without_effect"),
    Mutant("the halves of DSOD's maps swapped", "experiments/baselines.py",
           "[self.handed_on(self.pool(x)), self.learned(x)]",
           "[self.learned(x), self.handed_on(self.pool(x))]",
           "test_fidelity.py", "networks_compute and dsod300"),
    Mutant("a bottleneck of SSD321 without its middle 3x3", "experiments/baselines.py",
           "conv_bn(mid, mid, 3, padding=dilation, dilation=dilation, bn=bn),\n",
           "conv_bn(mid, mid, 1, bn=bn),\n",
           "test_baselines.py", "released_one"),
    Mutant("biases of VGG-16 lost under BN", "experiments/convert.py",
           "norms[i].running_mean.sub_(bias) if norms", "bias if norms",
           "test_convert.py", "pretrained"),
    Mutant("the first rows of the scores, not those of the classes", "experiments/convert.py",
           "per_prior[:, rows]", "per_prior[:, : len(rows)]",
           "test_convert.py", "coco_detector"),
    Mutant("a checkpoint may run code", "plumbing/checkpoint.py",
           "weights_only=True", "weights_only=False",
           "test_config.py", "anything_else"),
    # Coding and matching
    Mutant("variances swapped, on both ways", "ops/reference.py",
           "VARIANCES = (0.1, 0.2)", "VARIANCES = (0.2, 0.1)",
           "test_priors.py", "by_hand"),
    Mutant("encode with the variance of the size", "scratchdet.py",
           "[size * VARIANCES[0], ", "[size * VARIANCES[1], ",
           "test_priors.py", "by_hand or round_trip"),
    Mutant("IoU with sides one longer", "ops/reference.py",
           "area_a = (a[..., 2] - a[..., 0])", "area_a = (a[..., 2] - a[..., 0] + 1)",
           "test_loss.py", "brute_force or plain_loops"),
    Mutant("forced match lost", "ops/reference.py",
           "matched[n, prior] = box + start", "pass",
           "test_loss.py", "brute_force or by_hand"),
    Mutant("the last box wins a shared prior", "ops/reference.py",
           "free[:, prior] = -1.0", "pass",
           "test_loss.py", "brute_force or by_hand"),
    Mutant("boxes choose in their order, not best pair first", "ops/reference.py",
           "flat = (free == free.max())", "flat = (free == free.amax(1)[free.amax(1) >= 0][0])",
           "test_loss.py", "brute_force or by_hand"),
    Mutant("IoU of .5 is background", "ops/reference.py",
           "(best_iou >= iou_threshold)", "(best_iou > iou_threshold)",
           "test_loss.py", "exactly_the_threshold"),
    Mutant("rows of the first image for all", "ops/reference.py",
           "best_box + start, matched[n])", "best_box, matched[n])",
           "test_loss.py", "brute_force"),
    # The loss
    Mutant("negatives of the batch, not of the image", "ops/reference.py",
           "negatives_per_positive * positive.sum(dim=1)",
           "negatives_per_positive * positive.sum().expand(len(positive))",
           "test_loss.py", "mined_in_each_image or plain_loops"),
    Mutant("positives mined as negatives", "ops/reference.py",
           "hard_negatives(score, ~positive, ", "hard_negatives(score, positive | True, ",
           "test_loss.py", "plain_loops or gradient_flows"),
    Mutant("the easiest negatives", "ops/reference.py",
           "hard_negatives(score, ", "hard_negatives(1 / (1 + score), ",
           "test_loss.py", "plain_loops or gradient_flows"),
    Mutant("two negatives for a positive", "scratchdet.py",
           "negatives_per_positive: int = 3", "negatives_per_positive: int = 2",
           "test_loss.py", "by_hand or plain_loops"),
    Mutant("division by zero positives", "scratchdet.py",
           "norm = total.clamp(min=1)", "norm = total",
           "test_loss.py", "without_boxes"),
    Mutant("divided by images, not by positives", "scratchdet.py",
           "norm = total.clamp(min=1)", "norm = max(1, len(positive))",
           "test_loss.py", "divided_by or plain_loops"),
    Mutant("background is a positive", "scratchdet.py",
           "positive = target_labels > 0", "positive = target_labels >= 0",
           "test_loss.py", "plain_loops"),
    Mutant("exponentials relative to the largest logit of all", "ops/reference.py",
           'cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")',
           "nll_loss(((logits - logits.max()).exp() / (logits - logits.max()).exp()"
           '.sum(2, True)).log().flatten(0, 1), labels.flatten(), reduction="none")',
           "test_loss.py", "large_logits"),
    Mutant("mining hides a NaN", "ops/reference.py",
           "positive | mined | ~finite, cross_entropy", "positive | mined & finite, cross_entropy",
           "test_loss.py", "never_hides"),
    Mutant("ties of the mining all taken", "ops/reference.py",
           "(at & (at.cumsum(dim=1) <= how_many - above.sum(1, keepdim=True)))", "at",
           "test_loss.py", "argsort"),
    # Detection
    Mutant("background detected", "ops/reference.py",
           "for label in range(1, num_classes):", "for label in range(num_classes):",
           "test_model.py", "detect"),
    Mutant("NMS across classes", "ops/reference.py",
           "(iou <= iou_threshold) | (groups[rest] != groups[best])", "iou <= iou_threshold",
           "test_ops.py", "nms_reference_is_brute_force"),
    Mutant("IoU at the threshold suppresses", "ops/reference.py",
           "order = rest[(iou <= iou_threshold)", "order = rest[(iou < iou_threshold)",
           "test_ops.py", "nms_reference_is_brute_force"),
    Mutant("equal scores in any order", "ops/reference.py",
           "order = torch.sort(scores, descending=True, stable=True)",
           "order = torch.sort(scores, descending=True)",
           "test_ops.py", "first_of_many"),
    Mutant("the best 200 of a class, not 400", "ops/__init__.py",
           "top_k: int = 400", "top_k: int = 200",
           "test_model.py", "detect"),
    Mutant("decoded boxes lose half their size", "ops/reference.py",
           "[centre - size / 2, centre + size / 2]", "[centre, centre + size / 2]",
           "test_priors.py", "by_hand or round_trip"),
    # The kernels
    Mutant("IoU of .5 is background", "ops/match.cpp",
           "if (best[j] >= threshold)", "if (best[j] > threshold)",
           "test_ops.py", "match_at_the_threshold", compiled=True),
    Mutant("the highest of equal negatives", "ops/mined_cross_entropy.cpp",
           "(uint32_t)~prior", "(uint32_t)prior",
           "test_ops.py", "mined_by_hand or mined_full", compiled=True),
    Mutant("no one-hot in the gradient", "ops/mined_cross_entropy.cpp",
           " - (k == label[i])", "",
           "test_ops.py", "mined_gradient", compiled=True),
    Mutant("classes suppress each other", "ops/nms.cpp",
           "if (groups[i] != group) kept.clear();", "",
           "test_ops.py", "nms_groups", compiled=True),
    Mutant("negative scores sort upside down", "ops/greedy.h",
           "return bits >> 31 ? bits :", "return bits >> 31 ? ~bits :",
           "test_ops.py", "nms_order", compiled=True),
    Mutant("hue in degrees of 360", "ops/colour.h",
           "by / 30.0f", "by / 60.0f",
           "test_colour.py", "colour_random", compiled=True),
    Mutant("contrast always first", "ops/colour.h",
           "order == 0.0f ? contrast : 1.0f, row[3], row[4], order > 0.0f ? contrast : 1.0f",
           "contrast, row[3], row[4], 1.0f",
           "test_colour.py", "colour_by_hand or colour_random", compiled=True),
    Mutant("the mean in BGR order", "ops/colour.cpp",
           "mean0 = mean[2 * scale.bgr]", "mean0 = mean[2 - 2 * scale.bgr]",
           "test_colour.py", "colour_by_hand", compiled=True),
    Mutant("the mean is added below the image", "ops/colour.cpp",
           "y < image.y0 || y >= image.y1", "y < image.y0",
           "test_colour.py", "colour_random or colour_full", compiled=True),
    Mutant("a prior that the box covers is not seen", "ops/match.cu",
           "(a.x1 < b.x2) & (b.x1 < a.x2)", "(a.x1 < b.x1) & (b.x1 < a.x2)",
           "test_kernels.py", "match_random", compiled=True),
    Mutant("negative scores sort upside down", "ops/sort.h",
           "bits >> 31 ? ~bits : bits | 0x80000000u", "bits | 0x80000000u",
           "test_kernels.py", "nms_order", compiled=True),
    Mutant("scores near the threshold are lost before the division", "ops/postprocess.cu",
           "row[c] > threshold ? row[c] / sum", "row[c] > threshold * 1.1f ? row[c] / sum",
           "test_kernels.py", "odd_numbers", compiled=True),
    Mutant("the first sieve stops too many", "ops/postprocess.cpp",
           "std::log(threshold) - 1e-3f", "std::log(threshold) + 1.0f",
           "test_ops.py", "postprocess_random", compiled=True),
    # Threads
    Mutant("each part of a batch normalised by itself", "plumbing/joint_norm.cpp",
           "for (int i = 1; i < parts; ++i) combine(values, table[i]);", "values = table[part];",
           "test_threads.py", "learn or truth", compiled=True),
    Mutant("means that are apart add no variance", "plumbing/joint_norm.cpp",
           " + apart * apart * (all[0] * more[0] / total);", ";",
           "test_threads.py", "learn or truth", compiled=True),
    Mutant("gradients of the first part alone", "plumbing/threads.py",
           "parameter.grad += twin.grad", "pass",
           "test_threads.py", "learn or truth", compiled=True),
    Mutant("gradients of ranks summed", "plumbing/threads.py",
           "flat /= dist.get_world_size()", "pass",
           "test_threads.py", "ranks", compiled=True),
    Mutant("running statistics of one rank", "plumbing/threads.py",
           "tensors += [x for norm in norms for x in (norm.running_mean, norm.running_var)]",
           "pass",
           "test_threads.py", "ranks", compiled=True),
    # Training
    Mutant("biases decay", "train.py",
           '"params": biases, "weight_decay": 0.0',
           '"params": biases, "weight_decay": WEIGHT_DECAY',
           "test_train.py", "decay_and_rate"),
    Mutant("the head's BN decays", "train.py",
           '{"params": head_bn, "weight_decay": 0.0',
           '{"params": head_bn, "weight_decay": WEIGHT_DECAY',
           "test_train.py", "decay_and_rate"),
    Mutant("the rate follows the steps, not the work", "train.py",
           "done, _ = work_and_size(step, args)", "done = step / args.iterations",
           "test_train.py", "grow"),
    Mutant("priors of small images keep their pixels", "scratchdet.py",
           "(size, size), same_fraction=True)", "(size, size))",
           "test_train.py", "small_image"),
    Mutant("the learning rate drops a step late", "train.py",
           "done >= drop for drop", "done > drop for drop",
           "test_train.py", "schedule"),
    Mutant("micro-batches summed, not averaged", "train.py",
           "((loss_loc + loss_conf) / args.accumulate).backward()",
           "(loss_loc + loss_conf).backward()",
           "test_runs.py", "accumulation"),
    Mutant("no linear rule", "train.py",
           'args.lr = recipe["lr"] * scale if', 'args.lr = recipe["lr"] if',
           "test_train.py", "linear_rule"),
    Mutant("momentum lost on resuming", "train.py",
           'optimizer.load_state_dict(checkpoint["optimizer"])', "pass",
           "test_runs.py", "resumed_run and SIGTERM"),
    Mutant("resuming starts the stream anew", "train.py",
           "start_step=step * args.accumulate", "start_step=0",
           "test_runs.py", "resumed_run and SIGTERM"),
    Mutant("checkpoint written in place", "plumbing/run_folder.py",
           'open(temporary, "wb")', 'open(path, "wb")',
           "test_run_folder.py", "save_that_fails or full_disk"),
    # Data
    Mutant("crop constraint never enforced", "data.py",
           "success = iou >= MIN_IOUS[:, None]", "success = iou >= 0",
           "test_data.py", "crop"),
    Mutant("aspect ratios drawn between their bounds, not clamped to them", "data.py",
           "(0.5 + 1.5 * u[1]).clip(scale**2, scale**-2.0)",
           "u[1] * (np.minimum(2, scale**-2.0) - np.maximum(0.5, scale**2))"
           " + np.maximum(0.5, scale**2)",
           "test_data.py", "crop"),
    Mutant("IoU .5 missing from the samplers", "data.py",
           "np.array([0.1, 0.3, 0.5, 0.7, 0.9])", "np.array([0.1, 0.3, 0.7, 0.7, 0.9])",
           "test_data.py", "crop"),
    Mutant("boxes kept whose centre is outside", "data.py",
           "keep = ((centre >= 0) & (centre <= 1)).all(axis=1) & ", "keep = ",
           "test_data.py", "place"),
    Mutant("hue in degrees of 360", "ops/reference.py",
           "hue.new_tensor(30)", "hue.new_tensor(60)",
           "test_colour.py", "colour_reference_is_plain"),
    Mutant("no clamping after brightness", "ops/reference.py",
           "brightness[:, None]).round().clamp(0, 255)", "brightness[:, None]).round()",
           "test_colour.py", "colour_reference_is_plain"),
    Mutant("the mean in BGR order", "ops/reference.py",
           "per_channel(tuple(mean), ", "per_channel(tuple(mean)[::-1], ",
           "test_colour.py", "normalise_of_float"),
    Mutant("boxes not mirrored with the image", "data.py",
           "np.stack([1 - x1, y0, 1 - x0, y1], axis=1)", "boxes_xyxy",
           "test_data.py", "stay_on_their_pixels"),
    Mutant("every epoch augments alike", "data.py",
           "default_rng((self.seed, epoch, index))", "default_rng((self.seed, 0, index))",
           "test_data.py", "epoch"),
    Mutant("the canvas grows to 2, not to 4", "data.py",
           "ratio = rng.uniform(1.0, 4.0)", "ratio = rng.uniform(1.0, 2.0)",
           "test_data.py", "expand"),
    Mutant("a pixel subtracted from VOC's boxes", "plumbing/voc.py",
           "number(text) for text in", "number(text) - 1 for text in",
           "test_files_voc.py", "good_tree"),
    Mutant("another tool's XML is an image without objects", "plumbing/voc.py",
           'if not stack and tag != "annotation":', "if False:",
           "test_files_voc.py", "dialect"),
    Mutant("COCO's groups are classes", "plumbing/coco.py",
           "if not used[number_] and (groups or twice or is_background(name)):", "if False:",
           "test_files_coco.py", "only_group"),
    Mutant("YOLO's corner for its centre", "plumbing/yolo.py",
           "corners = x - bw / 2, y - bh / 2, x + bw / 2, y + bh / 2",
           "corners = x, y, x + bw, y + bh",
           "test_files_yolo.py", "good_tree"),
    Mutant("train and val share images", "plumbing/files.py",
           'if part == "val" else stems[cut:]', 'if part == "val" else stems',
           "test_files_layouts.py", "parts_of_a_set"),
    Mutant("a download is not checked", "plumbing/fetch.py",
           "if digest.hexdigest() != archive.md5:", "if False:",
           "test_fetch.py", "lies or never_removed"),
    Mutant("an archive unpacks anywhere", "plumbing/fetch.py",
           'if not stays_inside(name) or "\\\\" in name:', "if False:",
           "test_fetch.py", "means_harm"),
    Mutant("difficult objects never trained on", "data.py",
           "keep &= self.keep_difficult | ~record.difficult", "keep &= ~record.difficult",
           "test_data.py", "difficult"),
    Mutant("the first class is background", "plumbing/voc.py",
           "enumerate(classes, start=1)", "enumerate(classes)",
           "test_files_voc.py", "good_tree"),
    # Evaluation
    Mutant("VOC without + 1", "metrics.py",
           "iou_threshold, plus=1.0)", "iou_threshold)",
           "test_metrics.py", "voc"),
    Mutant("VOC with >= .5", "metrics.py",
           "enough = iou > iou_threshold", "enough = iou >= iou_threshold",
           "test_metrics.py", "voc"),
    Mutant("difficult objects counted", "metrics.py",
           "counted = ~m.objects.difficult & ", "counted = ",
           "test_metrics.py", "voc"),
    Mutant("an object found twice", "metrics.py",
           "tp[looks[best]] = True", "tp[looks] = True",
           "test_metrics.py", "voc"),
    Mutant("ten points instead of eleven", "metrics.py",
           "np.arange(0, 1.1, 0.1)", "np.arange(0, 1.0, 0.1)",
           "test_metrics.py", "voc"),
    Mutant("a bootstrap that forgets how often it drew an image", "metrics.py",
           "tp * times[m.guesses.image], fp", "tp, fp",
           "test_metrics.py", "several_times"),
    Mutant("F1 without the objects that were missed", "metrics.py",
           "(right + wrong + objects[c])", "(2 * right + wrong)",
           "test_metrics.py", "f1"),
    Mutant("COCO's ignored objects before those that count", "metrics.py",
           "-iou[some], last[some], d[some]", "last[some], -iou[some], d[some]",
           "test_metrics.py", "coco_frozen"),
    Mutant("all that point at an object are mended", "experiments/errors.py",
           "mended[order[first]] = True", "mended[order] = True",
           "test_errors.py", "tidecv or by_hand"),
    Mutant("a mended class keeps its wrong name", "experiments/errors.py",
           "label[repaired] = v.objects.label[v.target[repaired]]", "pass",
           "test_errors.py", "tidecv or by_hand"),
    Mutant("an object that could be mended is missed, too", "experiments/errors.py",
           "missed[reached] = False", "pass",
           "test_errors.py", "tidecv or by_hand"),
    Mutant("difficult objects hide nothing", "experiments/errors.py",
           "inside[d[share > ENOUGH]] = True", "pass",
           "test_errors.py", "difficult"),
    Mutant("a confused object is missed, too", "experiments/errors.py",
           "            seen[v.target[d]] = True\n", "",
           "test_errors.py", "confusion"),
    Mutant("the sentence says won for lost", "experiments/compare.py",
           "return np.flatnonzero(b & ~a), np.flatnonzero(a & ~b)",
           "return np.flatnonzero(a & ~b), np.flatnonzero(b & ~a)",
           "test_errors.py", "command_compares"),
    Mutant("BN left in training mode at evaluation", "eval.py",
           "    model.eval()\n    try:", "    model.train()\n    try:",
           "test_runs.py", "running_statistics"),
]
# fmt: on
WIDTH = max(len(mutant.what) for mutant in MUTANTS)


def copy_of_the_repository(folder: Path) -> Path:
    """What git knows or would add, or all that is no build, data or run."""
    skip = (".git", "build", "runs", ".venv", "__pycache__", ".pytest_cache", ".ruff_cache")
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z", "-co", "--exclude-standard"],
            cwd=ROOT, capture_output=True, check=True, text=True,
        ).stdout  # fmt: skip
        files = [Path(name) for name in listed.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):  # an export without .git
        files = [p.relative_to(ROOT) for p in ROOT.rglob("*") if p.is_file()]
    for file in files:
        if not set(file.parts) & set(skip) and (ROOT / file).is_file():
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / file, folder / file)
    return folder


def run_tests(repo: Path, tests: str, where: str, *, compiled: bool) -> tuple[int, str]:
    """pytest's exit code (negative: killed by that signal) and what it printed, of some tests.

    In a fork of this process, which has imported torch but nothing of the repository: starting
    Python anew for each bug would cost more than the tests do.
    """
    with tempfile.TemporaryFile("w+") as output:
        child = os.fork()
        if child == 0:
            os.setsid()  # to be ended together with what it starts: compilers, data workers
            signal.alarm(SECONDS)
            resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
            os.chdir(repo)
            sys.path[:] = [p for p in sys.path if Path(p).resolve() not in OURS]
            os.environ["SCRATCHDET_OPS"] = "require" if compiled else "reference"
            null = os.open(os.devnull, os.O_RDONLY)
            for theirs, ours in ((null, 0), (output.fileno(), 1), (output.fileno(), 2)):
                os.dup2(theirs, ours)
            code = 3
            try:
                flags = ("-x", "-q", "--tb=line", "-p", "no:cacheprovider")
                code = int(pytest.main([*flags, f"tests/{tests}", "-k", where]))
                sys.stdout.flush()
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        output.seek(0)
        return code, output.read()


def plant(repo: Path, mutant: Mutant) -> str:
    """Writes the bug into the copy; returns the file as it was."""
    original = (repo / mutant.file).read_text()
    if (count := original.count(mutant.old)) != 1:
        raise ValueError(
            f"{mutant.file} has {count} x {mutant.old!r}, expected once: {mutant.what}"
        )
    (repo / mutant.file).write_text(original.replace(mutant.old, mutant.new))
    return original


def verdict(repo: Path, mutant: Mutant) -> tuple[bool, str]:
    """Whether the tests saw the bug, and which one did."""
    try:
        original = plant(repo, mutant)
    except (ValueError, OSError) as error:
        return False, f"NOT PLANTED: {error}"
    code, output = run_tests(repo, mutant.tests, mutant.where, compiled=mutant.compiled)
    (repo / mutant.file).write_text(original)
    if code == 1:  # some tests failed; others are errors of collection, or nothing selected
        failed = next((s for s in output.splitlines() if s.startswith(("FAILED", "ERROR"))), "?")
        return True, failed.split("::")[-1].split(" ")[0]
    reason = {0: "SURVIVED", 5: "no such test"}.get(code, f"exit code {code}")
    if code in (-signal.SIGALRM, -signal.SIGXCPU, -signal.SIGKILL):
        reason = f"more than {CPU_SECONDS} CPU seconds or {SECONDS} seconds"
    return False, reason + ("" if code == 0 else "\n" + output[-2000:])


def work(group: list[Mutant]) -> list[str]:
    """Plants the bugs that the tests of one file have to see; prints a row each; -> the missed."""
    tests, compiled = group[0].tests, group[0].compiled
    with tempfile.TemporaryDirectory() as folder:
        repo = copy_of_the_repository(Path(folder))
        where = " or ".join(sorted({f"({m.where})" for m in group}))
        code, output = run_tests(repo, tests, where, compiled=compiled)
        if code != 0:
            print(f"RED WITHOUT ANY BUG: {tests} -k '{where}'\n{output[-3000:]}", flush=True)
            return [m.what for m in group]
        missed = []
        for mutant in group:
            start = time.monotonic()
            seen, by = verdict(repo, mutant)
            row = f"{'seen' if seen else 'MISSED':6}  {mutant.file:19} {mutant.what:{WIDTH}}"
            print(f"{row} {time.monotonic() - start:4.0f} s  {by}", flush=True)
            if not seen:
                missed.append(mutant.what)
        return missed


def main(word: str = "") -> bool:
    """Prints the table; True if the tests saw every bug."""
    mutants = [m for m in MUTANTS if word.lower() in f"{m.what} {m.file}".lower()]
    groups: dict[tuple, list[Mutant]] = {}
    for mutant in sorted(mutants, key=lambda m: not m.compiled):  # those that build come first
        groups.setdefault((mutant.compiled, mutant.tests), []).append(mutant)
    begin = time.monotonic()
    with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
        missed = [what for part in pool.map(work, groups.values()) for what in part]
    seen = f"{len(mutants) - len(missed)} of {len(mutants)} bugs turned the tests red"
    print(f"{seen}, {time.monotonic() - begin:.0f} s")
    return bool(mutants) and not missed


if __name__ == "__main__":
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    os.environ.pop("SCRATCHDET_DATA", None)  # real data would only take longer
    with tempfile.TemporaryDirectory() as objects:
        once = (sys.executable, Path(__file__).with_name("compile_once.py"), objects)
        os.environ["CXX"] = f"{shlex.join(map(str, once))} {os.environ.get('CXX', 'c++')}"
        sys.exit(0 if main(*sys.argv[1:]) else 1)
