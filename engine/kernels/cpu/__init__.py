"""The attention kernels in C++, for CPUs."""
