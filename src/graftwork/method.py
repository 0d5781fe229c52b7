"""Former place of `graftwork.grafting.method`; kept for one release."""

from graftwork.grafting.method import Change as Change
from graftwork.grafting.method import Method as Method
from graftwork.grafting.method import Paper as Paper
