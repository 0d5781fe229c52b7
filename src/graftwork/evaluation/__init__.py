"""Prediction, language modelling and cost measurement on a converted model."""
