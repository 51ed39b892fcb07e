"""experiments/page: what the page's JavaScript computes is what the Python computes.

The functions run in node, the whole page in a headless Chromium; where there is none of them the
tests say so and skip. The browser is asked through a pair of pipes (Chrome's DevTools protocol).
"""

import base64
import fcntl
import io
import json
import os
import select
import shutil
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from trees import an_object, make_voc, write, xml_of

import metrics
from experiments import page
from metrics import Detections
from ops import reference
from ops.reference import normalise
from plumbing.files import Record
from plumbing.shapes import draw_image
from scratchdet import PRIORS, Config, ScratchDet, cxcywh_to_xyxy, encode, make_priors
from scratchdet import multibox_loss as python_loss

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "shapes.html"  # the quick start's network
CODE = ROOT / "experiments" / "page.js"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)

needs_node = pytest.mark.skipif(not shutil.which("node"), reason="no node on this machine")
needs_browser = pytest.mark.skipif(not CHROMIUM, reason="no Chromium on this machine")


def run_js(body: str, given: dict):
    """The result of a JavaScript function body, in which page.js is `page`, the input `given`."""
    script = (
        f"const page = require({json.dumps(str(CODE))});"
        "const given = JSON.parse(require('fs').readFileSync(0, 'utf8'));"
        f"(async () => {{ {body} }})().then((x) => console.log(JSON.stringify(x)),"
        " (e) => { console.error(e); process.exit(1); });"
    )
    done = subprocess.run(
        ["node", "-e", script], input=json.dumps(given), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def random_boxes(rng, count, grid=None):
    """xyxy float32; on a coarse grid many IoUs are equal, so that ties are decided, too."""
    corner, size = rng.uniform(0, 0.8, (count, 2)), rng.uniform(0.02, 0.4, (count, 2))
    boxes = np.concatenate([corner, corner + size], axis=1)
    return (np.round(boxes * grid) / grid if grid else boxes).astype(np.float32)


# ------------------------------------------------------------------------------ the functions


@needs_node
def test_priors_and_coding():
    """Priors to the last bit; offsets to rounding, for exp and log are not the same everywhere."""
    for name, size in (("voc", 300), ("coco", 300), ("voc321", 321)):
        config = Config(priors=name, size=size)
        sizes = [[s, s + 1] for s in (38, 19, 10, 5, 3, 1)]
        expected = make_priors(config, sizes)
        got = run_js("return page.makePriors(given.table, given.sizes, given.size)",
                     {"table": PRIORS[name], "sizes": sizes, "size": size})  # fmt: skip
        assert torch.equal(torch.tensor(got), expected)
    rng, expected = np.random.default_rng(0), expected[::10].contiguous()
    loc = torch.from_numpy(rng.normal(0, 2, (len(expected), 4)).astype(np.float32))
    boxes = reference.decode(loc, expected)
    given = {"loc": loc.tolist(), "priors": expected.tolist(), "boxes": boxes.tolist()}
    got = run_js("return given.loc.map((row, p) => page.decode(row, given.priors[p]))", given)
    torch.testing.assert_close(torch.tensor(got), boxes, rtol=1e-5, atol=1e-6)
    got = run_js("return given.boxes.map((box, p) => page.encode(box, given.priors[p]))", given)
    torch.testing.assert_close(torch.tensor(got), encode(boxes, expected), rtol=1e-4, atol=1e-3)


@needs_node
def test_matching():
    """The same box for every prior, on random boxes and on a coarse grid, of which some are close
    to others or the same: so boxes share their best prior, and IoUs are equal."""
    rng = np.random.default_rng(1)
    cases, expected = [], []
    for i in range(40):
        grid = (None, 8, 16)[i % 3]
        priors, boxes = random_boxes(rng, 150, grid), random_boxes(rng, int(rng.integers(5)), grid)
        near = boxes[: i % 4] + rng.normal(0, 0.01, (len(boxes[: i % 4]), 4))
        boxes = np.concatenate([boxes, near, boxes[: i % 3]]).astype(np.float32)
        threshold = float(rng.choice([0.3, 0.5, 0.9]))
        offsets = torch.tensor([0, len(boxes)])
        found = reference.match(
            torch.from_numpy(priors), torch.from_numpy(boxes), offsets, threshold
        )
        expected.append(found[0].tolist())
        cases.append([priors.tolist(), boxes.tolist(), threshold])
    got = run_js("return given.map((one) => [...page.match(...one)])", cases)
    assert got == expected
    lost = run_js('return given.map((one) => [...page.match(...one, "threshold alone")])', cases)
    assert lost != expected


@needs_node
def test_a_shared_prior():
    """The page's example: where each box takes its best prior, one of two boxes is lost."""
    priors = cxcywh_to_xyxy(make_priors(Config()))
    boxes = torch.tensor([[116, 24, 146, 264], [142, 24, 172, 264]]) / 300
    body = """return ["best pair first", "each box its best", "threshold alone"].map((how) => {
      const matched = page.match(given.priors, given.boxes, 0.5, how);
      return [0, 1].map((g) => matched.filter((m) => m === g).length); })"""
    got = run_js(body, {"priors": priors.tolist(), "boxes": boxes.tolist()})
    assert got == [[1, 1], [0, 1], [0, 0]]
    assert "[[116, 24, 146, 264], [142, 24, 172, 264]]" in (
        (CODE.parent / "page_view.js").read_text()
    )


@needs_node
def test_nms():
    """The same boxes are kept; each other one names a kept box that overlaps it too much."""
    rng = np.random.default_rng(2)
    cases, expected = [], []
    for i in range(40):
        count, grid = int(rng.integers(1, 120)), (None, 8, 16)[i % 3]
        boxes = random_boxes(rng, count, grid)
        scores = np.round(rng.random(count), 1 + i % 3).astype(np.float32)
        groups, threshold = rng.integers(1, 4, count), float(rng.choice([0.3, 0.45, 0.5]))
        rows = boxes.tolist()
        if i % 5 == 0:
            boxes[0], rows[0] = np.nan, [None] * 4  # JSON has no NaN
        keep = reference.nms(*map(torch.from_numpy, (boxes, scores, groups)), threshold)
        expected.append(keep.tolist())
        cases.append([rows, scores.tolist(), groups.tolist(), threshold])
    got = run_js("return given.map((one) => [...page.nms(...one)])", cases)
    assert [[i == s for i, s in enumerate(row)] for row in got] == expected
    for row, (boxes, _, groups, threshold), keep in zip(got, cases, expected, strict=True):
        for i, s in enumerate(row):
            if s >= 0 and s != i:
                pair = torch.tensor([boxes[i], boxes[s]])
                assert keep[s]
                assert groups[i] == groups[s]
                assert reference.pairwise_iou(pair[:1], pair[1:]) > threshold


@needs_node
def test_loss():
    """Both parts of the loss, and as many mined negatives, on random outputs of a network."""
    rng = np.random.default_rng(3)
    priors = make_priors(Config())[::7].contiguous()
    for count in (0, 1, 5):
        boxes = torch.from_numpy(random_boxes(rng, count))
        labels = torch.from_numpy(rng.integers(1, 5, count))
        loc = torch.from_numpy(rng.normal(0, 1, (len(priors), 4)).astype(np.float32))
        logits = torch.from_numpy(rng.normal(0, 3, (len(priors), 5)).astype(np.float32))
        loss_loc, loss_conf, total = python_loss(
            loc[None], logits[None], priors, boxes, labels, torch.tensor([0, count])
        )
        got = run_js(
            """const f = (rows) => Float32Array.from(rows.flat());
            const matched = page.match(given.priors.map(page.cxcywhToXyxy), given.boxes);
            return page.multiboxLoss(f(given.loc), f(given.logits), given.priors, matched,
                                     given.boxes, given.labels);""",
            {"priors": priors.tolist(), "boxes": boxes.tolist(), "labels": labels.tolist(),
             "loc": loc.tolist(), "logits": logits.tolist()},
        )  # fmt: skip
        assert got["positives"] == total
        assert sum(got["mined"].values()) == 3 * total
        assert got["lossLoc"] == pytest.approx(loss_loc.item(), rel=1e-4)
        conf = got["lossPositives"] + got["lossNegatives"]
        assert conf == pytest.approx(loss_conf.item(), rel=1e-4)


@needs_node
def test_average_precision():
    """AP by VOC's rules, both ways, on random detections: duplicates, misses, difficult objects."""
    rng = np.random.default_rng(4)
    records, detections, pictures = [], [], []
    for i in range(30):
        boxes = np.round(random_boxes(rng, int(rng.integers(0, 5))) * 300).astype(float)
        labels = rng.integers(1, 4, len(boxes))
        near = np.repeat(boxes, 3, axis=0) + rng.normal(0, 9, (3 * len(boxes), 4))
        found = np.concatenate([near, random_boxes(rng, 6) * 300])
        found_labels = np.concatenate([np.repeat(labels, 3), rng.integers(1, 4, 6)])
        scores = rng.random(len(found))
        difficult, area = rng.random(len(boxes)) < 0.2, np.ones(len(boxes))
        records.append(Record(str(i), Path(f"{i}.jpg"), (300, 300), boxes, labels, difficult, area))
        detections.append(Detections(found, scores, found_labels))
        pictures.append({
            "boxes": boxes.tolist(), "labels": labels.tolist(), "difficult": difficult.tolist(),
            "found": [{"xyxy": b, "score": s, "label": n} for b, s, n in
                      zip(found.tolist(), scores.tolist(), found_labels.tolist(), strict=True)],
        })  # fmt: skip
    expected = metrics.voc_ap(records, detections, 3)
    got = run_js("return [1, 2, 3].map((label) => page.averagePrecision(given, label))", pictures)
    assert [ap["ap11"] for ap in got] == pytest.approx(expected["ap11"].tolist(), abs=1e-12)
    assert [ap["area"] for ap in got] == pytest.approx(expected["area"].tolist(), abs=1e-12)
    assert 0.05 < min(expected["area"])  # neither nothing nor all
    assert max(expected["area"]) < 0.95


# ------------------------------------------------------------------------------ the network


def as_network_sees(pixels: np.ndarray, config: Config) -> torch.Tensor:
    """(H, W, 3) uint8 -> (1, 3, S, S), as `detect_image` of detect.py makes it."""
    planes = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]
    size = (config.size, config.size)
    planes = F.interpolate(planes, size, mode="bilinear", antialias=True)
    return normalise(planes, config.mean, config.std, config.channels)


def to_rgba(pixels: np.ndarray) -> np.ndarray:
    return np.concatenate([pixels, np.full_like(pixels[..., :1], 255)], axis=2)


@needs_node
def test_resize():
    """Pixels of any size become the network's input, as PyTorch resizes them."""
    rng = np.random.default_rng(5)
    other = Config(channels="bgr", std=(2.0, 3.0, 4.0))
    for width, height in ((300, 300), (340, 265), (97, 500), (640, 480), (1, 7)):
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        for config in (Config(), other) if width == 340 else (Config(),):
            about = {k: getattr(config, k) for k in ("size", "mean", "std", "channels")}
            got = run_js(
                """const rgba = Buffer.from(given.rgba, "base64");
                const planes = page.resize(rgba, given.width, given.height, given.about.size);
                const { data } = page.normalise(planes, given.about);
                return Buffer.from(data.buffer).toString("base64");""",
                {"rgba": base64.b64encode(to_rgba(pixels).tobytes()).decode(), "width": width,
                 "height": height, "about": about},
            )  # fmt: skip
            got = np.frombuffer(base64.b64decode(got), np.float32).reshape(1, 3, 300, 300)
            assert np.abs(got - as_network_sees(pixels, config).numpy()).max() == 0


def random_network(config: Config, seed: int = 0) -> ScratchDet:
    """A network whose BatchNorm has seen something, so that folding it changes all weights."""
    torch.manual_seed(seed)
    model = ScratchDet(config).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.005, 0.015)
            nn.init.normal_(module.bias, 0, 0.2)
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 5e-5, 2e-4)  # so small that eps counts
    return model


def save_checkpoint(path: Path, model: ScratchDet) -> None:
    state = {"config": vars(model.config), "model": model.state_dict(), "ema": None}
    torch.save(state | {"args": {}, "commit": None, "step": 0}, path)


FAMILY = {
    "root": Config(backbone="root-resnet18", width=0.1, classes=("a", "b")),
    "strided": Config(backbone="resnet18", width=0.1, classes=("one",), bn="backbone"),
    "wide classes": Config(backbone="resnet18-a", width=0.1, bn="none", extras="conv"),
    "root-34, conv": Config(backbone="root-resnet34", width=0.1, stem=(5, 2, 2), extras="conv"),
}


@torch.no_grad()
@needs_node
@pytest.mark.parametrize("name", [pytest.param("root", marks=pytest.mark.slow), *list(FAMILY)[1:]])
def test_every_network_of_the_family(name, tmp_path):
    """A page's network in node equals PyTorch's, of the weights in the page; and they are close
    to the checkpoint's: BatchNorm is folded, and a weight has 11 bits."""
    config = FAMILY[name]
    model = random_network(config)
    save_checkpoint(tmp_path / "last.pt", model)
    image = draw_image(np.random.default_rng(0))[0]
    image.save(tmp_path / "one.png")
    page.write_page(tmp_path / "last.pt", tmp_path / "page.html", [tmp_path / "one.png"])
    stored, about = page.read_page(tmp_path / "page.html")
    assert [one["name"] for one in about["pictures"]] == ["one"]
    pixels = np.asarray(image)
    x = as_network_sees(pixels, config)
    loc, logits = stored(x)
    got = run_js(
        """const html = require("fs").readFileSync(given.path, "utf8");
        const block = (name) => html.split(`id="${name}">`)[1].split("</script>")[0];
        const bytes = Uint8Array.from(Buffer.from(block("weights"), "base64"));
        const network = page.makeNetwork(JSON.parse(block("data")).network,
                                         new Uint16Array(bytes.buffer));
        const rgba = Buffer.from(given.rgba, "base64");
        const planes = page.resize(rgba, given.width, given.height, network.config.size);
        const image = page.normalise(planes, network.config);
        const { loc, logits, mapSizes } = await page.runNetwork(network, image);
        return { loc: [...loc], logits: [...logits], mapSizes };""",
        {"path": str(tmp_path / "page.html"), "width": pixels.shape[1], "height": pixels.shape[0],
         "rgba": base64.b64encode(to_rgba(pixels).tobytes()).decode()},
    )  # fmt: skip
    assert [tuple(size) for size in got["mapSizes"]] == model.map_sizes(300, 300)
    for ours, theirs, exact in zip(
        (got["loc"], got["logits"]), (loc, logits), model(x), strict=True
    ):
        scale = theirs.abs().max()
        ours = torch.tensor(ours).view_as(theirs)
        assert (ours - theirs).abs().max() < 1e-5 * scale
        assert (theirs - exact).abs().max() < 1e-2 * scale
        assert exact.std() > 0.01  # it says something


def test_pictures_of_a_set(tmp_path):
    """A large picture is shrunk, and its boxes with it; files come without boxes."""
    Image.new("RGB", (1280, 640)).save(tmp_path / "wide.png")
    boxes, no = np.array([[100.0, 60, 300, 200], [0, 0, 1280, 640]]), np.zeros(2)
    labels, difficult = np.array([2, 1]), np.array([False, True])
    record = Record("a", tmp_path / "wide.png", (1280, 640), boxes, labels, difficult, no)
    one, other = page.read_pictures([record, tmp_path])
    assert one["boxes"] == [[50, 30, 150, 100], [0, 0, 640, 320]]
    assert (one["labels"], one["difficult"]) == ([2, 1], [False, True])
    jpeg = base64.b64decode(one["src"].removeprefix("data:image/jpeg;base64,"))
    assert Image.open(io.BytesIO(jpeg)).size == (640, 320)
    assert (other["name"], other["boxes"], other["difficult"]) == ("wide", [], [])


def test_other_networks_are_refused(tmp_path):
    """A network that page.js cannot run is named, and what it can run."""
    save_checkpoint(tmp_path / "last.pt", ScratchDet(Config(backbone="vgg16", width=0.1)))
    with pytest.raises(ValueError, match="vgg16: the page runs the ResNet family"):
        page.write_page(tmp_path / "last.pt", tmp_path / "page.html")


@pytest.mark.parametrize("name", ["shapes.html", "page.html"])
def test_the_page_is_what_the_command_builds(name, tmp_path):
    """The pages in docs are of today's page.js, page_view.js and page.html, and below 4 MB."""
    there = PAGE.with_name(name)
    page.write_page(there, tmp_path / "page.html")
    remedy = f"`python -m experiments.page docs/{name} --out docs/{name}` builds it again"
    is_the_same = there.read_bytes() == (tmp_path / "page.html").read_bytes()
    assert is_the_same, remedy  # pytest would take minutes to compare them
    assert there.stat().st_size < 4e6
    text = there.read_text()
    assert "http://" not in text
    assert "https://" not in text


# ------------------------------------------------------------------------------ in a browser


FRAME = "new Promise((done) => requestAnimationFrame(() => setTimeout(done, 30)))"


def high_pipe() -> list[int]:
    """A pipe whose ends are above 3 and 4, which the browser takes."""
    ends = os.pipe()
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 20) for fd in ends]
    for fd in ends:
        os.close(fd)
    return high


class Browser:
    """A headless Chromium, asked through two pipes: its file descriptors 3 and 4."""

    def __init__(self, profile: Path, *flags: str):
        (ours_in, theirs_out), (theirs_in, ours_out) = high_pipe(), high_pipe()
        self.process = subprocess.Popen(
            [CHROMIUM, "--headless", "--no-sandbox", "--disable-quic", "--no-first-run",
             "--disable-background-networking", "--disable-component-update", "--disable-sync",
             "--remote-debugging-pipe", "--window-size=1280,900", f"--user-data-dir={profile}",
             *flags],
            pass_fds=(3, 4), preexec_fn=lambda: (os.dup2(theirs_in, 3), os.dup2(theirs_out, 4)),
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        os.close(theirs_in)
        os.close(theirs_out)
        self.reader, self.writer = os.fdopen(ours_in, "rb"), os.fdopen(ours_out, "wb")
        self.count, self.session, self.unread, self.errors = 0, None, b"", []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        answer = self.ask("Target.attachToTarget", targetId=target, flatten=True)
        self.session = answer["sessionId"]
        for domain in ("Runtime", "Log", "Network", "Page"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **params) -> dict:
        """One command and its answer; errors that the page meets meanwhile are kept."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        self.writer.write(json.dumps(message).encode() + b"\0")
        self.writer.flush()
        while True:
            while b"\0" not in self.unread:
                if not select.select([self.reader], [], [], 120)[0]:
                    raise RuntimeError(f"{method}: no answer in two minutes")
                self.unread += (chunk := os.read(self.reader.fileno(), 1 << 20))
                if not chunk:
                    raise RuntimeError("the browser has ended")
            line, self.unread = self.unread.split(b"\0", 1)
            answer = json.loads(line)
            if answer.get("id") == self.count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            about = answer.get("params", {})
            kind = about.get("type") or about.get("entry", {}).get("level")
            url = about.get("request", {}).get("url", "")
            if answer.get("method") == "Runtime.exceptionThrown" or kind == "error":
                self.errors.append(about)
            if url and not url.startswith(("file:", "data:", "blob:")):
                self.errors.append(f"the page asks for {url}")

    def run(self, expression: str):
        """The value of an expression in the page; a promise is waited for."""
        answer = self.ask("Runtime.evaluate", expression=expression, awaitPromise=True,
                          returnByValue=True)  # fmt: skip
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def key(self, name: str, **more):
        for kind in ("keyDown", "keyUp"):
            self.ask("Input.dispatchKeyEvent", type=kind, key=name, **more)

    def open(self, path: Path):
        """The page, when its network has run for the first time."""
        self.ask("Page.navigate", url=path.as_uri())
        self.run("""new Promise((done) => {
          const isSeen = () => typeof state === "object" && picture?.result;
          const look = () => isSeen() ? done() : setTimeout(look, 50);
          look(); })""")

    def drag(self, name: str, *points: tuple[float, float]):
        """The mouse over a canvas, pressed at the first point; in parts of its sides."""
        place = f"""(() => {{ const c = document.getElementById('{name}');
          c.scrollIntoView({{ block: 'center', behavior: 'instant' }});
          const r = c.getBoundingClientRect(); return [r.left, r.top, r.width, r.height]; }})()"""
        box = before = None
        while box is None or box != before:  # a smooth scroll from before may still be on its way
            before, _, box = box, self.run(FRAME), self.run(place)
        kinds = ["mousePressed", *["mouseMoved"] * (len(points) - 1), "mouseReleased"]
        for kind, (x, y) in zip(kinds, [*points, points[-1]], strict=True):
            self.ask("Input.dispatchMouseEvent", type=kind, x=box[0] + x * box[2],
                     y=box[1] + y * box[3], button="left", buttons=1, clickCount=1)  # fmt: skip
            self.run(FRAME)

    def close(self):
        os.killpg(self.process.pid, signal.SIGKILL)  # all of its processes; the profile is ours
        self.process.wait()
        self.reader.close()
        self.writer.close()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    one = Browser(tmp_path_factory.mktemp("profile"), "--disable-gpu")
    try:
        one.open(PAGE)
        yield one
    finally:
        one.close()


RUN = """(async () => {
  const rgba = Uint8ClampedArray.from(atob("%s"), (c) => c.charCodeAt(0));
  const { loc, logits, way, ms } = await runPixels(rgba, %d, %d);
  const found = postprocess(loc, softmax(logits, NAMES.length), priors);
  const text = (array) => { let s = "";
    for (const b of new Uint8Array(array.buffer)) s += String.fromCharCode(b); return btoa(s); };
  return { loc: text(loc), logits: text(logits), way, ms, found }; })()"""


@torch.no_grad()
def compare(browser, count: int, way: str) -> tuple[float, float]:
    """Runs drawn pictures in the page and in PyTorch: the largest differences of loc and logits.

    Every detection with a score of .1 and more must have its like in the other list.
    """
    model, _ = page.read_page(PAGE)
    worst, times = np.zeros(2), []
    for i in range(count):  # of another seed than those in the page
        pixels = np.asarray(draw_image(np.random.default_rng((7, 1, i)))[0])
        height, width = pixels.shape[:2]
        rgba = base64.b64encode(to_rgba(pixels).tobytes()).decode()
        got = browser.run(RUN % (rgba, width, height))
        assert got["way"] == way
        times.append(got["ms"])
        loc, logits = model(as_network_sees(pixels, model.config))
        for k, expected in enumerate((loc, logits)):
            raw = base64.b64decode(got[("loc", "logits")[k]])
            ours = torch.frombuffer(bytearray(raw), dtype=torch.float32).view_as(expected)
            worst[k] = max(worst[k], (ours - expected).abs().max().item())
        boxes, scores, labels, number = reference.postprocess(
            loc, logits, model.priors_cxcywh, 0.01, 400, 0.45, 200
        )
        assert len(got["found"]) == number[0]
        rows = [[*one["xyxy"], one["score"], one["label"]] for one in got["found"]]
        ours = torch.tensor(rows).reshape(-1, 6)
        theirs = torch.cat([boxes[0], scores[0, :, None], labels[0, :, None]], dim=1)[: number[0]]
        for some, others in ((ours, theirs), (theirs, ours)):
            for row in some[some[:, 4] >= 0.1]:
                assert ((others - row).abs().amax(dim=1) < 1e-3).any()
    print(f"{way}: loc within {worst[0]:.1e}, logits {worst[1]:.1e}, {np.median(times):.0f} ms")
    return tuple(worst)


@pytest.mark.slow
@needs_browser
def test_the_page_says_what_pytorch_says(browser):
    """20 pictures: the outputs equal PyTorch's to rounding, and the detections are the same."""
    loc, logits = compare(browser, 20, "plain JavaScript")
    assert max(loc, logits) < 1e-3


@pytest.mark.slow
@needs_browser
def test_hands_and_keys(browser):
    """Every control does something that can be read, and nothing ends in the console."""
    run = browser.run

    def text(name: str) -> str:
        run(FRAME)
        return run(f"document.getElementById('{name}').textContent")

    assert "found in" in text("say-picture")
    before = text("say-priors")
    run("document.getElementById('c-priors').focus()")
    browser.key("ArrowDown")
    assert text("say-priors") != before
    run("document.getElementById('nms-on').click()")
    assert "it stays" in text("say-nms")
    run("document.querySelector('[data-scene=twins]').click()")
    assert "2 positives of 8,732" in text("say-matching")
    run("document.querySelector('[name=how][value=\"each box its best\"]').click()")
    assert "Box 1 is lost" in text("say-matching")
    run("document.getElementById('c-matching').focus()")
    browser.key("Delete")
    browser.key("Delete")
    assert "No box" in text("say-matching")
    assert "no negatives count" in text("say-loss")
    browser.key("n")
    assert text("boxes").startswith("1 ")
    browser.drag("c-matching", (0.12, 0.5), (0.2, 0.6), (0.32, 0.7))  # beside it: a new box
    run(FRAME)
    drawn = run("picture.scene.boxes[1]")
    tall = 0.2 * run("picture.width / picture.height")  # the canvas is square, this picture is not
    assert (drawn[2] - drawn[0], drawn[3] - drawn[1]) == pytest.approx((0.2, tall), abs=0.01)
    browser.drag("c-matching", (0.22, 0.6), (0.3, 0.6))
    run(FRAME)
    moved = run("picture.scene.boxes[1]")
    assert moved[0] - drawn[0] == pytest.approx(0.08, abs=0.01)
    assert moved[2] - moved[0] == pytest.approx(drawn[2] - drawn[0])
    assert "2 " in text("boxes")
    assert "Cross-entropy" in text("say-loss")
    old = run("pictures.length")
    run("""(async () => { const c = document.createElement('canvas');
      c.width = 500; c.height = 200;
      c.getContext('2d').fillRect(100, 50, 60, 60);
      await new Promise((done) => c.toBlob((b) => { take(b, 'dropped').then(done) }));
      await see(picture); })()""")
    assert run("pictures.length") == old + 1
    assert run("picture.name") == "dropped"
    run("document.getElementById('c-matching').focus()")
    browser.key("n")  # drawn boxes count as ground truth
    run("pictures.splice(2, pictures.length - 3)")  # the first two, and this one
    run("measure()")
    assert "mAP" in text("aps")
    assert run("state.measured.length") == 3
    assert "right" in text("say-map")
    assert (
        run("document.querySelectorAll('canvas:not([aria-label]):not([aria-hidden])').length") == 0
    )
    assert browser.errors == []


@pytest.mark.slow
@needs_browser
def test_webgpu_says_the_same(tmp_path):
    """The other way to run, on a GPU made of CPU threads: skips where the browser has none."""
    one = Browser(tmp_path, "--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader",
                  "--enable-features=Vulkan")  # fmt: skip
    try:
        one.open(PAGE)
        if not one.run("state.ways.includes('gpu')"):
            pytest.skip("this browser has no WebGPU, not even a software one")
        loc, logits = compare(one, 2, "WebGPU")
        assert max(loc, logits) < 1e-3
        assert one.errors == []
    finally:
        one.close()


def test_a_page_of_a_page_with_a_test_set(tmp_path):
    """The network may come from a page; the pictures then come from the data that are named."""
    root, out = make_voc(tmp_path), tmp_path / "page.html"
    for name in "ab":
        write(root / f"Annotations/{name}.xml", xml_of(an_object("circle")))
    flags = [str(PAGE), "--out", str(out), "--eval-sets", "trainval"]
    with pytest.raises(ValueError, match="--eval-sets: of which data"):
        page.main(flags)
    page.main([*flags, "--voc-root", str(root)])
    assert '"pictures":[{"name":"a",' in out.read_text(encoding="utf-8")


@pytest.mark.slow
@needs_browser
def test_names_do_not_cover_each_other(browser):
    plates = browser.run("""(() => {
      const drawn = [], plates = [];
      const context = { measureText: () => ({ width: 60 }), fillText() {},
                        fillRect: (...plate) => drawn.push(plate) };
      for (const [x, y] of [[50, 100], [52, 104], [300, 100], [50, 130], [40, 120], [470, 5]])
        label(context, "ring .9", x, y, "#fff", 480, plates);
      return drawn; })()""")
    assert len(plates) == 6
    for i, (x, y, w, h) in enumerate(plates):
        assert 0 <= x <= x + w <= 480
        assert 0 <= y <= y + h <= 480
        for left, top, wide, tall in plates[:i]:
            assert left + wide <= x or x + w <= left or top + tall <= y or y + h <= top
