// The rate of fused multiply-adds that one core sustains: the floor under every fp32 kernel.
//
// Accumulators stay in registers and depend on nothing but themselves, so only the FMA units limit the loop.

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif
constexpr int kAccumulators = 12;  // latency 4 x 2 units = 8 in flight; more would spill with 16 registers

typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));

extern "C" int multiply_adds_per_step() { return kLanes * kAccumulators; }

extern "C" float multiply_add(long steps) {
  Vector sums[kAccumulators];
  for (int i = 0; i < kAccumulators; ++i) sums[i] = Vector{} + float(i);
  const Vector factor = Vector{} + 0.999f, offset = Vector{} + 1e-3f;
  for (long step = 0; step < steps; ++step)
    for (int i = 0; i < kAccumulators; ++i) sums[i] = sums[i] * factor + offset;
  float total = 0;
  for (int i = 0; i < kAccumulators; ++i)
    for (int lane = 0; lane < kLanes; ++lane) total += sums[i][lane];
  return total;
}
