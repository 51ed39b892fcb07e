// The 64 x 64 tile of NMS: 64 boxes in shared memory, one bit a pair. nms.cu and the ladder's rungs
// 2 and 3 are built on it.
#pragma once
#include "sort.h"

namespace {

// grid (W, W) with W = ceil(K / 64), 64 threads. Block (x, y), thread t: word x in the row of box
// 64 y + t, whose bit c says that this box suppresses box 64 x + c. A row has `pitch` words.
__global__ void __launch_bounds__(64)
    tile_kernel(const Box* boxes, const int64_t* groups, int count, float threshold, Key* mask,
                int pitch) {
  __shared__ Box box[64];
  __shared__ int64_t group[64];
  const int t = threadIdx.x, row = blockIdx.y * 64 + t, first = blockIdx.x * 64;
  if (blockIdx.x < blockIdx.y) return;  // below the diagonal: nobody asks
  const int columns = min(64, count - first);
  if (t < columns) {
    box[t] = boxes[first + t];
    group[t] = groups[first + t];
  }
  __syncthreads();
  if (row >= count) return;
  const Box mine = boxes[row];
  const int64_t my_group = groups[row];
  Key word = 0;
  for (int c = blockIdx.x == blockIdx.y ? t + 1 : 0; c < columns; ++c)
    if (exceeds(mine, box[c], threshold) && group[c] == my_group)
      word |= Key(1) << c;
  mask[int64_t(row) * pitch + blockIdx.x] = word;
}

// The mask of boxes 0 .. count - 1, as (count, pitch) words; those below the diagonal are not
// written.
void launch_tiles(const Box* boxes, const int64_t* groups, int64_t count, double threshold,
                  Tensor& mask, Stream stream) {
  const unsigned words = divide_up(count, 64);
  LAUNCH(tile_kernel, dim3(words, words), 64, 0, stream)(
      boxes, groups, int(count), float(threshold),
      reinterpret_cast<Key*>(mask.mutable_data_ptr<int64_t>()), int(mask.size(1)));
  CHECK_LAUNCH();
}

}  // namespace
