"""Fused operations. Each file holds one: the definition in plain torch, a memory-lean torch path, Triton kernels and one public function."""
