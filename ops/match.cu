// ops.match for CUDA: one launch a batch, one block an image (reference.match is the meaning).
//
//            priors 0 .. P-1                 every thread holds kPriors priors in registers and
//          +----------------+                walks down the image's boxes, which lie in shared
//   boxes  | IoU never      |  -> max of a   memory. A warp first votes whether any of 32 priors
//   0..G-1 | stored         |     row: warp  touches the box: of neighbours, mostly none does. Down
//          +----------------+     maxima     a column: the prior's best box. Along a row: the box's
//            max of a column: registers      best prior, by max_of_warp (device.h) and one atomicMax
//                                            a warp. Both maxima keep the lowest index on ties.
//
// Then the greedy step, by one warp: the best pair first, until no box is free. A box's best prior
// may have been taken since it was found; only then, when the box's turn comes, does the whole
// block look again.
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

// False only where the IoU is 0.
__device__ bool may_touch(Box a, Box b) {
  return (a.x1 < b.x2) & (b.x1 < a.x2) & (a.y1 < b.y2) & (b.y1 < a.y2);
}

// Fills best_prior, and matched by the threshold alone.
__device__ void find_best(const Image& image, float threshold) {
  __shared__ Box box[kBoxes];
  const int t = threadIdx.x;
  for (int g = t; g < image.num_boxes; g += kThreads) image.best_prior[g] = 0;
  for (int first = 0; first < image.num_priors; first += kThreads * kPriors) {
    const int own = first + t / 32 * 32 * kPriors + t % 32;  // a warp's priors are neighbours
    Box prior[kPriors];
    float best_iou[kPriors] = {};  // a prior that touches nothing has an IoU of 0 with box 0
    int best_box[kPriors] = {};
    for (int k = 0; k < kPriors; ++k) {
      const int p = own + k * 32;
      prior[k] = p < image.num_priors ? finite_or_empty(image.priors[p]) : Box{0, 0, 0, 0};
    }
    for (int start = 0; start < image.num_boxes; start += kBoxes) {
      const int count = min(kBoxes, image.num_boxes - start);
      if (first == 0 || image.num_boxes > kBoxes) {  // else they are still there
        __syncthreads();  // nobody reads the boxes before these any more
        for (int g = t; g < count; g += kThreads) box[g] = finite_or_empty(image.boxes[start + g]);
        __syncthreads();
      }
      for (int g = 0; g < count; ++g) {
        const Box one = box[g];
        bool touches[kPriors], any = false;  // of the whole warp
        for (int k = 0; k < kPriors; ++k)
          any |= touches[k] = __any_sync(kFullWarp, may_touch(one, prior[k]));
        if (!any) continue;
        float top = kMinBipartiteIou;
        int who = -1;  // the lowest of equal priors, for p rises with k
        for (int k = 0; k < kPriors; ++k) {
          if (!touches[k]) continue;
          const float overlap = iou(one, area(one), prior[k], area(prior[k]));
          if (overlap > best_iou[k]) best_iou[k] = overlap, best_box[k] = start + g;
          if (overlap > top) top = overlap, who = own + k * 32;
        }
        const Key mine = max_of_warp(who < 0 ? 0 : pack(top, who));
        if (t % 32 == 0 && mine != 0) atomicMax(&image.best_prior[start + g], mine);
      }
    }
    for (int k = 0; k < kPriors; ++k) {
      const int p = own + k * 32;
      const bool over = image.num_boxes > 0 && best_iou[k] >= threshold;
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
  if (threadIdx.x % 32 == 0 && mine != 0) atomicMax(best, mine);
}

// By one warp: gives boxes their best prior, best pair first, until every box has one or none that
// is free overlaps it: -> -1. Or until the next box's prior is taken: -> that box.
// best_prior[g] never understates the box's best free prior, because priors are only ever taken: so
// if the largest of them is up to date, it is the best pair of all. A box that has a prior keeps it
// with an IoU of 0, and so the box needs no more.
__device__ int assign_until_taken(const Image& image) {
  const int lane = threadIdx.x;
  for (;;) {
    Key best = 0;  // (IoU, ~box)
    for (int g = lane; g < image.num_boxes; g += 32) {
      const Key key = image.best_prior[g] >> 32 << 32 | unsigned(~g);
      best = key > best ? key : best;
    }
    best = max_of_warp(best);
    if (best >> 32 == 0) return -1;
    const int winner = index_of(best);
    const Key owned = unsigned(image.best_prior[winner]);  // what a box keeps that has this prior
    bool is_taken = false;
    for (int g = lane; g < image.num_boxes; g += 32) is_taken |= image.best_prior[g] == owned;
    if (__any_sync(kFullWarp, is_taken)) return winner;
    if (lane == 0) {
      image.best_prior[winner] = owned;
      image.matched[index_of(owned)] = kTaken;
    }
    __syncwarp();
  }
}

__device__ void assign_best_first(const Image& image) {
  __shared__ int unlucky;
  __shared__ Key best;
  const int t = threadIdx.x;
  for (;;) {
    __syncthreads();  // best_prior and matched are as the step before left them
    if (t < 32) {
      const int box = assign_until_taken(image);
      if (t == 0) unlucky = box, best = 0;
    }
    __syncthreads();
    if (unlucky < 0) break;
    look_again(image, unlucky, &best);
    __syncthreads();
    if (t == 0) image.best_prior[unlucky] = best;
  }
  for (int g = t; g < image.num_boxes; g += kThreads) {
    const Key key = image.best_prior[g];
    if (key != 0) image.matched[index_of(key)] = image.first_box + g;
  }
}

// grid (N), block = one image
__global__ void __launch_bounds__(kThreads)
    match_kernel(const Box* priors, int num_priors, const Box* boxes, int64_t num_rows,
                 const int64_t* offsets, float threshold, Key* best_prior, int64_t* matched) {
  // Offsets on the GPU cannot be checked before the launch: wrong ones must not leave the rows.
  const int64_t start = max(int64_t(0), min(num_rows, offsets[blockIdx.x]));
  const int64_t end = max(start, min(num_rows, offsets[blockIdx.x + 1]));
  // Few boxes, as nearly always: what is asked of them again and again lies in shared memory.
  __shared__ Key few[kBoxes];
  const int num_boxes = int(end - start);
  const Image image = {priors, num_priors, boxes + start, num_boxes, start,
                       num_boxes <= kBoxes ? few : best_prior + start,
                       matched + int64_t(blockIdx.x) * num_priors};
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
