"use strict";
// What page.html shows, and what the reader's hands do. The detector itself is page.js.
//
// One picture is the current one; `state` has what the controls say. `draw.NAME` paints the section
// of that name from both, and `later("NAME")` asks for it at the next frame.

const $ = (id) => document.getElementById(id);
const about = JSON.parse($("data").textContent);
const { config } = about.network, SIZE = config.size;
const NAMES = ["background", ...config.classes];
const NUMBER = new Intl.NumberFormat("en");
const dec = (x, digits = 2) => x.toFixed(digits).replace(/^(-?)0\./, "$1."); // .84
const plural = (n, one, many = `${one}s`) => `${NUMBER.format(n)} ${n === 1 ? one : many}`;
const px = (unit) => Math.round(unit * SIZE); // of the network's image
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

const pictures = []; // {name, image, width, height, truth, scene, result}
let picture = null; // the current one
let priors = [], priorsXyxy = [], mapSizes = [], perCell = [];
const state = {
  way: null, ways: ["plain"], layers: [], map: 1, cell: null, label: 1, threshold: 0.05, morph: 1,
  iou: 0.45, step: 0, how: "best pair first", matchIou: 0.5, selected: 0, ratio: 3, visited: 0,
  shown: about.training.threshold ?? 0.3, // as detect.py's
  apLabel: 1, walked: 0, aps: null,
};

// ------------------------------------------------------------------------------ the pen

function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

/** A context whose canvas is as sharp as the screen, in CSS pixels. */
function sheet(canvas, aspect = 1) {
  const width = canvas.clientWidth || 300, height = Math.round(width * aspect);
  const ratio = Math.min(3, window.devicePixelRatio || 1);
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  return { context, width, height };
}

/** The picture in the middle of a square canvas, and a pen whose units are those of the image. */
function paint(canvas, of, { shade = false } = {}) {
  const { context, width: side } = sheet(canvas), longest = Math.max(of.width, of.height);
  const [w, h] = [of.width, of.height].map((length) => Math.round((side * length) / longest));
  const [left, top] = [Math.round((side - w) / 2), Math.round((side - h) / 2)];
  context.drawImage(of.image, left, top, w, h);
  if (shade) { // grey and pale, so that the boxes are what one sees
    context.globalCompositeOperation = "saturation";
    context.fillStyle = "#808080";
    context.fillRect(left, top, w, h);
    context.globalCompositeOperation = "source-over";
    context.fillStyle = colour("shade");
    context.fillRect(left, top, w, h);
  }
  const rectangle = ([x0, y0, x1, y1]) =>
    [left + x0 * w, top + y0 * h, (x1 - x0) * w, (y1 - y0) * h];
  const plates = []; // where names stand: the next one goes below them
  return {
    context, side,
    box(xyxy, name, { width = 2, dash = [], fill = 0, alpha = 1, halo = width >= 2,
                      text = "" } = {}) {
      const r = rectangle(xyxy), ink = colour(name);
      context.globalAlpha = alpha * fill;
      context.fillStyle = ink;
      if (fill) context.fillRect(...r);
      context.setLineDash(dash);
      if (halo) { // a dark edge, so that the line is seen on any picture
        context.globalAlpha = alpha * 0.55;
        context.strokeStyle = "#000";
        context.lineWidth = width + 1.5;
        context.strokeRect(...r);
      }
      context.globalAlpha = alpha;
      context.strokeStyle = ink;
      context.lineWidth = width;
      context.strokeRect(...r);
      context.setLineDash([]);
      if (text) label(context, text, r[0], r[1], ink, side, plates);
      context.globalAlpha = 1;
    },
    line(from, to, name, width = 1.5) {
      context.strokeStyle = colour(name);
      context.lineWidth = width;
      context.beginPath();
      context.moveTo(left + from[0] * w, top + from[1] * h);
      context.lineTo(left + to[0] * w, top + to[1] * h);
      context.stroke();
    },
    dot(x, y, name, radius = 3) {
      context.fillStyle = colour(name);
      context.beginPath();
      context.arc(left + x * w, top + y * h, radius, 0, 7);
      context.fill();
    },
    image(other, smooth = false) {
      context.imageSmoothingEnabled = smooth;
      context.drawImage(other, left, top, w, h);
    },
  };
}

function label(context, text, x, y, ink, side, plates) {
  context.font = "600 13px system-ui, sans-serif";
  const width = context.measureText(text).width + 10;
  const left = Math.max(0, Math.min(x - 1, side - width));
  let top = y > 20 ? y - 20 : Math.max(0, y);
  for (const one of plates.sort((a, b) => a.top - b.top)) {
    const beside = one.left >= left + width || left >= one.left + one.width;
    if (!beside && Math.abs(one.top - top) < 19) top = one.top + 19;
  }
  top = Math.min(top, side - 19);
  plates.push({ left, top, width });
  context.fillStyle = ink;
  context.fillRect(left, top, width, 19);
  context.fillStyle = "#000";
  context.fillText(text, left + 5, top + 14);
}

/** One bar a value, side by side. */
function bars(canvas, aspect, values, colourOf) {
  const { context, width, height } = sheet(canvas, aspect), w = width / values.length;
  const most = values.reduce((a, b) => Math.max(a, b), 1e-3);
  values.forEach((value, i) => {
    const tall = Math.max(1, ((height - 8) * value) / most);
    context.fillStyle = colour(colourOf(i));
    context.fillRect(i * w, height - tall, Math.max(0.6, w > 4 ? w - 2 : w - 0.4), tall);
  });
  return { context, height, w };
}

/** Where a pointer is, in units of the image. */
function pointAt(event, of = picture) {
  const r = event.currentTarget.getBoundingClientRect(), longest = Math.max(of.width, of.height);
  const unit = (at, from, side, length) => ((at - from) / side - 0.5) * (longest / length) + 0.5;
  return [unit(event.clientX, r.left, r.width, of.width),
          unit(event.clientY, r.top, r.height, of.height)];
}

const centre = ([x0, y0, x1, y1]) => [(x0 + x1) / 2, (y0 + y1) / 2];
const isInside = ([x, y], [x0, y0, x1, y1]) => x >= x0 && x <= x1 && y >= y0 && y <= y1;
const clip = (xyxy) => xyxy.map((v) => Math.min(1, Math.max(0, v)));

function say(name, text) {
  const place = $(`say-${name}`);
  if (place.textContent !== text) place.textContent = text;
}

function rows(body, cells) {
  $(body).replaceChildren(...cells.map((row) => {
    const line = document.createElement("tr");
    row.forEach((text, i) => {
      const cell = line.insertCell();
      cell.textContent = text;
      if (i) cell.className = "right";
    });
    return line;
  }));
}

const waiting = new Set();

function later(...names) {
  if (!waiting.size) requestAnimationFrame(() => {
    const some = [...waiting];
    waiting.clear();
    for (const name of some) if (picture) draw[name]();
  });
  for (const name of names) waiting.add(name);
}

// ------------------------------------------------------------------------------ the worker

const jobs = [];
let worker = null, running = null, isReady = false;

function startWorker() {
  const code = new Blob([$("code").textContent], { type: "text/javascript" });
  worker = new Worker(URL.createObjectURL(code));
  const bytes = Uint8Array.from(atob($("weights").textContent), (c) => c.charCodeAt(0));
  worker.postMessage({ description: about.network, weights16: new Uint16Array(bytes.buffer) });
  worker.onmessage = ({ data }) => {
    if (data.ways) return start(data.ways);
    const job = running;
    if (data.step !== undefined) {
      if (job.watched && job.watched === picture) step(data);
      return;
    }
    running = null;
    if (data.error) job.fail(new Error(data.error));
    else job.done(data);
    pump();
  };
  worker.onerror = (event) => say("picture", `The network could not start: ${event.message}`);
}

/**
 * Runs the network on RGBA pixels, in turn: {loc, logits, mapSizes, way, ms}. `watched` is the
 * picture of which the page shows every layer: it comes first.
 */
function runPixels(rgba, width, height, watched = null) {
  return new Promise((done, fail) => {
    jobs[watched ? "unshift" : "push"]({ rgba, width, height, watched, done, fail });
    pump();
  });
}

function pump() {
  if (running || !jobs.length || !isReady) return;
  running = jobs.shift();
  const { rgba, width, height, watched } = running;
  worker.postMessage({ id: 1, rgba, width, height, glances: watched !== null, way: state.way });
}

/** Runs the network on a picture, once, and keeps what it says. */
async function see(of, watched = false) {
  if (of.result && !watched) return of.result;
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [of.width, of.height];
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(of.image, 0, 0, of.width, of.height);
  const { data } = context.getImageData(0, 0, of.width, of.height);
  const result = await runPixels(data, of.width, of.height, watched ? of : null);
  if (!priors.length) learnPriors(result.mapSizes);
  result.probabilities = softmax(result.logits, NAMES.length);
  result.detections = postprocess(result.loc, result.probabilities, priors);
  of.result = result;
  return result;
}

function learnPriors(sizes) {
  mapSizes = sizes;
  priors = makePriors(about.network.priors, mapSizes, SIZE);
  priorsXyxy = priors.map(cxcywhToXyxy);
  perCell = mapSizes.map((_, m) => 2 + 2 * about.network.priors[m][3].length);
  $("count").textContent = NUMBER.format(priors.length);
  $("maps").replaceChildren(...mapSizes.map(([h, w], m) => {
    const choice = document.createElement("label"), input = document.createElement("input");
    Object.assign(input, { type: "radio", name: "map", value: m, checked: m === state.map });
    input.addEventListener("change", () => { chooseMap(m); });
    const text = document.createElement("span");
    text.textContent = `${h} × ${w}`;
    choice.append(input, text);
    return choice;
  }));
  $("heat").replaceChildren(...mapSizes.map(([h, w]) => {
    const figure = document.createElement("figure"), canvas = document.createElement("canvas");
    canvas.setAttribute("role", "img");
    figure.append(canvas, document.createElement("figcaption"));
    return figure;
  }));
}

function step({ step: index, size, ms, bytes }) {
  const { steps } = about.network;
  state.layers[index] = { size, ms, bytes };
  $("progress").value = (index + 1) / steps.length;
  say("picture", `Layer ${index + 1} of ${steps.length}: ${steps[index].name}`);
  if (index === Number($("layer").value)) later("layers");
}

// ------------------------------------------------------------------------------ pictures

async function addPicture({ name, src, boxes, labels, difficult }) {
  const image = new Image();
  image.src = src;
  image.alt = name;
  await image.decode();
  const [width, height] = [image.naturalWidth, image.naturalHeight];
  const unit = boxes.map(([x0, y0, x1, y1]) => [x0 / width, y0 / height, x1 / width, y1 / height]);
  const truth = boxes.length ? { boxes: unit, labels, difficult } : null;
  return keep({ name, image, width, height, truth }, image);
}

function keep(one, image) {
  pictures.push(one);
  one.button = document.createElement("button");
  one.button.append(image);
  one.button.addEventListener("click", () => choose(one));
  $("strip").append(one.button);
  return one;
}

/** A file, a frame of the camera or a dropped picture becomes the current one. */
async function take(source, name) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(source);
  } catch {
    return say("picture", `${name} is not a picture that this browser can read.`);
  }
  const scale = Math.min(1, 1280 / Math.max(bitmap.width, bitmap.height));
  const canvas = document.createElement("canvas"); // a copy of bearable size
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  const context = canvas.getContext("2d");
  context.fillStyle = "#fff"; // below transparent pixels
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  const small = new Image();
  small.src = canvas.toDataURL("image/jpeg", 0.8);
  small.alt = name;
  choose(keep({ name, image: canvas, width: canvas.width, height: canvas.height, truth: null },
              small));
}

async function choose(one) {
  picture = one;
  one.scene ??= SCENES.own();
  Object.assign(state, { selected: 0, step: 0, visited: 0, layers: [] });
  for (const other of pictures) other.button.setAttribute("aria-pressed", other === one);
  $("strip").scrollTo({ left: one.button.offsetLeft - $("strip").offsetLeft - 100 });
  for (const place of document.querySelectorAll(".has-truth")) place.hidden = !one.truth;
  $("progress").hidden = false;
  $("say-picture").setAttribute("aria-busy", true); // a screen reader need not hear every layer
  $("progress").value = 0;
  all();
  let result;
  try {
    result = await see(one, true);
  } catch (error) {
    return say("picture", `The network stopped: ${error.message}`);
  }
  if (picture !== one) return;
  $("progress").hidden = true;
  $("say-picture").setAttribute("aria-busy", false);
  const seen = result.detections.filter(({ score }) => score >= state.shown);
  const count = NAMES.map((_, label) => seen.filter((d) => d.label === label).length);
  const first = seen.find(({ label }) => label === argmax(count)) ?? result.detections[0];
  if (first) setLabel(first.label); // of the class that is found most often
  lookAt(first);
  say("picture", `${plural(seen.length, "object")} found in ${(result.ms / 1000).toFixed(2)} s, ` +
    `${result.way}: ${NUMBER.format(Math.round(about.network.macs / 1e6))} million ` +
    "multiplications, once for the whole picture.");
  all();
}

/** The cell to begin with: that of the best detection's prior. */
function lookAt(detection) {
  let prior = detection ? detection.prior : 0, m = 0;
  while (prior >= mapSizes[m][0] * mapSizes[m][1] * perCell[m])
    prior -= mapSizes[m][0] * mapSizes[m][1] * perCell[m++];
  const cell = Math.floor(prior / perCell[m]);
  state.map = m;
  state.cell = [Math.floor(cell / mapSizes[m][1]), cell % mapSizes[m][1]];
  document.querySelectorAll("#maps input").forEach((input, i) => { input.checked = i === m; });
}

function chooseMap(m) {
  const [row, column] = state.cell ?? [0, 0], [h, w] = mapSizes[state.map], [h2, w2] = mapSizes[m];
  state.cell = [Math.floor(((row + 0.5) * h2) / h), Math.floor(((column + 0.5) * w2) / w)];
  state.map = m;
  later("priors");
}

function setLabel(value) {
  state.label = value;
  state.step = 0;
  for (const select of document.querySelectorAll("[data-class]")) select.value = value;
  later("scores", "candidates", "nms");
}

// ------------------------------------------------------------------------------ the sections

const draw = {};
const all = () => later(...Object.keys(draw));

function drawDetections(canvas, minScore) {
  const pen = paint($(canvas), picture);
  for (const box of picture.truth?.boxes ?? []) pen.box(box, "truth", { width: 2.5 });
  const seen = (picture.result?.detections ?? []).filter(({ score }) => score >= minScore);
  for (const { xyxy, score, label } of [...seen].reverse())
    pen.box(clip(xyxy), "positive", { width: 3, text: `${NAMES[label]} ${dec(score)}` });
  $(canvas).setAttribute("aria-label", `${picture.name} with ${plural(seen.length, "detection")}`);
  return seen;
}

draw.picture = () => {
  drawDetections("c-picture", state.shown);
  const { context, width } = sheet($("thumb"));
  const side = Math.min(picture.width, picture.height);
  context.drawImage(picture.image, (picture.width - side) / 2, (picture.height - side) / 2,
                    side, side, 0, 0, width, width);
};

draw.layers = () => {
  const { steps } = about.network, index = Number($("layer").value), layer = state.layers[index];
  const { name, op, from, add, kernel, stride, in: channelsIn } = steps[index];
  $("o-layer").textContent = `${index + 1} of ${steps.length}`;
  const { context, width } = sheet($("c-layers"));
  if (!layer) return say("layers", "The network has not come this far yet.");
  const { channels, height, width: columns } = layer.size, shown = Math.min(16, channels);
  const grey = document.createElement("canvas"), pixels = new ImageData(256, 256);
  grey.width = grey.height = 256;
  layer.bytes.forEach((v, i) => pixels.data.set([v, v, v, 255], 4 * i));
  grey.getContext("2d").putImageData(pixels, 0, 0);
  context.imageSmoothingEnabled = columns >= 64;
  const gap = 4, tile = (width - 3 * gap) / 4;
  for (let c = 0; c < shown; c++)
    context.drawImage(grey, (c & 3) * 64, (c >> 2) * 64, 64, 64,
                      (c & 3) * (tile + gap), (c >> 2) * (tile + gap), tile, tile);
  $("c-layers").setAttribute("aria-label", `The first channels of ${name} as grey pictures`);
  $("caption-layers").textContent = `${name}: ${shown} of its ${channels} channels, each ` +
    `${height} × ${columns} cells. White: the filter answers.`;
  const macs = op === "conv" ? channelsIn * kernel ** 2 * channels * height * columns : 0;
  const what = op === "conv" ? `${kernel} × ${kernel} convolution over ${channelsIn} channels`
    : `pooling: the largest of each ${kernel} × ${kernel} window`;
  say("layers", `${name} reads ${from < 0 ? "the picture" : steps[from].name}. It is a ${what}` +
    (stride > 1 ? `, which moves ${stride} cells a step` : "") +
    (add === null ? "" : `, and adds ${steps[add].name} (a residual block)`) +
    `. ${(macs / 1e6).toFixed(1)} million multiplications, ${layer.ms.toFixed(1)} ms here. ` +
    "The bars: the time of every layer.");
  const times = steps.map((_, i) => state.layers[i]?.ms ?? 0);
  bars($("c-times"), 0.17, times, (i) => (i === index ? "positive" : "prior"));
  $("c-times").setAttribute("aria-label", "Time of every layer, " +
    `${times.reduce((a, b) => a + b, 0).toFixed(0)} ms together`);
};

/** The priors of a cell: their numbers. */
function priorsOf(m, [row, column]) {
  let first = 0;
  for (let i = 0; i < m; i++) first += mapSizes[i][0] * mapSizes[i][1] * perCell[i];
  first += (row * mapSizes[m][1] + column) * perCell[m];
  return Array.from({ length: perCell[m] }, (_, i) => first + i);
}

draw.priors = () => {
  const pen = paint($("c-priors"), picture, { shade: true });
  if (!state.cell) return say("priors", "");
  const [h, w] = mapSizes[state.map], [row, column] = state.cell;
  for (let y = 0; y < h; y++)
    for (let x = 0; x < w; x++)
      pen.dot((x + 0.5) / w, (y + 0.5) / h, "prior", Math.max(0.9, Math.min(4, 60 / w)));
  pen.box([column / w, row / h, (column + 1) / w, (row + 1) / h], "ink",
          { width: 1, fill: 0.25, halo: false });
  const numbers = priorsOf(state.map, state.cell), { result } = picture;
  for (const p of numbers) pen.box(priorsXyxy[p], "prior", { width: 2.5 });
  let text = `Map ${state.map + 1}, row ${row + 1}, column ${column + 1}: ` +
    `${numbers.length} priors of ${numbers.map((p) => `${px(priors[p][2])} × ${px(priors[p][3])}`)
      .join(", ")} pixels.`;
  if (result) {
    const best = numbers.map((p) => {
      const scores = result.probabilities.subarray(p * NAMES.length, (p + 1) * NAMES.length);
      const most = argmax(scores.subarray(1)) + 1;
      return { p, most, score: scores[most] };
    });
    if ($("moved").checked)
      for (const { p, score } of best)
        pen.box(decode(result.loc.subarray(4 * p, 4 * p + 4), priors[p]), "positive",
                { width: 2, alpha: 0.25 + 0.75 * score, halo: score > 0.3 });
    const top = best.reduce((a, b) => (b.score > a.score ? b : a));
    text += ` The network’s best guess here: ${NAMES[top.most]}, ${dec(top.score)}.`;
  }
  say("priors", text);
};

draw.scores = () => {
  const { result } = picture;
  if (!priors.length) return;
  let first = 0, strongest = { score: -1 };
  [...$("heat").children].forEach((figure, m) => {
    const [h, w] = mapSizes[m], [canvas, caption] = figure.children;
    const pen = paint(canvas, picture, { shade: true });
    let most = 0;
    if (result) {
      const heat = document.createElement("canvas"), pixels = new ImageData(w, h);
      [heat.width, heat.height] = [w, h];
      for (let cell = 0; cell < h * w; cell++) {
        let best = 0;
        for (let a = 0; a < perCell[m]; a++)
          best = Math.max(best, result.probabilities[
            (first + cell * perCell[m] + a) * NAMES.length + state.label]);
        pixels.data.set([245, 130, 0, 235 * best ** 0.7], 4 * cell);
        most = Math.max(most, best);
      }
      heat.getContext("2d").putImageData(pixels, 0, 0);
      pen.image(heat);
    }
    first += h * w * perCell[m];
    if (most > strongest.score) strongest = { score: most, h, w };
    caption.textContent = `${h} × ${w}: ${result ? dec(most) : "…"}`;
    canvas.setAttribute("aria-label", `Scores on the map of ${h} × ${w}, at best ${dec(most)}`);
  });
  const { h, w, score } = strongest;
  if (result) say("scores", `The best ${NAMES[state.label]} scores ${dec(score)}, on the map of ` +
    `${h} × ${w} cells. Choose a class that is not in the picture: nothing lights up, or little.`);
};

function chosen() {
  const { result } = picture;
  return result
    ? candidates(result.loc, result.probabilities, priors, state.label, state.threshold) : [];
}

draw.candidates = () => {
  const pen = paint($("c-candidates"), picture, { shade: true }), found = chosen();
  for (const { prior, xyxy, score } of [...found].reverse()) {
    const t = state.morph, from = priorsXyxy[prior];
    const box = xyxy.map((v, i) => (1 - t) * from[i] + t * v);
    if (t < 1) pen.box(box, "prior", { width: 1.5, alpha: (1 - t) * 0.9, halo: false });
    if (t > 0)
      pen.box(box, "positive", { width: 1.5, alpha: t * (0.15 + 0.85 * score), halo: false });
  }
  const text = `${NUMBER.format(found.length)} of ${NUMBER.format(priors.length)} priors score ` +
    `above ${dec(state.threshold)} for ${NAMES[state.label]}` +
    (found.length === 400 ? " or more: the best 400 stay." : ".");
  $("c-candidates").setAttribute("aria-label", text);
  say("candidates", text + (found.length ? ` The best: ${dec(found[0].score)}.` : ""));
};

draw.nms = () => {
  const pen = paint($("c-nms"), picture, { shade: true }), found = chosen();
  const suppressor = nms(found.map((c) => c.xyxy), found.map((c) => c.score),
                         found.map((c) => c.label), state.iou);
  const kept = found.flatMap((_, i) => (suppressor[i] === i ? [i] : []));
  state.step = Math.min(state.step, kept.length);
  const turn = new Map(kept.map((i, n) => [i, n + 1])), { step } = state; // when each stays
  found.forEach(({ xyxy }, i) => {
    if (turn.get(suppressor[i]) > step) pen.box(xyxy, "prior", { width: 1.2, halo: false });
  });
  const gone = [], best = kept[step - 1];
  found.forEach((candidate, i) => {
    if (step && suppressor[i] === best && i !== best) gone.push(candidate);
  });
  for (const { xyxy } of gone) {
    pen.box(xyxy, "negative", { width: 1.5, halo: false });
    pen.line(centre(xyxy), centre(found[best].xyxy), "negative");
    pen.dot(...centre(xyxy), "negative", 3);
  }
  kept.slice(0, step).forEach((i, n) => pen.box(found[i].xyxy, "positive", {
    width: n + 1 === step ? 4 : 2, text: n + 1 === step ? dec(found[i].score) : "" }));
  $("step").max = kept.length;
  $("step").value = step;
  $("o-step").textContent = `${step} of ${kept.length}`;
  $("nms-back").disabled = step === 0;
  $("nms-on").disabled = step === kept.length;
  const name = NAMES[state.label];
  let text = `${plural(found.length, "candidate")} for ${name}, the best first. Press “Next step”.`;
  if (!found.length) text = `No candidate for ${name}: lower the threshold of step 5.`;
  if (step) {
    const overlaps = gone.map(({ xyxy }) => iou(xyxy, found[best].xyxy)).sort((a, b) => b - a);
    const list = overlaps.slice(0, 3).map((v) => dec(v)).join(", ");
    text = `The best that is left scores ${dec(found[best].score)}: it stays. ` + (gone.length
      ? `It suppresses ${plural(gone.length, "box", "boxes")}, with an IoU of ${list}` +
        `${overlaps.length > 3 ? " and less" : ""}.`
      : "No other box overlaps it too much.");
    if (step === kept.length)
      text += ` Done: of ${plural(found.length, "candidate")} ${kept.length} stay.`;
  }
  $("c-nms").setAttribute("aria-label", text);
  say("nms", text);
};

draw.detections = () => {
  const seen = drawDetections("c-detections", state.shown);
  rows("found", seen.map(({ xyxy, score, label }) => [NAMES[label], dec(score),
    ...clip(xyxy).map((v, i) => Math.round(v * (i % 2 ? picture.height : picture.width)))]));
};

// ------------------------------------------------------------------------------ how it learns

draw.matching = () => {
  const { scene } = picture, pen = paint($("c-matching"), picture, { shade: true });
  if (!priors.length) return;
  const boxes = scene.boxes.map((box) => box.map(f32));
  const matched = match(priorsXyxy, boxes, state.matchIou, state.how);
  const alone = match(priorsXyxy, boxes, state.matchIou, "threshold alone");
  const count = boxes.map(() => 0), given = [];
  matched.forEach((g, p) => {
    if (g < 0) return;
    count[g] += 1;
    if (alone[p] !== g) given.push(p);
    else pen.box(priorsXyxy[p], "positive", g === state.selected
      ? { width: 1.6, halo: false } : { width: 1, halo: false, alpha: 0.4 });
  });
  for (const p of given) pen.box(priorsXyxy[p], "positive", { width: 3, dash: [7, 4] });
  const named = boxes.map((_, g) => `${g + 1} ${NAMES[scene.labels[g]]}`);
  boxes.forEach((box, g) => {
    const isSelected = g === state.selected;
    pen.box(box, "truth", { width: isSelected ? 4 : 2.5, fill: count[g] ? 0 : 0.25,
                            text: named[g] });
    if (isSelected) pen.dot(box[2], box[3], "truth", 7);
  });
  const overlap = boxes.map((box) => priorsXyxy.map((prior) => iou(box, prior)));
  const best = overlap.map(argmax); // the prior that each box overlaps most
  rows("boxes", boxes.map((_, g) => [named[g], dec(overlap[g][best[g]]), count[g]]));
  [...$("boxes").children].forEach((line, g) => {
    line.setAttribute("aria-selected", g === state.selected);
  });
  const positives = count.reduce((a, b) => a + b, 0);
  let text = `${plural(positives, "positive")} of ${NUMBER.format(priors.length)} priors.`;
  if (!boxes.length) text = "No box: the whole picture is background. Draw one.";
  if (given.length) text += ` Dashed: ${plural(given.length, "prior")} given to a box ` +
    `although ${given.length === 1 ? "it is" : "they are"} below the threshold, or another’s.`;
  boxes.forEach((_, g) => {
    const owner = matched[best[g]];
    if (!count[g]) text += ` Box ${g + 1} is lost: ` + (owner < 0 ? "no prior learns it."
      : `box ${owner + 1} took its best prior, and no other learns it.`);
  });
  $("remove").disabled = $("box-class").disabled = !boxes.length;
  if (boxes.length) $("box-class").value = scene.labels[state.selected];
  $("c-matching").setAttribute("aria-description", text);
  say("matching", text);
};

function lossOf() {
  const { scene, result } = picture;
  const boxes = scene.boxes.map((box) => box.map(f32));
  const matched = match(priorsXyxy, boxes, state.matchIou, state.how);
  return multiboxLoss(result.loc, result.logits, priors, matched, boxes, scene.labels, state.ratio);
}

draw.loss = () => {
  const { result } = picture, pen = paint($("c-loss"), picture, { shade: true });
  if (!result) return;
  const loss = lossOf(), all_ = [...loss.labels.keys()];
  const positive = all_.filter((p) => loss.labels[p] > 0);
  const mined = all_.filter((p) => loss.mined[p]);
  const cost = (p) => loss.crossEntropy[p] + loss.offsetLoss[p];
  state.visits = [...positive, ...mined].sort((p, q) => cost(q) - cost(p));
  state.visited = Math.min(state.visited, Math.max(0, state.visits.length - 1));
  const most = Math.max(...mined.map((p) => loss.crossEntropy[p]), 1e-3);
  for (const p of mined)
    pen.box(priorsXyxy[p], "negative", { width: 1.3, halo: false,
      alpha: 0.25 + (0.75 * loss.crossEntropy[p]) / most });
  for (const p of positive)
    pen.box(priorsXyxy[p], "positive", { width: 1.3, halo: false, alpha: 0.6 });
  const at = state.visits[state.visited];
  let text = "No positives, so no negatives count either: a picture without boxes adds no loss.";
  if (at !== undefined) {
    const isPositive = loss.labels[at] > 0, target = loss.labels[at];
    const scores = result.probabilities.subarray(at * NAMES.length, (at + 1) * NAMES.length);
    const guess = argmax(scores), kind = isPositive ? "positive" : "negative";
    pen.box(priorsXyxy[at], kind, { width: 4 });
    text = `This ${kind} has to say ${NAMES[target]}. The network says ${NAMES[guess]} with ` +
      `${dec(scores[guess])}` +
      (guess === target ? "" : `, and ${NAMES[target]} with ${dec(scores[target])}`) +
      `. Cross-entropy ${dec(loss.crossEntropy[at])}` +
      (isPositive ? `, offsets ${dec(loss.offsetLoss[at])}.` : ".");
  }
  say("loss", text);
  rows("losses", [
    ["offsets of the positives, smooth L1", dec(loss.lossLoc, 3)],
    [`classes of the ${plural(loss.positives, "positive")}`, dec(loss.lossPositives, 3)],
    [`classes of the ${plural(mined.length, "hardest negative")}`, dec(loss.lossNegatives, 3)],
    [`the loss: all three, each divided by ${Math.max(1, loss.positives)}`,
     dec(loss.lossLoc + loss.lossPositives + loss.lossNegatives, 3)]]);
  drawMined(loss, mined.length);
};

function drawMined(loss, mined) {
  const sorted = loss.crossEntropy.filter((_, p) => loss.labels[p] === 0).sort().reverse();
  const shown = sorted.slice(0, Math.max(40, Math.round(2.5 * mined)));
  const { context, height, w } = bars($("c-mined"), 0.28, [...shown],
                                      (i) => (i < mined ? "negative" : "prior"));
  context.fillStyle = colour("ink");
  context.fillRect(mined * w, 0, 1.5, height);
  $("c-mined").setAttribute("aria-label", `Cross-entropy of the negatives: ${mined} count`);
}

// ------------------------------------------------------------------------------ how it is measured

const truthOf = (one) => one.truth ?? one.scene ?? { boxes: [], labels: [] }; // or drawn by hand
const inPixels = (box, { width, height }) =>
  [box[0] * width, box[1] * height, box[2] * width, box[3] * height];

async function measure() {
  $("measure").disabled = true;
  const some = pictures.filter((one) => truthOf(one).boxes.length);
  for (const [i, one] of some.entries()) {
    say("map", `Running the network on picture ${i + 1} of ${some.length} …`);
    await see(one);
  }
  $("measure").disabled = false;
  if (!some.length)
    return say("map", "No picture here has ground truth. Draw its boxes in step 8: they count.");
  const set = some.map((one) => ({
    labels: truthOf(one).labels, difficult: truthOf(one).difficult ?? [],
    boxes: truthOf(one).boxes.map((box) => inPixels(box, one)),
    found: one.result.detections.map((d) => ({ ...d, xyxy: inPixels(clip(d.xyxy), one) })),
  }));
  state.measured = some;
  state.aps = NAMES.map((_, label) => (label ? averagePrecision(set, label) : null));
  if (!state.aps[state.apLabel]?.objects)
    state.apLabel = Math.max(1, state.aps.findIndex((ap) => ap?.objects));
  $("ap-class").value = state.apLabel;
  $("gallery").replaceChildren(...some.map(() => {
    const canvas = document.createElement("canvas");
    canvas.setAttribute("role", "img");
    return canvas;
  }));
  walkFrom(null);
}

/** Down the list to the given row; null: to a score of .5. */
function walkFrom(row) {
  const ap = state.aps[state.apLabel], last = ap.rows.findLastIndex(({ right }) => right);
  state.length = Math.min(ap.rows.length, last + 16);
  state.walked = row ?? ap.rows.filter(({ score }) => score >= 0.5).length;
  $("ap").max = state.length;
  later("map");
}

draw.map = () => {
  if (!state.aps) return;
  const ap = state.aps[state.apLabel], walked = ap.rows.slice(0, state.walked);
  const right = walked.filter((row) => row.right).length, end = walked.at(-1);
  $("ap").value = state.walked;
  $("o-ap").textContent = end ? dec(end.score) : "1";
  const name = NAMES[state.apLabel];
  say("map", !ap.objects ? `No ${name} in these pictures.` : !end
    ? `${plural(ap.objects, "object")} of class ${name} to find. Move the slider, or press Play.`
    : `Down to a score of ${dec(end.score)}: ${right} right, ${walked.length - right} wrong, of ` +
      `${plural(ap.objects, "object")}. Recall ${dec(end.recall)}, precision ` +
      `${dec(end.precision)}. The last one is ${end.right ? "right" : "wrong"}.`);
  [...$("gallery").children].forEach((canvas, i) => {
    const of = state.measured[i], truth = truthOf(of), pen = paint(canvas, of, { shade: true });
    const here = walked.filter((row) => row.image === i);
    const hit = new Set(here.filter((row) => row.right).map((row) => row.box));
    truth.boxes.forEach((box, g) => {
      if (truth.labels[g] === state.apLabel && !truth.difficult?.[g] && !hit.has(g))
        pen.box(box, "truth", { halo: false });
    });
    for (const row of here) {
      const unit = row.xyxy.map((v, k) => v / (k % 2 ? of.height : of.width));
      const width = row === end ? 4 : 2;
      pen.box(unit, row.right ? "positive" : "negative", { width, halo: false });
    }
    canvas.setAttribute("aria-label", `${of.name}: ${hit.size} found`);
  });
  drawCurve(ap);
  const known = state.aps.map((one, label) => ({ one, label })).filter(({ one }) => one?.objects);
  const sum = (key) => known.reduce((total, { one }) => total + one[key], 0);
  rows("aps", [...known.map(({ one, label }) =>
                 [NAMES[label], one.objects, dec(one.ap11, 3), dec(one.area, 3)]),
               ["mAP, their mean", sum("objects"),
                ...["ap11", "area"].map((key) => dec(sum(key) / known.length, 3))]]);
  [...$("aps").children].forEach((line, i) => {
    line.setAttribute("aria-selected", known[i]?.label === state.apLabel);
  });
};

function drawCurve(ap) {
  const { context, width, height } = sheet($("c-curve"), 0.85);
  const [left, top, w, h] = [34, 14, width - 50, height - 44];
  const at = (recall, precision) => [left + w * recall, top + h * (1 - precision)];
  context.font = "12px system-ui, sans-serif";
  context.fillStyle = colour("soft");
  context.strokeStyle = colour("rule");
  for (const v of [0, 0.25, 0.5, 0.75, 1]) {
    context.beginPath();
    context.moveTo(...at(0, v));
    context.lineTo(...at(1, v));
    context.stroke();
    context.textAlign = "right";
    context.fillText(String(v).replace(/^0\./, "."), left - 6, at(0, v)[1] + 4);
    context.textAlign = "center";
    context.fillText(String(v).replace(/^0\./, "."), at(v, 0)[0], top + h + 16);
  }
  context.fillText("recall", left + w / 2, height - 4);
  const bestAt = (recall) => ap.rows.reduce((best, row) =>
    row.recall >= recall ? Math.max(best, row.precision) : best, 0);
  const line = (points, ink, size) => {
    context.strokeStyle = colour(ink);
    context.lineWidth = size;
    context.beginPath();
    points.forEach((p, i) => context[i ? "lineTo" : "moveTo"](...at(...p)));
    context.stroke();
  };
  const points = ap.rows.slice(0, state.length).map(({ recall, precision }) => [recall, precision]);
  const most = ap.rows.at(-1)?.recall ?? 0;
  context.fillStyle = colour("positive");
  context.globalAlpha = 0.14; // the area under the curve at its best
  context.beginPath();
  context.moveTo(...at(0, 0));
  for (let r = 0; r <= 200; r++) {
    const recall = (most * r) / 200;
    context.lineTo(...at(recall, bestAt(recall)));
  }
  context.lineTo(...at(most, 0));
  context.fill();
  context.globalAlpha = 1;
  line(points, "prior", 1);
  line(points.slice(0, state.walked), "positive", 3);
  for (let k = 0; k <= 10; k++) {
    context.fillStyle = colour("ink");
    context.beginPath();
    context.arc(...at(k / 10, bestAt(k * 0.1)), 3, 0, 7);
    context.fill();
  }
  const here = points[state.walked - 1];
  if (here) {
    context.fillStyle = colour("positive");
    context.beginPath();
    context.arc(...at(...here), 6, 0, 7);
    context.fill();
  }
  $("c-curve").setAttribute("aria-label",
                            `Precision over recall: AP ${dec(ap.ap11)} at 11 recalls`);
}

// ------------------------------------------------------------------------------ hands

/** A slider sets a number of `state` and asks for sections; `output` shows it, as `write` says. */
function slider(id, key, output, sections, write = dec) {
  const show = () => { if (output) $(output).textContent = write(Number($(id).value)); };
  $(id).addEventListener("input", () => {
    state[key] = Number($(id).value);
    show();
    later(...sections.split(" "));
  });
  show();
}

/** A button that calls `next` again and again, until it returns false or is pressed once more. */
function player(button, next, ms = 700) {
  let timer = null;
  const stop = () => { clearInterval(timer); timer = null; $(button).textContent = "Play"; };
  $(button).addEventListener("click", () => {
    if (timer) return stop();
    $(button).textContent = "Stop";
    timer = setInterval(() => { if (!next()) stop(); }, ms);
  });
}

function options(select, first = 1) {
  select.replaceChildren(...NAMES.slice(first).map((name, i) => new Option(name, i + first)));
}

/** Ground truth under the reader's hand: boxes are moved, resized, drawn and removed. */
function editBoxes(canvas) {
  let drag = null;
  const change = () => { later("matching", "loss"); };
  canvas.addEventListener("pointerdown", (event) => {
    const at = pointAt(event), { boxes, labels } = picture.scene;
    const near = (box) => Math.hypot((at[0] - box[2]) * 22, (at[1] - box[3]) * 22) < 1;
    const area = ([x0, y0, x1, y1]) => (x1 - x0) * (y1 - y0);
    let g = boxes.findIndex((box, i) => i === state.selected && near(box)), corner = g >= 0;
    if (g < 0) { g = boxes.findIndex(near); corner = g >= 0; }
    if (g < 0) boxes.forEach((box, i) => {
      if (isInside(at, box) && (g < 0 || area(box) < area(boxes[g]))) g = i;
    });
    if (g < 0) {
      boxes.push([...at, ...at]);
      labels.push(Number($("box-class").value) || 1);
      [g, corner] = [boxes.length - 1, true];
    }
    state.selected = g;
    drag = { corner, at, box: [...boxes[g]] };
    canvas.setPointerCapture(event.pointerId);
    change();
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!drag) return;
    const at = pointAt(event), [dx, dy] = [at[0] - drag.at[0], at[1] - drag.at[1]];
    const [x0, y0, x1, y1] = drag.box;
    picture.scene.boxes[state.selected] = drag.corner
      ? [Math.min(x0, x1 + dx), Math.min(y0, y1 + dy), Math.max(x0, x1 + dx), Math.max(y0, y1 + dy)]
      : [x0 + dx, y0 + dy, x1 + dx, y1 + dy];
    change();
  });
  const end = () => {
    if (!drag) return;
    drag = null;
    const [x0, y0, x1, y1] = picture.scene.boxes[state.selected];
    if (x1 - x0 < 0.012 || y1 - y0 < 0.012) removeBox(); // a click is no box
    change();
  };
  canvas.addEventListener("pointerup", end);
  canvas.addEventListener("pointercancel", end);
  canvas.addEventListener("keydown", (event) => {
    const { boxes, labels } = picture.scene, box = boxes[state.selected];
    const by = ARROWS[event.key]?.map((v) => v / 100);
    if (by && box) {
      if (!event.shiftKey) [box[0], box[1]] = [box[0] + by[0], box[1] + by[1]];
      box[2] = Math.max(box[0] + 0.02, box[2] + by[0]);
      box[3] = Math.max(box[1] + 0.02, box[3] + by[1]);
    } else if (event.key === "Enter" && boxes.length) {
      state.selected = (state.selected + 1) % boxes.length;
    } else if (event.key === "n") {
      boxes.push([0.4, 0.4, 0.6, 0.6]);
      labels.push(Number($("box-class").value) || 1);
      state.selected = boxes.length - 1;
    } else if (event.key === "Delete" || event.key === "Backspace") removeBox();
    else return;
    event.preventDefault();
    change();
  });
}

function removeBox() {
  const { boxes, labels } = picture.scene;
  boxes.splice(state.selected, 1);
  labels.splice(state.selected, 1);
  state.selected = Math.max(0, boxes.length - 1);
  later("matching", "loss");
}

const SCENES = { // in pixels of the network's image
  own: () => structuredClone(picture.truth) ?? { boxes: [], labels: [] },
  twins: () => ({ boxes: [[116, 24, 146, 264], [142, 24, 172, 264]],
                  labels: [1, NAMES.length - 1] }),
  tiny: () => ({ boxes: [[60, 70, 71, 80], [120, 200, 250, 212]], labels: [1, NAMES.length - 1] }),
};

function wire() {
  slider("threshold", "threshold", "o-threshold", "candidates nms");
  slider("morph", "morph", "o-morph", "candidates", (v) => `${Math.round(100 * v)} %`);
  slider("iou", "iou", "o-iou", "nms");
  slider("step", "step", null, "nms");
  $("shown").value = state.shown;
  slider("shown", "shown", "o-shown", "detections picture");
  slider("match-iou", "matchIou", "o-match", "matching loss");
  slider("ratio", "ratio", "o-ratio", "loss", String);
  slider("ap", "walked", null, "map");
  $("layer").max = about.network.steps.length - 1;
  $("layer").addEventListener("input", () => later("layers"));
  player("layers-play", () => {
    const at = Number($("layer").value), last = Number($("layer").max);
    $("layer").value = at === last ? 0 : at + 1;
    later("layers");
    return at + 1 !== last;
  }, 350);
  $("moved").addEventListener("change", () => later("priors"));
  for (const select of document.querySelectorAll("[data-class]")) {
    options(select);
    select.addEventListener("change", () => setLabel(Number(select.value)));
  }
  for (const id of ["box-class", "ap-class"]) options($(id));
  $("box-class").addEventListener("change", () => {
    picture.scene.labels[state.selected] = Number($("box-class").value);
    later("matching", "loss");
  });
  $("ap-class").addEventListener("change", () => {
    state.apLabel = Number($("ap-class").value);
    if (state.aps) walkFrom(null);
  });
  $("how").addEventListener("change", (event) => {
    state.how = event.target.value;
    later("matching", "loss");
  });
  $("remove").addEventListener("click", removeBox);
  for (const button of document.querySelectorAll("[data-scene]"))
    button.addEventListener("click", () => {
      const scene = SCENES[button.dataset.scene]();
      if (button.dataset.scene !== "own")
        scene.boxes = scene.boxes.map((box) => box.map((v) => v / 300));
      picture.scene = scene;
      state.selected = 0;
      later("matching", "loss");
    });
  const turn = (by) => { state.step = Number($("step").value) + by; later("nms"); };
  $("nms-on").addEventListener("click", () => turn(1));
  $("nms-back").addEventListener("click", () => turn(-1));
  player("nms-play", () => {
    const end = state.step >= Number($("step").max);
    turn(1);
    return !end;
  });
  player("ap-play", () => {
    if (!state.aps) return false;
    state.walked = state.walked >= state.length ? 0 : state.walked + 1;
    later("map");
    return state.walked < state.length;
  });
  $("measure").addEventListener("click", measure);

  const cellAt = (event) => {
    if (!state.cell) return;
    const [x, y] = pointAt(event), [h, w] = mapSizes[state.map];
    const inside = (v, n) => Math.max(0, Math.min(n - 1, Math.floor(v * n)));
    state.cell = [inside(y, h), inside(x, w)];
    later("priors");
  };
  $("c-priors").addEventListener("pointermove", cellAt);
  $("c-priors").addEventListener("pointerdown", cellAt);
  $("c-priors").addEventListener("keydown", (event) => {
    const by = ARROWS[event.key];
    if (!by || !state.cell) return;
    event.preventDefault();
    state.cell = state.cell.map((v, i) =>
      Math.max(0, Math.min(mapSizes[state.map][i] - 1, v + by[1 - i])));
    later("priors");
  });

  editBoxes($("c-matching"));
  const visit = (event) => { // the smallest box under the pointer
    const at = pointAt(event), area = (p) => priors[p][2] * priors[p][3];
    const under = (state.visits ?? []).filter((p) => isInside(at, priorsXyxy[p]));
    if (!under.length) return;
    state.visited = state.visits.indexOf(under.reduce((a, b) => (area(b) < area(a) ? b : a)));
    later("loss");
  };
  $("c-loss").addEventListener("pointermove", visit);
  $("c-loss").addEventListener("pointerdown", visit);
  $("c-loss").addEventListener("keydown", (event) => {
    const by = ARROWS[event.key];
    if (!by || !state.visits?.length) return;
    event.preventDefault();
    const next = state.visited + by[0] + by[1];
    state.visited = Math.max(0, Math.min(state.visits.length - 1, next));
    later("loss");
  });

  const go = (by) => {
    const i = pictures.indexOf(picture) + by;
    choose(pictures[(i + pictures.length) % pictures.length]);
  };
  $("previous").addEventListener("click", () => go(-1));
  $("next").addEventListener("click", () => go(1));
  $("file").addEventListener("change", () => {
    if ($("file").files[0]) take($("file").files[0], $("file").files[0].name);
    $("file").value = "";
  });
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    $("c-picture").classList.add("drop");
  });
  document.addEventListener("dragleave", () => $("c-picture").classList.remove("drop"));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    $("c-picture").classList.remove("drop");
    const [file] = event.dataTransfer.files;
    if (!file) return;
    take(file, file.name);
    $("picture").scrollIntoView();
  });
  document.addEventListener("paste", (event) => {
    const [file] = event.clipboardData.files;
    if (file) take(file, "pasted picture");
  });
  $("camera").addEventListener("click", camera);
  $("ways").addEventListener("change", (event) => {
    state.way = event.target.value;
    choose(picture);
  });
}

async function camera() {
  const video = $("video");
  if (video.srcObject) {
    const bitmap = await createImageBitmap(video);
    for (const track of video.srcObject.getTracks()) track.stop();
    video.srcObject = null;
    video.hidden = true;
    $("camera").textContent = "Camera";
    return take(bitmap, "camera");
  }
  try {
    video.srcObject = await navigator.mediaDevices.getUserMedia({ video: true });
    await video.play();
    video.hidden = false;
    $("camera").textContent = "Take the picture";
  } catch (error) {
    video.srcObject = null;
    say("picture", `No camera: ${error?.message ?? "this browser offers none"}.`);
  }
}

/** The steps in the bar, the one in view marked; screen readers hear only the section in use. */
function watchSections() {
  const links = new Map();
  document.querySelectorAll("section").forEach((section, i) => {
    const link = document.createElement("a");
    link.href = `#${section.id}`;
    link.textContent = `${i + 1} ${section.dataset.name}`;
    $("steps").append(link);
    links.set(section, link);
    const place = section.querySelector("[role=status]");
    place?.setAttribute("aria-live", "off");
    section.addEventListener("focusin", () => place?.setAttribute("aria-live", "polite"));
    section.addEventListener("focusout", () => place?.setAttribute("aria-live", "off"));
  });
  const observer = new IntersectionObserver((entries) => {
    for (const { target, isIntersecting } of entries) {
      if (!isIntersecting) continue;
      for (const link of links.values()) link.removeAttribute("aria-current");
      const link = links.get(target), nav = $("steps");
      link.setAttribute("aria-current", "step");
      nav.scrollTo({ left: link.offsetLeft - nav.offsetLeft - nav.clientWidth / 3 });
      if (target.id === "map" && !state.aps && isReady && picture?.result) measure();
    }
  }, { rootMargin: "-30% 0px -65% 0px" });
  for (const section of links.keys()) observer.observe(section);
}

function start(ways) {
  isReady = true;
  state.ways = ways;
  state.way = ways.includes("gpu") ? "gpu" : "plain";
  $("ways").hidden = ways.length < 2;
  for (const input of document.querySelectorAll("[name=way]"))
    input.checked = input.value === state.way;
  pump();
}

function introduce() {
  const { training, network } = about;
  $("parameters").textContent = NUMBER.format(network.parameters);
  const many = config.classes.length;
  $("classes").textContent = many === 1 ? `one class, ${config.classes[0]}` : many <= 12
    ? `${config.classes.slice(0, -1).join(", ")} and ${config.classes[many - 1]}`
    : `${many} classes: ${config.classes.join(", ")}`;
  for (const place of document.querySelectorAll(".size"))
    place.textContent = `${SIZE} × ${SIZE}`;
  const data = { shapes: ", on drawn pictures of shapes", voc: ", on photographs (PASCAL VOC)",
                 coco: ", on photographs (COCO)" };
  $("learned").textContent = data[training.data] ?? "";
  $("about").textContent = `${config.backbone}, ${config.width} times the paper’s channels, ` +
    `${network.parameters.toLocaleString("en")} weights as 16-bit numbers, BatchNorm folded in` +
    (training.commit ? `; trained at commit ${training.commit}.` : ".");
}

async function main() {
  introduce();
  wire();
  watchSections();
  startWorker();
  for (const one of about.pictures) await addPicture(one);
  let width = 0;
  new ResizeObserver(() => { // not for a change of height, which drawing itself may cause
    if (document.body.clientWidth !== width) all();
    width = document.body.clientWidth;
  }).observe(document.body);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", all);
  if (pictures.length) choose(pictures[about.start]);
}

main();
