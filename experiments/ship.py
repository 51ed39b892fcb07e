"""Make a small file for others of a checkpoint: weights in half precision, with a card.

    python -m experiments.ship runs/photos/last.pt --voc-root DIR --out weights/photos.pt

The file has the network's Config, its weights, the run's arguments without paths, and the card. The
card says what the network was trained on and how, what it reaches, what it cannot do, and on what
terms. Everything is measured anew, on the weights as they are in the file. The card is also written
as a page beside it, README.md. `detect.py` takes weights/photos.pt by default.

`--average FILE ...` ships the mean of this checkpoint's weights and theirs: runs that began from
the same weights can be better together than each alone (Wortsman et al. 2022, "Model soups").
`--size` ships them for another size of the input: priors are fractions of it, weights know of none.
"""

import argparse
import hashlib
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

import eval as evaluation
import train
from experiments import baselines  # noqa: F401  a checkpoint may have any network
from plumbing import machine
from plumbing.checkpoint import read_checkpoint
from plumbing.program import as_words, check_file, run_program
from plumbing.sources import add_eval_flags, check_eval_flags, open_test_set
from plumbing.voc import VOC_CLASSES
from scratchdet import Config, ScratchDet, load_detector

PATHS = ("voc_root", "coco_root", "yolo_root", "classes", "init", "out", "cache")
NOT_SAID = (*PATHS, "minutes", "resume", "device", "workers", "save_every", "eval_every", "data")
SAID = ("recipe", "batch_size", "lr", "iterations")  # the last two follow the batch size otherwise
FIRST = 100  # images of a measurement that a test can repeat in seconds
WRITTEN = "Written by `python -m experiments.ship`."
LIMITS = (
    "It knows these classes and no others, and an object that it has never seen may look like one "
    "of them.",
    "It is made to teach and to start from, not to decide anything about people.",
)
SMALL = "Small objects are mostly missed: those of less than 32 pixels in a picture of 300x300."
PICTURES = {
    "voc": "Its photographs are snapshots, most of them by day",
    "own": "It was trained on pictures of one data set",
    "shapes": "It was trained on drawn shapes",
}
TERMS = {
    "voc": "The weights are under this project's licence (MIT). They were trained on photographs "
    "of the PASCAL VOC sets of 2007 and 2012, which come from Flickr and stand under its terms of "
    "use; VOC's makers offer them for research. No photograph is in the file or in this project.",
    "own": "The terms of the pictures that it was trained on are not known to the program that "
    "wrote this. Whoever passes the file on should say them here.",
    "shapes": "The weights are under this project's licence (MIT), which also draws the shapes.",
}


def halved(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of convolutions as fp16; BatchNorm stays fp32: its variances may exceed 65,504."""
    return {k: v.half() if v.dim() == 4 else v.clone() for k, v in state.items()}


def averaged(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of several networks' weights and statistics; counters are the first one's."""
    return {
        k: torch.stack([s[k].float() for s in states]).mean(0) if v.is_floating_point() else v
        for k, v in states[0].items()
    }


def fingerprint(state: dict[str, Tensor]) -> str:
    """SHA-256 over all tensors by name, as they are in the file."""
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode() + state[name].contiguous().numpy().tobytes())
    return digest.hexdigest()


def command_of(args: dict) -> str:
    """The command of a run: the flags that differ from the defaults of its recipe."""
    root = [] if args["data"] == "shapes" else [f"--{args['data']}-root", "DIR"]
    default = vars(train.parse_args([*root, "--recipe", args["recipe"], "--device", "cpu"]))
    flags = {action.dest for action in train.make_parser()._actions}
    words = ["python train.py", *root]
    if args.get("classes"):
        words += ["--classes", "auto" if args["classes"] == "auto" else "FILE"]
    for name in ("recipe", *sorted(set(args) & set(default) - {"recipe"})):
        value = args[name]
        if name in NOT_SAID or (value == default[name] and name not in SAID):
            continue
        if name == "sizes":
            value = as_words(value).split()
        if name not in flags:  # a field of Config
            words += ["--config", f"{name}={value}".replace(" ", "")]
            continue
        if value is False:
            words.append(f"--no-{name.replace('_', '-')}")
            continue
        values = value if isinstance(value, (list, tuple)) else [value]
        words += [f"--{name.replace('_', '-')}", *(f"{v:g}" if type(v) is float else str(v)
                  for v in values if v is not True)]  # fmt: skip
    return " ".join(words)


def part(run: dict) -> dict:
    """What a card says of one run, given its checkpoint or a shipped file."""
    if "card" in run:
        keys = ("command", "commit", "cpu_hours", "averaged")
        return {key: run["card"][key] for key in keys if run["card"].get(key)}
    hours = (run["results"] or {}).get("cpu_minutes", 0) / 60
    return dict(command=command_of(run["args"]), commit=run["commit"], cpu_hours=round(hours, 3))


def parts_before(init: str | None) -> list[dict]:
    """The runs that made the file from which a run began (--init): the first one first."""
    if not init:
        return []
    run = read_checkpoint(init)
    if "args" not in run:  # another program's weights, converted
        return []
    if "card" in run:
        return [*run["card"].get("before", []), part(run)]
    return [*parts_before(run["args"].get("init")), part(run)]


def numbers(results: dict) -> dict:
    """What a card says of an evaluation."""
    rows = results["per_class"].items()
    return {
        **{key: results[key] for key in ("mAP_11point", "mAP_area", "images", "objects")},
        "per_class": {n: {k: row[f"ap_{k}"] for k in ("11point", "area")} for n, row in rows},
        "by_size": {n: row["mAP_11point"] for n, row in results["by_size"].items()},
    }


def key(run: dict) -> tuple:
    """What tells one run from all others, whether or not its weights were then averaged."""
    return run["command"], run["commit"], run["cpu_hours"]


def origin(about: dict, classes: Sequence[str]) -> str:
    """Whose pictures a run was trained on: voc, shapes, or own."""
    if about["data"] == "shapes":
        return "shapes"
    sets = {name.partition(":")[0] for name in about["train_sets"]}
    of_voc = about["data"] == "voc" and tuple(classes) == VOC_CLASSES and sets <= {"2007", "2012"}
    return "voc" if of_voc else "own"


def limits(whose: str, small: float | None) -> tuple[str, ...]:
    """What it cannot do. `small`: its mAP for small objects, if there are any."""
    missed = [SMALL] if (small or 0) < 0.2 else []
    return (LIMITS[0], *missed, f"{PICTURES[whose]}, and it was tested on no others.", LIMITS[1])


def all_hours(card: dict) -> float:
    """CPU hours of all runs that made a file, each counted once."""
    chain = (*card.get("before", []), card)
    runs = [one for run in chain for one in (run, *run.get("averaged", []))]
    return sum({key(run): run["cpu_hours"] for run in runs}.values())


def beside(run: dict, before: list[dict]) -> str:
    """What a run's weights are averaged with: those of run 5, the mean of run 5 if its weights were
    averaged, too, or those of a command. An empty string for a run alone."""
    names = {key(p): f"run {n}" for n, p in enumerate(before, start=1)}
    others = [
        ("the mean of " if "averaged" in p else "those of ") + names[key(p)]
        if key(p) in names
        else f"those of `{p['command']}` (commit {p['commit']}, {p['cpu_hours']:.2f} CPU hours)"
        for p in run.get("averaged", [])
    ]
    return "; its weights averaged with " * bool(others) + " and with ".join(others)


def page(card: dict, name: str) -> str:
    """The card as a page of Markdown."""
    all_of_it, config, before = card["measured"], card["network"], card.get("before", [])
    runs, again = [*before, card], "`python -m experiments.again"
    chosen = " (a little too good if what to average was chosen on them)"
    lines = [
        f"# {name}",
        "",
        f"{WRITTEN} A detector of {len(all_of_it['per_class'])} "
        f"classes, trained from random weights{', without a GPU' * ('thread' in card['machine'])}. "
        "Same facts in the file: "
        f'`torch.load("{name}")["card"]`.',
        "",
        "| | |",
        "|---|---|",
        f"| network | {config}; {card['bytes'] / 1e6:.1f} MB, convolutions in fp16 |",
        f"| trained on | {', '.join(card['train_sets'])}: the {card['images']:,} images that were "
        f"there{'; each run begins with what the one before it left (--init)' * bool(before)} |",
        *(
            f"| run {n} | `{p['command']}`; commit {p['commit']}, {p['cpu_hours']:.2f} CPU hours"
            f"{beside(p, before)} |"
            for n, p in enumerate(runs, start=1)
        ),
        f"| all of it again | {again} {name}`, with the data's folder and `--out DIR` |",
        f"| commit, torch, seed | {card['commit']}, {card['torch']}, {card['seed']} |",
        f"| cost | {all_hours(card):.2f} CPU hours in all; the last run on {card['machine']} |",
        f"| mAP on {' '.join(card['eval_sets'])}, {all_of_it['images']:,} images"
        f"{chosen * any('averaged' in run for run in runs)} | "
        f"**{all_of_it['mAP_11point']:.4f}** 11-point, {all_of_it['mAP_area']:.4f} area |",
        f"| the same, the first {card['first']['images']} images | "
        f"{card['first']['mAP_11point']:.4f}, {card['first']['mAP_area']:.4f} |",
        f"| on images it was trained on, the first {card['seen']['images']:,} | "
        f"{card['seen']['mAP_11point']:.4f}, {card['seen']['mAP_area']:.4f} |",
        "| by size of the object in 300x300 | "
        + ", ".join(f"{n} {v or 0:.4f}" for n, v in all_of_it["by_size"].items())
        + " |",
        "| shown from a score of | "
        + (f"{card['threshold']:.2f} (best F1) |" if card["threshold"] else ".3 (none is right) |"),
        f"| SHA-256 of the tensors | `{card['sha256']}` |",
        "",
        "| class | 11-point | area |",
        "|---|---|---|",
    ]
    order = sorted(all_of_it["per_class"].items(), key=lambda row: -(row[1]["11point"] or 0))
    lines += [f"| {n} | {ap['11point'] or 0:.4f} | {ap['area'] or 0:.4f} |" for n, ap in order]
    lines += ["", "**What it cannot do.** " + " ".join(card["limits"]), ""]
    return "\n".join([*lines, f"**Terms.** {card['terms']}", ""])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("checkpoint", help="of train.py, at the end of its run")
    add_eval_flags(parser)
    parser.add_argument("--average", nargs="+", default=[], metavar="FILE", help="with these")
    parser.add_argument("--size", type=int, help="side of the input (default: the checkpoint's)")
    parser.add_argument("--out", required=True, metavar="FILE", help="such as weights/NAME.pt")
    args = parser.parse_args(argv)
    check_eval_flags(args)
    check_file(args.out, args.checkpoint, *args.average)
    readme = Path(args.out).with_name("README.md")
    if readme.exists() and WRITTEN not in readme.read_text(encoding="utf-8"):
        raise ValueError(f"{readme}: would be overwritten; choose another folder for --out")
    model, run = load_detector(args.checkpoint, args.device)
    if "card" in run or not {"args", "images", "torch", "machine"} <= set(run):
        raise ValueError(
            f"{args.checkpoint}: {'a shipped file' if 'card' in run else 'no run of train.py'}; "
            "expected the last.pt of a run"
        )
    config, about = run["config"], run["args"]
    if args.size is not None:
        config = config | {"size": args.size}
        model = ScratchDet(replace(model.config, size=args.size)).to(args.device).eval()
    others = [read_checkpoint(file) for file in args.average]
    # What acts before training only, and the size of the images, may differ.
    free = {"head_gamma": model.config.head_gamma, "size": model.config.size}
    for file, one in zip((args.checkpoint, *args.average), (run, *others), strict=True):
        if not one.get("results"):
            raise ValueError(f"{file}: step {one.get('step')}, not the end of a run: no results")
        if Config.from_dict(one["config"] | free) != model.config:
            raise ValueError(
                f"--average {file}: another network, or other classes, than {args.checkpoint}"
            )
    runs = {"before": parts_before(about.get("init")), "averaged": [*map(part, others)]}
    runs |= part(run)  # before the long work: --init's file may be gone
    state = halved(averaged([run["model"], *(other["model"] for other in others)]))
    model.load_state_dict(state)  # what is measured is what is shipped

    def measure(sets: list[str], first: int | None = None) -> dict:
        args.eval_sets = sets
        records = open_test_set(args, about, tuple(config["classes"]))[:first]
        return evaluation.evaluate(
            model, records, metric=evaluation.metric_of(about["data"], sets),
            batch_size=args.batch_size, workers=args.workers,
        )[0]  # fmt: skip

    whose = origin(about, config["classes"])
    tested, trained = args.eval_sets or about["eval_sets"], about["train_sets"]
    results, some = measure(tested), measure(tested, FIRST)
    seen = measure(trained[:1], results["images"])
    card = {
        **runs,
        "network": f"{config['backbone']}, width {config['width']:g}, {config['size']} px",
        "train_sets": trained, "eval_sets": tested, "images": run["images"],
        "torch": run["torch"], "machine": run["machine"], "seed": about["seed"],
        "measured": numbers(results), "first": numbers(some), "seen": numbers(seen),
        "threshold": results["threshold"], "sha256": fingerprint(state),
        "measured_with": f"commit {machine.commit()}, torch {torch.__version__}",
        "date": time.strftime("%Y-%m-%d"), "terms": TERMS[whose],
        "limits": limits(whose, numbers(results)["by_size"]["small"]),
    }  # fmt: skip
    kept = {"threshold": results["threshold"]}  # detect.py asks for it
    plain = {name: about[name] for name in about if name not in PATHS}
    shipped = {"config": config, "model": state, "results": kept, "args": plain, "card": card}
    shipped |= {"step": run["step"], "commit": run["commit"]}
    out = Path(args.out)
    torch.save(shipped, out)
    card["bytes"] = out.stat().st_size  # the file itself does not say it
    readme.write_text(page(card, out.name), encoding="utf-8")
    print(f"{out}: {card['bytes'] / 1e6:.2f} MB, mAP {results['mAP']:.4f}; {out.parent}/README.md")


if __name__ == "__main__":
    run_program(main)
