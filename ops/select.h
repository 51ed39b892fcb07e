// Radix selection by one block of a GPU: postprocess finds its best scores with it, and
// mined_cross_entropy its hardest negatives.
#pragma once
#include "device.h"

namespace {

// keys[i] with its index: the larger goes first, no two are equal, and 0 stays 0.
inline __device__ Key with_index(const unsigned* keys, int i) {
  return keys[i] == 0 ? 0 : Key(keys[i]) << 32 | unsigned(~i);
}

// Calls visit(key) for the keys of this thread, t, t + kBlock, ...: all but the zeros. Eight loads
// are on their way before the first one is looked at, for each takes as long as a hundred
// instructions.
template <int kBlock, class Visit>
__device__ void visit_keys(const unsigned* __restrict__ keys, int count, Visit visit) {
  constexpr int kAhead = 8;
  for (int first = threadIdx.x; first < count; first += kAhead * kBlock) {
    unsigned some[kAhead];
#pragma unroll
    for (int k = 0; k < kAhead; ++k)
      some[k] = first + k * kBlock < count ? keys[first + k * kBlock] : 0;
#pragma unroll
    for (int k = 0; k < kAhead; ++k)
      if (some[k] != 0) visit(Key(some[k]) << 32 | unsigned(~(first + k * kBlock)));
  }
}

// Radix selection: the `wanted`-th largest of with_index(keys, 0..count), or 1 if there are fewer.
// Eight bits a round, from the top: count how often each digit follows the digits found so far,
// and go down from the largest digit until `wanted` keys are passed.
template <int kBlock>
__device__ Key select(const unsigned* __restrict__ keys, int count, int wanted) {
  __shared__ int bins[256], digit, still_wanted, in_bin;
  const int t = threadIdx.x;
  Key found = 0;  // the upper digits of the key that is looked for
  for (int shift = 56;; shift -= 8) {
    for (int b = t; b < 256; b += kBlock) bins[b] = 0;
    if (t == 0) digit = -1;
    __syncthreads();
    int last = 0, run = 0;  // equal digits come in runs: one atomic a run spares the bin a queue
    visit_keys<kBlock>(keys, count, [&](Key key) {
      if (shift < 56 && key >> shift >> 8 != found) return;
      const int d = key >> shift & 255;
      if (d != last && run > 0) atomicAdd(&bins[last], run);
      run = d == last ? run + 1 : 1;
      last = d;
    });
    if (run > 0) atomicAdd(&bins[last], run);
    __syncthreads();
    if (t < 32) {  // lane l adds up bins 8 l .. 8 l + 7, then those of the lanes above it
      int mine = 0;
      for (int b = 8 * t; b < 8 * t + 8; ++b) mine += bins[b];
      int above = mine;
      for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_down_sync(kFullWarp, above, step);
        if (t + step < 32) above += other;
      }
      above -= mine;
      if (above < wanted && wanted <= above + mine) {  // true for one lane, or for none
        int b = 8 * t + 7;
        for (; above + bins[b] < wanted; --b) above += bins[b];
        digit = b, still_wanted = wanted - above, in_bin = bins[b];
      }
    }
    __syncthreads();
    if (digit < 0) return 1;
    found = found << 8 | unsigned(digit);
    wanted = still_wanted;
    if (in_bin == wanted || shift == 0)  // the whole bin is wanted, but never a 0
      return max(found << shift, Key(1));
    __syncthreads();  // everyone has read what the next round overwrites
  }
}

}  // namespace
