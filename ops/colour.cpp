// colour on the CPU: a row of an image at a time, a step at a time, so that every loop runs over
// neighbours in the cache and becomes vector instructions. A step that changes nothing is skipped:
// evaluation pays for the mean and the layout alone. A thread takes rows.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <string>
#include <vector>

#include "colour.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Planes {  // of the pixels in work, one array a channel
  std::vector<float> r, g, b;
  explicit Planes(int64_t width) : r(width), g(width), b(width) {}
};

template <class Step>
void each(Planes& x, int64_t count, Step step) {
  float *r = x.r.data(), *g = x.g.data(), *b = x.b.data();
  for (int64_t i = 0; i < count; ++i) {
    const Pixel p = step(Pixel{r[i], g[i], b[i]});
    r[i] = p.r, g[i] = p.g, b[i] = p.b;
  }
}

void apply(const Jitter& j, Planes& x, int64_t count) {
  if (j.brightness != 0) each(x, count, [by = j.brightness](Pixel p) { return brighten(p, by); });
  if (j.first != 1) each(x, count, [by = j.first](Pixel p) { return contrast(p, by); });
  if (j.saturation != 1) each(x, count, [by = j.saturation](Pixel p) { return saturate(p, by); });
  if (j.hue != 0) each(x, count, [by = j.hue](Pixel p) { return shift_hue(p, by); });
  if (j.last != 1) each(x, count, [by = j.last](Pixel p) { return contrast(p, by); });
}

struct Image {
  const uint8_t* pixels;  // (3,H,W)
  int64_t height, width;
  int64_t x0, y0, x1, y1;  // what it covers, within the image
  Jitter jitter;
};

struct Scale {
  std::vector<float> mean, std;
  bool bgr;
};

// Row y of the network's input: (W,3).
template <typename T>
void write_row(const Image& image, int64_t y, const Scale& scale, Planes& x, T* out) {
  const bool is_beside = y < image.y0 || y >= image.y1;
  const int64_t begin = is_beside ? image.width : image.x0;
  const int64_t count = is_beside ? 0 : std::max<int64_t>(0, image.x1 - image.x0);
  std::fill(out, out + begin * 3, T(0.0f));
  std::fill(out + (begin + count) * 3, out + image.width * 3, T(0.0f));
  const uint8_t* from = image.pixels + y * image.width + begin;
  const int64_t size = image.height * image.width;
  std::copy_n(from, count, x.r.data());
  std::copy_n(from + size, count, x.g.data());
  std::copy_n(from + 2 * size, count, x.b.data());
  apply(image.jitter, x, count);
  const float *r = x.r.data(), *g = x.g.data(), *b = x.b.data();
  const float *first = scale.bgr ? b : r, *last = scale.bgr ? r : b;
  const float *mean = scale.mean.data(), *std = scale.std.data();
  const float mean0 = mean[2 * scale.bgr], mean2 = mean[2 - 2 * scale.bgr], mean1 = mean[1];
  const float std0 = std[2 * scale.bgr], std2 = std[2 - 2 * scale.bgr], std1 = std[1];
  T* to = out + begin * 3;
  for (int64_t i = 0; i < count; ++i) {
    to[3 * i] = T((first[i] - mean0) / std0);
    to[3 * i + 1] = T((g[i] - mean1) / std1);
    to[3 * i + 2] = T((last[i] - mean2) / std2);
  }
}

template <typename T>
void write_all(const uint8_t* images, const int64_t* inside, const float* jitter, int64_t n,
               int64_t height, int64_t width, const Scale& scale, T* out) {
  torch::stable::parallel_for(0, n * height, 16, [&](int64_t begin, int64_t end) {
    Planes work(width);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t i = row / height;
      const int64_t* in = inside + i * 4;
      const auto column = [&](int64_t x) { return std::clamp<int64_t>(x, 0, width); };
      const Image image = {images + i * 3 * height * width, height, width, column(in[0]), in[1],
                           column(in[2]), in[3], jitter_of(jitter + i * 5)};
      write_row(image, row % height, scale, work, out + row * width * 3);
    }
  });
}

Tensor colour_cpu(const Tensor& images, const Tensor& inside, const Tensor& jitter,
                  std::vector<double> mean, std::vector<double> std, std::string channels,
                  ScalarType dtype) {
  const Tensor x = torch::stable::contiguous(images), in = torch::stable::contiguous(inside);
  const Tensor j = torch::stable::contiguous(jitter);
  const int64_t n = x.size(0), height = x.size(2), width = x.size(3);
  STD_TORCH_CHECK(x.size(1) == 3 && in.numel() == n * 4 && j.numel() == n * 5 && mean.size() == 3 &&
                      std.size() == 3,
                  "colour: images (N,3,H,W), inside (N,4), jitter (N,5), mean and std of 3 numbers");
  Tensor out = torch::stable::empty({n, height, width, 3}, dtype);
  const Scale scale = {{mean.begin(), mean.end()}, {std.begin(), std.end()}, channels == "bgr"};
  const auto write = [&](auto* to) {
    write_all(x.const_data_ptr<uint8_t>(), in.const_data_ptr<int64_t>(), j.const_data_ptr<float>(),
              n, height, width, scale, to);
  };
  switch (dtype) {
    case ScalarType::Float: write(out.mutable_data_ptr<float>()); break;
    case ScalarType::Half:
      write(static_cast<torch::headeronly::Half*>(out.mutable_data_ptr()));
      break;
    case ScalarType::BFloat16:
      write(static_cast<torch::headeronly::BFloat16*>(out.mutable_data_ptr()));
      break;
    default: STD_TORCH_CHECK(false, "colour: dtype must be float32, float16 or bfloat16");
  }
  // (N,H,W,3) seen as (N,3,H,W): that is channels_last.
  return torch::stable::transpose(torch::stable::transpose(out, 1, 3), 2, 3);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(scratchdet, CPU, m) { m.impl("colour", TORCH_BOX(&colour_cpu)); }
