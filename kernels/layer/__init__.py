"""The parts of a transformer block, each fused into its matmuls: residual stream, MLP, self attention."""
