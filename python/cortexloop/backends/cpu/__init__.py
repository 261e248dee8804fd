"""The fused C++ kernels, reached through `cortexloop._native`."""
