"""Inspection and change of foreign models: families, sites, attention, masks, module replacement."""
