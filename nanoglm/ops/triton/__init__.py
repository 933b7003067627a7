"""Triton kernels for CUDA and ROCm; imported when the first tensor lies on such a device."""
