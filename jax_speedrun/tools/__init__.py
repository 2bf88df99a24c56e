"""Tools that look at the recipe from outside: cost model, profiles, statistics, samples, benches, PyTorch beside it."""
