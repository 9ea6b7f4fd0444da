"""Shift invariance of shell couplings, in residual networks and in plain ones.

The experiment of section 7 of "When Does Learning Renormalize?" on small networks, with seeds,
several batches, intervals and nulls.
"""
