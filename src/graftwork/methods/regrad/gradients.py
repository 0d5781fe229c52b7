"""Deprecated import path of `graftwork.methods.regrad.encoding.gradients`; kept for one release."""

from graftwork.methods.regrad.encoding.gradients import passage_gradients as passage_gradients
