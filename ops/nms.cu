// ops.nms for CUDA: bit masks a panel at a time, scanned on the device (reference.nms is the
// meaning). The host waits for nothing and the launches depend on K alone: a CUDA graph records it.
//
//   sort     every box, by (score descending, index ascending)                          sort.h
//   and for each panel of 4096 boxes in that order:
//   mask     64 x 64 tiles; bit c of word (r, w): box r suppresses box 64 w + c          tile.h
//   scan     one block walks down the panel 64 boxes at a time and learns which are kept
//   suppress every box after the panel: does a kept one overlap it?
//
// A mask of all K boxes at once would be K^2 / 8 bytes: 1.25 GB for 100,000. A panel's is 2 MB and
// stays in the L2 cache, and the boxes after it are compared with survivors only.
#include "tile.h"

namespace {

constexpr int kPanel = 4096;
constexpr int kWords = kPanel / 64;  // of one row of the mask
constexpr int kThreads = threads(256, 64);

// grid (1). For each chunk of 64 boxes: thread 0 settles the chunk by its own 64 x 64 tile, then
// thread (part, w) adds the survivors' rows to word w of those that are gone.
__global__ void __launch_bounds__(kThreads)
    scan_kernel(const Key* mask, int count, const int* index, const bool* was_gone, Key* kept,
                bool* keep) {
  __shared__ Key gone[kWords], tile[64], survivors;
  const int t = threadIdx.x, chunks = (count + 63) / 64;
  for (int w = t; w < chunks; w += kThreads) {
    gone[w] = 0;
    for (int c = 0; c < 64; ++c)
      if (w * 64 + c >= count || was_gone[w * 64 + c]) gone[w] |= Key(1) << c;
  }
  // A thread's row of the diagonal tile of a chunk: fetched a chunk ahead, for it waits for nobody.
  const auto row_of_tile = [&](int chunk) {
    const int i = chunk * 64 + t;
    return t < 64 && i < count ? mask[int64_t(i) * kWords + chunk] : Key(0);
  };
  Key next = row_of_tile(0);
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const int first = chunk * 64;
    if (t < 64) tile[t] = next;
    next = row_of_tile(chunk + 1);
    __syncthreads();
    if (t == 0) {
      Key alive = ~gone[chunk];
      for (Key left = alive; left != 0;) {  // the survivors, best first
        const int c = __ffsll(left) - 1;
        alive &= ~tile[c];
        left = alive & (~Key(1) << c);
      }
      survivors = kept[chunk] = alive;
    }
    __syncthreads();
    if (t < 64 && first + t < count) keep[index[first + t]] = survivors >> t & 1;
    for (int w = chunk + 1 + t % 64; w < chunks; w += 64) {
      Key suppressed = 0;
      constexpr int kParts = kThreads / 64;
#pragma unroll 8
      for (int k = 0; k < 64 / kParts; ++k) {  // all loads on their way at once
        const int c = k * kParts + t / 64;
        if (survivors >> c & 1) suppressed |= mask[int64_t(first + c) * kWords + w];
      }
      atomicOr(&gone[w], suppressed);
    }
  }
}

// grid (ceil(boxes after the panel / kThreads)), thread = one of them; the panel's boxes pass by
// in shared memory, 64 at a time, and only the survivors among them are looked at.
__global__ void __launch_bounds__(kThreads)
    suppress_kernel(const Box* panel, const int64_t* panel_groups, const Key* kept,
                    const Box* boxes, const int64_t* groups, int count, float threshold,
                    bool* gone) {
  __shared__ Box box[64];
  __shared__ int64_t group[64];
  const int t = threadIdx.x, i = blockIdx.x * kThreads + t;
  const Box mine = i < count ? boxes[i] : Box{0, 0, 0, 0};
  const int64_t my_group = i < count ? groups[i] : 0;
  bool is_gone = i >= count || gone[i];
  for (int chunk = 0; chunk < kWords; ++chunk) {
    __syncthreads();  // nobody reads the boxes before these any more
    if (t < 64) {
      box[t] = panel[chunk * 64 + t];
      group[t] = panel_groups[chunk * 64 + t];
    }
    __syncthreads();
    for (Key left = is_gone ? 0 : kept[chunk]; left != 0 && !is_gone; left &= left - 1) {
      const int c = __ffsll(left) - 1;
      is_gone = exceeds(box[c], mine, threshold) && group[c] == my_group;
    }
  }
  if (i < count) gone[i] = is_gone;
}

Tensor nms(const Tensor& boxes_xyxy, const Tensor& scores, const Tensor& groups,
           double iou_threshold) {
  const OnDeviceOf device(scores);
  const int64_t k = scores.size(0);
  Tensor keep = torch::stable::new_empty(scores, {k}, ScalarType::Bool);
  if (k == 0) return keep;
  const Candidates c = sort_boxes(boxes_xyxy, scores, groups, device.stream);
  const int64_t rows = min(k, int64_t(kPanel));
  Tensor mask = torch::stable::new_empty(groups, {rows, kWords});
  Tensor kept = torch::stable::new_empty(groups, {kWords});
  Key* kept_words = reinterpret_cast<Key*>(kept.mutable_data_ptr<int64_t>());
  for (int64_t first = 0; first < k; first += kPanel) {
    const int count = int(min(k - first, int64_t(kPanel)));
    const Box* box = c.sorted.box + first;
    const int64_t* group = c.sorted.group + first;
    launch_tiles(box, group, count, iou_threshold, mask, device.stream);
    LAUNCH(scan_kernel, 1, kThreads, 0, device.stream)(
        reinterpret_cast<const Key*>(mask.const_data_ptr<int64_t>()), count, c.sorted.index + first,
        c.sorted.gone + first, kept_words, keep.mutable_data_ptr<bool>());
    CHECK_LAUNCH();
    const int64_t after = k - first - count;
    if (after == 0) break;
    LAUNCH(suppress_kernel, divide_up(after, kThreads), kThreads, 0, device.stream)(
        box, group, kept_words, box + count, group + count, int(after), float(iou_threshold),
        c.sorted.gone + first + count);
    CHECK_LAUNCH();
  }
  return keep;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(OP_NAMESPACE, DEVICE_KEY, m) { m.impl("nms", TORCH_BOX(&nms)); }
