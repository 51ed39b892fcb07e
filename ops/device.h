// What every .cu file needs of CUDA and torch, and under g++ of the emulator in CUDA's place.
//
// The torch headers are the stable ABI: they compile in 2 s instead of 20, with or without CUDA's
// own headers beside torch, and the library fits every torch from 2.11 on.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <tuple>

#include "iou.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#ifdef __CUDACC__
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>  // torch 2.11 does not include it elsewhere
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#define LAUNCH(kernel, grid, block, shared_bytes, stream) \
  kernel<<<grid, block, shared_bytes, stream>>>
#define DYNAMIC_SHARED(type, name)                             \
  extern __shared__ __align__(16) unsigned char name##_bytes[]; \
  type* name = reinterpret_cast<type*>(name##_bytes)
#define CHECK_LAUNCH() STD_CUDA_KERNEL_LAUNCH_CHECK()
#define DEVICE_KEY CUDA
using Stream = cudaStream_t;

// Makes the tensor's GPU the current one, and finds the stream that torch's next op there uses.
struct OnDeviceOf {
  torch::stable::accelerator::DeviceGuard guard;
  Stream stream = nullptr;
  explicit OnDeviceOf(const Tensor& x) : guard(x.get_device_index()) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &current));
    stream = static_cast<Stream>(current);
  }
};

constexpr int threads(int on_gpu, int) { return on_gpu; }
#else
#include "emulate.h"

#define CHECK_LAUNCH()
#define DEVICE_KEY CPU
using Stream = int;

struct OnDeviceOf {
  Stream stream = 0;
  explicit OnDeviceOf(const Tensor&) {}
};

// A barrier of CPU threads costs 3 us a thread: small blocks, unless a test wants the GPU's own.
#ifdef EMULATE_FULL_BLOCKS
constexpr int threads(int on_gpu, int) { return on_gpu; }
#else
constexpr int threads(int, int emulated) { return emulated; }
#endif
#endif

#ifndef OP_NAMESPACE  // a test loads the emulated kernels beside the CPU's, under another name
#define OP_NAMESPACE scratchdet
#endif

using Key = unsigned long long;  // 64 bits: a mask, or (value, ~index) packed for one comparison
constexpr unsigned kFullWarp = 0xffffffffu;

// The larger key has the larger value; at equal values, the lower index. value >= 0.
inline __device__ Key pack(float value, unsigned index) {
  return Key(__float_as_uint(value)) << 32 | unsigned(~index);
}
inline __device__ unsigned index_of(Key key) { return ~unsigned(key); }

// The largest key of the warp, in every lane: a few lines that replace 32 atomics by one. From
// sm_80 on (A100) one instruction finds the largest of 32 bits; before, five exchanges do it.
inline __device__ Key max_of_warp(Key key) {
#if defined(SCRATCHDET_EMULATE) || __CUDA_ARCH__ >= 800
  const unsigned upper = __reduce_max_sync(kFullWarp, unsigned(key >> 32));
  const unsigned lower = key >> 32 == upper ? unsigned(key) : 0;
  return Key(upper) << 32 | __reduce_max_sync(kFullWarp, lower);
#else
  for (int step = 16; step > 0; step /= 2) {
    const Key other = __shfl_xor_sync(kFullWarp, key, step);
    key = other > key ? other : key;
  }
  return key;
#endif
}

// A box that is not finite overlaps nothing, and so does an empty one: iou() needs no more rules.
inline __device__ Box finite_or_empty(Box box) {
  return is_finite(box) ? box : Box{0, 0, 0, 0};
}

inline __device__ float load(const void* data, int64_t i, ScalarType type) {
  switch (type) {
    case ScalarType::Half: return static_cast<const torch::headeronly::Half*>(data)[i];
    case ScalarType::BFloat16: return static_cast<const torch::headeronly::BFloat16*>(data)[i];
    case ScalarType::Double: return float(static_cast<const double*>(data)[i]);
    default: return static_cast<const float*>(data)[i];
  }
}

// IoU > threshold >= 0, with a division only where that is nearly so: a quotient of floats above the
// threshold means intersection >= threshold * union, for rounding keeps order.
inline __device__ bool exceeds(Box a, Box b, float threshold) {
  const float w = fminf(a.x2, b.x2) - fmaxf(a.x1, b.x1);
  const float h = fminf(a.y2, b.y2) - fmaxf(a.y1, b.y1);
  const float area_a = area(a), area_b = area(b), inter = fmaxf(w, 0.0f) * fmaxf(h, 0.0f);
  if (!(inter >= threshold * (area_a + area_b - inter))) return false;
  return iou(a, area_a, b, area_b) > threshold;
}

// IoU of two boxes of a list, or 0 where their groups differ.
inline __device__ float overlap(const Box* boxes, const int64_t* groups, int i, int j) {
  return groups[i] == groups[j] ? iou(boxes[i], area(boxes[i]), boxes[j], area(boxes[j])) : 0;
}

// Waits for the GPU.
inline Tensor on_host(const Tensor& x) {
  return torch::stable::to(x, torch::stable::Device(torch::headeronly::DeviceType::CPU));
}

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
