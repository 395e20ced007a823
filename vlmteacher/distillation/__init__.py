"""From a many-step video model to a few-step Reasoner: fine-tuning on a domain, and distillation."""
