// Rung 3 of NMS: the scan moves to the device. One block walks down the mask, 64 boxes at a time;
// the host launches and goes on, so nothing waits and a CUDA graph can record it.
//
// What is still slow: a mask of all boxes (1.25 GB for 100,000), and one multiprocessor reads it.
// The final nms.cu does this a panel of 4,096 boxes at a time.
#include "tile.h"

namespace {

constexpr int kThreads = threads(256, 64);

// grid (1), thread t = words t, t + kThreads, ... of `gone`, in shared memory. A chunk of 64 is
// settled by thread 0 from the chunk's own tile; then all threads add the survivors' rows.
__global__ void __launch_bounds__(kThreads)
    scan_kernel(const Key* mask, int count, const int* index, const bool* unusable, bool* keep) {
  DYNAMIC_SHARED(Key, gone);
  __shared__ Key survivors;
  const int t = threadIdx.x, words = (count + 63) / 64;
  for (int w = t; w < words; w += kThreads) {
    gone[w] = 0;
    for (int c = 0; c < 64; ++c)
      if (w * 64 + c >= count || unusable[w * 64 + c]) gone[w] |= Key(1) << c;
  }
  for (int chunk = 0; chunk < words; ++chunk) {
    const Key* rows = mask + int64_t(chunk) * 64 * words;
    __syncthreads();
    if (t == 0) {
      Key alive = ~gone[chunk];
      for (Key left = alive; left != 0;) {
        const int c = __ffsll(left) - 1;
        alive &= ~rows[int64_t(c) * words + chunk];
        left = alive & (~Key(1) << c);
      }
      survivors = alive;
    }
    __syncthreads();
    for (int c = t; c < 64; c += kThreads)
      if (chunk * 64 + c < count) keep[index[chunk * 64 + c]] = survivors >> c & 1;
    for (int w = chunk + 1 + t; w < words; w += kThreads)
      for (Key left = survivors; left != 0; left &= left - 1)
        gone[w] |= rows[int64_t(__ffsll(left) - 1) * words + w];
  }
}

Tensor nms(const Tensor& boxes, const Tensor& scores, const Tensor& groups, double threshold) {
  const OnDeviceOf device(scores);
  const int64_t k = scores.size(0), words = divide_up(k, 64);
  STD_TORCH_CHECK(words * 8 <= 40000, "nms_3_scan: at most 320,000 boxes; got ", k);
  Tensor keep = torch::stable::new_empty(scores, {k}, ScalarType::Bool);
  if (k == 0) return keep;
  const Candidates c = sort_boxes(boxes, scores, groups, device.stream);
  Tensor mask = torch::stable::new_empty(groups, {k, words});
  launch_tiles(c.sorted.box, c.sorted.group, k, threshold, mask, device.stream);
  LAUNCH(scan_kernel, 1, kThreads, words * sizeof(Key), device.stream)(
      reinterpret_cast<const Key*>(mask.const_data_ptr<int64_t>()), int(k), c.sorted.index,
      c.sorted.gone, keep.mutable_data_ptr<bool>());
  CHECK_LAUNCH();
  return keep;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(OP_NAMESPACE, DEVICE_KEY, m) { m.impl("nms_3_scan", TORCH_BOX(&nms)); }
