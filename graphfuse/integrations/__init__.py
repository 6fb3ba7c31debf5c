"""graphfuse in the tools that own the training loop. Each module needs its tool installed, and nothing else needs it.

transformers    GraphfuseCallback, for transformers' Trainer and everything built on it: TRL, LLaMA-Factory
accelerate      enable(), so that accelerate and TrainingArguments take "graphfuse" for a backend's name
axolotl         GraphfusePlugin, for the `plugins:` of an axolotl configuration
"""
