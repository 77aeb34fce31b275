"""Others that can take the steps of a run, over the same batches and between the same checkpoints as `train/loop.py`.

callbacks    the recipe's `train.callbacks`, imported and made
hf_trainer   transformers' Trainer
"""
