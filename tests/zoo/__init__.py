"""Every causal language model type of transformers, tiny and random: what is rewritten, what is not, and why."""
