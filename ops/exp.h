// The exponential of a softmax on the CPU, for the kernels whose loops the compiler vectorises.
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
