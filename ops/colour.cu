// ops.colour for CUDA: one launch a batch (reference.colour is the meaning).
//
//   images (N,3,H,W) bytes        a thread takes kEach pixels of an image, a whole block apart, so
//   R ................            that the lanes of a warp read neighbours and 3 x kEach loads are
//   G ................            on their way at once. The results meet in shared memory, where
//   B ................            they get the order of the network's input, and leave as one
//        -> (N,H,W,3)             contiguous range, 16 bytes a thread.
//
// PyTorch needs 83 launches for the same, and moves each byte through memory a hundred times.
#include "colour.h"
#include "device.h"

#include <string>
#include <vector>

namespace {

constexpr int kThreads = threads(256, 64);
constexpr int kEach = 4;  // pixels of a thread
constexpr int kPixels = kThreads * kEach;

struct Scale {
  float mean[3], std[3];  // of R, G, B
  bool divides;           // unless all of std are 1
  int r, b;               // where they go: 0 and 2, or 2 and 0
};

struct alignas(16) Chunk {
  unsigned words[4];
};

// The steps that change anything: all threads of a block take the same branches.
__device__ Pixel apply(const Jitter& j, Pixel p) {
  if (j.brightness != 0) p = brighten(p, j.brightness);
  if (j.first != 1) p = contrast(p, j.first);
  if (j.saturation != 1) p = saturate(p, j.saturation);
  if (j.hue != 0) p = shift_hue(p, j.hue);
  if (j.last != 1) p = contrast(p, j.last);
  return p;
}

// grid (N, ceil(H W / kPixels)), block = kPixels neighbours in one image
template <typename T>
__global__ void __launch_bounds__(kThreads)
    colour_kernel(const uint8_t* images, const int64_t* inside, const float* jitter, Scale scale,
                  int height, int width, T* out) {
  DYNAMIC_SHARED(T, tile);  // (kPixels,3)
  const int t = threadIdx.x, size = height * width, first = blockIdx.y * kPixels;
  const uint8_t* pixels = images + int64_t(blockIdx.x) * 3 * size;
  const int64_t* in = inside + int64_t(blockIdx.x) * 4;
  const auto within = [](int64_t x, int most) { return int(max(int64_t(0), min(int64_t(most), x))); };
  const int x0 = within(in[0], width), y0 = within(in[1], height);
  const int x1 = within(in[2], width), y1 = within(in[3], height);
  const Jitter j = jitter_of(jitter + int64_t(blockIdx.x) * 5);
  uint8_t byte[kEach][3];
  bool is_inside[kEach];
  int y = (first + t) / width, x = first + t - y * width;
  const int down = kThreads / width, right = kThreads % width;  // to the thread's next pixel
  for (int k = 0; k < kEach; ++k) {
    const int p = first + k * kThreads + t;
    is_inside[k] = x >= x0 && x < x1 && y >= y0 && y < y1;  // never past the last row
    for (int c = 0; c < 3; ++c) byte[k][c] = is_inside[k] ? pixels[c * int64_t(size) + p] : 0;
    x += right, y += down;
    if (x >= width) x -= width, ++y;
  }
  for (int k = 0; k < kEach; ++k) {
    Pixel p = apply(j, {float(byte[k][0]), float(byte[k][1]), float(byte[k][2])});
    p = {p.r - scale.mean[0], p.g - scale.mean[1], p.b - scale.mean[2]};
    if (scale.divides) p = {p.r / scale.std[0], p.g / scale.std[1], p.b / scale.std[2]};
    T* to = tile + (k * kThreads + t) * 3;
    to[scale.r] = T(is_inside[k] ? p.r : 0.0f);
    to[1] = T(is_inside[k] ? p.g : 0.0f);
    to[scale.b] = T(is_inside[k] ? p.b : 0.0f);
  }
  __syncthreads();
  T* to = out + (int64_t(blockIdx.x) * size + first) * 3;
  const int numbers = min(kPixels, size - first) * 3;
  constexpr int kPer = sizeof(Chunk) / sizeof(T);
  const int in_chunks = reinterpret_cast<uintptr_t>(to) % sizeof(Chunk) == 0 ? numbers / kPer : 0;
  for (int i = t; i < in_chunks; i += kThreads)
    reinterpret_cast<Chunk*>(to)[i] = reinterpret_cast<const Chunk*>(tile)[i];
  for (int i = in_chunks * kPer + t; i < numbers; i += kThreads) to[i] = tile[i];
}

Tensor colour(const Tensor& images, const Tensor& inside, const Tensor& jitter,
              std::vector<double> mean, std::vector<double> std, std::string channels,
              ScalarType dtype) {
  const OnDeviceOf device(images);
  const Tensor x = torch::stable::contiguous(images), in = torch::stable::contiguous(inside);
  const Tensor j = torch::stable::contiguous(jitter);
  const int64_t n = x.size(0), height = x.size(2), width = x.size(3);
  STD_TORCH_CHECK(x.size(1) == 3 && in.numel() == n * 4 && j.numel() == n * 5 && mean.size() == 3 &&
                      std.size() == 3 && height * width < INT32_MAX / 4,
                  "colour: images (N,3,H,W), inside (N,4), jitter (N,5), mean and std of 3 numbers");
  Tensor out = torch::stable::new_empty(x, {n, height, width, 3}, dtype);
  const bool bgr = channels == "bgr";
  const Scale scale = {{float(mean[0]), float(mean[1]), float(mean[2])},
                       {float(std[0]), float(std[1]), float(std[2])},
                       std[0] != 1 || std[1] != 1 || std[2] != 1,
                       bgr ? 2 : 0, bgr ? 0 : 2};
  const auto launch = [&](auto kernel, auto* to) {
    const dim3 grid(n, divide_up(height * width, kPixels));
    LAUNCH(kernel, grid, kThreads, kPixels * 3 * sizeof(*to), device.stream)(
        x.const_data_ptr<uint8_t>(), in.const_data_ptr<int64_t>(), j.const_data_ptr<float>(), scale,
        int(height), int(width), to);
    CHECK_LAUNCH();
  };
  using torch::headeronly::BFloat16, torch::headeronly::Half;
  void* data = out.mutable_data_ptr();
  if (out.numel() > 0) switch (dtype) {  // a grid of 0 blocks is an error
      case ScalarType::Float: launch(colour_kernel<float>, static_cast<float*>(data)); break;
      case ScalarType::Half: launch(colour_kernel<Half>, static_cast<Half*>(data)); break;
      case ScalarType::BFloat16: launch(colour_kernel<BFloat16>, static_cast<BFloat16*>(data)); break;
      default: STD_TORCH_CHECK(false, "colour: dtype must be float32, float16 or bfloat16");
    }
  // (N,H,W,3) seen as (N,3,H,W): that is channels_last.
  return torch::stable::transpose(torch::stable::transpose(out, 1, 3), 2, 3);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(OP_NAMESPACE, DEVICE_KEY, m) { m.impl("colour", TORCH_BOX(&colour)); }
