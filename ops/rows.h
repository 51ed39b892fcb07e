// Rows of logits in shared memory: postprocess and mined_cross_entropy give each thread one row.
#pragma once
#include "device.h"

namespace {

// A type that torch gives logits in -> float.
template <typename T>
__device__ float as_float(T x) {
  return static_cast<float>(x);
}

// An odd pitch keeps the 32 threads of a warp, each in its own row, on 32 different banks.
inline __device__ int odd(int columns) { return columns | 1; }

// `count` numbers, which are whole rows of `columns`, into tile[row * odd(columns) + column]. They
// are one range of memory: neighbouring threads read neighbours, several loads ahead.
template <int kBlock, typename T>
__device__ void load_rows(const T* from, int count, int columns, float* tile) {
  const bool has_gaps = columns % 2 == 0;
#pragma unroll 8
  for (int i = threadIdx.x; i < count; i += kBlock)
    tile[has_gaps ? i + i / columns : i] = as_float(from[i]);
}

// Columns start .. start + columns of rows of `pitch`: for rows that are too long for one tile.
template <int kBlock, typename T>
__device__ void load_columns(const T* from, int rows, int64_t pitch, int columns, float* tile) {
  for (int row = threadIdx.x / 32; row < rows; row += kBlock / 32)
    for (int c = threadIdx.x % 32; c < columns; c += 32)
      tile[row * odd(columns) + c] = as_float(from[row * pitch + c]);
}

// call(pointer of the tensor's type): one of the four that logits may have.
template <class Call>
void with_type(const Tensor& x, const char* op, Call call) {
  const void* data = x.const_data_ptr();
  switch (x.scalar_type()) {
    case ScalarType::Float: return call(static_cast<const float*>(data));
    case ScalarType::Half: return call(static_cast<const torch::headeronly::Half*>(data));
    case ScalarType::BFloat16: return call(static_cast<const torch::headeronly::BFloat16*>(data));
    case ScalarType::Double: return call(static_cast<const double*>(data));
    default:
      STD_TORCH_CHECK(false, op, ": expected float32, float16, bfloat16 or float64");
  }
}

}  // namespace
