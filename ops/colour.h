// SSD's colour augmentation of one pixel, for host and device (reference.jitter_colour in PyTorch).
//
// The CPU's loops over rows and the GPU's threads share these lines, and there is no exponential in
// them: so both give the reference's bits, as long as no multiply and add are fused (see iou.h).
#pragma once
#include <cmath>
#include <cstdint>

#include "iou.h"

struct Pixel {
  float r, g, b;
};

struct Jitter {  // of one image: a row of `jitter`
  float brightness, first, saturation, hue, last;  // contrast before the others, or after them
};

HOST_DEVICE Jitter jitter_of(const float* row) {
  const float order = row[0], contrast = row[2];
  return {row[1], order == 0.0f ? contrast : 1.0f, row[3], row[4], order > 0.0f ? contrast : 1.0f};
}

// A GPU has one instruction for each of these two; a CPU's compiler makes one of the comparison, in
// loops, where it may not for fmaxf.
HOST_DEVICE float larger(float a, float b) {
#if defined(__CUDA_ARCH__)
  return fmaxf(a, b);
#else
  return a > b ? a : b;
#endif
}
HOST_DEVICE float smaller(float a, float b) {
#if defined(__CUDA_ARCH__)
  return fminf(a, b);
#else
  return a < b ? a : b;
#endif
}

// To the nearest whole number, halves to the even one. On a GPU, adding and subtracting 1.5 x 2^23,
// where floats are whole numbers, does so at eight times the speed: what is too large for that
// stays too large.
HOST_DEVICE float nearest(float x) {
#if defined(__CUDA_ARCH__) || defined(SCRATCHDET_EMULATE)
  return (x + 12582912.0f) - 12582912.0f;
#else
  return rintf(x);
#endif
}

HOST_DEVICE float to_byte(float x) { return smaller(larger(nearest(x), 0.0f), 255.0f); }

HOST_DEVICE Pixel brighten(Pixel p, float by) {
  return {to_byte(p.r + by), to_byte(p.g + by), to_byte(p.b + by)};
}

HOST_DEVICE Pixel contrast(Pixel p, float by) {
  return {to_byte(p.r * by), to_byte(p.g * by), to_byte(p.b * by)};
}

HOST_DEVICE float value_of(Pixel p) { return larger(larger(p.r, p.g), p.b); }

HOST_DEVICE float chroma_of(Pixel p, float value) {
  return value - smaller(smaller(p.r, p.g), p.b);
}

HOST_DEVICE Pixel saturate(Pixel p, float by) {
  const float value = value_of(p);
  float factor = by;
  if (by > 1.0f) {  // for all pixels of an image, or for none
    const float chroma = chroma_of(p, value);
    const float most = value / larger(chroma, 1.0f);  // >= 1: S is at its maximum then
    factor = smaller(most, by);
  }
  return {nearest(value - (value - p.r) * factor), nearest(value - (value - p.g) * factor),
          nearest(value - (value - p.b) * factor)};
}

// One channel of hue h: how far from the lowest to the highest one.
HOST_DEVICE float share(float x) { return smaller(larger(x, 0.0f), 1.0f); }

HOST_DEVICE Pixel shift_hue(Pixel p, float by) {
  const float value = value_of(p), chroma = chroma_of(p, value), lowest = value - chroma;
  const bool is_r = value == p.r, is_g = value == p.g;
  float above = is_g ? p.b - p.r : p.r - p.g;  // one select a line: nested ones become branches,
  float third = is_g ? 2.0f : 4.0f;            // and a loop with branches is not vectorised
  above = is_r ? p.g - p.b : above;
  third = is_r ? 0.0f : third;
  float h = above / larger(chroma, 1.0f) + third;
  h = h < 0.0f ? h + 6.0f : h;  // sixths of the circle
  h += by / 30.0f;
  h = larger(h, 0.0f);
  h = h >= 6.0f ? h - 6.0f : h;
  return {nearest(share(fabsf(h - 3.0f) - 1.0f) * chroma + lowest),
          nearest(share(2.0f - fabsf(h - 2.0f)) * chroma + lowest),
          nearest(share(2.0f - fabsf(h - 4.0f)) * chroma + lowest)};
}
