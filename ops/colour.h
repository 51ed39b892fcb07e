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

HOST_DEVICE float to_byte(float x) {  // a whole number 0..255; halves go to the even one
  x = rintf(x);
  x = x < 0.0f ? 0.0f : x;
  return x > 255.0f ? 255.0f : x;
}

HOST_DEVICE Pixel brighten(Pixel p, float by) {
  return {to_byte(p.r + by), to_byte(p.g + by), to_byte(p.b + by)};
}

HOST_DEVICE Pixel contrast(Pixel p, float by) {
  return {to_byte(p.r * by), to_byte(p.g * by), to_byte(p.b * by)};
}

HOST_DEVICE float value_of(Pixel p) {
  const float most = p.r > p.g ? p.r : p.g;
  return most > p.b ? most : p.b;
}

HOST_DEVICE float chroma_of(Pixel p, float value) {
  const float least = p.r < p.g ? p.r : p.g;
  return value - (least < p.b ? least : p.b);
}

HOST_DEVICE Pixel saturate(Pixel p, float by) {
  const float value = value_of(p), chroma = chroma_of(p, value);
  const float most = value / (chroma < 1.0f ? 1.0f : chroma);  // then S is at its maximum
  const float factor = most < by ? most : by;
  return {rintf(value - (value - p.r) * factor), rintf(value - (value - p.g) * factor),
          rintf(value - (value - p.b) * factor)};
}

// One channel of hue h: how far from the lowest to the highest one.
HOST_DEVICE float share(float x) {
  x = x < 0.0f ? 0.0f : x;
  return x > 1.0f ? 1.0f : x;
}

HOST_DEVICE Pixel shift_hue(Pixel p, float by) {
  const float value = value_of(p), chroma = chroma_of(p, value), lowest = value - chroma;
  const bool is_r = value == p.r, is_g = value == p.g;
  float above = is_g ? p.b - p.r : p.r - p.g;  // one select a line: nested ones become branches,
  float third = is_g ? 2.0f : 4.0f;            // and a loop with branches is not vectorised
  above = is_r ? p.g - p.b : above;
  third = is_r ? 0.0f : third;
  float h = above / (chroma < 1.0f ? 1.0f : chroma) + third;
  h = h < 0.0f ? h + 6.0f : h;  // sixths of the circle
  h += by / 30.0f;
  h = h < 0.0f ? 0.0f : h;
  h = h >= 6.0f ? h - 6.0f : h;
  return {rintf(share(fabsf(h - 3.0f) - 1.0f) * chroma + lowest),
          rintf(share(2.0f - fabsf(h - 2.0f)) * chroma + lowest),
          rintf(share(2.0f - fabsf(h - 4.0f)) * chroma + lowest)};
}
