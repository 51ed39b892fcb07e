// Softmax on the CPU, for loops that the compiler vectorises: LANES priors at a time, one a lane.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>

// exp(x) for x <= 0 to 1e-7 of its value, 0 below -87, in operations that vectorise:
// x = n ln 2 + r, exp(x) = 2^n exp(r) with |r| < .35 and eight terms of the series. NaN stays NaN.
// std::fma is one instruction where -march=native has it: half the time.
inline float exp_of_negative(float x) {
  const float shifted = std::fma(x, 1.44269504f, 12582912.0f);  // 1.5 * 2^23: n in the last bits
  const float n = shifted - 12582912.0f;
  const float r = std::fma(n, -1.42860677e-6f, std::fma(n, -0.693145752f, x));  // n ln 2, in two
  float sum = std::fma(1.0f / 5040, r, 1.0f / 720);
  sum = std::fma(sum, r, 1.0f / 120);
  sum = std::fma(sum, r, 1.0f / 24);
  sum = std::fma(sum, r, 1.0f / 6);
  sum = std::fma(sum, r, 0.5f);
  sum = std::fma(sum, r, 1.0f);
  sum = std::fma(sum, r, 1.0f);
  const uint32_t bits = std::bit_cast<uint32_t>(sum) + (std::bit_cast<uint32_t>(shifted) << 23);
  return x < -87.0f ? 0.0f : std::bit_cast<float>(bits) + (x - x);  // + NaN where x is NaN
}

// The rows of C logits of `lanes` priors, lane j's at logits + row_of(j) * C, turned into
// x[k * LANES + j]; and the largest of each. A short last block repeats its first prior.
template <int LANES, class RowOf>
void load_block(const float* logits, int64_t c, int lanes, RowOf row_of, float* x,
                float (&top)[LANES]) {
  for (int j = 0; j < LANES; ++j) {
    const float* row = logits + row_of(j < lanes ? j : 0) * c;
    for (int64_t k = 0; k < c; ++k) x[k * LANES + j] = row[k];
  }
  for (int j = 0; j < LANES; ++j) top[j] = x[j];
  for (int64_t k = 1; k < c; ++k)
    for (int j = 0; j < LANES; ++j) top[j] = x[k * LANES + j] > top[j] ? x[k * LANES + j] : top[j];
}
