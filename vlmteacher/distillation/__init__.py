"""Training of Reasoners and surrogate decoders: fine-tuning on a domain, and distillation to a few steps."""
