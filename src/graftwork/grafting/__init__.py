"""The method protocol, conversion and restoration, and what a converted model is."""
