// Sorts boxes for NMS on the GPU: by (score descending, index ascending), by counting.
//
// The place of a box is the number of boxes that go before it. That is K^2 comparisons, but each is
// a few instructions on a number in shared memory, none waits for another, and two launches do it
// where a radix sort needs a dozen. For 100,000 boxes it is still a small part of their IoUs.
#pragma once
#include "device.h"

namespace {

// 64 boxes a block, so that 8,732 reach every multiprocessor, and four threads a box.
constexpr int kSortThreads = threads(256, 64);

// The larger goes first; 0 for boxes that can never be kept, which go last. +0 for -0: they compare
// equal as numbers, and so must their keys.
inline __device__ unsigned rank_of(Box box, float score) {
  const unsigned bits = __float_as_uint(score + 0.0f);
  const unsigned rising = bits >> 31 ? ~bits : bits | 0x80000000u;  // negative scores count down
  return is_finite(box) && is_finite(score) ? rising : 0;
}

struct SortedBoxes {  // in order of the score
  Box* box;           // (K,) those that are not finite replaced by empty ones
  int64_t* group;     // (K,)
  int* index;         // (K,) where it came from
  bool* gone;         // (K,) true: not finite, or (later) suppressed
};

// grid (ceil(K / kSortThreads)), thread = one box
__global__ void __launch_bounds__(kSortThreads)
    rank_kernel(const Box* boxes, const float* scores, int count, unsigned* ranks) {
  const int i = blockIdx.x * kSortThreads + threadIdx.x;
  if (i < count) ranks[i] = rank_of(boxes[i], scores[i]);
}

// grid (ceil(K / 64)), thread (part, box): all ranks pass by in shared memory, and each part counts
// in its 64s. Of equal boxes the lower index goes first: so in the 64s before the block's own a rank
// counts from `mine` on, in those after it from `mine + 1` on.
__global__ void __launch_bounds__(kSortThreads)
    sort_kernel(const Box* boxes, const int64_t* groups, const unsigned* ranks, int count,
                SortedBoxes sorted) {
  alignas(16) __shared__ unsigned tile[kSortThreads];
  __shared__ int places[64];
  const int t = threadIdx.x, part = t / 64, own = t % 64, i = blockIdx.x * 64 + own;
  const unsigned mine = i < count ? ranks[i] : 0;
  if (t < 64) places[t] = 0;
  int even = 0, odd = 0;  // two counters: an addition need not wait for the one before
  for (int start = 0; start < count; start += kSortThreads) {
    __syncthreads();  // nobody reads the ranks before these any more
    tile[t] = start + t < count ? ranks[start + t] : 0;
    __syncthreads();
    const unsigned* some = tile + part * 64;
    const int which = start / 64 + part - int(blockIdx.x);
    if (which == 0) {
#pragma unroll 4
      for (int k = 0; k < 64; ++k) even += some[k] >= mine + (k >= own);
    } else {
      const unsigned least = mine + (which > 0);
#pragma unroll 16
      for (int k = 0; k < 64; k += 2) even += some[k] >= least, odd += some[k + 1] >= least;
    }
  }
  atomicAdd(&places[own], even + odd);
  __syncthreads();
  if (part > 0 || i >= count) return;
  const int place = places[own];
  sorted.box[place] = finite_or_empty(boxes[i]);
  sorted.group[place] = groups[i];
  sorted.index[place] = i;
  sorted.gone[place] = mine == 0;
}

// The sorted boxes and the tensors that own their memory.
struct Candidates {
  Tensor box, group, index, gone, ranks;
  SortedBoxes sorted;
};

Candidates sort_boxes(const Tensor& boxes_xyxy, const Tensor& scores, const Tensor& groups,
                      Stream stream) {
  const Tensor boxes = torch::stable::contiguous(boxes_xyxy);
  const Tensor s = torch::stable::contiguous(scores), g = torch::stable::contiguous(groups);
  const int64_t k = s.size(0);
  STD_TORCH_CHECK(k < INT32_MAX - kSortThreads, "nms: too many boxes: ", k);
  STD_TORCH_CHECK(boxes.numel() == 4 * k && g.numel() == k, "nms: inputs differ in K");
  Candidates c = {torch::stable::new_empty(boxes, {k, 4}), torch::stable::new_empty(g, {k}),
                  torch::stable::new_empty(g, {k}, ScalarType::Int),
                  torch::stable::new_empty(g, {k}, ScalarType::Bool),
                  torch::stable::new_empty(g, {k}, ScalarType::Int), {}};
  c.sorted = {reinterpret_cast<Box*>(c.box.mutable_data_ptr<float>()),
              c.group.mutable_data_ptr<int64_t>(), c.index.mutable_data_ptr<int>(),
              c.gone.mutable_data_ptr<bool>()};
  const Box* box = reinterpret_cast<const Box*>(boxes.const_data_ptr<float>());
  unsigned* rank = reinterpret_cast<unsigned*>(c.ranks.mutable_data_ptr<int>());
  LAUNCH(rank_kernel, divide_up(k, kSortThreads), kSortThreads, 0, stream)(
      box, s.const_data_ptr<float>(), int(k), rank);
  CHECK_LAUNCH();
  LAUNCH(sort_kernel, divide_up(k, 64), kSortThreads, 0, stream)(
      box, g.const_data_ptr<int64_t>(), rank, int(k), c.sorted);
  CHECK_LAUNCH();
  return c;
}

}  // namespace
