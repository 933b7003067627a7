"""Training: text in, a GLM-5.2-shaped model out."""
