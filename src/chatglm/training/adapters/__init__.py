"""Fine-tuning of few parameters over a frozen base: LoRA, QLoRA, P-tuning v2; merging the result into the base.

Read in this order: settings, base, lora, prefix, costs, saving, merging.
"""
