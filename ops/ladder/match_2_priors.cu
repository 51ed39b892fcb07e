// Rung 2 of matching: one thread a prior, no matrix. The image's boxes lie in shared memory, a
// prior's best box in a register; a box's best prior is found by 64-bit atomicMax on (IoU, ~prior).
//
// What is still slow: every overlapping pair is one atomic in device memory, all on one address a
// box; and the greedy step is a second launch. The final match.cu finds the maximum of a warp first.
#include "device.h"

namespace {

constexpr int kThreads = threads(256, 64);
constexpr int kBoxes = 64;
constexpr float kMinBipartiteIou = 1e-6f;

// grid (N, ceil(P / kThreads)), thread = one prior of one image
__global__ void __launch_bounds__(kThreads)
    prior_kernel(const Box* priors, int num_priors, const Box* boxes, const int64_t* offsets,
                 float threshold, Key* best_prior, int64_t* matched) {
  __shared__ Box box[kBoxes];
  const int t = threadIdx.x, p = blockIdx.y * kThreads + t;
  const int64_t end = offsets[blockIdx.x + 1];
  const Box prior = p < num_priors ? finite_or_empty(priors[p]) : Box{0, 0, 0, 0};
  float best = -1;
  int64_t best_row = -1;
  for (int64_t start = offsets[blockIdx.x]; start < end; start += kBoxes) {
    const int count = int(min(int64_t(kBoxes), end - start));
    __syncthreads();
    if (t < count) box[t] = finite_or_empty(boxes[start + t]);
    __syncthreads();
    for (int g = 0; g < count; ++g) {
      const float overlap = iou(box[g], area(box[g]), prior, area(prior));
      if (overlap > best) best = overlap, best_row = start + g;
      if (overlap > kMinBipartiteIou) atomicMax(&best_prior[start + g], pack(overlap, p));
    }
  }
  if (p < num_priors)
    matched[int64_t(blockIdx.x) * num_priors + p] = best >= threshold ? best_row : -1;
}

// grid (N), block = one image: the best pair first; a box whose prior was taken looks again.
__global__ void __launch_bounds__(kThreads)
    greedy_kernel(const Box* priors, int num_priors, const Box* boxes, const int64_t* offsets,
                  Key* best_prior, bool* taken, int64_t* matched) {
  __shared__ Key winner, again;
  const int t = threadIdx.x;
  const int64_t start = offsets[blockIdx.x], end = offsets[blockIdx.x + 1];
  taken += int64_t(blockIdx.x) * num_priors;
  for (;;) {
    __syncthreads();
    if (t == 0) winner = again = 0;
    __syncthreads();
    for (int64_t row = start + t; row < end; row += kThreads)
      if (best_prior[row] != 0)
        atomicMax(&winner, best_prior[row] >> 32 << 32 | unsigned(~(row - start)));
    __syncthreads();
    if (winner == 0) return;
    const int64_t row = start + index_of(winner);
    const int prior = index_of(best_prior[row]);
    const bool is_taken = taken[prior];
    for (int p = t; p < num_priors && is_taken; p += kThreads) {
      const Box box = finite_or_empty(boxes[row]), other = finite_or_empty(priors[p]);
      const float overlap = taken[p] ? 0 : iou(box, area(box), other, area(other));
      if (overlap > kMinBipartiteIou) atomicMax(&again, pack(overlap, p));
    }
    __syncthreads();
    if (t == 0) best_prior[row] = again;  // 0 once it has a prior
    if (t == 0 && !is_taken) {
      taken[prior] = true;
      matched[int64_t(blockIdx.x) * num_priors + prior] = row;
    }
  }
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
  Tensor best_prior = torch::stable::new_zeros(rows, {t});
  Tensor taken = torch::stable::new_zeros(rows, {n, p}, ScalarType::Bool);
  const Box* prior = reinterpret_cast<const Box*>(priors.const_data_ptr<float>());
  const Box* box = reinterpret_cast<const Box*>(boxes.const_data_ptr<float>());
  Key* best = reinterpret_cast<Key*>(best_prior.mutable_data_ptr<int64_t>());
  LAUNCH(prior_kernel, dim3(n, divide_up(p, kThreads)), kThreads, 0, device.stream)(
      prior, int(p), box, rows.const_data_ptr<int64_t>(), float(iou_threshold), best,
      matched.mutable_data_ptr<int64_t>());
  CHECK_LAUNCH();
  LAUNCH(greedy_kernel, n, kThreads, 0, device.stream)(
      prior, int(p), box, rows.const_data_ptr<int64_t>(), best, taken.mutable_data_ptr<bool>(),
      matched.mutable_data_ptr<int64_t>());
  CHECK_LAUNCH();
  return matched;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(OP_NAMESPACE, DEVICE_KEY, m) {
  m.impl("match_2_priors", TORCH_BOX(&match));
}
