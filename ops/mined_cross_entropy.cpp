// mined_cross_entropy on the CPU: one pass over the logits. A thread takes whole images.
//
//   1. cross-entropies of 32 priors at a time, one a vector lane: no sum runs across lanes;
//   2. the negatives' border, by a histogram of the numbers' upper bits and a selection among those
//      in the border's bin and above;
//   3. zeros for what is below it.
// The gradient is softmax - one-hot in the few rows that counted, and zeros elsewhere.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <functional>
#include <vector>

#include "exp.h"
#include "iou.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
constexpr int LANES = 32;        // priors of one softmax block
constexpr int BIN_BITS = 12;     // of a float: its sign, which is 0, exponent and 3 bits more
constexpr uint64_t NONE = ~0ull;  // a border that no key reaches

// The hardest negative has the largest key; of equal ones, the lowest prior has it. What is not
// finite is as hard as can be.
uint32_t hardness(float cross_entropy) {
  return std::bit_cast<uint32_t>(is_finite(cross_entropy) ? cross_entropy : INFINITY);
}
uint64_t key(float cross_entropy, int64_t prior) {
  return (uint64_t)hardness(cross_entropy) << 32 | (uint32_t)~prior;
}

// One image: -log softmax(logits)[label] of every prior; NaN for a label that is no class.
void cross_entropies(const float* logits, const int64_t* labels, int64_t p, int64_t c, float* out) {
  std::vector<float> x(c * LANES);
  for (int64_t start = 0; start < p; start += LANES) {
    const int lanes = std::min<int64_t>(LANES, p - start);
    float top[LANES], sum[LANES] = {};
    load_block(logits, c, lanes, [&](int j) { return start + j; }, x.data(), top);
    for (int64_t k = 0; k < c; ++k)
      for (int j = 0; j < LANES; ++j) sum[j] += exp_of_negative(x[k * LANES + j] - top[j]);
    for (int j = 0; j < lanes; ++j) {
      const int64_t label = labels[start + j];
      const float own = 0 <= label && label < c ? x[label * LANES + j] : NAN;
      out[start + j] = std::log(sum[j]) - (own - top[j]);
    }
  }
}

// The least key of the `wanted` hardest negatives.
uint64_t border_of(const float* cross_entropy, const int64_t* labels, int64_t p, int64_t wanted,
                   std::vector<uint64_t>& keys) {
  if (wanted == 0) return NONE;
  const auto bin = [&](int64_t i) { return hardness(cross_entropy[i]) >> (32 - BIN_BITS); };
  int64_t lowest = 1 << BIN_BITS, found = 0;
  int32_t histogram[1 << BIN_BITS] = {};
  for (int64_t i = 0; i < p; ++i) histogram[bin(i)] += labels[i] <= 0;
  while (lowest > 0 && found < wanted) found += histogram[--lowest];
  if (found <= wanted) return (uint64_t)lowest << (64 - BIN_BITS);  // the whole bin
  keys.clear();
  for (int64_t i = 0; i < p; ++i)
    if (labels[i] <= 0 && bin(i) >= lowest) keys.push_back(key(cross_entropy[i], i));
  std::nth_element(keys.begin(), keys.begin() + wanted - 1, keys.end(), std::greater<>());
  return keys[wanted - 1];
}

Tensor floats(const Tensor& x) {
  return torch::stable::contiguous(torch::stable::to(x, ScalarType::Float));
}

Tensor mined_cross_entropy_cpu(const Tensor& logits, const Tensor& labels,
                               int64_t negatives_per_positive) {
  const Tensor x = floats(logits), y = torch::stable::contiguous(labels);
  const int64_t n = x.size(0), p = x.size(1), c = x.size(2);
  STD_TORCH_CHECK(y.numel() == n * p && c > 0 && p < (1LL << 31),
                  "mined_cross_entropy: logits (N,P,C) and labels (N,P) of one N and P");
  Tensor result = torch::stable::empty({n, p}, ScalarType::Float);
  const float* logit = x.const_data_ptr<float>();
  const int64_t* all_labels = y.const_data_ptr<int64_t>();
  float* out = result.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    std::vector<uint64_t> keys;
    for (int64_t image = begin; image < end; ++image) {
      const int64_t* label = all_labels + image * p;
      float* value = out + image * p;
      cross_entropies(logit + image * p * c, label, p, c, value);
      const int64_t positives = std::count_if(label, label + p, [](int64_t l) { return l > 0; });
      const int64_t wanted = std::min(negatives_per_positive, p) * positives;
      const uint64_t border = border_of(value, label, p, wanted, keys);
      for (int64_t i = 0; i < p; ++i) {  // written always: a masked store is slower
        const bool is_out = (label[i] <= 0) & (key(value[i], i) < border) & is_finite(value[i]);
        value[i] = is_out ? 0 : value[i];
      }
    }
  });
  return result;
}

Tensor backward_cpu(const Tensor& gradient, const Tensor& logits, const Tensor& labels,
                    const Tensor& cross_entropy) {
  const Tensor g = torch::stable::contiguous(gradient), x = floats(logits);
  const Tensor y = torch::stable::contiguous(labels), ce = torch::stable::contiguous(cross_entropy);
  const int64_t rows = y.numel(), c = x.size(2);
  STD_TORCH_CHECK(g.numel() == rows && ce.numel() == rows && x.numel() == rows * c,
                  "mined_cross_entropy_backward: inputs differ in N or P");
  Tensor result = torch::stable::empty({x.size(0), x.size(1), c}, ScalarType::Float);
  const float *outer = g.const_data_ptr<float>(), *logit = x.const_data_ptr<float>();
  const float* used = ce.const_data_ptr<float>();
  const int64_t* label = y.const_data_ptr<int64_t>();
  float* out = result.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, rows, 1024, [&](int64_t begin, int64_t end) {
    std::fill(out + begin * c, out + end * c, 0.0f);
    for (int64_t i = begin; i < end; ++i) {
      if (used[i] == 0.0f) continue;  // NaN is not 0
      const float* row = logit + i * c;
      const float top = *std::max_element(row, row + c);
      float sum = 0;
      for (int64_t k = 0; k < c; ++k) sum += out[i * c + k] = std::exp(row[k] - top);
      for (int64_t k = 0; k < c; ++k)
        out[i * c + k] = outer[i] * (out[i * c + k] / sum - (k == label[i]));
    }
  });
  return torch::stable::to(result, logits.scalar_type());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(scratchdet, CPU, m) {
  m.impl("mined_cross_entropy", TORCH_BOX(&mined_cross_entropy_cpu));
  m.impl("mined_cross_entropy_backward", TORCH_BOX(&backward_cpu));
}
