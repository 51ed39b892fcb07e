// Sorts boxes for NMS on the GPU: by (score descending, index ascending), by counting.
//
// The place of a box is the number of boxes that go before it. That is K^2 comparisons, but each is
// a few instructions on a number in shared memory, none waits for another, and two launches do it
// where a radix sort needs a dozen. For 100,000 boxes it is still a small part of their IoUs.
#pragma once
#include "device.h"

namespace {

// 64 boxes a block, so that 8,732 reach every multiprocessor; kSortParts threads a box.
constexpr int kSortThreads = threads(256, 64), kSortParts = kSortThreads / 64;
constexpr int kSortTile = 256;  // keys in shared memory at a time

// The larger key goes first, and no two are equal. Boxes that can never be kept have the upper
// half 0 and go last. +0 for -0: they compare equal as numbers, and so must their keys.
inline __device__ Key sort_key(Box box, float score, int index) {
  const unsigned bits = __float_as_uint(score + 0.0f);
  const unsigned rising = bits >> 31 ? ~bits : bits | 0x80000000u;  // negative scores count down
  const bool usable = is_finite(box) && is_finite(score);
  return (usable ? Key(rising) << 32 : 0) | unsigned(~index);
}

struct SortedBoxes {  // in order of the score
  Box* box;           // (K,) those that are not finite replaced by empty ones
  int64_t* group;     // (K,)
  int* index;         // (K,) where it came from
  bool* gone;         // (K,) true: not finite, or (later) suppressed
};

// grid (ceil(K / kSortThreads)), thread = one box
__global__ void __launch_bounds__(kSortThreads)
    key_kernel(const Box* boxes, const float* scores, int count, Key* keys) {
  const int i = blockIdx.x * kSortThreads + threadIdx.x;
  if (i < count) keys[i] = sort_key(boxes[i], scores[i], i);
}

// grid (ceil(K / 64)), thread (part, box): all keys pass by in shared memory, and each part counts
// in its share of them; two counters, so that an addition need not wait for the one before.
__global__ void __launch_bounds__(kSortThreads)
    sort_kernel(const Box* boxes, const int64_t* groups, const Key* keys, int count,
                SortedBoxes sorted) {
  __shared__ Key tile[kSortTile];
  __shared__ int places[64];
  constexpr int kShare = kSortTile / kSortParts;
  const int t = threadIdx.x, part = t / 64, i = blockIdx.x * 64 + t % 64;
  const Key mine = i < count ? keys[i] : 0;
  if (t < 64) places[t] = 0;
  int even = 0, odd = 0;
  for (int start = 0; start < count; start += kSortTile) {
    __syncthreads();  // nobody reads the keys before these any more
    for (int k = t; k < kSortTile; k += kSortThreads)
      tile[k] = start + k < count ? keys[start + k] : 0;
    __syncthreads();
    const Key* share = tile + part * kShare;
#pragma unroll 16
    for (int k = 0; k < kShare; k += 2) even += share[k] > mine, odd += share[k + 1] > mine;
  }
  atomicAdd(&places[t % 64], even + odd);
  __syncthreads();
  if (part > 0 || i >= count) return;
  const int place = places[t];
  sorted.box[place] = finite_or_empty(boxes[i]);
  sorted.group[place] = groups[i];
  sorted.index[place] = i;
  sorted.gone[place] = mine >> 32 == 0;
}

// The sorted boxes and the tensors that own their memory.
struct Candidates {
  Tensor box, group, index, gone, keys;
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
                  torch::stable::new_empty(g, {k}), {}};
  c.sorted = {reinterpret_cast<Box*>(c.box.mutable_data_ptr<float>()),
              c.group.mutable_data_ptr<int64_t>(), c.index.mutable_data_ptr<int>(),
              c.gone.mutable_data_ptr<bool>()};
  const Box* box = reinterpret_cast<const Box*>(boxes.const_data_ptr<float>());
  Key* key = reinterpret_cast<Key*>(c.keys.mutable_data_ptr<int64_t>());
  LAUNCH(key_kernel, divide_up(k, kSortThreads), kSortThreads, 0, stream)(
      box, s.const_data_ptr<float>(), int(k), key);
  CHECK_LAUNCH();
  LAUNCH(sort_kernel, divide_up(k, 64), kSortThreads, 0, stream)(
      box, g.const_data_ptr<int64_t>(), key, int(k), c.sorted);
  CHECK_LAUNCH();
  return c;
}

}  // namespace
