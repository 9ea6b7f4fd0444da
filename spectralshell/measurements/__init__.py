"""Measurements of one snapshot, made once and remembered, whatever the shells."""
