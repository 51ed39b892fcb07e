// Rung 1 of matching: one thread a pair. All IoUs of the batch are written to memory, (T, P); then
// one thread a prior looks down its column, and one block an image takes the best pair that is
// left by looking at the whole matrix, G times over.
//
// What is slow: the matrix is written once and read G + 1 times; the greedy step is G^2 P work.
#include "device.h"

namespace {

constexpr int kThreads = threads(256, 64);

// grid (ceil(P / kThreads), T), thread = one pair
__global__ void pair_kernel(const Box* priors, int num_priors, const Box* boxes, int num_rows,
                            float* ious) {
  const int p = blockIdx.x * blockDim.x + threadIdx.x;
  if (p >= num_priors) return;
  for (int row = blockIdx.y; row < num_rows; row += gridDim.y) {  // the grid's y ends at 65,535
    const Box box = finite_or_empty(boxes[row]), prior = finite_or_empty(priors[p]);
    ious[int64_t(row) * num_priors + p] = iou(box, area(box), prior, area(prior));
  }
}

// grid (N, ceil(P / kThreads)), thread = one prior of one image: the best of its column
__global__ void column_kernel(const float* ious, int num_priors, const int64_t* offsets,
                              float threshold, int64_t* matched) {
  const int p = blockIdx.y * blockDim.x + threadIdx.x;
  if (p >= num_priors) return;
  float best = -1;
  int64_t best_row = -1;
  for (int64_t row = offsets[blockIdx.x]; row < offsets[blockIdx.x + 1]; ++row) {
    const float overlap = ious[row * num_priors + p];
    if (overlap > best) best = overlap, best_row = row;
  }
  matched[int64_t(blockIdx.x) * num_priors + p] = best >= threshold ? best_row : -1;
}

// grid (N), block = one image. Pairs are numbered box by box, so the lowest number at equal IoU is
// the lowest box, then the lowest prior. A taken row and column get IoU -1.
__global__ void __launch_bounds__(kThreads)
    greedy_kernel(float* ious, int num_priors, const int64_t* offsets, int64_t* matched) {
  __shared__ Key best;
  const int64_t start = offsets[blockIdx.x], num_boxes = offsets[blockIdx.x + 1] - start;
  float* iou = ious + start * num_priors;
  const int t = threadIdx.x;
  for (int64_t round = 0; round < num_boxes; ++round) {
    __syncthreads();
    if (t == 0) best = 0;
    __syncthreads();
    Key mine = 0;
    for (int64_t i = t; i < num_boxes * num_priors; i += kThreads)
      if (iou[i] > 1e-6f && pack(iou[i], i) > mine) mine = pack(iou[i], i);
    if (mine != 0) atomicMax(&best, mine);
    __syncthreads();
    if (best == 0) break;
    const int box = index_of(best) / num_priors, prior = index_of(best) % num_priors;
    if (t == 0) matched[int64_t(blockIdx.x) * num_priors + prior] = start + box;
    for (int p = t; p < num_priors; p += kThreads) iou[int64_t(box) * num_priors + p] = -1;
    __syncthreads();  // box's row and prior's column cross in one place
    for (int g = t; g < num_boxes; g += kThreads) iou[int64_t(g) * num_priors + prior] = -1;
  }
}

Tensor match(const Tensor& priors_xyxy, const Tensor& boxes_xyxy, const Tensor& offsets,
             double iou_threshold) {
  const OnDeviceOf device(priors_xyxy);
  const Tensor priors = torch::stable::contiguous(priors_xyxy);
  const Tensor boxes = torch::stable::contiguous(boxes_xyxy);
  const Tensor rows = torch::stable::contiguous(offsets);
  const int64_t n = rows.size(0) - 1, p = priors.size(0), t = boxes.size(0);
  STD_TORCH_CHECK(t * p < UINT32_MAX, "match_1_pairs: at most 2^32 pairs; got ", t * p);
  Tensor matched = torch::stable::new_empty(rows, {n, p});
  if (n == 0 || p == 0) return matched;
  Tensor ious = torch::stable::new_empty(priors, {t, p});
  const int64_t* offset = rows.const_data_ptr<int64_t>();
  const int64_t columns = divide_up(p, kThreads);
  if (t > 0) {
    LAUNCH(pair_kernel, dim3(columns, min(t, int64_t(65535))), kThreads, 0, device.stream)(
        reinterpret_cast<const Box*>(priors.const_data_ptr<float>()), int(p),
        reinterpret_cast<const Box*>(boxes.const_data_ptr<float>()), int(t),
        ious.mutable_data_ptr<float>());
    CHECK_LAUNCH();
  }
  LAUNCH(column_kernel, dim3(n, columns), kThreads, 0, device.stream)(
      ious.mutable_data_ptr<float>(), int(p), offset, float(iou_threshold),
      matched.mutable_data_ptr<int64_t>());
  CHECK_LAUNCH();
  LAUNCH(greedy_kernel, n, kThreads, 0, device.stream)(ious.mutable_data_ptr<float>(), int(p),
                                                       offset, matched.mutable_data_ptr<int64_t>());
  CHECK_LAUNCH();
  return matched;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(OP_NAMESPACE, DEVICE_KEY, m) {
  m.impl("match_1_pairs", TORCH_BOX(&match));
}
