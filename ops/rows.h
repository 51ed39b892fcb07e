// Rows of logits in shared memory: postprocess and mined_cross_entropy give each thread one row.
#pragma once
#include "device.h"

namespace {

// A type that torch gives logits in -> float.
template <typename T>
__device__ float as_float(T x) {
  return static_cast<float>(x);
}

// A block has a thread for each of its rows: as many as `threads`, or as fit 48 KB of shared memory.
inline int64_t rows_of_a_block(int threads, int64_t columns, const char* op) {
  const int64_t fit = (48 << 10) / sizeof(float) / (columns | 1);
  STD_TORCH_CHECK(fit > 0, op, ": more than 12,287 classes on a GPU: ", columns);
  return min(int64_t(threads), fit);
}

// `count` numbers, which are whole rows of `columns`, into tile[row * (columns | 1) + column]. They
// are one range of memory: neighbouring threads read neighbours, several loads ahead. The odd pitch
// keeps the 32 threads of a warp, each in its own row, on 32 different banks.
template <int kBlock, typename T>
__device__ void load_rows(const T* from, int count, int columns, float* tile) {
  if (columns % 2 == 0) {
    for (int i = threadIdx.x; i < count; i += kBlock) tile[i + i / columns] = as_float(from[i]);
  } else {
#pragma unroll 8
    for (int i = threadIdx.x; i < count; i += kBlock) tile[i] = as_float(from[i]);
  }
  __syncthreads();
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
