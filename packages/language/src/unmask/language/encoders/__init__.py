"""Networks: any transformers language model, and what methods need of one."""
