"""What looks at the recipe from outside: cost model, profiles, statistics, samples, benchmarks, PyTorch beside it."""
