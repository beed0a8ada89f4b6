"""Online self-distillation of multi-token blocks: data, regions, objective and trainer."""
