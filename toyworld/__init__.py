"""A procedurally drawn toy world with a tiny diffusion model trained on it and a judge that reads its pictures."""
