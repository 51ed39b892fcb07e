// Rung 1 of NMS: one thread a pair. The GPU compares every box with every other one and writes a
// byte for each; the host copies the K x K bytes and walks down them.
//
// What is slow: 76 MB written, copied and read for 8,732 boxes, half of it below the diagonal;
// every box is read K times from memory; and the host waits for the GPU.
#include "sort.h"

namespace {

// grid (ceil(K / 256), K), thread (i, j) = one pair: does box i overlap box j, which comes later?
__global__ void pair_kernel(const Box* boxes, const int64_t* groups, int count, float threshold,
                            bool* suppresses) {
  const int j = blockIdx.x * blockDim.x + threadIdx.x;
  if (j >= count) return;
  for (int i = blockIdx.y; i < count; i += gridDim.y) {  // the grid's y ends at 65,535
    const Box a = boxes[i], b = boxes[j];
    suppresses[int64_t(i) * count + j] =
        i < j && groups[i] == groups[j] && iou(a, area(a), b, area(b)) > threshold;
  }
}

Tensor nms(const Tensor& boxes, const Tensor& scores, const Tensor& groups, double threshold) {
  const OnDeviceOf device(scores);
  const int64_t k = scores.size(0);
  const Tensor keep = on_host(torch::stable::new_empty(scores, {k}, ScalarType::Bool));
  if (k == 0) return torch::stable::to(keep, scores.device());
  const Candidates c = sort_boxes(boxes, scores, groups, device.stream);
  Tensor matrix = torch::stable::new_empty(groups, {k, k}, ScalarType::Bool);
  const dim3 grid(divide_up(k, kSortThreads), min(k, int64_t(65535)));
  LAUNCH(pair_kernel, grid, kSortThreads, 0, device.stream)(
      c.sorted.box, c.sorted.group, int(k), float(threshold), matrix.mutable_data_ptr<bool>());
  CHECK_LAUNCH();

  const Tensor rows = on_host(matrix), places = on_host(c.index), unusable = on_host(c.gone);
  bool* gone = unusable.mutable_data_ptr<bool>();
  for (int64_t i = 0; i < k; ++i) {
    const bool* row = rows.const_data_ptr<bool>() + i * k;
    keep.mutable_data_ptr<bool>()[places.const_data_ptr<int>()[i]] = !gone[i];
    for (int64_t j = i + 1; j < k && !gone[i]; ++j) gone[j] |= row[j];
  }
  return torch::stable::to(keep, scores.device());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(OP_NAMESPACE, DEVICE_KEY, m) { m.impl("nms_1_pairs", TORCH_BOX(&nms)); }
