"""Inspection and modification of transformers models: families, sites, attention, masks, module replacement."""
