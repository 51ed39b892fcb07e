// Rung 4 of NMS: everything in the shared memory of one block, one launch. No mask leaves the
// chip, and a box is compared with the survivors before it instead of with all others.
//
// What it costs: at most 1,024 boxes, and one multiprocessor works. postprocess.cu runs this once
// for each class of each image, which fills the GPU.
#include "sort.h"

namespace {

constexpr int kThreads = threads(256, 64);
constexpr int kMost = 1024;

// grid (1), all boxes in shared memory, sorted by counting. Then chunks of 64: thread (part, c)
// compares box c of the chunk with a part of the survivors and of the chunk.
__global__ void __launch_bounds__(kThreads)
    block_kernel(const Box* boxes, const float* scores, const int64_t* groups, int count,
                 float threshold, bool* keep) {
  __shared__ Key keys[kMost], rows[64], gone;
  __shared__ Box box[kMost];
  __shared__ int64_t group[kMost];
  __shared__ int index[kMost], kept[kMost], num_kept;
  const int t = threadIdx.x, c = t % 64, parts = kThreads / 64;
  for (int i = t; i < count; i += kThreads) 
    keys[i] = Key(rank_of(boxes[i], scores[i])) << 32 | unsigned(~i);
  __syncthreads();
  for (int i = t; i < count; i += kThreads) {
    int place = 0;
    for (int j = 0; j < count; ++j) place += keys[j] > keys[i];
    box[place] = finite_or_empty(boxes[i]);
    group[place] = groups[i];
    index[place] = i;
    keep[i] = false;
  }
  if (t == 0) num_kept = 0;
  for (int first = 0; first < count; first += 64) {
    const int i = first + c, end = min(count, first + 64);
    if (t < 64) rows[t] = 0;
    if (t == 0) gone = 0;
    __syncthreads();
    if (i < end) {
      bool is_gone = keys[index[i]] >> 32 == 0;
      for (int k = t / 64; k < num_kept && !is_gone; k += parts)
        is_gone = overlap(box, group, kept[k], i) > threshold;
      if (is_gone) atomicOr(&gone, Key(1) << c);
      Key row = 0;
      for (int j = i + 1 + t / 64; j < end; j += parts)
        if (overlap(box, group, i, j) > threshold) row |= Key(1) << (j - first);
      atomicOr(&rows[c], row);
    }
    __syncthreads();
    if (t == 0)
      for (Key left = ~gone & (~Key(0) >> (64 - (end - first))); left != 0;) {
        const int best = __ffsll(left) - 1;
        keep[index[first + best]] = true;
        kept[num_kept++] = first + best;
        left &= ~rows[best] & (~Key(1) << best);
      }
    __syncthreads();
  }
}

Tensor nms(const Tensor& boxes, const Tensor& scores, const Tensor& groups, double threshold) {
  const OnDeviceOf device(scores);
  const int64_t k = scores.size(0);
  STD_TORCH_CHECK(k <= kMost, "nms_4_block: at most ", kMost, " boxes; got ", k);
  const Tensor b = torch::stable::contiguous(boxes), s = torch::stable::contiguous(scores);
  const Tensor g = torch::stable::contiguous(groups);
  Tensor keep = torch::stable::new_empty(scores, {k}, ScalarType::Bool);
  if (k == 0) return keep;
  LAUNCH(block_kernel, 1, kThreads, 0, device.stream)(
      reinterpret_cast<const Box*>(b.const_data_ptr<float>()), s.const_data_ptr<float>(),
      g.const_data_ptr<int64_t>(), int(k), float(threshold), keep.mutable_data_ptr<bool>());
  CHECK_LAUNCH();
  return keep;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(OP_NAMESPACE, DEVICE_KEY, m) { m.impl("nms_4_block", TORCH_BOX(&nms)); }
