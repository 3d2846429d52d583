"""Training: the objective of autoregressive blank infilling, its data, and the stages from pre-training to RLHF."""
