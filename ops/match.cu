// ops.match for CUDA: one launch a batch, one block an image (reference.match is the meaning).
//
//            priors 0 .. P-1                 every thread holds kPriors priors in registers and
//          +----------------+                walks down the image's boxes, which lie in shared
//   boxes  | IoU never      |  -> max of a   memory kBoxes at a time. Down a column: the prior's
//   0..G-1 | stored         |     row: warp  best box. Along a row: the box's best prior, by
//          +----------------+     shuffles   shuffles within a warp and one atomicMax a warp.
//            max of a column: registers      Both maxima keep the lowest index on ties.
//
// Then the greedy step: the best pair first, until no box is free. A box's best prior may have
// been taken since it was found; only then, when the box's turn comes, does it look again.
#include "device.h"

namespace {

constexpr int kThreads = threads(1024, 64);
constexpr int kBoxes = 64;               // boxes in shared memory at a time
constexpr int kPriors = 3;               // 3 passes of 3 x 1024 priors see SSD300's 8732
constexpr float kMinBipartiteIou = 1e-6f;  // below it a box takes no prior (Caffe MatchBBox)
constexpr int64_t kTaken = -2;           // marks a prior that a box owns, until the last step

struct Image {  // one image of the batch: what its block works on
  const Box* priors;
  int num_priors;
  const Box* boxes;
  int num_boxes;
  int64_t first_box;  // row of boxes[0] in the batch
  Key* best_prior;    // (G,) (IoU, ~prior) of the best prior that was free at the last look
  int64_t* matched;   // (P,)
};

// Fills best_prior, and matched by the threshold alone.
__device__ void find_best(const Image& image, float threshold) {
  __shared__ Box box[kBoxes];
  __shared__ Key best_of_box[kBoxes];
  const int t = threadIdx.x;
  for (int first = 0; first < image.num_priors; first += kThreads * kPriors) {
    Box prior[kPriors];
    float best_iou[kPriors];
    int best_box[kPriors];
    for (int k = 0; k < kPriors; ++k) {
      const int p = first + k * kThreads + t;
      prior[k] = p < image.num_priors ? finite_or_empty(image.priors[p]) : Box{0, 0, 0, 0};
      best_iou[k] = -1, best_box[k] = -1;
    }
    for (int start = 0; start < image.num_boxes; start += kBoxes) {
      const int count = min(kBoxes, image.num_boxes - start);
      __syncthreads();  // nobody reads the boxes before these any more
      for (int g = t; g < count; g += kThreads) {
        box[g] = finite_or_empty(image.boxes[start + g]);
        best_of_box[g] = 0;
      }
      __syncthreads();
      for (int g = 0; g < count; ++g) {
        Key mine = 0;
        for (int k = 0; k < kPriors; ++k) {
          const float overlap = iou(box[g], area(box[g]), prior[k], area(prior[k]));
          if (overlap > best_iou[k]) best_iou[k] = overlap, best_box[k] = start + g;
          const Key key = pack(overlap, first + k * kThreads + t);
          if (overlap > kMinBipartiteIou && key > mine) mine = key;
        }
        if (!__any_sync(kFullWarp, mine != 0)) continue;  // most warps are far from the box
        mine = max_of_warp(mine);
        if (t % 32 == 0) atomicMax(&best_of_box[g], mine);
      }
      __syncthreads();
      for (int g = t; g < count; g += kThreads)
        if (first == 0 || best_of_box[g] > image.best_prior[start + g])
          image.best_prior[start + g] = best_of_box[g];
    }
    for (int k = 0; k < kPriors; ++k) {
      const int p = first + k * kThreads + t;
      const bool over = best_box[k] >= 0 && best_iou[k] >= threshold;
      if (p < image.num_priors) image.matched[p] = over ? image.first_box + best_box[k] : -1;
    }
  }
}

// The best free prior of box g, (IoU, ~prior) or 0, left in *best by the whole block.
__device__ void look_again(const Image& image, int g, Key* best) {
  const Box box = finite_or_empty(image.boxes[g]);
  Key mine = 0;
  for (int p = threadIdx.x; p < image.num_priors; p += kThreads) {
    if (image.matched[p] == kTaken) continue;
    const Box prior = finite_or_empty(image.priors[p]);
    const float overlap = iou(box, area(box), prior, area(prior));
    const Key key = pack(overlap, p);
    if (overlap > kMinBipartiteIou && key > mine) mine = key;
  }
  mine = max_of_warp(mine);
  if (threadIdx.x % 32 == 0) atomicMax(best, mine);
}

// Best pair first. best_prior[g] never understates the box's best free prior, because priors are
// only ever taken: so if the largest of them is up to date, it is the best pair of all.
__device__ void assign_best_first(const Image& image) {
  __shared__ Key winner, best;
  const int t = threadIdx.x;
  for (;;) {
    __syncthreads();
    if (t == 0) winner = best = 0;
    __syncthreads();
    Key mine = 0;  // (IoU, ~box)
    for (int g = t; g < image.num_boxes; g += kThreads) {
      const Key key = image.best_prior[g] >> 32 << 32 | unsigned(~g);
      mine = key > mine ? key : mine;
    }
    mine = max_of_warp(mine);
    if (t % 32 == 0) atomicMax(&winner, mine);
    __syncthreads();
    if (winner >> 32 == 0) break;  // every box has a prior, or none that is free overlaps it
    const int g = index_of(winner);
    const Key key = image.best_prior[g];
    const unsigned p = index_of(key);
    const bool taken = image.matched[p] == kTaken;
    if (taken) look_again(image, g, &best);
    __syncthreads();
    if (t == 0) {
      if (!taken) image.matched[p] = kTaken;
      image.best_prior[g] = taken ? best : Key(unsigned(key));  // IoU 0: the box needs no more
    }
  }
  for (int g = t; g < image.num_boxes; g += kThreads) {
    const Key key = image.best_prior[g];
    if (key != 0) image.matched[index_of(key)] = image.first_box + g;
  }
}

// grid (N), block = one image; thread t looks after priors t, t + kThreads, ...
__global__ void __launch_bounds__(kThreads)
    match_kernel(const Box* priors, int num_priors, const Box* boxes, int64_t num_rows,
                 const int64_t* offsets, float threshold, Key* best_prior, int64_t* matched) {
  // Offsets on the GPU cannot be checked before the launch: wrong ones must not leave the rows.
  const int64_t start = max(int64_t(0), min(num_rows, offsets[blockIdx.x]));
  const int64_t end = max(start, min(num_rows, offsets[blockIdx.x + 1]));
  const Image image = {priors, num_priors, boxes + start, int(end - start), start,
                       best_prior + start, matched + int64_t(blockIdx.x) * num_priors};
  find_best(image, threshold);
  assign_best_first(image);
}

Tensor match(const Tensor& priors_xyxy, const Tensor& boxes_xyxy, const Tensor& offsets,
             double iou_threshold) {
  const OnDeviceOf device(priors_xyxy);
  const Tensor priors = torch::stable::contiguous(priors_xyxy);
  const Tensor boxes = torch::stable::contiguous(boxes_xyxy);
  const Tensor rows = torch::stable::contiguous(offsets);
  const int64_t n = rows.size(0) - 1, p = priors.size(0), t = boxes.size(0);
  Tensor matched = torch::stable::new_empty(rows, {n, p});
  if (n == 0 || p == 0) return matched;
  STD_TORCH_CHECK(p < INT32_MAX / 2 && t < INT32_MAX, "match: too many priors or boxes: ", p, ", ",
                  t);
  Tensor best_prior = torch::stable::new_empty(rows, {t});
  LAUNCH(match_kernel, n, kThreads, 0, device.stream)(
      reinterpret_cast<const Box*>(priors.const_data_ptr<float>()), int(p),
      reinterpret_cast<const Box*>(boxes.const_data_ptr<float>()), t,
      rows.const_data_ptr<int64_t>(), float(iou_threshold),
      reinterpret_cast<Key*>(best_prior.mutable_data_ptr<int64_t>()),
      matched.mutable_data_ptr<int64_t>());
  CHECK_LAUNCH();
  return matched;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(OP_NAMESPACE, DEVICE_KEY, m) { m.impl("match", TORCH_BOX(&match)); }
