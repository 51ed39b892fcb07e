// The one IoU formula and the one box decoding, for host and device.
//
// Every kernel includes this file, so CPU and CUDA agree to the last bit as long as the compiler
// does not fuse a multiply and an add: -ffp-contract=off for g++, --fmad=false for nvcc.
// ops/reference.py states the same in PyTorch.
#pragma once
#include <cmath>

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__ __forceinline__
#else
#define HOST_DEVICE inline
#endif

struct Box {  // xyxy, in units of the image
  float x1, y1, x2, y2;
};

// x - x is 0 for a finite number and NaN for an infinity or a NaN.
HOST_DEVICE bool is_finite(float x) { return x - x == 0.0f; }

// & and not &&: a GPU then loads all four numbers at once, not the next one after a yes.
HOST_DEVICE bool is_finite(Box b) {
  return is_finite(b.x1) & is_finite(b.y1) & is_finite(b.x2) & is_finite(b.y2);
}

HOST_DEVICE float area(Box b) { return (b.x2 - b.x1) * (b.y2 - b.y1); }

// IoU of two finite boxes. 0 unless the union is positive: so inverted and empty boxes, and boxes
// whose area overflows (union infinite or NaN), overlap nothing. Callers rule out boxes that are
// not finite. area_a + area_b - inter, in this order: bit-equal to torchvision's.
HOST_DEVICE float iou(Box a, float area_a, Box b, float area_b) {
  const float w = (a.x2 < b.x2 ? a.x2 : b.x2) - (a.x1 > b.x1 ? a.x1 : b.x1);
  const float h = (a.y2 < b.y2 ? a.y2 : b.y2) - (a.y1 > b.y1 ? a.y1 : b.y1);
  const float inter = (w > 0.0f ? w : 0.0f) * (h > 0.0f ? h : 0.0f);
  const float total = area_a + area_b - inter;
#if defined(__CUDA_ARCH__) || defined(SCRATCHDET_EMULATE)
  // Most pairs do not touch: a warp of such pairs skips the division, which is a third of a GPU's
  // instructions here. (It costs the CPU's vector loops a tenth.)
  if (!(inter > 0.0f)) return 0.0f;
#endif
  return total > 0.0f ? inter / total : 0.0f;
}

// Offsets on a prior (cx, cy, w, h) -> xyxy. Variances .1 (centre) and .2 (size); not clipped.
HOST_DEVICE Box decode(const float* loc, const float* prior) {
  const float cx = prior[0] + loc[0] * 0.1f * prior[2];
  const float cy = prior[1] + loc[1] * 0.1f * prior[3];
  const float w = prior[2] * expf(loc[2] * 0.2f);
  const float h = prior[3] * expf(loc[3] * 0.2f);
  return {cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2};
}
