"use strict";
// The detector in plain JavaScript: what page.html runs, in the page and in a worker. No library.
//
//     pixels --resize, normalise--> image --runNetwork--> loc, logits --postprocess--> detections
//     boxes, priors --match--> targets --multiboxLoss--> the loss of every prior
//     detections, ground truth --averagePrecision--> a precision-recall curve and AP
//
// The names are those of the Python: ops/reference.py, scratchdet.py and metrics.py have the same
// functions, and tests/test_page.py holds both to the same results. page_view.js draws all of it.
//
// Letters: P priors - C classes with background 0 - G boxes of a picture. A box is an array of four
// numbers in units of the image: xyxy is left, top, right, bottom; cxcywh is centre and size.
// A map is {data, channels, height, width}: one plane after another, row by row.

const VARIANCES = [0.1, 0.2]; // of centre and size
const MIN_BIPARTITE_IOU = 1e-6; // below it a box takes no prior at all
const f32 = Math.fround; // rounds to float32, so that ties fall as they do in PyTorch

// ------------------------------------------------------------------------------ boxes and priors

function cxcywhToXyxy([cx, cy, w, h]) {
  return [f32(cx - w / 2), f32(cy - h / 2), f32(cx + w / 2), f32(cy + h / 2)];
}

function xyxyToCxcywh([x0, y0, x1, y1]) {
  const w = f32(x1 - x0), h = f32(y1 - y0);
  return [f32(x0 + w / 2), f32(y0 + h / 2), w, h];
}

/** Intersection over union of two boxes xyxy; 0 unless the union is positive. */
function iou(a, b) {
  const w = Math.max(0, f32(Math.min(a[2], b[2]) - Math.max(a[0], b[0])));
  const h = Math.max(0, f32(Math.min(a[3], b[3]) - Math.max(a[1], b[1])));
  const inter = f32(w * h);
  const areaA = f32(f32(a[2] - a[0]) * f32(a[3] - a[1]));
  const areaB = f32(f32(b[2] - b[0]) * f32(b[3] - b[1]));
  const union = f32(f32(areaA + areaB) - inter);
  return union > 0 && a.every(Number.isFinite) && b.every(Number.isFinite) ? f32(inter / union) : 0;
}

/** The default boxes, cxcywh: map by map, row by row, cell by cell. `table` is PRIORS of Python. */
function makePriors(table, mapSizes, size) {
  const priors = [];
  mapSizes.forEach(([height, width], m) => {
    const [small, large, step, ratios] = table[m];
    const sides = [[small, small], [Math.sqrt(small * large), Math.sqrt(small * large)]];
    for (const ratio of ratios) {
      const root = Math.sqrt(ratio);
      sides.push([small * root, small / root], [small / root, small * root]); // wide, tall
    }
    for (let row = 0; row < height; row++)
      for (let column = 0; column < width; column++)
        for (const [w, h] of sides) {
          const cx = (column + 0.5) * (step ?? size / width);
          const cy = (row + 0.5) * (step ?? size / height);
          priors.push([cx / size, cy / size, w / 100, h / 100].map(f32));
        }
  });
  return priors;
}

/** What the network says of a prior (cxcywh) -> the box it means, xyxy. */
function decode(offsets, [cx, cy, w, h]) {
  const centreX = cx + offsets[0] * VARIANCES[0] * w;
  const centreY = cy + offsets[1] * VARIANCES[0] * h;
  const halfW = (w * Math.exp(offsets[2] * VARIANCES[1])) / 2;
  const halfH = (h * Math.exp(offsets[3] * VARIANCES[1])) / 2;
  return [centreX - halfW, centreY - halfH, centreX + halfW, centreY + halfH].map(f32);
}

/** What the network has to say, so that this prior (cxcywh) means this box (xyxy). */
function encode(boxXyxy, [cx, cy, w, h]) {
  const [bx, by, bw, bh] = xyxyToCxcywh(boxXyxy);
  return [(bx - cx) / w / VARIANCES[0], (by - cy) / h / VARIANCES[0],
          Math.log(bw / w) / VARIANCES[1], Math.log(bh / h) / VARIANCES[1]];
}

// --------------------------------------------------------------------------------- training side

/**
 * The box that each prior has to learn, or -1 for background: priors (P) and boxes (G), both xyxy.
 *
 * First each prior takes its best box, if their IoU reaches the threshold. Then `how` says what
 * happens to a box that would get no prior this way:
 *   "best pair first"      the best (prior, box) pair of all is matched, then the best of the rest,
 *                          until no box is left: every box gets a prior of its own. This is ours.
 *   "each box its best"    every box takes its best prior, in turn. Where two boxes share it, the
 *                          later one takes it away from the earlier one.
 *   "threshold alone"      nothing happens.
 */
function match(priorsXyxy, boxesXyxy, iouThreshold = 0.5, how = "best pair first") {
  const matched = new Int32Array(priorsXyxy.length).fill(-1);
  const overlap = boxesXyxy.map((box) => Float32Array.from(priorsXyxy, (prior) => iou(box, prior)));
  for (let p = 0; p < matched.length; p++) {
    let best = 0;
    for (let g = 1; g < boxesXyxy.length; g++) if (overlap[g][p] > overlap[best][p]) best = g;
    if (boxesXyxy.length && overlap[best][p] >= f32(iouThreshold)) matched[p] = best;
  }
  if (how === "each box its best") boxesXyxy.forEach((_, g) => {
    const prior = argmax(overlap[g]);
    if (overlap[g][prior] > MIN_BIPARTITE_IOU) matched[prior] = g;
  });
  if (how === "best pair first") for (let turn = 0; turn < boxesXyxy.length; turn++) {
    let box = 0, prior = 0; // of the best pair that is still free: the lowest box, then prior
    overlap.forEach((row, g) => {
      const p = argmax(row);
      if (row[p] > overlap[box][prior]) [box, prior] = [g, p];
    });
    if (overlap[box][prior] <= MIN_BIPARTITE_IOU) break;
    matched[prior] = box;
    overlap[box].fill(-1);
    for (const row of overlap) row[prior] = -1;
  }
  return matched;
}

/** Where the largest number stands; the first of several. */
function argmax(values) {
  let best = 0;
  for (let i = 1; i < values.length; i++) if (values[i] > values[best]) best = i;
  return best;
}

/** The negatives of the largest cross-entropy, so many for each positive: true where mined. */
function hardNegatives(crossEntropy, labels, negativesPerPositive) {
  const negatives = [...labels.keys()].filter((p) => labels[p] === 0);
  negatives.sort((p, q) => crossEntropy[q] - crossEntropy[p] || p - q);
  const mined = new Uint8Array(labels.length);
  const positives = labels.length - negatives.length;
  for (const p of negatives.slice(0, negativesPerPositive * positives)) mined[p] = 1;
  return mined;
}

function smoothL1(difference) {
  const d = Math.abs(difference);
  return d < 1 ? (d * d) / 2 : d - 0.5;
}

/** -log of the probability of a label, from the logits (C,) of a prior. */
function crossEntropyOf(logits, label) {
  const top = Math.max(...logits);
  return Math.log(logits.reduce((sum, v) => sum + Math.exp(v - top), 0)) + top - logits[label];
}

/** SSD's loss of one picture, prior by prior, and its sums divided by the number of positives. */
function multiboxLoss(loc, logits, priors, matched, boxesXyxy, boxLabels,
                      negativesPerPositive = 3) {
  const numClasses = logits.length / priors.length;
  const labels = Int32Array.from(matched, (g) => (g < 0 ? 0 : boxLabels[g])); // (P,)
  const crossEntropy = Float32Array.from(labels, (label, p) =>
    crossEntropyOf(logits.subarray(p * numClasses, (p + 1) * numClasses), label));
  const offsetLoss = Float32Array.from(matched, (g, p) => g < 0 ? 0 :
    encode(boxesXyxy[g], priors[p]).reduce((sum, t, i) => sum + smoothL1(loc[4 * p + i] - t), 0));
  const mined = hardNegatives(crossEntropy, labels, negativesPerPositive);
  const positives = labels.reduce((n, label) => n + (label > 0), 0), norm = Math.max(1, positives);
  const sum = (values, counts) =>
    values.reduce((total, v, p) => total + (counts(p) ? v : 0), 0) / norm;
  return {
    labels, crossEntropy, offsetLoss, mined, positives,
    lossLoc: sum(offsetLoss, (p) => labels[p] > 0),
    lossPositives: sum(crossEntropy, (p) => labels[p] > 0),
    lossNegatives: sum(crossEntropy, (p) => mined[p]),
  };
}

// ---------------------------------------------------------------------------------- testing side

/** Class scores of every prior: (P * C) logits -> (P * C), each row sums to 1. */
function softmax(logits, numClasses) {
  const out = new Float32Array(logits.length);
  for (let start = 0; start < logits.length; start += numClasses) {
    const row = logits.subarray(start, start + numClasses), top = Math.max(...row);
    let sum = 0;
    for (const v of row) sum += Math.exp(v - top);
    row.forEach((v, c) => { out[start + c] = Math.exp(v - top) / sum; });
  }
  return out;
}

/**
 * Greedy non-maximum suppression of boxes xyxy: for each the box that suppresses it, itself where
 * it is kept, -1 where box or score is not finite.
 *
 * The best box is kept; all others of its group that overlap it with IoU above the threshold go;
 * then the best of the rest, and so on. Equal scores: the first one is the best.
 */
function nms(boxes, scores, groups, iouThreshold = 0.45) {
  const suppressor = new Int32Array(boxes.length).fill(-1);
  let rest = [...boxes.keys()].filter((i) =>
    Number.isFinite(scores[i]) && boxes[i].every(Number.isFinite));
  rest.sort((i, j) => scores[j] - scores[i] || i - j);
  while (rest.length) {
    const best = rest[0];
    const goes = (i) =>
      groups[i] === groups[best] && iou(boxes[best], boxes[i]) > f32(iouThreshold);
    suppressor[best] = best;
    for (const i of rest.slice(1)) if (goes(i)) suppressor[i] = best;
    rest = rest.slice(1).filter((i) => suppressor[i] < 0);
  }
  return suppressor;
}

/** Priors that score above the threshold for a class, the best `topK`, decoded. */
function candidates(loc, probabilities, priors, label, scoreThreshold, topK = 400) {
  const numClasses = probabilities.length / priors.length, found = [];
  for (let prior = 0; prior < priors.length; prior++) {
    const score = probabilities[prior * numClasses + label];
    if (score > f32(scoreThreshold)) found.push({ prior, score, label });
  }
  found.sort((a, b) => b.score - a.score || a.prior - b.prior);
  const best = found.slice(0, topK);
  for (const c of best)
    c.xyxy = decode(loc.subarray(4 * c.prior, 4 * c.prior + 4), priors[c.prior]);
  return best;
}

/** All of it: candidates and NMS for each class, then the best detections of all classes. */
function postprocess(loc, probabilities, priors,
                     { scoreThreshold = 0.01, topK = 400, iouThreshold = 0.45,
                       maxDetections = 200 } = {}) {
  const numClasses = probabilities.length / priors.length, found = [];
  for (let label = 1; label < numClasses; label++) {
    const some = candidates(loc, probabilities, priors, label, scoreThreshold, topK);
    const suppressor = nms(some.map((c) => c.xyxy), some.map((c) => c.score), some.map(() => label),
                           iouThreshold);
    found.push(...some.filter((_, i) => suppressor[i] === i));
  }
  return found.sort((a, b) => b.score - a.score).slice(0, maxDetections); // sort is stable
}

// -------------------------------------------------------------------------------------- measuring

/**
 * VOC's average precision of one class. Pictures have `boxes` (xyxy in pixels), `labels`,
 * `difficult`, and `found`, detections {xyxy in pixels, score, label}.
 *
 * Detections of all pictures are visited by score. Each looks at the ground truth that it overlaps
 * most: with IoU above .5 (pixels counted inclusively, as in VOC), and not yet found by a better
 * one, it is right. A difficult object is no object, and a detection of it neither right nor wrong.
 * Returns a row a detection, the number of objects, AP at 11 recalls and as area.
 */
function averagePrecision(pictures, label, iouThreshold = 0.5) {
  const inclusive = ([x0, y0, x1, y1]) => [x0, y0, x1 + 1, y1 + 1];
  const overlapOf = (a, b) => { // in double precision, as metrics.py
    const w = Math.min(a[2], b[2]) - Math.max(a[0], b[0]);
    const h = Math.min(a[3], b[3]) - Math.max(a[1], b[1]);
    const inter = w > 0 && h > 0 ? w * h : 0;
    const area = (box) => (box[2] - box[0]) * (box[3] - box[1]);
    return inter ? inter / (area(a) + area(b) - inter) : 0;
  };
  const objects = pictures.reduce((n, { labels, difficult }) =>
    n + labels.filter((other, g) => other === label && !difficult[g]).length, 0);
  const detections = pictures.flatMap((picture, image) =>
    picture.found.filter((d) => d.label === label).map((d) => ({ ...d, image, box: -1 })));
  detections.sort((a, b) => b.score - a.score);
  const taken = new Set(), rows = [];
  let right = 0;
  for (const row of detections) {
    let best = 0;
    pictures[row.image].boxes.forEach((box, g) => {
      if (pictures[row.image].labels[g] !== label) return;
      const overlap = overlapOf(inclusive(box), inclusive(row.xyxy));
      if (overlap > best) [best, row.box] = [overlap, g];
    });
    const name = `${row.image} ${row.box}`;
    if (best > iouThreshold && pictures[row.image].difficult[row.box]) continue;
    row.right = best > iouThreshold && !taken.has(name);
    if (row.right) { taken.add(name); right += 1; }
    rows.push(row);
    [row.recall, row.precision] = [right / objects, right / rows.length];
  }
  // the best precision at this recall or at a larger one
  const bestAt = (recall) => rows.reduce((best, row) =>
    row.recall >= recall ? Math.max(best, row.precision) : best, 0);
  let ap11 = 0, area = 0;
  for (let k = 0; k <= 10; k++) ap11 += bestAt(k * 0.1) / 11;
  for (const row of rows) if (row.right) area += bestAt(row.recall) / objects;
  return objects ? { rows, objects, ap11, area } : { rows, objects, ap11: NaN, area: NaN };
}

// ------------------------------------------------------------------------------ pixels -> image

/**
 * RGBA pixels of any size -> RGB planes of size x size, 0..255: bilinear, and where the picture
 * shrinks, the mean of all pixels under a triangle. In whole numbers, as PyTorch resizes uint8.
 */
function resize(rgba, width, height, size) {
  const wide = new Uint8Array(3 * height * size), out = new Uint8Array(3 * size * size);
  const columns = triangles(width, size), rows = triangles(height, size);
  const rounded = (sum, bits) => Math.min(255, Math.max(0, sum >> bits));
  for (let c = 0; c < 3; c++)
    for (let y = 0; y < height; y++)
      columns.list.forEach(({ start, weights }, x) => {
        let sum = 1 << (columns.bits - 1);
        for (let i = 0; i < weights.length; i++)
          sum += weights[i] * rgba[4 * (y * width + start + i) + c];
        wide[(c * height + y) * size + x] = rounded(sum, columns.bits);
      });
  for (let c = 0; c < 3; c++)
    rows.list.forEach(({ start, weights }, y) => {
      for (let x = 0; x < size; x++) {
        let sum = 1 << (rows.bits - 1);
        for (let i = 0; i < weights.length; i++)
          sum += weights[i] * wide[(c * height + start + i) * size + x];
        out[(c * size + y) * size + x] = rounded(sum, rows.bits);
      }
    });
  return out;
}

/** For each of `to` pixels the first of `from` pixels under its triangle, and their weights. */
function triangles(from, to) {
  const scale = from / to, support = Math.max(scale, 1), list = [];
  for (let i = 0; i < to; i++) {
    const centre = scale * (i + 0.5), start = Math.max(0, Math.trunc(centre - support + 0.5));
    const end = Math.min(from, Math.trunc(centre + support + 0.5)), weights = [];
    for (let j = start; j < end; j++)
      weights.push(Math.max(0, 1 - Math.abs((j - centre + 0.5) / support)));
    const sum = weights.reduce((a, b) => a + b, 0);
    list.push({ start, weights: weights.map((w) => w / sum) });
  }
  const most = Math.max(...list.flatMap(({ weights }) => weights));
  let bits = 0; // of the fraction, as many as fit 16-bit weights
  while (bits < 22 && Math.trunc(0.5 + most * 2 ** (bits + 1)) < 2 ** 15) bits++;
  for (const one of list) one.weights = one.weights.map((w) => Math.trunc(0.5 + w * 2 ** bits));
  return { list, bits };
}

/** (pixel - mean) / std, in the network's order of channels: what the network sees. */
function normalise(planes, { size, mean, std, channels }) {
  const data = new Float32Array(planes.length), area = size * size;
  for (let c = 0; c < 3; c++) {
    const from = channels === "rgb" ? c : 2 - c;
    for (let i = 0; i < area; i++)
      data[c * area + i] = f32(planes[from * area + i] - mean[from]) / std[from];
  }
  return { data, channels: 3, height: size, width: size };
}

// ------------------------------------------------------------------------------------ the network

/** Weights from float16, four output channels side by side: the order in which `conv` reads. */
function makeNetwork(description, weights16) {
  const table = new Float32Array(65536); // every float16 there is
  for (let bits = 0; bits < 65536; bits++) {
    const sign = bits & 0x8000 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
    table[bits] = exponent ? sign * (1024 + fraction) * 2 ** (exponent - 25)
                           : sign * fraction * 2 ** -24;
  }
  let at = 0;
  const steps = description.steps.map((step) => {
    if (step.op !== "conv") return step;
    const length = step.in * step.kernel ** 2, blocks = Math.ceil(step.out / 4);
    const weights = new Float32Array(4 * blocks * length), bias = new Float32Array(4 * blocks);
    for (let o = 0; o < step.out; o++)
      for (let k = 0; k < length; k++)
        weights[4 * ((o >> 2) * length + k) + (o & 3)] = table[weights16[at++]];
    for (let o = 0; o < step.out; o++) bias[o] = table[weights16[at++]];
    return { ...step, weights, bias };
  });
  return { ...description, steps };
}

function outputSize(step, x) {
  const side = (n) => Math.floor((n + 2 * step.pad - step.kernel) / step.stride) + 1;
  const [height, width] = [side(x.height), side(x.width)];
  return { channels: step.out ?? x.channels, height, width };
}

/** The same map with `border` pixels of `value` around it. */
function withBorder(x, border, value) {
  if (border <= 0) return x;
  const height = x.height + 2 * border, width = x.width + 2 * border;
  const data = new Float32Array(x.channels * height * width).fill(value);
  for (let c = 0; c < x.channels; c++)
    for (let y = 0; y < x.height; y++) {
      const start = (c * x.height + y) * x.width;
      data.set(x.data.subarray(start, start + x.width), (c * height + y + border) * width + border);
    }
  return { data, channels: x.channels, height, width };
}

/** Where the kernel's inputs lie, seen from the first one. */
function kernelOffsets({ channels, height, width }, kernel) {
  const offsets = new Int32Array(channels * kernel * kernel);
  let i = 0;
  for (let c = 0; c < channels; c++)
    for (let y = 0; y < kernel; y++)
      for (let x = 0; x < kernel; x++) offsets[i++] = (c * height + y) * width + x;
  return offsets;
}

/**
 * Convolution, plus `added` (the shortcut of a residual block), then ReLU where the step has one.
 *
 * Four pixels times four output channels at once: 8 loads make 16 multiplications, and the sums
 * stay in registers. That is all that makes it fast: 2 billion multiplications a second.
 */
function conv(step, input, added) {
  const size = outputSize(step, input), area = size.height * size.width;
  const x = withBorder(input, step.pad, 0), first = Math.max(0, -step.pad); // pad -1: starts inside
  const offsets = kernelOffsets(x, step.kernel), length = offsets.length;
  const { stride, weights, bias } = step, from = x.data;
  const data = new Float32Array(size.channels * area), sums = new Float64Array(16);
  for (let row = 0; row < size.height; row++)
    for (let column = 0; column < size.width; column += 4) {
      const pixels = Math.min(4, size.width - column);
      const p0 = (row * stride + first) * x.width + column * stride + first;
      const p1 = pixels > 1 ? p0 + stride : p0, p2 = pixels > 2 ? p1 + stride : p1;
      const p3 = pixels > 3 ? p2 + stride : p2;
      for (let out = 0; out < size.channels; out += 4) {
        let a0 = 0, a1 = 0, a2 = 0, a3 = 0, b0 = 0, b1 = 0, b2 = 0, b3 = 0;
        let c0 = 0, c1 = 0, c2 = 0, c3 = 0, d0 = 0, d1 = 0, d2 = 0, d3 = 0;
        for (let k = 0, w = out * length; k < length; k++, w += 4) {
          const o = offsets[k], x0 = from[p0 + o], x1 = from[p1 + o];
          const x2 = from[p2 + o], x3 = from[p3 + o];
          const wa = weights[w], wb = weights[w + 1], wc = weights[w + 2], wd = weights[w + 3];
          a0 += wa * x0; a1 += wa * x1; a2 += wa * x2; a3 += wa * x3;
          b0 += wb * x0; b1 += wb * x1; b2 += wb * x2; b3 += wb * x3;
          c0 += wc * x0; c1 += wc * x1; c2 += wc * x2; c3 += wc * x3;
          d0 += wd * x0; d1 += wd * x1; d2 += wd * x2; d3 += wd * x3;
        }
        sums[0] = a0; sums[1] = a1; sums[2] = a2; sums[3] = a3;
        sums[4] = b0; sums[5] = b1; sums[6] = b2; sums[7] = b3;
        sums[8] = c0; sums[9] = c1; sums[10] = c2; sums[11] = c3;
        sums[12] = d0; sums[13] = d1; sums[14] = d2; sums[15] = d3;
        for (let j = 0; j < 4 && out + j < size.channels; j++)
          for (let i = 0; i < pixels; i++) {
            const at = (out + j) * area + row * size.width + column + i;
            const sum = sums[4 * j + i] + bias[out + j] + (added ? added.data[at] : 0);
            data[at] = step.relu && sum < 0 ? 0 : sum;
          }
      }
    }
  return { ...size, data };
}

/** The largest of each window. */
function maxPool(step, input) {
  const size = outputSize(step, input), x = withBorder(input, step.pad, -Infinity);
  const data = new Float32Array(size.channels * size.height * size.width);
  const offsets = kernelOffsets({ ...x, channels: 1 }, step.kernel);
  let at = 0;
  for (let c = 0; c < size.channels; c++)
    for (let row = 0; row < size.height; row++)
      for (let column = 0; column < size.width; column++) {
        const start = (c * x.height + row * step.stride) * x.width + column * step.stride;
        let most = -Infinity;
        for (const o of offsets) if (x.data[start + o] > most) most = x.data[start + o];
        data[at++] = most;
      }
  return { ...size, data };
}

/** The plain way to run a step. `makeGpu` has the same four functions. */
const PLAIN = {
  name: "plain JavaScript",
  upload: (map) => map,
  run: (step, x, added) => (step.op === "conv" ? conv(step, x, added) : maxPool(step, x)),
  download: async (map, channels) => map.data.subarray(0, channels * map.height * map.width),
  free: () => {},
};

/**
 * The whole network, step by step: image -> {loc (P * 4), logits (P * C), mapSizes}.
 *
 * `onStep(index, map, first channels)` is told of every step, and waited for. The head's outputs,
 * (A * k, H, W) planes, become rows of k numbers: row, column, prior of the cell.
 */
async function runNetwork(network, image, onStep = () => {}, way = PLAIN) {
  const { steps, loc, conf, config } = network, maps = [], numClasses = config.classes.length + 1;
  const last = new Map(); // the step that is the last to read a map
  steps.forEach((step, i) => [step.from, step.add].forEach((j) => last.set(j, i)));
  const uploaded = way.upload(image);
  const rows = { loc: [], logits: [] };
  for (let i = 0; i < steps.length; i++) {
    const step = steps[i];
    const input = step.from < 0 ? uploaded : maps[step.from];
    maps[i] = way.run(step, input, maps[step.add]);
    const isHead = loc.includes(i) || conf.includes(i), { channels, height, width } = maps[i];
    const data = await way.download(maps[i], isHead ? channels : Math.min(16, channels));
    await onStep(i, { channels, height, width }, data);
    if (isHead) {
      const flat = new Float32Array(data.length), area = height * width;
      for (let c = 0; c < channels; c++)
        for (let cell = 0; cell < area; cell++) flat[cell * channels + c] = data[c * area + cell];
      rows[loc.includes(i) ? "loc" : "logits"].push({ flat, size: [height, width] });
    }
    for (const j of [step.from, step.add, i])
      if (maps[j] && (last.get(j) ?? i) === i) { way.free(maps[j]); maps[j] = null; }
  }
  way.free(uploaded);
  const join = (parts) => {
    const out = new Float32Array(parts.reduce((n, { flat }) => n + flat.length, 0));
    parts.reduce((at, { flat }) => { out.set(flat, at); return at + flat.length; }, 0);
    return out;
  };
  return { loc: join(rows.loc), logits: join(rows.logits), numClasses,
           mapSizes: rows.loc.map(({ size }) => size) };
}

/** The first channels of a map as one grey picture, four a row: bytes, side of the picture. */
function glance({ channels, height, width }, data, side = 64) {
  const shown = Math.min(16, channels), bytes = new Uint8Array(16 * side * side);
  for (let c = 0; c < shown; c++) {
    const plane = data.subarray(c * height * width, (c + 1) * height * width);
    let low = Infinity, high = -Infinity;
    for (const v of plane) { if (v < low) low = v; if (v > high) high = v; }
    for (let y = 0; y < side; y++)
      for (let x = 0; x < side; x++) {
        const v = plane[Math.floor((y * height) / side) * width + Math.floor((x * width) / side)];
        const at = ((c >> 2) * side + y) * 4 * side + (c & 3) * side + x;
        bytes[at] = high > low ? (255 * (v - low)) / (high - low) : 0;
      }
  }
  return bytes;
}

// ------------------------------------------------------------------------- the same steps on a GPU

const SHADER = `
struct Step { channels: i32, height: i32, width: i32, out: i32, outHeight: i32, outWidth: i32,
              kernel: i32, stride: i32, pad: i32, relu: i32, added: i32, unused: i32 }
@group(0) @binding(0) var<uniform> step: Step;
@group(0) @binding(1) var<storage, read> x: array<f32>;
@group(0) @binding(2) var<storage, read_write> y: array<f32>;
@group(0) @binding(3) var<storage, read> weights: array<vec4f>; // the bias lies behind the weights
@group(0) @binding(4) var<storage, read> added: array<f32>;

// grid (pixels / 64, output channels / 4): a thread is one pixel of four output channels
@compute @workgroup_size(64) fn conv(@builtin(global_invocation_id) id: vec3u) {
  let pixel = i32(id.x); let block = i32(id.y); let area = step.outHeight * step.outWidth;
  if (pixel >= area) { return; }
  let top = pixel / step.outWidth * step.stride - step.pad;
  let left = pixel % step.outWidth * step.stride - step.pad;
  let length = step.channels * step.kernel * step.kernel;
  var sum = weights[(step.out + 3) / 4 * length + block];
  var w = block * length;
  for (var c = 0; c < step.channels; c++) {
    for (var i = top; i < top + step.kernel; i++) {
      for (var j = left; j < left + step.kernel; j++) {
        if (i >= 0 && i < step.height && j >= 0 && j < step.width) {
          sum += weights[w] * x[(c * step.height + i) * step.width + j];
        }
        w++;
      }
    }
  }
  for (var k = 0; k < min(4, step.out - 4 * block); k++) {
    let at = (4 * block + k) * area + pixel;
    var value = sum[k];
    if (step.added > 0) { value += added[at]; }
    if (step.relu > 0) { value = max(value, 0.0); }
    y[at] = value;
  }
}

@compute @workgroup_size(64) fn pool(@builtin(global_invocation_id) id: vec3u) {
  let pixel = i32(id.x); let c = i32(id.y); let area = step.outHeight * step.outWidth;
  if (pixel >= area) { return; }
  let top = pixel / step.outWidth * step.stride - step.pad;
  let left = pixel % step.outWidth * step.stride - step.pad;
  var most = -3.4e38;
  for (var i = max(top, 0); i < min(top + step.kernel, step.height); i++) {
    for (var j = max(left, 0); j < min(left + step.kernel, step.width); j++) {
      most = max(most, x[(c * step.height + i) * step.width + j]);
    }
  }
  y[c * area + pixel] = most;
}`;

/** The functions of `PLAIN` on the GPU, or null where the browser offers none. */
async function makeGpu(steps) {
  const adapter = await globalThis.navigator?.gpu?.requestAdapter();
  if (!adapter) return null;
  const device = await adapter.requestDevice();
  const module = device.createShaderModule({ code: SHADER });
  const pipelines = {};
  for (const op of ["conv", "pool"])
    pipelines[op] = await device.createComputePipelineAsync({
      layout: "auto", compute: { module, entryPoint: op } });
  const { STORAGE, UNIFORM, COPY_SRC, COPY_DST, MAP_READ } = GPUBufferUsage;
  const bufferOf = (data, usage) => {
    const buffer = device.createBuffer({ size: data.byteLength, usage: usage | COPY_DST });
    device.queue.writeBuffer(buffer, 0, data);
    return buffer;
  };
  const weights = new Map();
  for (const step of steps.filter(({ op }) => op === "conv")) {
    const both = new Float32Array(step.weights.length + step.bias.length);
    both.set(step.weights);
    both.set(step.bias, step.weights.length);
    weights.set(step, bufferOf(both, STORAGE));
  }
  return {
    name: "WebGPU",
    upload: ({ data, ...size }) => ({ ...size, buffer: bufferOf(data, STORAGE) }),
    run(step, x, added) {
      const size = outputSize(step, x), count = size.channels * size.height * size.width;
      const buffer = device.createBuffer({ size: 4 * count, usage: STORAGE | COPY_SRC });
      const about = bufferOf(Int32Array.of(
        x.channels, x.height, x.width, size.channels, size.height, size.width,
        step.kernel, step.stride, step.pad, step.relu ? 1 : 0, added ? 1 : 0, 0), UNIFORM);
      const bound = [about, x.buffer, buffer];
      if (step.op === "conv") bound.push(weights.get(step), (added ?? x).buffer);
      const commands = device.createCommandEncoder(), pass = commands.beginComputePass();
      pass.setPipeline(pipelines[step.op]);
      pass.setBindGroup(0, device.createBindGroup({
        layout: pipelines[step.op].getBindGroupLayout(0),
        entries: bound.map((b, binding) => ({ binding, resource: { buffer: b } })) }));
      pass.dispatchWorkgroups(Math.ceil((size.height * size.width) / 64),
        step.op === "conv" ? Math.ceil(size.channels / 4) : size.channels);
      pass.end();
      device.queue.submit([commands.finish()]);
      return { ...size, buffer };
    },
    async download({ buffer, height, width }, channels) {
      const size = 4 * channels * height * width;
      const copy = device.createBuffer({ size, usage: MAP_READ | COPY_DST });
      const commands = device.createCommandEncoder();
      commands.copyBufferToBuffer(buffer, 0, copy, 0, size);
      device.queue.submit([commands.finish()]);
      await copy.mapAsync(GPUMapMode.READ);
      const data = new Float32Array(copy.getMappedRange().slice(0));
      copy.destroy();
      return data;
    },
    free: ({ buffer }) => buffer.destroy(),
  };
}

// -------------------------------------------------------------------------------------- the worker

/** Answers {description, weights16} with the ways it can run, {id, rgba, ...} with the outputs. */
function serve() {
  let network = null, ways = {};
  onmessage = async ({ data }) => {
    if (data.description) {
      network = makeNetwork(data.description, data.weights16);
      const gpu = await makeGpu(network.steps).catch(() => null); // the plain way is always there
      ways = { plain: PLAIN, ...(gpu && { gpu }) };
      return postMessage({ ways: Object.keys(ways) });
    }
    const { id, rgba, width, height, glances } = data;
    let way = ways[data.way] ?? PLAIN;
    for (;;) {
      try {
        const begin = performance.now();
        const image = normalise(resize(rgba, width, height, network.config.size), network.config);
        let before = performance.now();
        const result = await runNetwork(network, image, (step, size, values) => {
          const now = performance.now(), bytes = glances ? glance(size, values) : null;
          postMessage({ id, step, size, ms: now - before, bytes });
          before = performance.now();
        }, way);
        return postMessage({ id, ...result, way: way.name, ms: performance.now() - begin });
      } catch (error) {
        if (way === PLAIN) return postMessage({ id, error: String(error) });
        way = PLAIN; // a GPU may be lost at any time
        delete ways.gpu;
      }
    }
  };
}

if (typeof WorkerGlobalScope !== "undefined") serve();
if (typeof module !== "undefined")
  module.exports = { cxcywhToXyxy, xyxyToCxcywh, iou, makePriors, decode, encode, match,
                     hardNegatives, multiboxLoss, softmax, nms, postprocess, averagePrecision,
                     resize, normalise, makeNetwork, runNetwork };
