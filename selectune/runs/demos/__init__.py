"""The demos: a small pretrained model, tuned within minutes.

comparison    base, random mask, LoRA, ID3 and full fine-tuning side by side, on a classifier
before_after  a language model before, after and reverted: what it writes, and what it lost
"""
