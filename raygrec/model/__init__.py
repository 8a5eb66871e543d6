"""Backbones, prompts and heads: the parts that the recipes are made of."""
