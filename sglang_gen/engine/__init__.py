"""The native engine's sampling loop, guidance, attention kernels, compilation and CUDA graphs."""
